//! What a guest's memory is made of: its own memfd, or copies of an image's pages.

use super::HUGE_PAGE_BYTES;
use super::error::{ImagePart, MemoryError, RestoreMemoryError};
use super::file;
use super::image::{Base, ImageFile, MemoryImage};
use super::mapping::Mapping;
use super::pagemap::Pagemap;
use super::runs::Runs;
use super::shape::Shape;
use crate::layout::PAGE_BYTES;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::MapFlags;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// How many runs of a layer are mapped; of one that has more, the longest. Each costs two of the process's mappings, of which Linux
/// allows 65,530 (vm.max_map_count), and about as much time as copying a page. Copied pages are not shared with other guests.
const MAX_MAPPED_RUNS: usize = 512;

/// How many discarded ranges are mapped for themselves, up to two mappings each; beyond that ranges are zeroed where they are, and
/// the host gets nothing back.
const MAX_DISCARDS: usize = 4096;

/// How many discarded ranges of at least [`HUGE_PAGE_BYTES`] there may be on top of these.
const MAX_LARGE_DISCARDS: usize = 4096;

#[derive(Debug)]
pub(super) enum Backing {
    Shared(Shared),
    Private(Private),
}

/// A memfd of the guest's own, mapped shared.
#[derive(Debug)]
pub(super) struct Shared {
    pub file: Arc<File>,
    /// Whether another process has it, too.
    pub is_given_away: bool,
}

/// An image, mapped privately, and in its place the pages that the guest has written.
#[derive(Debug)]
pub(super) struct Private {
    pub base: Arc<Base>,
    pub layer: Option<Layer>,
    /// Where there are zeros, or what the guest has written since, in place of what the image has.
    pub discarded: Runs,
    /// How many ranges were mapped for that.
    discards: usize,
}

/// The layer of an image, and where its pages are.
#[derive(Debug)]
pub(super) struct Layer {
    pub file: ImageFile,
    pub pages: Runs,
}

impl Backing {
    /// Fresh memory.
    pub(super) fn zeros(shape: &Shape, mapping: &Mapping) -> Result<Self, MemoryError> {
        Shared::new(shape, mapping).map(Self::Shared)
    }

    /// Memory with an image's contents.
    pub(super) fn of_image(
        image: &MemoryImage,
        shape: &Shape,
        mapping: &Mapping,
    ) -> Result<Self, RestoreMemoryError> {
        if !shape.is_eager() {
            return Private::new(image, mapping).map(Self::Private);
        }
        let shared = Shared::new(shape, mapping)?;
        shared.load(image, mapping)?;
        Ok(Self::Shared(shared))
    }

    /// Zeros in place of all contents.
    pub(super) fn zero(&mut self, shape: &Shape, mapping: &Mapping) -> Result<(), MemoryError> {
        match self {
            Self::Shared(shared) => shared.zero(shape, mapping),
            Self::Private(_) => {
                *self = Self::zeros(shape, mapping)?;
                Ok(())
            }
        }
    }

    /// An image's contents in place of all others.
    pub(super) fn replace(
        &mut self,
        image: &MemoryImage,
        shape: &Shape,
        mapping: &Mapping,
    ) -> Result<(), RestoreMemoryError> {
        match self {
            Self::Shared(shared) if shape.is_eager() || shared.is_given_away => {
                shared.zero(shape, mapping)?;
                shared.load(image, mapping)
            }
            _ => {
                *self = Self::of_image(image, shape, mapping)?;
                Ok(())
            }
        }
    }

    /// Takes the page tables of a part away, if a freeze would put them aside.
    pub(super) fn loosen(&self, part: &Range<u64>, shape: &Shape, mapping: &Mapping) -> io::Result<()> {
        match self {
            Self::Shared(shared) if shared.can_be_private(shape) => Ok(mapping.forget(part)?),
            Self::Shared(_) | Self::Private(_) => Ok(()),
        }
    }

    pub(super) fn discard(&mut self, part: Range<u64>, mapping: &Mapping) -> io::Result<()> {
        match self {
            Self::Shared(shared) => Ok(shared.punch(&part)?),
            Self::Private(private) => private.discard(part, mapping),
        }
    }

    /// The file of the guest's own, to be shared with another process from now on. An image's contents are copied into one.
    pub(super) fn give_away(
        &mut self,
        mapping: &Mapping,
        pagemap: Option<&Pagemap>,
    ) -> io::Result<Arc<File>> {
        let file = match self {
            Self::Shared(shared) => shared.file.clone(),
            Self::Private(private) => Arc::new(private.copy(mapping, pagemap)?),
        };
        if let Self::Private(_) = self {
            mapping.map_shared(&file, MapFlags::NORESERVE)?;
        }
        *self = Self::Shared(Shared { file: file.clone(), is_given_away: true });
        Ok(file)
    }

    /// Copies what is at an offset. What was never touched stays so.
    pub(super) fn read(
        &self,
        offset: u64,
        bytes: &mut [u8],
        mapping: &Mapping,
        pagemap: Option<&Pagemap>,
    ) -> io::Result<()> {
        match (self, pagemap) {
            (Self::Shared(shared), _) => shared.file.read_exact_at(bytes, offset),
            (Self::Private(private), Some(pagemap)) => private.read(offset, bytes, mapping, pagemap),
            (Self::Private(_), None) => {
                mapping.read(offset, bytes);
                Ok(())
            }
        }
    }
}

impl Shared {
    fn new(shape: &Shape, mapping: &Mapping) -> Result<Self, MemoryError> {
        let bytes = shape.file_bytes();
        let shared = Self { file: Arc::new(file::create(bytes, shape.options)?), is_given_away: false };
        // Without NORESERVE, so that a pool with too few huge pages fails here and not in the guest.
        let flags = if shape.options.huge_pages { MapFlags::empty() } else { MapFlags::NORESERVE };
        mapping.map_shared(&shared.file, flags).map_err(|error| match shape.options.huge_pages {
            true => MemoryError::no_huge_pages(bytes)(error),
            false => MemoryError::system("mmap", bytes)(error),
        })?;
        if shape.options.lock {
            mapping.lock(shape.told_bytes()).map_err(MemoryError::lock(shape.bytes))?;
        }
        if shape.options.prefault {
            populate(shape, mapping)?;
        }
        Ok(shared)
    }

    fn zero(&self, shape: &Shape, mapping: &Mapping) -> Result<(), MemoryError> {
        let bytes = shape.file_bytes();
        self.punch(&(0..bytes)).map_err(MemoryError::system("fallocate", bytes))?;
        if shape.options.huge_pages {
            // Punching has given the pages back to the pool with their reservation; a guest that found it empty would get SIGBUS.
            let reserved = fallocate(&self.file, FallocateFlags::empty(), 0, bytes);
            reserved.map_err(MemoryError::no_huge_pages(shape.bytes))?;
        }
        if shape.options.prefault || shape.options.lock {
            populate(shape, mapping)?;
        }
        Ok(())
    }

    fn punch(&self, part: &Range<u64>) -> rustix::io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, punch, part.start, part.end - part.start)
    }

    /// Copies an image into memory that is all zero.
    fn load(&self, image: &MemoryImage, mapping: &Mapping) -> Result<(), RestoreMemoryError> {
        image.parts().try_for_each(|(part, image)| {
            let pages = image.taken_pages(mapping.all().end);
            let copied =
                pages.and_then(|pages| pages.iter().try_for_each(|run| mapping.copy_from(&image.file, run)));
            copied.map_err(|source| RestoreMemoryError::Map { part, source })
        })
    }
}

fn populate(shape: &Shape, mapping: &Mapping) -> Result<(), MemoryError> {
    mapping.populate(shape.told_bytes()).map_err(MemoryError::system("madvise", shape.bytes))
}

impl Private {
    /// Maps an image over the whole mapping.
    fn new(image: &MemoryImage, mapping: &Mapping) -> Result<Self, RestoreMemoryError> {
        let failed = |part| move |source| RestoreMemoryError::Map { part, source };
        let layer = image.layer.as_ref().map(|layer| Layer::of(layer, mapping)).transpose();
        let layer = layer.map_err(failed(ImagePart::Layer))?;
        let base = Base::new(image.base.clone(), None);
        let mut private = Self::over(base, mapping).map_err(failed(ImagePart::Base))?;
        if let Some(layer) = layer {
            layer.map(mapping).map_err(failed(ImagePart::Layer))?;
            private.layer = Some(layer);
        }
        Ok(private)
    }

    /// Maps a base over the whole mapping. What the guest has there beside it is gone.
    pub(super) fn over(base: Arc<Base>, mapping: &Mapping) -> io::Result<Self> {
        mapping.map_private(&base.file.file, &mapping.all())?;
        Ok(Self::mapped(base))
    }

    /// A base that is mapped.
    pub(super) fn mapped(base: Arc<Base>) -> Self {
        Self { base, layer: None, discarded: Runs::default(), discards: 0 }
    }

    /// The image's own pages would be there again if this only dropped the guest's copies, so zeros take their place.
    fn discard(&mut self, part: Range<u64>, mapping: &Mapping) -> io::Result<()> {
        if self.discarded.contains(&part) || self.image_pages(&part)?.is_empty() {
            return Ok(mapping.forget(&part)?);
        }
        let large = part.end - part.start >= HUGE_PAGE_BYTES;
        if self.discards >= if large { MAX_DISCARDS + MAX_LARGE_DISCARDS } else { MAX_DISCARDS } {
            mapping.clear(&part);
            return Ok(());
        }
        mapping.map_zeros(&part)?;
        self.discards += 1;
        self.discarded.insert(part);
        Ok(())
    }

    /// Where the image has pages in a part.
    pub(super) fn image_pages(&self, part: &Range<u64>) -> io::Result<Runs> {
        let base = file::data(&self.base.file.file, part.clone())?;
        let layer = self.layer.iter().flat_map(|layer| layer.pages.within(part)).collect();
        Ok(base.union(&layer))
    }

    fn read(&self, offset: u64, bytes: &mut [u8], mapping: &Mapping, pagemap: &Pagemap) -> io::Result<()> {
        let all = offset..offset + bytes.len() as u64;
        let place = |part: &Range<u64>| {
            let [start, end] = [part.start, part.end].map(|at| usize::try_from(at - offset).expect("inside"));
            start..end
        };
        self.base.file.file.read_exact_at(bytes, offset)?;
        if let Some(layer) = &self.layer {
            for part in layer.pages.within(&all) {
                layer.file.file.read_exact_at(&mut bytes[place(&part)], part.start)?;
            }
        }
        for part in self.discarded.within(&all) {
            bytes[place(&part)].fill(0);
        }
        for part in pagemap.copies(mapping, whole_pages(&all))?.within(&all) {
            mapping.read(part.start, &mut bytes[place(&part)]);
        }
        Ok(())
    }
}

/// The pages that a range touches.
fn whole_pages(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE_BYTES * PAGE_BYTES..range.end.next_multiple_of(PAGE_BYTES)
}

impl Layer {
    fn of(file: &ImageFile, mapping: &Mapping) -> io::Result<Self> {
        Ok(Self { file: file.clone(), pages: file.taken_pages(mapping.all().end)? })
    }

    fn map(&self, mapping: &Mapping) -> io::Result<()> {
        let (mapped, copied) = self.pages.longest(MAX_MAPPED_RUNS);
        mapped.iter().try_for_each(|run| mapping.map_private(&self.file.file, run))?;
        copied.iter().try_for_each(|run| mapping.copy_from(&self.file.file, run))
    }
}
