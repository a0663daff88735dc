//! Memory of a guest that consists of its driver alone.

use super::{Buffer, Segment};
use crate::virtio::GuestRam;
use rustix::fs::MemfdFlags;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// How much memory there is, from address 0.
pub const RAM_BYTES: u64 = 32 << 20;

/// Nothing is allocated below: a null address is somebody's mistake.
const FIRST: u64 = 0x1000;

/// Alignment of what is allocated: enough for every part of a queue, and for a disk's sector.
const ALIGNMENT: u64 = 512;

/// Memory, and what of it is in use.
#[derive(Debug)]
pub struct FakeRam {
    view: GuestMemoryMmap,
    /// Allocations: where each begins, and where it ends.
    used: Mutex<BTreeMap<u64, u64>>,
    discarded: Mutex<Vec<(u64, u64)>>,
}

impl FakeRam {
    pub(super) fn new() -> Self {
        let bytes = usize::try_from(RAM_BYTES).expect("fits");
        // A file, as a machine's memory is one: back ends in other processes map it.
        let file = rustix::fs::memfd_create("fake-ram", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&file, RAM_BYTES).expect("a memfd of this size");
        let file = FileOffset::new(file.into(), 0);
        let ranges = [(GuestAddress(0), bytes, Some(file))];
        let view = GuestMemoryMmap::from_ranges_with_files(ranges).expect("memory");
        Self { view, used: Mutex::default(), discarded: Mutex::default() }
    }

    fn used(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of so many bytes, a multiple of 512. Panics if there is no room.
    pub fn allocate(&self, bytes: u64) -> u64 {
        let mut used = self.used();
        let mut start = FIRST;
        for (&taken, &end) in &*used {
            if start + bytes <= taken {
                break;
            }
            start = end.next_multiple_of(ALIGNMENT);
        }
        assert!(start + bytes <= RAM_BYTES, "no room for {bytes} bytes");
        used.insert(start, start + bytes.max(1));
        start
    }

    /// Gives an allocation back.
    pub fn free(&self, address: u64) {
        self.used().remove(&address);
    }

    pub(super) fn forget_allocations(&self) {
        self.used().clear();
    }

    /// Writes bytes to memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.view.write_slice(bytes, GuestAddress(address)).expect("there is memory");
    }

    /// Reads bytes from memory.
    pub fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.view.read_slice(&mut data, GuestAddress(address)).expect("there is memory");
        data
    }

    /// The ranges that the device has given back to the host, as start and length.
    pub fn discarded(&self) -> Vec<(u64, u64)> {
        self.discarded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn place(&self, buffer: Buffer<'_>) -> Segment {
        match buffer {
            Buffer::Out(bytes) => {
                let length = u32::try_from(bytes.len()).expect("a buffer");
                let address = self.allocate(bytes.len() as u64);
                self.write(address, bytes);
                Segment { address, length, writable: false }
            }
            Buffer::In(length) => Segment { address: self.allocate(length.into()), length, writable: true },
        }
    }

    pub(super) fn take(&self, segments: &[Segment]) -> Vec<u8> {
        let mut data = Vec::new();
        for &Segment { address, length, writable } in segments {
            if writable {
                data.extend(self.read(address, usize::try_from(length).expect("fits")));
            }
            self.free(address);
        }
        data
    }

    pub(super) fn copy_from(&self, other: &Self) {
        self.write(0, &other.read(0, usize::try_from(RAM_BYTES).expect("fits")));
        *self.used() = other.used().clone();
    }
}

impl GuestRam for FakeRam {
    fn view(&self) -> &GuestMemoryMmap {
        &self.view
    }

    /// Zeroes the range, and notes it.
    fn discard(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        let zeros = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        self.view.write_slice(&zeros, start).map_err(io::Error::other)?;
        self.discarded.lock().unwrap_or_else(PoisonError::into_inner).push((start.0, bytes));
        Ok(())
    }

    fn share(&self) -> io::Result<GuestMemoryMmap> {
        Ok(self.view.clone())
    }
}
