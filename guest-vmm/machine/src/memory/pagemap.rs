//! Which pages of a private mapping are the process's own copies.
//!
//! Source: Linux's documentation of `/proc/pid/pagemap`: bit 63 of a page's entry says that it is present, bit 62 that it is swapped
//! out, bit 61 that it is a file's page or a shared one. A page of a private mapping is a copy if it is there, or was swapped out, and
//! is not the file's. Pages of zeros that were only read in an anonymous mapping show as copies, too.

use super::mapping::Mapping;
use super::runs::Runs;
use crate::layout::PAGE_BYTES;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;
const ENTRY_BYTES: usize = size_of::<u64>();
/// How many pages are asked for at once.
const PAGES_AT_ONCE: u64 = 1 << 13;

/// This process's page map. It stays usable when `/proc` cannot be reached any more.
#[derive(Debug)]
pub(super) struct Pagemap(File);

impl Pagemap {
    pub(super) fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// The copies in a range of the mapping, which is whole pages. What is being written meanwhile may be among them or not.
    pub(super) fn copies(&self, mapping: &Mapping, range: Range<u64>) -> io::Result<Runs> {
        let mut copies = Runs::default();
        let mut entries = vec![0; usize::try_from(PAGES_AT_ONCE).expect("fits") * ENTRY_BYTES];
        let first = mapping.address() as u64;
        let mut at = range.start;
        while at < range.end {
            let pages = ((range.end - at) / PAGE_BYTES).min(PAGES_AT_ONCE);
            let entries = &mut entries[..usize::try_from(pages).expect("fits") * ENTRY_BYTES];
            self.0.read_exact_at(entries, (first + at) / PAGE_BYTES * ENTRY_BYTES as u64)?;
            for entry in entries.as_chunks::<ENTRY_BYTES>().0 {
                if is_copy(u64::from_le_bytes(*entry)) {
                    copies.push(at..at + PAGE_BYTES);
                }
                at += PAGE_BYTES;
            }
        }
        Ok(copies)
    }
}

fn is_copy(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & OF_A_FILE == 0
}
