//! The files that a guest is booted from and works with, opened with the user's own rights.

use crate::devices::OpenDevices;
use crate::ending::{Outcome, Trouble};
use crate::options::Run;
use rustix::fs::{MemfdFlags, SealFlags};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The open files of a guest.
pub struct Files {
    /// What it begins with.
    pub source: Source,
    /// What its devices are made of.
    pub devices: OpenDevices,
}

/// What a guest begins with.
pub enum Source {
    /// It is booted.
    Boot { kernel: File, initrd: Option<File> },
    /// It goes on from a snapshot's file, and what that is a layer of.
    Saved { file: File, base: Option<File> },
}

impl Files {
    /// Opens what was named; the built-in guest if no kernel and no snapshot was.
    pub fn open(run: &Run) -> Outcome<Self> {
        let given =
            |option: &str, path: &Option<PathBuf>| path.as_deref().map(|path| open(option, path)).transpose();
        let source = match given("--snapshot", &run.snapshot)? {
            Some(file) => Source::Saved { file, base: given("--snapshot-base", &run.snapshot_base)? },
            None => Source::Boot {
                kernel: given("--kernel", &run.kernel)?.map_or_else(builtin_guest, Ok)?,
                initrd: given("--initrd", &run.initrd)?,
            },
        };
        Ok(Self { source, devices: run.devices.open()? })
    }
}

fn open(option: &str, path: &Path) -> Outcome<File> {
    let unusable = |reason: String| Trouble::Usage(format!("{option} {}: {reason}", path.display()));
    let file = File::open(path).map_err(|error| unusable(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| unusable(error.to_string()))?;
    if metadata.is_file() { Ok(file) } else { Err(unusable("not a regular file".into())) }
}

/// The built-in guest as a file without a name.
pub fn builtin_guest() -> Outcome<File> {
    Ok(in_memory("built-in guest", builtin_guest::IMAGE)?)
}

/// A file that exists in memory only, sealed: a VMM uses it as it is, and copies any other.
pub fn in_memory(name: &str, contents: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create(name, flags)?);
    file.write_all(contents)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}
