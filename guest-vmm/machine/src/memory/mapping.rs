//! A range of the VMM's addresses that belongs to one guest's memory, and what is mapped there.
//!
//! Offsets are bytes from the start of the range; ranges of them are whole pages where pages are meant.

// UNSAFETY: reserves an address range and maps files into it at chosen, aligned addresses, which no safe interface does.
#![expect(unsafe_code, reason = "mapping at a chosen address")]

use super::HUGE_PAGE_BYTES;
use crate::layout::PAGE_BYTES;
use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mlock, mmap, mmap_anonymous, mremap_fixed, munmap,
};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

/// Dropping it unmaps the range.
#[derive(Debug)]
pub(super) struct Mapping {
    base: *mut c_void,
    bytes: usize,
    kept: bool,
}

// SAFETY: the pointer is only used as an address; what lies there is accessed by volatile accesses and by the system alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves an aligned range in which nothing can be accessed yet.
    pub(super) fn reserve(bytes: usize) -> rustix::io::Result<Self> {
        let alignment = usize::try_from(HUGE_PAGE_BYTES).expect("fits");
        let padded = bytes.checked_add(alignment).ok_or(Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the system's choice takes nothing from anybody.
        let start = unsafe { mmap_anonymous(null_mut(), padded, ProtFlags::empty(), flags) }?;
        let before = start.align_offset(alignment);
        let base = start.wrapping_byte_add(before);
        // SAFETY: both ranges are parts of the mapping just made, on both sides of what is kept.
        unsafe {
            trim(start, before)?;
            trim(base.wrapping_byte_add(bytes), padded - before - bytes)?;
        }
        Ok(Self { base, bytes, kept: false })
    }

    /// The VMM's own address of its first byte.
    pub(super) fn address(&self) -> usize {
        self.base.addr()
    }

    /// From a byte on; the pointer is not to be used once the mapping is dropped.
    pub(super) fn pointer(&self, offset: u64) -> *mut u8 {
        let offset = usize::try_from(offset).ok().filter(|offset| *offset < self.bytes);
        self.base.cast::<u8>().wrapping_add(offset.expect("part of the mapping"))
    }

    /// Keeps the range mapped for the life of the process.
    pub(super) fn keep(&mut self) {
        self.kept = true;
    }

    pub(super) fn all(&self) -> Range<u64> {
        0..self.bytes as u64
    }

    /// Maps a file's first bytes over the whole range, shared with all who have the file.
    pub(super) fn map_shared(&self, file: &File, flags: MapFlags) -> rustix::io::Result<()> {
        self.map(file, &self.all(), flags | MapFlags::SHARED)
    }

    /// Maps a part of a file over the same part of the range, so that what is written stays here.
    pub(super) fn map_private(&self, file: &File, part: &Range<u64>) -> rustix::io::Result<()> {
        self.map(file, part, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }

    fn map(&self, file: &File, part: &Range<u64>, flags: MapFlags) -> rustix::io::Result<()> {
        let (start, bytes) = self.part(part);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the part belongs to `self`, and no reference into it exists: whoever uses it copies from and to it.
        unsafe { mmap(start, bytes, access, flags | MapFlags::FIXED, file, part.start) }?;
        Ok(())
    }

    /// Maps zeros that belong to no file over a part.
    pub(super) fn map_zeros(&self, part: &Range<u64>) -> rustix::io::Result<()> {
        let (start, bytes) = self.part(part);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: as in `map`.
        unsafe { mmap_anonymous(start, bytes, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        Ok(())
    }

    /// Puts the pages, which are a shared mapping of the file, aside, and maps the file privately in their place. Whoever is not
    /// stopped, as they should be, still finds memory at any moment. If it fails, nothing has changed.
    ///
    /// The pages are put aside with their page tables, because taking these down costs as much as the guest has pages.
    pub(super) fn set_aside(&self, file: &File) -> rustix::io::Result<Self> {
        let aside = Self::reserve(self.bytes)?;
        // What is mapped here meanwhile is the same file without page tables. Nobody else can be given these addresses.
        let flags = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
        // SAFETY: both ranges belong to this process's own mappings, and no reference into either exists.
        unsafe { mremap_fixed(self.base, self.bytes, self.bytes, flags, aside.base) }?;
        self.map_private(file, &self.all())?;
        Ok(aside)
    }

    /// Drops this process's page tables of a part, and its copies of pages with them: a private mapping shows again what it is of, a
    /// shared one what it showed before.
    pub(super) fn forget(&self, part: &Range<u64>) -> rustix::io::Result<()> {
        let (start, bytes) = self.part(part);
        // SAFETY: changes the contents of memory that only volatile accesses see.
        unsafe { madvise(start, bytes, Advice::LinuxDontNeed) }
    }

    /// Allocates every page of the first `bytes`, as far as that has not happened.
    pub(super) fn populate(&self, bytes: usize) -> rustix::io::Result<()> {
        // SAFETY: allocates pages of the range; their contents stay.
        unsafe { madvise(self.base, bytes.min(self.bytes), Advice::LinuxPopulateWrite) }
    }

    pub(super) fn lock(&self, bytes: usize) -> rustix::io::Result<()> {
        // SAFETY: locks pages of the range; their contents stay.
        unsafe { mlock(self.base, bytes.min(self.bytes)) }
    }

    /// Copies what is at an offset.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) {
        let slice = self.slice(&(offset..offset + bytes.len() as u64));
        slice.read_slice(bytes, 0).expect("as long as the part");
    }

    /// Writes zeros.
    pub(super) fn clear(&self, part: &Range<u64>) {
        let zeros = [0; 4096];
        let slice = self.slice(part);
        for at in (0..slice.len()).step_by(zeros.len()) {
            slice.write_slice(&zeros[..zeros.len().min(slice.len() - at)], at).expect("inside the part");
        }
    }

    /// Whether a page holds nothing but zeros.
    pub(super) fn is_zero(&self, page: u64) -> bool {
        let words = self.slice(&(page..page + PAGE_BYTES));
        let words = words.get_array_ref::<u64>(0, words.len() / size_of::<u64>()).expect("a page of words");
        (0..words.len()).all(|word| words.load(word) == 0)
    }

    /// Writes a part to the same part of a file.
    pub(super) fn copy_to(&self, file: &File, part: &Range<u64>) -> io::Result<()> {
        transfer(part, |at, bytes, offset| {
            // SAFETY: the bytes are mapped; the system copies them, whoever writes to them.
            unsafe { libc::pwrite(file.as_raw_fd(), self.pointer(at).cast(), bytes, offset) }
        })
    }

    /// Reads a part from the same part of a file.
    pub(super) fn copy_from(&self, file: &File, part: &Range<u64>) -> io::Result<()> {
        transfer(part, |at, bytes, offset| {
            // SAFETY: the bytes are mapped, and no reference to them exists.
            unsafe { libc::pread(file.as_raw_fd(), self.pointer(at).cast(), bytes, offset) }
        })
    }

    fn slice(&self, part: &Range<u64>) -> VolatileSlice<'_> {
        let (start, bytes) = self.part(part);
        // SAFETY: the bytes are mapped for as long as `self` is there, and only accessed like this.
        unsafe { VolatileSlice::new(start.cast(), bytes) }
    }

    fn part(&self, part: &Range<u64>) -> (*mut c_void, usize) {
        let whole = part.start <= part.end && part.end <= self.bytes as u64;
        assert!(whole, "{part:x?} is not part of a mapping of {:#x} bytes", self.bytes);
        let [start, end] = [part.start, part.end].map(|at| usize::try_from(at).expect("checked"));
        (self.base.wrapping_byte_add(start), end - start)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // SAFETY: the range belongs to `self`; who refers to it keeps `self`, or has it kept.
        if let Err(error) = unsafe { munmap(self.base, self.bytes) } {
            tracing::error!(%error, bytes = self.bytes, "cannot unmap guest memory");
        }
    }
}

/// Unmaps a range, which may be empty.
///
/// # Safety
///
/// Nobody may refer to the range.
unsafe fn trim(start: *mut c_void, bytes: usize) -> rustix::io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { munmap(start, bytes) }
}

/// Calls `some` with where, how many bytes at most and where in the file, until all of the part is transferred.
fn transfer(part: &Range<u64>, some: impl Fn(u64, usize, libc::off_t) -> libc::ssize_t) -> io::Result<()> {
    let mut at = part.start;
    while at < part.end {
        let left = usize::try_from(part.end - at).expect("part of a mapping");
        let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
        match u64::try_from(some(at, left, offset)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => at += done,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
