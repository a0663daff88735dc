//! Guest memory as a debugger reads and writes it, by linear or guest physical addresses. The guest may run meanwhile.

use super::paging::{Unmapped, translate};
use processor::SystemRegisters;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// The smallest page: what lies in it is in one piece.
const PAGE_BYTES: u64 = 4096;

/// Why memory cannot be read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemoryAccessError {
    /// The linear address is not mapped.
    #[error(transparent)]
    Unmapped(#[from] Unmapped),
    /// The guest physical address is not one of memory.
    #[error("there is no memory at the guest physical address {address:#x}")]
    NoMemory {
        /// The address.
        address: u64,
    },
    /// There are no addresses beyond the last one.
    #[error("{bytes} bytes from {address:#x} on reach beyond the last address")]
    Beyond {
        /// The first address.
        address: u64,
        /// How many bytes.
        bytes: usize,
    },
}

/// How addresses are meant.
#[derive(Debug, Clone, Copy)]
pub(super) enum Space<'a> {
    /// Guest physical.
    Physical,
    /// Linear, as a VP with these registers sees them.
    Linear(&'a SystemRegisters),
}

/// Reads up to the first address that cannot be read. What was read comes with why it is not all.
pub(super) fn read(
    memory: &impl GuestMemoryBackend,
    space: Space<'_>,
    address: u64,
    length: usize,
) -> (Vec<u8>, Option<MemoryAccessError>) {
    let mut bytes = Vec::with_capacity(length);
    for piece in pieces(memory, space, address, length) {
        let (at, length) = match piece {
            Ok(piece) => piece,
            Err(error) => return (bytes, Some(error)),
        };
        let read_before = bytes.len();
        bytes.resize(read_before + length, 0);
        if memory.read_slice(&mut bytes[read_before..], GuestAddress(at)).is_err() {
            bytes.truncate(read_before);
            return (bytes, Some(MemoryAccessError::NoMemory { address: at }));
        }
    }
    (bytes, None)
}

/// Writes all of it, or nothing.
pub(super) fn write(
    memory: &impl GuestMemoryBackend,
    space: Space<'_>,
    address: u64,
    mut bytes: &[u8],
) -> Result<(), MemoryAccessError> {
    let pieces: Vec<_> = pieces(memory, space, address, bytes.len()).collect::<Result<_, _>>()?;
    for (at, length) in pieces {
        let (piece, rest) = bytes.split_at(length);
        let written = memory.write_slice(piece, GuestAddress(at));
        written.map_err(|_| MemoryAccessError::NoMemory { address: at })?;
        bytes = rest;
    }
    Ok(())
}

/// The range in pieces that are in memory and in one page each: where, and how long.
fn pieces<'a>(
    memory: &'a impl GuestMemoryBackend,
    space: Space<'a>,
    address: u64,
    length: usize,
) -> impl Iterator<Item = Result<(u64, usize), MemoryAccessError>> + 'a {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = match address.checked_add(done as u64) {
            Some(at) => at,
            None => return Some(Err(MemoryAccessError::Beyond { address, bytes: length })),
        };
        let in_page = usize::try_from(PAGE_BYTES - at % PAGE_BYTES).expect("no more than a page");
        let piece = in_page.min(length - done);
        done += piece;
        Some(locate(memory, space, at).and_then(|at| {
            let there = memory.check_range(GuestAddress(at), piece);
            there.then_some((at, piece)).ok_or(MemoryAccessError::NoMemory { address: at })
        }))
    })
}

fn locate(
    memory: &impl GuestMemoryBackend,
    space: Space<'_>,
    address: u64,
) -> Result<u64, MemoryAccessError> {
    match space {
        Space::Physical => Ok(address),
        Space::Linear(registers) => Ok(translate(memory, registers, address)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    const TWO_PAGES: usize = 0x2000;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), TWO_PAGES)]).unwrap()
    }

    /// One 4-level mapping: linear 0x40_0000 is the second page, and nothing else is mapped. The tables follow it.
    fn paged() -> (GuestMemoryMmap, SystemRegisters) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x6000)]).unwrap();
        let entries = [(0x2000, 0x3003_u64), (0x3000, 0x4003), (0x4010, 0x5003), (0x5000, 0x1003)];
        for (at, entry) in entries {
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let system = SystemRegisters {
            cr0: 1 << 31 | 1,
            cr3: 0x2000,
            cr4: 1 << 5,
            efer: 1 << 10,
            ..SystemRegisters::default()
        };
        (memory, system)
    }

    #[test]
    fn what_is_written_over_a_page_boundary_is_read() {
        let memory = memory();
        write(&memory, Space::Physical, 0xffe, b"word").unwrap();
        assert_eq!(read(&memory, Space::Physical, 0xffe, 4), (b"word".to_vec(), None));
    }

    #[test]
    fn a_read_ends_where_memory_does_and_a_write_does_nothing_then() {
        let memory = memory();
        let no_memory = MemoryAccessError::NoMemory { address: 0x2000 };
        write(&memory, Space::Physical, 0x1ffe, b"ab").unwrap();
        assert_eq!(read(&memory, Space::Physical, 0x1ffe, 4), (b"ab".to_vec(), Some(no_memory)));
        assert_eq!(write(&memory, Space::Physical, 0x1ffe, b"1234"), Err(no_memory));
        assert_eq!(read(&memory, Space::Physical, 0x1ffe, 2).0, b"ab");
    }

    #[test]
    fn nothing_is_beyond_the_last_address() {
        let (last, bytes) = (u64::MAX - 1, 4);
        let (read, error) = read(&memory(), Space::Physical, last, bytes);
        assert_eq!((read, error), (Vec::new(), Some(MemoryAccessError::NoMemory { address: last })));
        let (memory, system) = paged();
        // The last page of all addresses, mapped.
        for (at, entry) in [(0x2ff8, 0x3003_u64), (0x3ff8, 0x4003), (0x4ff8, 0x5003), (0x5ff8, 0x1003)] {
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let beyond = MemoryAccessError::Beyond { address: last, bytes };
        let (read, error) = super::read(&memory, Space::Linear(&system), last, bytes);
        assert_eq!((read.len(), error), (2, Some(beyond)));
        assert_eq!(write(&memory, Space::Linear(&system), last, b"over"), Err(beyond));
    }

    #[test]
    fn linear_addresses_go_through_the_tables() {
        let (memory, system) = paged();
        write(&memory, Space::Linear(&system), 0x40_0ffe, b"ok").unwrap();
        assert_eq!(read(&memory, Space::Physical, 0x1ffe, 2).0, b"ok");
        let (read, error) = read(&memory, Space::Linear(&system), 0x40_0ffe, 4);
        let next_page = Unmapped::NotPresent { address: 0x40_1000, level: 1, entry: 0x5008 };
        assert_eq!((&read[..], error), (&b"ok"[..], Some(next_page.into())));
        assert_eq!(write(&memory, Space::Linear(&system), 0x40_0ffe, b"none"), Err(next_page.into()));
    }

    #[test]
    fn nothing_is_read_of_nothing() {
        assert_eq!(read(&memory(), Space::Physical, u64::MAX, 0), (Vec::new(), None));
    }
}
