//! Files that are there under their names only once they are whole.

use crate::encode::SnapshotEncoder;
use crate::error::WriteError;
use crate::output::{SparseOutput, write};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use tempfile::NamedTempFile;

/// How far it is written between two times that the disk is told to go to work on it: in bytes, holes included.
const FLUSH: u64 = 64 << 20;

/// A file that is being written, and has its name only once it is whole: a crash at any moment leaves what was there before, or it.
///
/// Dropping it leaves nothing. Neither does a crash, where the file system has files without names; where it has not, a file remains
/// whose name begins with a dot and ends with `.partial`.
pub struct SavedFile {
    file: Written,
    path: PathBuf,
}

enum Written {
    /// It has no name yet.
    Unnamed(File),
    Named(NamedTempFile),
}

impl SavedFile {
    /// An empty file that is to have this name. A symbolic link is followed. Only its owner may read it.
    ///
    /// # Errors
    /// If the folder takes no new files.
    pub fn create(path: &Path) -> io::Result<Self> {
        let path = match path.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
            found => found?,
        };
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match openat(CWD, folder(&path), flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(Self { file: Written::Unnamed(file.into()), path }),
            // What a file system says that has no such files (open(2)).
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => Self::named(path),
            Err(error) => Err(error.into()),
        }
    }

    /// One that has another name meanwhile.
    pub(crate) fn named(path: PathBuf) -> io::Result<Self> {
        let file = Written::Named(unfinished().tempfile_in(folder(&path))?);
        Ok(Self { file, path })
    }

    /// What is to be written.
    pub fn file(&self) -> &File {
        match &self.file {
            Written::Unnamed(file) => file,
            Written::Named(file) => file.as_file(),
        }
    }

    /// Writes all of a snapshot's file, as [`write()`] does, while the disk is at work on what was written before. Blocks.
    ///
    /// # Errors
    /// As [`write()`].
    pub fn write(
        &self,
        encoder: &mut SnapshotEncoder,
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<(), WriteError> {
        let file = self.file();
        std::thread::scope(|scope| {
            let (tell, told) = mpsc::sync_channel::<()>(1);
            // An error is told to one of those who ask for it, here or in `commit`.
            let flushing = scope.spawn(move || told.iter().try_for_each(|()| file.sync_data()));
            let mut flushed = 0;
            let written = write(encoder, &mut SparseOutput::new(file), |at, bytes| {
                if at - flushed >= FLUSH {
                    flushed = at;
                    // It is at work still if this fails.
                    let _ = tell.try_send(());
                }
                progress(at, bytes)
            });
            drop(tell);
            let flushed = flushing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            written.and(flushed.map_err(WriteError::Output))
        })
    }

    /// Has it on disk whole, then under its name in place of what was there, and that on disk as well. Blocks.
    ///
    /// # Errors
    /// If that fails; then what was there before is there still, unless only the folder could not be written out.
    pub fn commit(self) -> io::Result<()> {
        self.file().sync_all()?;
        let Self { file, path } = self;
        match file {
            Written::Unnamed(file) => {
                // A link replaces nothing, so it has another name first.
                let link = |to: &Path| link(&file, to);
                unfinished().make_in(folder(&path), link)?.persist(&path).map_err(|error| error.error)?;
            }
            Written::Named(file) => drop(file.persist(&path).map_err(|error| error.error)?),
        }
        File::open(folder(&path))?.sync_all()
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The name of what is not whole.
fn unfinished<'a, 'b>() -> tempfile::Builder<'a, 'b> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".").suffix(".partial");
    builder
}

/// Gives a file its first name (open(2), O_TMPFILE).
fn link(file: &File, to: &Path) -> io::Result<()> {
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, unnamed, CWD, to, AtFlags::SYMLINK_FOLLOW)?)
}
