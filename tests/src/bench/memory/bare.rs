//! The bare system calls that freezing and restoring memory come down to.

// UNSAFETY: maps files at chosen addresses and writes there, which is what is measured.
#![expect(unsafe_code, reason = "mapping at a chosen address")]

use std::ffi::c_void;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap, mmap_anonymous, mremap_fixed, munmap};

pub(in crate::bench) const PAGE: usize = 4096;
const ALIGNMENT: usize = 2 << 20;
/// How many pages the page map is asked for at once.
const PAGES_AT_ONCE: usize = 1 << 16;

/// A memfd, mapped at an aligned address.
pub(in crate::bench) struct BareMemory {
    file: File,
    start: *mut c_void,
    bytes: usize,
    /// What was put aside.
    aside: Option<*mut c_void>,
}

impl BareMemory {
    /// Mapped shared, with every page written.
    pub(in crate::bench) fn touched(bytes: usize) -> anyhow::Result<Self> {
        let memory = Self::of(memfd(bytes)?, bytes, MapFlags::SHARED)?;
        memory.write(0..bytes / PAGE);
        Ok(memory)
    }

    /// This file, mapped privately.
    pub(in crate::bench) fn private(file: File, bytes: usize) -> anyhow::Result<Self> {
        Self::of(file, bytes, MapFlags::PRIVATE)
    }

    fn of(file: File, bytes: usize, flags: MapFlags) -> anyhow::Result<Self> {
        let start = reserve(bytes)?;
        map(start, bytes, &file, flags)?;
        Ok(Self { file, start, bytes, aside: None })
    }

    /// Writes to each of these pages.
    pub(in crate::bench) fn write(&self, pages: impl Iterator<Item = usize>) {
        for page in pages {
            // SAFETY: the page is part of the mapping, to which nobody else refers.
            unsafe { self.start.cast::<u8>().add(page * PAGE).write_volatile(1) };
        }
    }

    /// Moves the mapping aside and maps the file privately in its place.
    pub(in crate::bench) fn freeze(&mut self) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let aside = reserve(self.bytes)?;
        // SAFETY: both ranges are this memory's own, and nobody refers to them.
        unsafe { mremap_fixed(self.start, self.bytes, self.bytes, MremapFlags::MAYMOVE, aside) }?;
        map(self.start, self.bytes, &self.file, MapFlags::PRIVATE)?;
        let time = begin.elapsed();
        self.aside = Some(aside);
        Ok(time)
    }

    /// Unmaps what was put aside.
    pub(in crate::bench) fn unmap_aside(&mut self) {
        if let Some(aside) = self.aside.take() {
            // SAFETY: nobody refers to it.
            let _ = unsafe { munmap(aside, self.bytes) };
        }
    }

    /// Maps the file privately once more, at aligned addresses of its own, and unmaps it.
    pub(in crate::bench) fn restore(&self) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let start = reserve(self.bytes)?;
        map(start, self.bytes, &self.file, MapFlags::PRIVATE)?;
        let time = begin.elapsed();
        // SAFETY: nobody refers to it.
        unsafe { munmap(start, self.bytes) }?;
        Ok(time)
    }

    /// Finds the pages that were written since the freeze, and copies them to a new memfd.
    pub(in crate::bench) fn copy_written(&self, pagemap: &File) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let layer = memfd(self.bytes)?;
        let mut entries = vec![0; PAGES_AT_ONCE * 8];
        for first in (0..self.bytes / PAGE).step_by(PAGES_AT_ONCE) {
            let count = PAGES_AT_ONCE.min(self.bytes / PAGE - first);
            let entries = &mut entries[..count * 8];
            pagemap.read_exact_at(entries, ((self.start.addr() / PAGE + first) * 8) as u64)?;
            for (page, entry) in (first..).zip(entries.as_chunks::<8>().0) {
                let bits = u64::from_le_bytes(*entry) >> 61;
                if bits & 0b110 != 0 && bits & 1 == 0 {
                    // SAFETY: the page is part of the mapping, and nobody writes to it.
                    let bytes =
                        unsafe { std::slice::from_raw_parts(self.start.cast::<u8>().add(page * PAGE), PAGE) };
                    layer.write_all_at(bytes, (page * PAGE) as u64)?;
                }
            }
        }
        Ok(begin.elapsed())
    }
}

impl Drop for BareMemory {
    fn drop(&mut self) {
        self.unmap_aside();
        // SAFETY: nobody refers to it.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

fn memfd(bytes: usize) -> anyhow::Result<File> {
    let file = memfd_create("bare", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, bytes as u64)?;
    Ok(file.into())
}

/// Addresses that begin at a multiple of 2 MiB.
fn reserve(bytes: usize) -> anyhow::Result<*mut c_void> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping takes nothing from anybody.
    let start = unsafe { mmap_anonymous(null_mut(), bytes + ALIGNMENT, ProtFlags::empty(), flags) }?;
    let before = start.align_offset(ALIGNMENT);
    let aligned = start.wrapping_byte_add(before);
    // SAFETY: what lies before and behind what is kept.
    unsafe {
        if before > 0 {
            munmap(start, before)?;
        }
        munmap(aligned.wrapping_byte_add(bytes), ALIGNMENT - before)?;
    }
    Ok(aligned)
}

fn map(start: *mut c_void, bytes: usize, file: &File, flags: MapFlags) -> anyhow::Result<()> {
    let flags = flags | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the range was reserved for this.
    unsafe { mmap(start, bytes, ProtFlags::READ | ProtFlags::WRITE, flags, file, 0) }?;
    Ok(())
}
