//! Memory of its own: what it is made of, and what is refused.

use super::*;
use crate::layout::{self, PAGE_BYTES};
use devices::virtio::GuestRam;
use rustix::fs::{SealFlags, fcntl_add_seals, fstat};
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn memory(bytes: u64) -> GuestMemory {
    GuestMemory::new(bytes, MemoryOptions::default()).unwrap()
}

#[test]
fn discarded_pages_go_back_to_the_host_and_read_as_zeros() {
    let memory = memory(4 * MIB);
    memory.view().write_slice(&[7; 3 * 4096], GuestAddress(0x10_0000)).unwrap();
    let before = allocated_bytes(&memory);
    memory.discard(GuestAddress(0x10_1000), 4096).unwrap();
    assert_eq!(allocated_bytes(&memory), before - 4096);
    let byte = |at| memory.view().read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!([byte(0x10_0fff), byte(0x10_1000), byte(0x10_1fff), byte(0x10_2000)], [7, 0, 0, 7]);
    for (start, bytes) in
        [(0x800, 4096), (0, 100), (0, 0), (4 * MIB, 4096), (4 * MIB - 4096, 8192), (u64::MAX - 4095, 4096)]
    {
        assert!(memory.discard(GuestAddress(start), bytes).is_err(), "{bytes:#x} at {start:#x}");
    }
}

#[test]
fn a_region_for_later_is_memory_that_nobody_is_told_of() {
    let region = layout::hotplug_region(4 * MIB, 8 * MIB, 2 * MIB);
    let options = MemoryOptions { prefault: true, ..MemoryOptions::default() };
    let memory = GuestMemory::with_hotplug(4 * MIB, options, Some(region.clone())).unwrap();
    assert_eq!((memory.bytes(), memory.ranges()), (4 * MIB, vec![0..4 * MIB, region.clone()]));
    assert_eq!(allocated_bytes(&memory), 4 * MIB, "nothing of it is there before it is touched");
    let last = GuestAddress(region.end - 4096);
    memory.view().write_obj(7u8, last).unwrap();
    assert_eq!(allocated_bytes(&memory), 4 * MIB + 4096);
    memory.discard(last, 4096).unwrap();
    assert_eq!((allocated_bytes(&memory), memory.view().read_obj::<u8>(last).unwrap()), (4 * MIB, 0));
    memory.view().write_obj(7u8, last).unwrap();
    memory.zero().unwrap();
    assert_eq!(allocated_bytes(&memory), 4 * MIB);
}

fn allocated_bytes(memory: &GuestMemory) -> u64 {
    u64::try_from(fstat(memory.file()).unwrap().st_blocks).unwrap() * 512
}

#[test]
fn the_size_is_rounded_up_to_a_page() {
    assert_eq!(memory(MIB).bytes(), MIB);
    assert_eq!(memory(MIB + 1).bytes(), MIB + 4096);
}

#[test]
fn sizes_that_cannot_be_are_refused_with_both_numbers() {
    let error = GuestMemory::new(MIB - 1, MemoryOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "memory of 1048575 bytes is too small: 1048576 bytes are the least");
    for bytes in [host_memory_bytes() + 1, u64::MAX] {
        let error = GuestMemory::new(bytes, MemoryOptions::default()).unwrap_err();
        let host_bytes = host_memory_bytes();
        let text = format!("memory of {bytes} bytes is too large: the host has {host_bytes} bytes");
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn the_file_and_the_memory_are_the_same() {
    let memory = memory(8 * MIB);
    memory.view().write_slice(b"guest", GuestAddress(5 * MIB)).unwrap();
    let mut found = [0; 5];
    memory.file().read_exact_at(&mut found, 5 * MIB).unwrap();
    assert_eq!(&found, b"guest");
    assert_eq!(memory.host_address() % (2 << 20), 0);
    assert_eq!(memory.view().get_host_address(GuestAddress(0)).unwrap().addr(), memory.host_address());
}

#[test]
fn memory_above_the_hole_follows_in_the_file() {
    let memory = memory(3 * GIB + MIB);
    let view = memory.view();
    assert_eq!(view.num_regions(), 2);
    assert!(!view.address_in_range(GuestAddress(3 * GIB)));
    view.write_slice(b"high", GuestAddress(4 * GIB)).unwrap();
    let mut found = [0; 4];
    memory.file().read_exact_at(&mut found, 3 * GIB).unwrap();
    assert_eq!(&found, b"high");
    let shared = memory.share().unwrap();
    let high = shared.find_region(GuestAddress(4 * GIB)).unwrap();
    assert_eq!(high.file_offset().unwrap().start(), 3 * GIB);
    assert_eq!(high.len(), MIB);
}

#[test]
fn memory_is_allocated_when_touched_and_given_back_by_zeroing() {
    let memory = memory(64 * MIB);
    assert_eq!(allocated_bytes(&memory), 0);
    memory.view().write_slice(&[1], GuestAddress(32 * MIB)).unwrap();
    assert_ne!(allocated_bytes(&memory), 0);
    memory.zero().unwrap();
    assert_eq!(allocated_bytes(&memory), 0);
    assert_eq!(memory.view().read_obj::<u8>(GuestAddress(32 * MIB)).unwrap(), 0);
}

#[test]
fn prefaulted_memory_is_allocated_at_once_and_again_after_zeroing() {
    let options = MemoryOptions { prefault: true, ..MemoryOptions::default() };
    let memory = GuestMemory::new(4 * MIB, options).unwrap();
    assert_eq!(allocated_bytes(&memory), 4 * MIB);
    memory.zero().unwrap();
    assert_eq!(allocated_bytes(&memory), 4 * MIB);
}

/// Either outcome is right, depending on the host's pool; each has to be whole.
#[test]
fn huge_pages_are_there_or_named_in_the_error() {
    let options = MemoryOptions { huge_pages: true, ..MemoryOptions::default() };
    match GuestMemory::new(3 * MIB, options) {
        Ok(memory) => {
            assert_eq!(memory.bytes(), 4 * MIB);
            memory.view().write_slice(&[1], GuestAddress(3 * MIB)).unwrap();
            memory.zero().unwrap();
            assert_eq!(memory.view().read_obj::<u8>(GuestAddress(3 * MIB)).unwrap(), 0);
        }
        Err(error) => {
            let text = "the host has no 2 free huge pages of 2 MiB (vm.nr_hugepages)";
            assert_eq!(error.to_string(), text);
        }
    }
}

#[test]
fn locking_works_or_names_the_limit() {
    let options = MemoryOptions { lock: true, ..MemoryOptions::default() };
    match GuestMemory::new(2 * MIB, options) {
        Ok(memory) => assert_eq!(allocated_bytes(&memory), 2 * MIB),
        Err(error) => assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}"),
    }
}

#[test]
fn the_file_can_be_sealed_but_not_resized() {
    let memory = memory(MIB);
    assert!(memory.file().set_len(2 * MIB).is_err());
    assert!(memory.file().set_len(0).is_err());
    fcntl_add_seals(memory.file(), SealFlags::FUTURE_WRITE).unwrap();
}

/// How many mappings this process has of a memfd.
fn mappings(file: &File) -> usize {
    let inode = fstat(file).unwrap().st_ino.to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let of_it = |line: &&str| {
        let mut fields = line.split_ascii_whitespace().skip(4);
        fields.next() == Some(&inode) && line.contains("memfd:")
    };
    maps.lines().filter(of_it).count()
}

#[test]
fn a_view_that_outlives_the_memory_keeps_the_mapping() {
    let (kept, dropped) = (memory(MIB), memory(MIB));
    let (kept_file, dropped_file, view) = (kept.file(), dropped.file(), kept.view().clone());
    drop((kept, dropped));
    assert_eq!([mappings(&kept_file), mappings(&dropped_file)], [1, 0]);
    view.write_slice(b"still there", GuestAddress(0)).unwrap();
}

#[test]
fn a_view_for_another_process_keeps_the_mapping_too() {
    let memory = memory(MIB);
    let (file, view) = (memory.file(), memory.share().unwrap());
    drop(memory);
    assert_eq!(mappings(&file), 1);
    view.write_slice(b"still there", GuestAddress(0)).unwrap();
}

mod freezing;
mod images;
mod model;
