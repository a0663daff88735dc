//! Snapshots' files that guests go on from: obtained from the client, checked, and made what a machine is built with.
//!
//! A descriptor is used as it is, and its memory read as the guest touches it: nobody checks that then, and whoever can write to the
//! file can change the guest. What a `File` has is copied, and checked whole. Kernel and initrd are copied in either case, so that a
//! reset boots what was checked.

use crate::config::{Source, regular_file};
use crate::files::{self, SEALED};
use crate::snapshot::{OpenSnapshot, decoded};
use guest_schema::{ConfigFault, Failure, FileSource, GuestError, SavedSource, chain};
use guest_snapshot_file::{OpenError, Part, SnapshotFile, SnapshotState};
use guest_transport::Descriptors;
use machine::memory::{ImageFile, MemoryImage};
use rustix::fs::{OFlags, fcntl_add_seals, fcntl_get_seals, fcntl_getfl};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

const FILE: &str = "source.saved.file";
const BASE: &str = "source.saved.base";

/// A snapshot's file, and the one that it is a layer of.
pub(crate) struct SavedFiles {
    file: Source,
    base: Option<Source>,
}

impl SavedFiles {
    /// Takes them from the channel on which they came; `None` with a fault if there are none.
    pub fn take(
        source: &SavedSource,
        descriptors: &Descriptors,
        faults: &mut Vec<ConfigFault>,
    ) -> Option<Self> {
        let mut take = |source: &Option<FileSource>, field: &str| {
            let taken = match source {
                None => None,
                Some(FileSource::File(file)) => Some(Ok(Source::File(file.clone()))),
                Some(FileSource::Descriptor(number)) => Some(unwritable(descriptors, *number)),
            };
            let taken = taken.map(|taken| taken.map_err(|problem| ConfigFault::new(field, problem)));
            taken.transpose().unwrap_or_else(|fault| {
                faults.push(fault);
                None
            })
        };
        let (file, base) = (take(&source.file, FILE), take(&source.base, BASE));
        if source.file.is_none() {
            faults.push(ConfigFault::new(FILE, "none was given"));
        }
        Some(Self { file: file?, base })
    }

    /// Opens them. Waits for the client's `File`s, each answer of which has a deadline; what blocks is done on the blocking pool, which
    /// lets go of the files when this is dropped.
    ///
    /// # Errors
    /// `badConfig` for what cannot be had or does not belong together; `snapshotCorrupt`, `snapshotIncompatible`.
    pub async fn open(self, host_bytes: u64) -> Result<OpenSnapshot, Failure> {
        let Self { file, base } = self;
        let file = Obtained::new(file, FILE, host_bytes).await?;
        let base = match base {
            Some(base) => Some(Obtained::new(base, BASE, host_bytes).await?),
            None => None,
        };
        let opened = tokio::task::spawn_blocking(move || open(file, base, host_bytes)).await;
        let opened = opened.unwrap_or_else(|_| {
            Err(Failure::new(GuestError::InternalError, format!("{FILE}: opening it panicked")))
        });
        let Opened { state, image, kernel, ramdisk } = opened?;
        let (config, units) = decoded(state)?;
        Ok(OpenSnapshot { config, units, image, kernel, ramdisk })
    }
}

/// A file that nobody writes to by the descriptor that came: it is passed on to those who go on from the guest's snapshots.
fn unwritable(descriptors: &Descriptors, number: u64) -> Result<Source, String> {
    let file = regular_file(descriptors, number)?;
    let flags = fcntl_getfl(&file).map_err(|error| format!("descriptor {number}: {error}"))?;
    if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE == OFlags::WRONLY {
        return Err(format!("descriptor {number} was not opened for reading"));
    }
    if is_writable(&file) {
        return Err(format!(
            "descriptor {number} can be written to: it has to be opened for reading alone, or sealed"
        ));
    }
    Ok(Source::Descriptor(file))
}

/// Whether a descriptor's holder can change the file.
pub(crate) fn is_writable(file: impl AsFd) -> bool {
    let is_sealed = fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SEALED));
    !is_sealed && !fcntl_getfl(&file).is_ok_and(|flags| flags & OFlags::RWMODE == OFlags::RDONLY)
}

/// A file in hand.
enum Obtained {
    /// The client's.
    Given(OwnedFd),
    /// A copy, not sealed yet.
    Copied(File),
}

impl Obtained {
    async fn new(source: Source, field: &'static str, limit: u64) -> Result<Self, Failure> {
        match source {
            Source::Descriptor(descriptor) => Ok(Self::Given(descriptor)),
            Source::File(file) => {
                let copied = files::receive(&file, limit).await;
                copied.map(Self::Copied).map_err(|problem| bad(field, problem))
            }
        }
    }
}

fn bad(field: &str, problem: impl std::fmt::Display) -> Failure {
    Failure::new(GuestError::BadConfig, format!("{field}: {problem}"))
}

fn refused(field: &str, error: &OpenError) -> Failure {
    let code = match error {
        OpenError::Format { .. } => GuestError::SnapshotIncompatible,
        _ => GuestError::SnapshotCorrupt,
    };
    Failure::new(code, format!("{field}: {}", chain(error)))
}

/// What is in a snapshot's file, the state not decoded any further.
struct Opened {
    state: SnapshotState,
    image: MemoryImage,
    kernel: File,
    ramdisk: Option<File>,
}

fn open(file: Obtained, base: Option<Obtained>, host_bytes: u64) -> Result<Opened, Failure> {
    let file = OpenedFile::new(file, FILE)?;
    let base = base.map(|base| OpenedFile::new(base, BASE)).transpose()?;
    check_base(&file.snapshot, base.as_ref().map(|base| &base.snapshot))?;
    let bytes = file.snapshot.memory_bytes();
    if bytes > host_bytes {
        let problem = format!("{FILE}: its memory of {bytes} bytes is more than the host's {host_bytes}");
        return Err(Failure::new(GuestError::SnapshotIncompatible, problem));
    }
    let kernel = file.copy(Part::Kernel)?;
    let kernel = kernel.ok_or_else(|| corrupt(format!("{FILE}: kernel is missing")))?;
    let ramdisk = file.copy(Part::Ramdisk)?;
    let state = file.snapshot.state().clone();
    let pages = file.snapshot.layer_pages().map(<[_]>::to_vec);
    let image = match (base, pages) {
        (Some(base), Some(pages)) => {
            MemoryImage { base: base.image()?, layer: Some(file.image()?.with_pages(pages)) }
        }
        _ => MemoryImage { base: file.image()?, layer: None },
    };
    Ok(Opened { state, image, kernel, ramdisk })
}

fn corrupt(problem: String) -> Failure {
    Failure::new(GuestError::SnapshotCorrupt, problem)
}

/// Whether a layer has its base, and nothing else one.
fn check_base(file: &SnapshotFile, base: Option<&SnapshotFile>) -> Result<(), Failure> {
    match (file.base_checksum(), base) {
        (None, None) => Ok(()),
        (None, Some(_)) => Err(bad(BASE, "the file is no layer, and has all of its memory")),
        (Some(noted), None) => {
            let (parent, taken) = noted_base(file);
            let problem = format!(
                "none was given, and the file is a layer of a snapshot of {parent}, taken {taken} µs after 1970, whose memory's checksum is {noted}"
            );
            Err(bad(BASE, problem))
        }
        (Some(_), Some(base)) if base.base_checksum().is_some() => Err(bad(BASE, "it is a layer itself")),
        (Some(noted), Some(base)) if base.memory_checksum() != noted => {
            let found = base.memory_checksum();
            let problem = format!(
                "it is not what the file is a layer of: its memory's checksum is {found}, and not {noted}"
            );
            Err(bad(BASE, problem))
        }
        (Some(_), Some(base)) if base.memory_bytes() != file.memory_bytes() => {
            let problem =
                format!("its memory is of {} bytes, and not {}", base.memory_bytes(), file.memory_bytes());
            Err(bad(BASE, problem))
        }
        (Some(_), Some(_)) => Ok(()),
    }
}

fn noted_base(file: &SnapshotFile) -> (String, u64) {
    let base = file.manifest().base.as_ref();
    base.map_or_else(Default::default, |base| (format!("{:.64?}", base.parent), base.taken_at_us))
}

/// A file that was opened and checked.
struct OpenedFile {
    snapshot: SnapshotFile,
    field: &'static str,
    is_copy: bool,
}

impl OpenedFile {
    fn new(obtained: Obtained, field: &'static str) -> Result<Self, Failure> {
        let (file, is_copy) = match obtained {
            Obtained::Given(descriptor) => (descriptor.into(), false),
            Obtained::Copied(file) => (file, true),
        };
        let snapshot = SnapshotFile::open(file).map_err(|error| refused(field, &error))?;
        if is_copy {
            snapshot.verify_memory(|_, _| ()).map_err(|error| refused(field, &error))?;
        }
        Ok(Self { snapshot, field, is_copy })
    }

    /// A sealed copy of a part, if there is one.
    fn copy(&self, part: Part) -> Result<Option<File>, Failure> {
        let Some(place) = self.snapshot.part(part) else { return Ok(None) };
        let (bytes, memory) = (place.end - place.start, self.snapshot.memory_bytes());
        if bytes > memory {
            let name = part.name();
            let problem =
                format!("{}: {name}: its {bytes} bytes do not fit into {memory} bytes of memory", self.field);
            return Err(corrupt(problem));
        }
        let mut copy = files::memfd().map_err(|error| internal(self.field, &error))?;
        self.snapshot.copy_part(part, &mut copy).map_err(|error| refused(self.field, &error))?;
        fcntl_add_seals(&copy, SEALED).map_err(|error| internal(self.field, &error.into()))?;
        Ok(Some(copy))
    }

    /// Its memory. Of a copy nothing else is kept.
    fn image(&self) -> Result<ImageFile, Failure> {
        let (file, bytes) = (self.snapshot.file().clone(), self.snapshot.memory_bytes());
        let image = if self.is_copy {
            let sealed = file.set_len(bytes).and_then(|()| Ok(fcntl_add_seals(&*file, SEALED)?));
            sealed.map_err(|error| internal(self.field, &error))?;
            ImageFile::sealed(file)
        } else {
            ImageFile::on_disk(file)
        };
        let image = image.map_err(|error| corrupt(format!("{} {}", self.field, chain(&error))))?;
        Ok(image.with_memory_bytes(bytes))
    }
}

fn internal(field: &str, error: &std::io::Error) -> Failure {
    Failure::new(GuestError::InternalError, format!("{field}: {error}"))
}

#[cfg(test)]
mod tests;
