//! Freezing: what becomes of the guest's memory, of the host's, and of those who have the same image.

use super::*;
use rustix::fs::{FallocateFlags, fallocate, fcntl_get_seals};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Weak;

fn frozen(memory: &GuestMemory) -> FrozenMemory {
    memory.freeze().unwrap().seal().unwrap()
}

fn restored(frozen: &FrozenMemory) -> GuestMemory {
    let FrozenMemory { image, bytes, hotplug, .. } = frozen;
    GuestMemory::restore(image, *bytes, MemoryOptions::default(), hotplug.clone()).unwrap()
}

fn put(memory: &GuestMemory, at: u64, value: u8) {
    memory.view().write_obj(value, GuestAddress(at)).unwrap();
}

fn get(memory: &GuestMemory, at: u64) -> u8 {
    memory.view().read_obj(GuestAddress(at)).unwrap()
}

fn in_file(file: &File, at: u64) -> u8 {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0]
}

/// Writes to one byte in each of so many pages, each beside one that is left alone.
fn touch(memory: &GuestMemory, pages: u64, value: u8) {
    (0..pages).for_each(|page| put(memory, page * 2 * PAGE_BYTES, value));
}

#[test]
fn the_first_freeze_copies_nothing_and_moves_nothing() {
    let memory = memory(8 * MIB);
    put(&memory, 5 * MIB, 1);
    let (address, file) = (memory.host_address(), memory.file());
    let frozen = memory.freeze().unwrap();
    put(&memory, 5 * MIB, 2);
    let frozen = frozen.seal().unwrap();
    assert_eq!((frozen.method, frozen.copied_bytes, frozen.bytes), (FreezeMethod::Remapped, 0, 8 * MIB));
    assert!(Arc::ptr_eq(frozen.image.base.file(), &file), "the memory itself is the image");
    assert_eq!((in_file(&file, 5 * MIB), get(&memory, 5 * MIB)), (1, 2));
    let view = memory.view().get_host_address(GuestAddress(0)).unwrap().addr();
    assert_eq!((memory.host_address(), view), (address, address));
    assert_eq!(mappings(&file), 1, "what was put aside is gone");
}

/// Whether this process has a page in its tables.
fn is_mapped(memory: &GuestMemory, at: u64) -> bool {
    let mut entry = [0; 8];
    let page = (memory.host_address() as u64 + at) / PAGE_BYTES;
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entry, page * 8).unwrap();
    u64::from_le_bytes(entry) >> 63 == 1
}

#[test]
fn a_prepared_freeze_finds_no_page_tables_and_all_contents() {
    let memory = memory(8 * MIB);
    let places = [0, 3 * MIB, 8 * MIB - PAGE_BYTES];
    places.iter().for_each(|&at| put(&memory, at, 1));
    memory.prepare_freeze().unwrap();
    assert!(!places.iter().any(|&at| is_mapped(&memory, at)));
    // The guest goes on meanwhile.
    put(&memory, 3 * MIB, 2);
    let image = frozen(&memory);
    assert_eq!(image.method, FreezeMethod::Remapped);
    for memory in [&memory, &restored(&image)] {
        assert_eq!(places.map(|at| get(memory, at)), [1, 2, 1]);
    }
}

#[test]
fn what_is_copied_is_not_prepared() {
    let memory = memory(8 * MIB);
    let first = frozen(&memory);
    put(&memory, MIB, 1);
    memory.prepare_freeze().unwrap();
    assert_eq!((get(&memory, MIB), is_mapped(&memory, MIB)), (1, true), "the guest's own copy");
    assert_eq!(get(&restored(&frozen(&memory)), MIB), 1);
    assert_eq!(get(&restored(&first), MIB), 0);
}

#[test]
fn what_is_frozen_cannot_be_written_by_anybody() {
    let memory = memory(2 * MIB);
    put(&memory, 0, 1);
    let first = frozen(&memory);
    put(&memory, 0, 2);
    let second = frozen(&memory);
    assert_eq!(second.method, FreezeMethod::Layered);
    for (part, ImageFile { file, .. }) in second.image.parts().chain(first.image.parts()) {
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        assert_eq!(fcntl_get_seals(file).unwrap(), seals, "{part}");
        assert!(file.write_at(b"x", 0).is_err(), "{part}");
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert!(fallocate(file, punch, 0, PAGE_BYTES).is_err(), "{part}");
        assert!(file.set_len(0).is_err(), "{part}");
    }
}

#[test]
fn a_later_freeze_copies_what_was_written_since_the_first() {
    let memory = memory(8 * MIB);
    touch(&memory, 512, 1);
    frozen(&memory);
    touch(&memory, 3, 2);
    let second = frozen(&memory);
    assert_eq!((second.method, second.copied_bytes), (FreezeMethod::Layered, 3 * PAGE_BYTES));
    touch(&memory, 5, 3);
    let third = frozen(&memory);
    assert_eq!(third.copied_bytes, 5 * PAGE_BYTES, "each layer has all that differs from the base");
    let bytes = |image: &GuestMemory| [0, 4, 8, 12].map(|page| get(image, page * PAGE_BYTES));
    assert_eq!(bytes(&restored(&second)), [2, 2, 1, 1]);
    assert_eq!(bytes(&restored(&third)), [3, 3, 3, 1]);
    assert_eq!(bytes(&memory), [3, 3, 3, 1]);
}

#[test]
fn a_restored_memorys_layer_has_the_pages_of_the_one_before() {
    let memory = memory(8 * MIB);
    touch(&memory, 100, 1);
    frozen(&memory);
    touch(&memory, 3, 2);
    let child = restored(&frozen(&memory));
    put(&child, 20 * PAGE_BYTES, 3);
    let frozen = frozen(&child);
    assert_eq!((frozen.method, frozen.copied_bytes), (FreezeMethod::Layered, 4 * PAGE_BYTES));
    let grandchild = restored(&frozen);
    assert_eq!([0, 4, 20, 22].map(|page| get(&grandchild, page * PAGE_BYTES)), [2, 2, 3, 1]);
}

#[test]
fn a_layer_over_half_of_memory_becomes_a_base() {
    let memory = memory(2 * MIB);
    put(&memory, 2 * MIB - 1, 1);
    let first = frozen(&memory);
    touch(&memory, 256, 2);
    assert_eq!(frozen(&memory).method, FreezeMethod::Layered, "half of it is not over half");
    put(&memory, PAGE_BYTES, 2);
    let base = frozen(&memory);
    // The last page was written before the first freeze alone.
    assert_eq!((base.method, base.copied_bytes), (FreezeMethod::Copied, 258 * PAGE_BYTES));
    assert!(base.image.layer.is_none());
    assert_eq!([0, PAGE_BYTES, 2 * MIB - 1].map(|at| get(&restored(&base), at)), [2, 2, 1]);
    put(&memory, 0, 3);
    let later = frozen(&memory);
    assert_eq!((later.method, later.copied_bytes), (FreezeMethod::Layered, PAGE_BYTES), "it is small again");
    assert_eq!(
        [&memory, &restored(&later), &restored(&base), &restored(&first)].map(|m| get(m, 0)),
        [3, 3, 2, 0]
    );
}

#[test]
fn parent_and_siblings_never_see_each_others_writes() {
    let parent = memory(4 * MIB);
    touch(&parent, 4, 1);
    let image = frozen(&parent);
    let children = [restored(&image), restored(&image)];
    for (value, guest) in (2..).zip(children.iter().chain([&parent])) {
        assert_eq!(get(guest, 0), 1);
        put(guest, 0, value);
    }
    assert_eq!(children.each_ref().map(|child| get(child, 0)), [2, 3]);
    assert_eq!((get(&parent, 0), in_file(image.image.base.file(), 0)), (4, 1));
}

#[test]
fn memory_above_the_hole_and_what_is_plugged_later_are_frozen_too() {
    let region = layout::hotplug_region(3 * GIB + MIB, 8 * MIB, 2 * MIB);
    let options = MemoryOptions::default();
    let memory = GuestMemory::with_hotplug(3 * GIB + MIB, options, Some(region.clone())).unwrap();
    let places = [0, 3 * GIB - 1, 4 * GIB, 4 * GIB + MIB - 1, region.start, region.end - 1];
    places.iter().for_each(|at| put(&memory, *at, 1));
    let first = frozen(&memory);
    places.iter().step_by(2).for_each(|at| put(&memory, *at, 2));
    let second = frozen(&memory);
    assert_eq!(second.hotplug, Some(region));
    assert_eq!(second.copied_bytes, 3 * PAGE_BYTES);
    assert_eq!(places.map(|at| get(&restored(&first), at)), [1; 6]);
    let child = restored(&second);
    assert_eq!(places.map(|at| get(&child, at)), [2, 1, 2, 1, 2, 1]);
    assert_eq!((child.ranges(), child.bytes()), (memory.ranges(), memory.bytes()));
}

/// What comes of a discard is the same, however it is done; see also the model.
#[test]
fn discarded_pages_of_an_image_are_zero_and_go_back_to_the_host() {
    let parent = memory(8 * MIB);
    parent.view().write_slice(&[7; 16 * 4096], GuestAddress(0)).unwrap();
    let image = frozen(&parent);
    for memory in [&parent, &restored(&image)] {
        memory.view().write_slice(&[8; 3 * 4096], GuestAddress(0)).unwrap();
        let copies = || {
            let pagemap = Pagemap::open().unwrap();
            pagemap.copies(&memory.mapping, memory.mapping.all()).unwrap().bytes()
        };
        assert_eq!(copies(), 3 * PAGE_BYTES);
        memory.discard(GuestAddress(PAGE_BYTES), 3 * PAGE_BYTES).unwrap();
        assert_eq!(copies(), PAGE_BYTES);
        let bytes = |memory: &GuestMemory| [0, 1, 2, 3, 4].map(|page| get(memory, page * PAGE_BYTES));
        let dump = {
            let mut bytes = vec![1; 5 * 4096 - 3];
            memory.read(1, &mut bytes).unwrap();
            [0, 1, 2, 3, 4].map(|page| bytes[page * 4096])
        };
        assert_eq!((bytes(memory), dump), ([8, 0, 0, 0, 7], [8, 0, 0, 0, 7]));
        assert_eq!(bytes(&restored(&frozen(memory))), [8, 0, 0, 0, 7]);
        put(memory, PAGE_BYTES, 9);
        memory.discard(GuestAddress(PAGE_BYTES), PAGE_BYTES).unwrap();
        assert_eq!(bytes(&restored(&frozen(memory))), [8, 0, 0, 0, 7]);
    }
    assert_eq!(get(&restored(&image), PAGE_BYTES), 7);
}

/// Discarding page by page must not use up the process's mappings.
#[test]
fn endless_discards_are_right_beyond_what_is_mapped_for_them() {
    const PAGES: u64 = 10_000;
    let parent = memory(2 * PAGES * PAGE_BYTES);
    touch(&parent, PAGES, 1);
    let image = frozen(&parent);
    (0..PAGES).for_each(|page| parent.discard(GuestAddress(page * 2 * PAGE_BYTES), PAGE_BYTES).unwrap());
    assert!(mappings(image.image.base.file()) <= 4097);
    let child = restored(&frozen(&parent));
    for memory in [&parent, &child] {
        assert!((0..PAGES).all(|page| get(memory, page * 2 * PAGE_BYTES) == 0));
    }
}

#[test]
fn reading_for_a_dump_touches_nothing() {
    let parent = memory(8 * MIB);
    touch(&parent, 2, 1);
    let image = frozen(&parent);
    let child = restored(&image);
    put(&child, 2 * PAGE_BYTES, 2);
    let allocated = || fstat(image.image.base.file()).unwrap().st_blocks;
    let before = allocated();
    let mut bytes = vec![9; 8 << 20];
    child.read(0, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[8192], bytes.iter().filter(|byte| **byte != 0).count()), (1, 2, 2));
    assert_eq!(allocated(), before);
    assert!(child.read(8 * MIB - 1, &mut [0; 2]).is_err());
    assert!(child.read(u64::MAX, &mut [0; 2]).is_err());
}

#[test]
fn zeroing_gives_back_the_image_and_the_memory_is_its_own_again() {
    for layered in [false, true] {
        let memory = memory(4 * MIB);
        touch(&memory, 4, 1);
        let mut image = frozen(&memory);
        if layered {
            touch(&memory, 2, 2);
            image = frozen(&memory);
        }
        memory.discard(GuestAddress(2 * PAGE_BYTES), PAGE_BYTES).unwrap();
        let files: Vec<Weak<File>> =
            image.image.parts().map(|(_, part)| Arc::downgrade(part.file())).collect();
        drop(image);
        let address = memory.host_address();
        memory.zero().unwrap();
        assert!(files.iter().all(|file| file.upgrade().is_none()), "the image is gone");
        assert_eq!((memory.is_private(), memory.host_address()), (false, address));
        assert_eq!(allocated_bytes(&memory), 0);
        assert!((0..4).all(|page| get(&memory, page * 2 * PAGE_BYTES) == 0));
        assert_eq!(mappings(&memory.file()), 1);
        put(&memory, MIB, 5);
        let next = frozen(&memory);
        assert_eq!((next.method, get(&restored(&next), MIB)), (FreezeMethod::Remapped, 5));
    }
}

#[test]
fn the_hosts_memory_lasts_as_long_as_a_guest_or_an_image_needs_it() {
    let parent = memory(4 * MIB);
    touch(&parent, 4, 1);
    let image = frozen(&parent);
    let file = Arc::downgrade(image.image.base.file());
    let child = restored(&image);
    drop((parent, image));
    assert_eq!(get(&child, 0), 1);
    drop(child);
    assert!(file.upgrade().is_none());
    let unsealed = memory(4 * MIB);
    let file = Arc::downgrade(&unsealed.file());
    let frozen = unsealed.freeze().unwrap();
    drop((unsealed, frozen));
    assert!(file.upgrade().is_none());
}

#[test]
fn a_freeze_that_is_given_up_leaves_memory_that_can_be_frozen() {
    let memory = memory(4 * MIB);
    put(&memory, 0, 1);
    let file = memory.file();
    drop(memory.freeze().unwrap());
    assert_eq!(mappings(&file), 1);
    put(&memory, 0, 2);
    let next = frozen(&memory);
    assert_eq!((get(&restored(&next), 0), in_file(&file, 0)), (2, 1));
}

/// The second is sealed first: its base still has the mapping that the first freeze has put aside.
#[test]
fn freezes_are_sealed_in_any_order() {
    let memory = memory(4 * MIB);
    put(&memory, 0, 1);
    let first = memory.freeze().unwrap();
    put(&memory, 0, 2);
    let second = memory.freeze().unwrap().seal().unwrap();
    let first = first.seal().unwrap();
    assert_eq!([&first, &second].map(|image| get(&restored(image), 0)), [1, 2]);
}

/// As the system has it for a moment, on a busy host for longer than it waits itself.
#[test]
fn memory_is_sealed_once_nobody_else_has_it_mapped() {
    let memory = memory(2 * MIB);
    put(&memory, 0, 1);
    let file = memory.file();
    let other = Mapping::reserve(2 << 20).unwrap();
    other.map_shared(&file, rustix::mm::MapFlags::NORESERVE).unwrap();
    let frozen = memory.freeze().unwrap();
    let sealing = std::thread::spawn(|| frozen.seal());
    // It is asked again and again: the first answers have been refusals.
    while mappings(&file) > 2 {
        std::thread::yield_now();
    }
    assert!(!sealing.is_finished());
    drop(other);
    assert_eq!(get(&restored(&sealing.join().unwrap().unwrap()), 0), 1);
}

#[test]
fn memory_that_somebody_else_has_mapped_is_not_sealed_and_its_guest_goes_on() {
    let memory = memory(2 * MIB);
    put(&memory, 0, 1);
    let file = memory.file();
    let other = Mapping::reserve(2 << 20).unwrap();
    other.map_shared(&file, rustix::mm::MapFlags::NORESERVE).unwrap();
    let error = memory.freeze().unwrap().seal().unwrap_err();
    assert!(matches!(error, FreezeError::Seal(_)), "{error}");
    put(&memory, 0, 2);
    assert_eq!((get(&memory, 0), in_file(&file, 0)), (2, 1));
    drop(other);
    assert_eq!(get(&restored(&frozen(&memory)), 0), 2, "a later one does");
}

#[test]
fn a_freeze_that_cannot_map_leaves_all_as_it_was() {
    let memory = memory(2 * MIB);
    put(&memory, 0, 1);
    let file = memory.file();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*file));
    let unmappable = File::options().read(true).custom_flags(libc::O_PATH).open(path).unwrap();
    assert!(memory.mapping.set_aside(&unmappable).is_err());
    put(&memory, MIB, 2);
    assert_eq!([0, MIB].map(|at| (get(&memory, at), in_file(&file, at))), [(1, 1), (2, 2)]);
    assert_eq!(mappings(&file), 1);
    assert_eq!(frozen(&memory).method, FreezeMethod::Remapped);
}

#[test]
fn memory_that_another_process_has_is_copied_and_stays_shared() {
    let memory = memory(4 * MIB);
    put(&memory, 0, 1);
    put(&memory, MIB, 0);
    let shared = memory.share().unwrap();
    let file = shared.iter().next().unwrap().file_offset().unwrap().arc().clone();
    let image = frozen(&memory);
    assert_eq!((image.method, image.copied_bytes), (FreezeMethod::Copied, PAGE_BYTES), "zeros are left out");
    put(&memory, 0, 2);
    file.write_at(&[3], 1).unwrap();
    assert_eq!((in_file(&file, 0), get(&memory, 1), get(&restored(&image), 0)), (2, 3, 1));
    memory.zero().unwrap();
    assert_eq!(in_file(&file, 0), 0, "it is the same file also after a reset");
    memory.remap(&image.image).unwrap();
    assert_eq!(in_file(&file, 0), 1, "and after another guest came into it");
}

#[test]
fn a_restored_guests_memory_can_be_shared_with_another_process() {
    let parent = memory(4 * MIB);
    touch(&parent, 3, 1);
    let child = restored(&frozen(&parent));
    put(&child, 0, 2);
    child.discard(GuestAddress(2 * PAGE_BYTES), PAGE_BYTES).unwrap();
    let address = child.host_address();
    let shared = child.share().unwrap();
    let file = shared.iter().next().unwrap().file_offset().unwrap().arc().clone();
    assert_eq!([0, 2, 4, 6].map(|page| in_file(&file, page * PAGE_BYTES)), [2, 0, 1, 0]);
    put(&child, 0, 3);
    assert_eq!((in_file(&file, 0), child.host_address(), child.is_private()), (3, address, false));
    assert_eq!(get(&parent, 0), 1);
    drop(shared);
}

/// Locked memory if the host allows, prefaulted memory anyway: both are there at once also when they are restored.
#[test]
fn memory_that_is_there_at_once_is_restored_as_such() {
    let parent = memory(4 * MIB);
    touch(&parent, 3, 1);
    frozen(&parent);
    touch(&parent, 2, 2);
    let image = frozen(&parent);
    let eager = [
        (MemoryOptions { prefault: true, ..MemoryOptions::default() }, FreezeMethod::Remapped),
        (MemoryOptions { lock: true, ..MemoryOptions::default() }, FreezeMethod::Copied),
        (MemoryOptions { huge_pages: true, ..MemoryOptions::default() }, FreezeMethod::Copied),
    ];
    for (options, method) in eager {
        let child = match GuestMemory::restore(&image.image, 4 * MIB, options, None) {
            Ok(child) => child,
            Err(RestoreMemoryError::Memory(MemoryError::Lock { .. })) if options.lock => continue,
            Err(RestoreMemoryError::Memory(MemoryError::NoHugePages { .. })) if options.huge_pages => {
                continue;
            }
            Err(error) => panic!("{options:?}: {error}"),
        };
        assert_eq!(allocated_bytes(&child), 4 * MIB);
        assert_eq!([0, 2, 4, 6].map(|page| get(&child, page * PAGE_BYTES)), [2, 2, 1, 0]);
        put(&child, 0, 3);
        let again = frozen(&child);
        assert_eq!(again.method, method, "{options:?}");
        assert_eq!([0, 2].map(|page| get(&restored(&again), page * PAGE_BYTES)), [3, 2]);
    }
}

#[test]
fn without_a_page_map_all_is_copied() {
    let mut memory = memory(2 * MIB);
    memory.pagemap = None;
    touch(&memory, 3, 1);
    frozen(&memory);
    put(&memory, 0, 2);
    let next = frozen(&memory);
    assert_eq!((next.method, next.copied_bytes), (FreezeMethod::Copied, 3 * PAGE_BYTES));
    assert_eq!([0, 2].map(|page| get(&restored(&next), page * PAGE_BYTES)), [2, 1]);
    let mut bytes = [9; 2];
    memory.read(PAGE_BYTES - 1, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 0]);
}
