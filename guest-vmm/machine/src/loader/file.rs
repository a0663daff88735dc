//! A kernel or initrd file, read at explicit offsets.

// UNSAFETY: reads a file into guest memory without a copy in between.
#![expect(unsafe_code, reason = "reading into guest memory directly")]

use super::error::{FileKind, LoadError};
use rustix::fs::{FileType, fstat};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// A file of known size, not empty.
#[derive(Clone, Copy)]
pub(super) struct ImageFile<'a> {
    kind: FileKind,
    file: &'a File,
    bytes: u64,
}

impl<'a> ImageFile<'a> {
    pub(super) fn open(kind: FileKind, file: &'a File) -> Result<Self, LoadError> {
        let read = |source: rustix::io::Errno| LoadError::Read {
            file: kind,
            offset: 0,
            bytes: 0,
            source: source.into(),
        };
        let stat = fstat(file).map_err(read)?;
        let found = FileType::from_raw_mode(stat.st_mode);
        if found != FileType::RegularFile {
            return Err(LoadError::NotRegular { file: kind, found: type_name(found) });
        }
        let bytes = u64::try_from(stat.st_size).expect("a regular file's size is not negative");
        if bytes == 0 {
            return Err(LoadError::Empty { file: kind });
        }
        Ok(Self { kind, file, bytes })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file's first bytes, as many as there are up to `limit`.
    pub(super) fn head(&self, limit: usize) -> Result<Vec<u8>, LoadError> {
        let length = usize::try_from(self.bytes).map_or(limit, |bytes| bytes.min(limit));
        self.read(0, length, "the beginning")
    }

    /// Bytes of the file. `what` names them if the file ends before they do.
    pub(super) fn read(&self, offset: u64, length: usize, what: &'static str) -> Result<Vec<u8>, LoadError> {
        self.check(offset, length as u64, what)?;
        let mut bytes = vec![0; length];
        let read = self.file.read_exact_at(&mut bytes, offset);
        read.map_err(|source| self.read_error(offset, length as u64, source))?;
        Ok(bytes)
    }

    /// Checks that the file holds a range.
    pub(super) fn check(&self, offset: u64, length: u64, what: &'static str) -> Result<(), LoadError> {
        let end = offset.saturating_add(length);
        if end <= self.bytes {
            return Ok(());
        }
        Err(LoadError::Truncated { file: self.kind, what, end, bytes: self.bytes })
    }

    /// Reads bytes of the file into guest memory.
    pub(super) fn read_into(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        address: u64,
        length: u64,
    ) -> Result<(), LoadError> {
        if length == 0 {
            return Ok(());
        }
        let failed = |source| self.read_error(offset, length, source);
        let count = usize::try_from(length).map_err(|e| failed(io::Error::other(e)))?;
        let slice = memory.get_slice(GuestAddress(address), count);
        let slice = slice.map_err(|e| failed(io::Error::other(e)))?;
        read_slice(self.file, offset, &slice).map_err(failed)
    }

    fn read_error(&self, offset: u64, bytes: u64, source: io::Error) -> LoadError {
        LoadError::Read { file: self.kind, offset, bytes, source }
    }
}

fn read_slice(file: &File, offset: u64, slice: &VolatileSlice<'_>) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let mut done = 0;
    while done < guard.len() {
        let position = libc::off_t::try_from(offset + done as u64).map_err(io::Error::other)?;
        let (to, left) = (guard.as_ptr().wrapping_add(done), guard.len() - done);
        // SAFETY: `to` and `left` are the rest of the slice, which is mapped and writable while the guard lives; nothing refers to
        // guest memory by reference.
        let read = unsafe { libc::pread(file.as_raw_fd(), to.cast(), left, position) };
        match usize::try_from(read) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(_) => interrupted()?,
        }
    }
    Ok(())
}

/// The last system call's error, unless it was only interrupted.
fn interrupted() -> io::Result<()> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

fn type_name(found: FileType) -> &'static str {
    match found {
        FileType::Directory => "a directory",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        _ => "a file of this type",
    }
}
