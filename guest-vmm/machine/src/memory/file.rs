//! Files that hold guest memory: memfds and what is sealed of them.

use super::runs::Runs;
use super::{MemoryError, MemoryOptions};
use crate::layout::PAGE_BYTES;
use rustix::fs::{
    MemfdFlags, SealFlags, SeekFrom, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create, seek,
};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

/// What a file's contents need to stay as they are.
pub(super) const UNCHANGING: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK);

/// How long the system may be busy with pages that are to be sealed, and how often it is asked.
const BUSY: Duration = Duration::from_secs(2);
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// A memfd of so many bytes, all zero. Its size never changes.
pub(super) fn create(bytes: u64, options: MemoryOptions) -> Result<File, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = if options.huge_pages {
        let flags = flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        memfd_create("guest-memory", flags).map_err(MemoryError::no_huge_pages(bytes))?
    } else {
        memfd_create("guest-memory", flags).map_err(MemoryError::system("memfd_create", bytes))?
    };
    set_size(&file, bytes).map_err(MemoryError::system("ftruncate", bytes))?;
    Ok(file.into())
}

/// A memfd for a copy, of so many bytes.
pub(super) fn create_copy(bytes: u64) -> io::Result<File> {
    let file = memfd_create("frozen-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    set_size(&file, bytes)?;
    Ok(file.into())
}

/// A file that shrinks would turn every access to it into SIGBUS, for whomever it is passed to.
fn set_size(file: &rustix::fd::OwnedFd, bytes: u64) -> rustix::io::Result<()> {
    ftruncate(file, bytes)?;
    fcntl_add_seals(file, SealFlags::SHRINK | SealFlags::GROW)
}

/// Makes sure that nobody can ever write to a memfd.
///
/// The system refuses with EBUSY while it has a page in hand itself: a guest's write that is being copied elsewhere, a page on its way
/// between its lists. It waits for a tenth of a second, in which a busy host may not run whoever has the page: this asks it again.
pub(super) fn seal(file: &File) -> io::Result<()> {
    if fcntl_get_seals(file)?.contains(UNCHANGING) {
        return Ok(());
    }
    let begun = Instant::now();
    loop {
        match fcntl_add_seals(file, UNCHANGING | SealFlags::GROW | SealFlags::SEAL) {
            Err(Errno::BUSY) if begun.elapsed() < BUSY => std::thread::sleep(BETWEEN_TRIES),
            sealed => return Ok(sealed?),
        }
    }
}

/// The pages of a part of a file that are not holes. The part is whole pages.
pub(super) fn data(file: &File, part: Range<u64>) -> io::Result<Runs> {
    let mut data = Runs::default();
    let mut at = part.start;
    while at < part.end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < part.end => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        // Blocks of a file system may be smaller than a page.
        at = seek(file, SeekFrom::Hole(start))?.next_multiple_of(PAGE_BYTES).min(part.end);
        data.push(start / PAGE_BYTES * PAGE_BYTES..at);
    }
    Ok(data)
}
