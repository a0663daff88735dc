//! The state in which the first VP starts, with the descriptor and page tables that it needs (Intel SDM volume 3, 3.4.5 and 4.5).

use super::error::{LoadError, Occupant};
use super::kernel::Protocol;
use super::write;
use crate::layout;
use processor::{Registers, Segment, SystemRegisters, Table};
use vm_memory::GuestMemoryMmap;

/// The state in which the first VP starts. The others wait to be started by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InitialVpState {
    /// The general registers.
    pub registers: Registers,
    /// The segment and control registers.
    pub system_registers: SystemRegisters,
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS: u64 = 1 << 1;

/// Linux wants its code segment at 0x10 and its data segment at 0x18.
const CODE_32: Segment = Segment { base: 0, limit: u32::MAX, selector: 0x10, attributes: 0xc09b };
const CODE_64: Segment = Segment { base: 0, limit: u32::MAX, selector: 0x10, attributes: 0xa09b };
const DATA: Segment = Segment { base: 0, limit: u32::MAX, selector: 0x18, attributes: 0xc093 };
/// PVH wants a task segment of this limit; in long mode it takes two entries.
const TASK: Segment = Segment { base: 0, limit: 0x67, selector: 0x20, attributes: 0x008b };
/// As after a reset, with the null selector.
const LDT: Segment = Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x0082 };

const GDT_ENTRIES: usize = 6;
const _: () = assert!(GDT_ENTRIES as u64 * 8 == layout::GDT.end - layout::GDT.start);

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
/// One directory maps a gigabyte.
const DIRECTORIES: u64 = 4;
const _: () =
    assert!((2 + DIRECTORIES) * layout::PAGE_BYTES == layout::PAGE_TABLES.end - layout::PAGE_TABLES.start);

/// Writes the tables that a protocol needs and gives the registers that it wants.
pub(super) fn prepare(
    memory: &GuestMemoryMmap,
    protocol: Protocol,
    entry: u64,
) -> Result<InitialVpState, LoadError> {
    let code = if protocol == Protocol::Linux64 { CODE_64 } else { CODE_32 };
    write_numbers(memory, Occupant::Gdt, layout::GDT.start, &gdt(code))?;
    if protocol == Protocol::Linux64 {
        write_numbers(memory, Occupant::PageTables, layout::PAGE_TABLES.start, &page_tables())?;
    }
    Ok(InitialVpState {
        registers: registers(protocol, entry),
        system_registers: system_registers(protocol, code),
    })
}

fn registers(protocol: Protocol, entry: u64) -> Registers {
    let registers = Registers { rip: entry, rflags: RFLAGS, ..Registers::default() };
    match protocol {
        Protocol::Pvh => Registers { rbx: layout::PVH_START_INFO.start, ..registers },
        Protocol::Linux32 | Protocol::Linux64 => Registers { rsi: layout::ZERO_PAGE.start, ..registers },
    }
}

fn system_registers(protocol: Protocol, code: Segment) -> SystemRegisters {
    let limit = u16::try_from(GDT_ENTRIES * 8 - 1).expect("a small table");
    let flat = SystemRegisters {
        cs: code,
        ds: DATA,
        es: DATA,
        fs: DATA,
        gs: DATA,
        ss: DATA,
        tr: TASK,
        ldtr: LDT,
        gdtr: Table { base: layout::GDT.start, limit },
        cr0: CR0_PE | CR0_ET,
        ..SystemRegisters::default()
    };
    match protocol {
        Protocol::Pvh | Protocol::Linux32 => flat,
        Protocol::Linux64 => SystemRegisters {
            cr0: flat.cr0 | CR0_PG,
            cr3: layout::PAGE_TABLES.start,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            ..flat
        },
    }
}

fn gdt(code: Segment) -> [u64; GDT_ENTRIES] {
    let mut table = [0; GDT_ENTRIES];
    for segment in [code, DATA, TASK] {
        table[usize::from(segment.selector / 8)] = descriptor(segment);
    }
    table
}

/// The descriptor that loads a segment register with these values. The base is 0 in all of them.
fn descriptor(segment: Segment) -> u64 {
    let granular = segment.attributes & (1 << 15) != 0;
    let limit = u64::from(if granular { segment.limit >> 12 } else { segment.limit });
    (limit & 0xffff) | ((limit & 0xf_0000) << 32) | (u64::from(segment.attributes & 0xf0ff) << 40)
}

/// PML4, PDPT and directories that map the first 4 GiB to themselves.
fn page_tables() -> Vec<u64> {
    let (pdpt, directories) =
        (layout::PAGE_TABLES.start + layout::PAGE_BYTES, layout::PAGE_TABLES.start + 2 * layout::PAGE_BYTES);
    let pml4 = std::iter::once(pdpt | PAGE_PRESENT_WRITABLE);
    let pdpt = (0..DIRECTORIES).map(|n| (directories + n * layout::PAGE_BYTES) | PAGE_PRESENT_WRITABLE);
    let large =
        (0..DIRECTORIES * ENTRIES).map(|n| (n * LARGE_PAGE_BYTES) | PAGE_PRESENT_WRITABLE | PAGE_LARGE);
    table(pml4).chain(table(pdpt)).chain(large).collect()
}

/// One table's entries, those not given absent.
fn table(entries: impl Iterator<Item = u64>) -> impl Iterator<Item = u64> {
    entries.chain(std::iter::repeat(0)).take(usize::try_from(ENTRIES).expect("512"))
}

fn write_numbers(
    memory: &GuestMemoryMmap,
    what: Occupant,
    address: u64,
    numbers: &[u64],
) -> Result<(), LoadError> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    write(memory, what, address, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_say_what_the_registers_hold() {
        let expected = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0];
        assert_eq!(gdt(CODE_64), expected);
        assert_eq!(gdt(CODE_32)[2], 0x00cf_9b00_0000_ffff);
    }

    /// Walks the tables as the processor does.
    #[test]
    fn the_first_four_gigabytes_are_mapped_to_themselves() {
        let tables = page_tables();
        let entry = |table: u64, index: u64| {
            let entry = tables[usize::try_from((table - layout::PAGE_TABLES.start) / 8 + index).unwrap()];
            (entry & !0xfff, entry & 0xfff)
        };
        for address in (0..4 << 30).step_by(0x123_4567).chain([0, 0xfee0_0000, 0xffff_ffff]) {
            let (pdpt, flags) = entry(layout::PAGE_TABLES.start, address >> 39);
            assert_eq!(flags, 3);
            let (directory, flags) = entry(pdpt, address >> 30);
            assert_eq!(flags, 3);
            let (page, flags) = entry(directory, address >> 21 & 511);
            assert_eq!((page | (address & 0x1f_ffff), flags), (address, 0x83));
        }
        assert_eq!(tables.iter().filter(|entry| **entry != 0).count(), 1 + 4 + 2048);
    }
}
