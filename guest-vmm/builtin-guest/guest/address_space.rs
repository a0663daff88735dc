//! Page tables: everything is mapped to itself in 2 MiB pages, for all VPs alike.
//!
//! A table is filled before it is linked, because a host that shadows page tables emulates every later write.

use core::ptr::{with_exposed_provenance_mut, write_volatile};

use crate::ram::PAGE;

const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
const PRESENT_WRITABLE_USER: u64 = 0x7;
const LARGE: u64 = 0x80;
/// One page of directory pointers: as far as this program can see, in bytes.
pub const REACH: u64 = 512 * GIB;

#[repr(align(4096))]
struct Table([u64; 512]);

static mut DIRECTORIES_TO_4_GIB: [Table; 3] = [const { Table([0; 512]) }; 3];

unsafe extern "C" {
    static mut page_directory_pointers: [u64; 512];
}

/// Maps the second to fourth GiB; `entry.s` has mapped the first.
pub fn map_first_4_gib() {
    let first = (&raw mut DIRECTORIES_TO_4_GIB).cast::<Table>();
    for gib in 1..4 {
        // SAFETY: three tables for three GiB; only the boot VP is here, and once.
        unsafe { map_gib(gib, first.add(gib - 1).cast()) }
    }
}

/// Whether an address is mapped.
pub fn is_mapped(address: u64) -> bool {
    // SAFETY: the index is checked; only the boot VP changes the table.
    address < REACH
        && unsafe { (&raw const page_directory_pointers).cast::<u64>().add((address / GIB) as usize).read() }
            != 0
}

/// Maps the GiB that holds `address`, with `page` (its address) as the table.
pub fn map_with(address: u64, page: u64) {
    debug_assert!(address < REACH && page.is_multiple_of(PAGE));
    // SAFETY: the caller gives a page of free RAM, and the address is within reach.
    unsafe { map_gib((address / GIB) as usize, with_exposed_provenance_mut(page as usize)) }
}

/// # Safety
/// `table` is a mapped page that nothing else uses, `gib` below 512.
unsafe fn map_gib(gib: usize, table: *mut u64) {
    for index in 0..512 {
        let page = gib as u64 * GIB + index as u64 * LARGE_PAGE;
        // SAFETY: the caller's table has 512 entries.
        unsafe { table.add(index).write(page | LARGE | PRESENT_WRITABLE_USER) }
    }
    let link = table.expose_provenance() as u64 | PRESENT_WRITABLE_USER;
    // SAFETY: the caller's index; the processor sees the entry after the table it leads to.
    unsafe { write_volatile((&raw mut page_directory_pointers).cast::<u64>().add(gib), link) }
}
