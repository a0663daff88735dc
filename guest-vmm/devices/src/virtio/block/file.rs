//! A disk's image as an open file: what may be done with it, and its lock.

use super::disk::DiskSize;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FileType, OFlags, SeekFrom};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Why an open file cannot be a disk's image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is a directory, a socket, a pipe.
    #[error("it is neither a regular file nor a block device but {0:?}")]
    Kind(FileType),
    /// It was not opened for what is to be done with it.
    #[error("it was opened {opened}, and has to be {needed}")]
    Access {
        /// How it was opened.
        opened: &'static str,
        /// How it has to be.
        needed: &'static str,
    },
    /// Somebody else has it.
    #[error("it is in use: another process or guest holds {0}")]
    Locked(&'static str),
    /// There is not one sector in it.
    #[error("its {0} bytes are less than a sector of 512")]
    Empty(u64),
    /// It is no image in the qcow2 format, or none that can be used.
    #[error("it is no qcow2 image that can be used: {0}")]
    Qcow2(String),
    /// The host's io_uring cannot be used.
    #[error(
        "io_uring, which block devices need, cannot be set up (Linux 5.19 or newer, with sysctl kernel.io_uring_disabled = 0 and no \
         filter that refuses io_uring_setup)"
    )]
    NoUring(#[source] io::Error),
    /// The host does not say what it is.
    #[error("the host does not tell what it is")]
    Host(#[from] io::Error),
}

impl From<rustix::io::Errno> for ImageError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Host(error.into())
    }
}

/// An open regular file or block device, locked for as long as it is kept: by any number of readers or by one writer.
///
/// The lock is an open file description's (F_OFD_SETLK, fcntl_locking(2)): guests that were given duplicates of one descriptor share
/// it. It is advice, which whoever ignores locks ignores.
#[derive(Debug)]
pub struct ImageFile(OwnedFd);

impl ImageFile {
    /// Checks and locks a file: for writing, or for reading alone.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn lock(file: OwnedFd, writable: bool) -> Result<Self, ImageError> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            return Err(ImageError::Kind(kind));
        }
        check_access(&file, writable)?;
        set_lock(&file, writable)?;
        let image = Self(file);
        match image.bytes()? {
            bytes @ 0..512 => Err(ImageError::Empty(bytes)),
            _ => Ok(image),
        }
    }

    /// The block that the host writes without reading around it, in bytes.
    pub(super) fn physical_block_bytes(&self) -> u32 {
        let stat = rustix::fs::fstat(&self.0).ok();
        let block = stat.and_then(|stat| u32::try_from(stat.st_blksize).ok()).unwrap_or(512);
        if block.is_power_of_two() { block.clamp(512, 64 << 10) } else { 512 }
    }
}

fn check_access(file: &OwnedFd, writable: bool) -> Result<(), ImageError> {
    let opened = match rustix::fs::fcntl_getfl(file)? & OFlags::ACCMODE {
        OFlags::RDWR => return Ok(()),
        OFlags::WRONLY => "for writing alone",
        flags if flags.contains(OFlags::PATH) => "as a path alone",
        _ if !writable => return Ok(()),
        _ => "for reading alone",
    };
    let needed = if writable { "for reading and writing" } else { "for reading" };
    Err(ImageError::Access { opened, needed })
}

fn set_lock(file: &OwnedFd, writable: bool) -> Result<(), ImageError> {
    let kind = if writable { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock = libc::flock {
        l_type: libc::c_short::try_from(kind).expect("a small number"),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Err(Errno::EAGAIN | Errno::EACCES) => {
            Err(ImageError::Locked(if writable { "a lock on it" } else { "it for writing" }))
        }
        // A file system without locks has none to respect.
        Ok(_) | Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

impl DiskSize for ImageFile {
    fn bytes(&self) -> io::Result<u64> {
        // Of a block device, stat tells no size.
        Ok(rustix::fs::seek(&self.0, SeekFrom::End(0))?)
    }
}

impl AsFd for ImageFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// io_uring is told of files by number.
impl AsRawFd for ImageFile {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    fn open(file: &tempfile::NamedTempFile, write: bool) -> OwnedFd {
        OpenOptions::new().read(true).write(write).open(file.path()).expect("there").into()
    }

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(bytes).expect("set");
        file
    }

    #[test]
    fn one_writes_or_many_read() {
        let file = image(4096);
        let refused =
            |writable| ImageFile::lock(open(&file, writable), writable).expect_err("taken").to_string();
        let writer = ImageFile::lock(open(&file, true), true).expect("free");
        assert_eq!(refused(true), "it is in use: another process or guest holds a lock on it");
        assert_eq!(refused(false), "it is in use: another process or guest holds it for writing");
        drop(writer);
        let readers = [(); 2].map(|()| ImageFile::lock(open(&file, false), false).expect("free"));
        assert_eq!(refused(true), "it is in use: another process or guest holds a lock on it");
        drop(readers);
        ImageFile::lock(open(&file, true), true).expect("free");
    }

    #[test]
    fn what_is_no_image_says_why() {
        let refused =
            |file: OwnedFd, writable| ImageFile::lock(file, writable).expect_err("none").to_string();
        let file = image(511);
        assert_eq!(refused(open(&file, false), false), "its 511 bytes are less than a sector of 512");
        assert_eq!(
            refused(open(&file, false), true),
            "it was opened for reading alone, and has to be for reading and writing"
        );
        let written = OpenOptions::new().write(true).open(file.path()).expect("there");
        assert_eq!(
            refused(written.into(), false),
            "it was opened for writing alone, and has to be for reading"
        );
        let directory = std::fs::File::open("/").expect("there").into();
        let problem = "it is neither a regular file nor a block device but Directory";
        assert_eq!(refused(directory, false), problem);
    }
}
