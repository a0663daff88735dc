//! Images of guest memory: what a freeze leaves, and what memory is restored from.
//!
//! An image is a base, which has all of the memory, and at most one layer, which has the pages that differ: what is not a hole in the
//! layer is to be taken from it, unless it comes with a list of its pages. Both lie as the memory does in its own file: what firmware tells of below the hole, above the hole,
//! the region for what is plugged later.

use super::error::{ImageError, ImagePart, RestoreMemoryError};
use super::file;
use super::mapping::Mapping;
use super::runs::Runs;
use rustix::fs::{FileType, OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fstat};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// A file whose contents stay as they are.
#[derive(Debug, Clone)]
pub struct ImageFile {
    pub(super) file: Arc<File>,
    pub(super) on_disk: bool,
    /// How much of the file is memory; all of it, or of a file on disk what the memory takes, if that is not known.
    memory_bytes: Option<u64>,
    /// Which pages it has as a layer, in place of those that are not holes.
    pages: Option<Arc<Runs>>,
}

impl ImageFile {
    /// A memfd that nobody can write to or cut short any more, from whomever it comes.
    ///
    /// # Errors
    /// [`ImageError`] if it is not one: it lacks F_SEAL_WRITE or F_SEAL_SHRINK (F_SEAL_FUTURE_WRITE does not do: mappings from before
    /// it still write), or has no seals, being no memfd.
    pub fn sealed(file: Arc<File>) -> Result<Self, ImageError> {
        check_readable(&file)?;
        let seals = fcntl_get_seals(&*file).unwrap_or(SealFlags::empty());
        let lacks = |(name, seal)| (!seals.contains(seal)).then_some(name);
        let needed = [("F_SEAL_WRITE", SealFlags::WRITE), ("F_SEAL_SHRINK", SealFlags::SHRINK)];
        let missing: Vec<_> = needed.into_iter().filter_map(lacks).collect();
        if missing.is_empty() {
            return Ok(Self::own(file));
        }
        Err(ImageError::NotSealed { missing: missing.join(" and ") })
    }

    /// A file that cannot be sealed. Whoever calls this knows that it is neither written nor cut short while it is used: a guest
    /// would see what is written, and one whose memory is cut off ends with its process (SIGBUS).
    ///
    /// # Errors
    /// [`ImageError`] if it is not a regular file that can be read.
    pub fn on_disk(file: Arc<File>) -> Result<Self, ImageError> {
        check_readable(&file)?;
        Ok(Self { on_disk: true, ..Self::own(file) })
    }

    /// A memfd that is sealed, or is going to be.
    pub(super) fn own(file: Arc<File>) -> Self {
        Self { file, on_disk: false, memory_bytes: None, pages: None }
    }

    /// The same, of which so many bytes are memory, and what follows is not.
    #[must_use]
    pub fn with_memory_bytes(self, bytes: u64) -> Self {
        Self { memory_bytes: Some(bytes), ..self }
    }

    /// The same as a layer that has these pages, ranges of bytes in ascending order; what is a hole in the file there is zeros. Without
    /// this a layer has the pages that are not holes, so that none can be one of zeros that a tool left out.
    #[must_use]
    pub fn with_pages(self, pages: impl IntoIterator<Item = Range<u64>>) -> Self {
        Self { pages: Some(Arc::new(pages.into_iter().collect())), ..self }
    }

    /// The pages to be taken from it, of memory of so many bytes: of a base those that are not holes.
    pub(super) fn taken_pages(&self, bytes: u64) -> io::Result<Runs> {
        self.pages.as_ref().map_or_else(|| file::data(&self.file, 0..bytes), |pages| Ok((**pages).clone()))
    }

    /// The file. Its descriptor may be passed on.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// A memfd has the memory's size; behind what a file on disk has of it there may be more.
    fn check_size(&self, expected: u64) -> Result<(), ImageError> {
        let length = self.file.metadata().map_err(ImageError::Stat)?.len();
        let bytes = self.memory_bytes.map_or(length, |bytes| bytes.min(length));
        let is_longer = self.on_disk && self.memory_bytes.is_none() && bytes > expected;
        if bytes != expected && !is_longer {
            return Err(ImageError::Size { bytes, expected });
        }
        let last = self.pages.iter().filter_map(|pages| pages.iter().last()).find(|run| run.end > expected);
        last.map_or(Ok(()), |run| Err(ImageError::Size { bytes: run.end, expected }))
    }
}

fn check_readable(file: &File) -> Result<(), ImageError> {
    let stat = fstat(file).map_err(|error| ImageError::Stat(error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(ImageError::NotAFile);
    }
    let flags = fcntl_getfl(file).map_err(|error| ImageError::Stat(error.into()))?;
    if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE == OFlags::WRONLY {
        return Err(ImageError::NotReadable);
    }
    Ok(())
}

/// What memory is restored from. The same image may be restored any number of times, and at the same time: what its guests do not
/// write, they share.
#[derive(Debug, Clone)]
pub struct MemoryImage {
    /// All of the memory.
    pub base: ImageFile,
    /// The pages that differ from it, and holes where none does.
    pub layer: Option<ImageFile>,
}

impl MemoryImage {
    /// The parts, the base first.
    pub fn parts(&self) -> impl Iterator<Item = (ImagePart, &ImageFile)> {
        let layer = self.layer.iter().map(|file| (ImagePart::Layer, file));
        [(ImagePart::Base, &self.base)].into_iter().chain(layer)
    }

    pub(super) fn check(&self, bytes: u64) -> Result<(), RestoreMemoryError> {
        self.parts().try_for_each(|(part, file)| {
            file.check_size(bytes).map_err(|source| RestoreMemoryError::Image { part, source })
        })
    }
}

/// How memory was frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezeMethod {
    /// The guest went on with a private mapping of its own memory; nothing was copied.
    Remapped,
    /// The pages that the guest had written since its memory was frozen or restored were copied into a layer.
    Layered,
    /// All pages but those of zeros were copied: into a new base for a guest that had written more than half of them, or because its
    /// memory is of huge pages, locked or shared with another process.
    Copied,
}

/// Frozen memory: it never changes. Keeps the host's memory for as long as a descriptor of it, or a guest, does.
#[derive(Debug, Clone)]
pub struct FrozenMemory {
    /// Its contents.
    pub image: MemoryImage,
    /// The memory's size in bytes, without the region for what is plugged later.
    pub bytes: u64,
    /// The region for what is plugged later.
    pub hotplug: Option<Range<u64>>,
    /// How it was made.
    pub method: FreezeMethod,
    /// How many bytes were copied for it.
    pub copied_bytes: u64,
}

/// The memory that a guest was frozen with, or restored from: unchanging but for the mapping from before, which is still to go.
#[derive(Debug)]
pub(super) struct Base {
    pub file: ImageFile,
    /// The shared mapping that the guest had. Nobody writes to it.
    aside: Mutex<Option<Mapping>>,
}

impl Base {
    pub(super) fn new(file: ImageFile, aside: Option<Mapping>) -> Arc<Self> {
        Arc::new(Self { file, aside: aside.into() })
    }

    /// Gives up the mapping from before.
    pub(super) fn unmap_aside(&self) {
        let aside = self.aside.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(aside);
    }

    /// Makes it what it says of itself.
    pub(super) fn seal(&self) -> io::Result<ImageFile> {
        self.unmap_aside();
        if !self.file.on_disk {
            file::seal(&self.file.file)?;
        }
        Ok(self.file.clone())
    }
}
