//! Freezing memory: its contents stay as they are for whoever has the image, and the guest goes on with copies of what it writes.
//!
//! Three ways, by what the memory is made of ([`FreezeMethod`]):
//!
//! - its own memfd: the guest's mapping becomes a private one of the same memfd, and the memfd is the image. The guest stands still for
//!   two system calls; what takes as long as the guest has pages is left for [`Frozen::seal`].
//! - an image: the pages that the guest has written or discarded since, and those of the image's layer, become a new layer over the
//!   same base. The guest keeps its copies, so each layer has all of the one before. When the layer would be over half of memory,
//!   what is there becomes a new base, and the guest's copies go.
//! - what cannot be mapped privately (huge pages, locked memory, memory that another process has, too): all of it is copied. The guest's
//!   memory stays what it is.

use super::backing::{Backing, Private, Shared};
use super::error::FreezeError;
use super::file;
use super::image::{Base, FreezeMethod, FrozenMemory, ImageFile, MemoryImage};
use super::mapping::Mapping;
use super::pagemap::Pagemap;
use super::runs::Runs;
use super::shape::Shape;
use crate::layout::PAGE_BYTES;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Memory that is frozen, but not yet protected from whoever might write to it. May be sent to another thread.
///
/// Dropping it without sealing gives up what it holds; the guest is not concerned.
#[derive(Debug)]
#[must_use = "frozen memory is to be sealed"]
pub struct Frozen {
    base: Arc<Base>,
    layer: Option<File>,
    bytes: u64,
    hotplug: Option<Range<u64>>,
    method: FreezeMethod,
    copied_bytes: u64,
}

impl Frozen {
    /// Does the rest, while the guest goes on: unmaps the mapping that the guest had, and seals the files. Takes as long as the
    /// guest has pages: milliseconds for each GiB.
    ///
    /// # Errors
    /// [`FreezeError::Seal`] if somebody has the memory mapped, or the system reads or writes it (EBUSY), for more than 2 s. There is no
    /// image then; the guest is not concerned.
    pub fn seal(mut self) -> Result<FrozenMemory, FreezeError> {
        let base = self.base.seal().map_err(FreezeError::Seal)?;
        let layer = self.layer.take().map(|file| {
            file::seal(&file)?;
            Ok(ImageFile::own(Arc::new(file)))
        });
        let layer = layer.transpose().map_err(FreezeError::Seal)?;
        let Self { bytes, ref hotplug, method, copied_bytes, .. } = self;
        let image = MemoryImage { base, layer };
        Ok(FrozenMemory { image, bytes, hotplug: hotplug.clone(), method, copied_bytes })
    }

    /// How it was frozen.
    pub fn method(&self) -> FreezeMethod {
        self.method
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.base.unmap_aside();
    }
}

/// A freeze, and what the memory is made of after it, if that has changed.
type Freeze = (Frozen, Option<Private>);

impl Backing {
    /// If it fails, nothing has changed.
    pub(super) fn freeze(
        &mut self,
        shape: &Shape,
        mapping: &Mapping,
        pagemap: Option<&Pagemap>,
    ) -> Result<Frozen, FreezeError> {
        let (frozen, changed) = match self {
            Self::Shared(shared) if shared.can_be_private(shape) => shared.remap(shape, mapping)?,
            Self::Shared(shared) => (shared.copy(shape, mapping)?, None),
            Self::Private(private) => private.freeze(shape, mapping, pagemap)?,
        };
        if let Some(private) = changed {
            *self = Self::Private(private);
        }
        Ok(frozen)
    }
}

impl Shared {
    pub(super) fn can_be_private(&self, shape: &Shape) -> bool {
        !(self.is_given_away || shape.options.huge_pages || shape.options.lock)
    }

    fn remap(&self, shape: &Shape, mapping: &Mapping) -> Result<Freeze, FreezeError> {
        let aside = mapping.set_aside(&self.file).map_err(|error| FreezeError::Map(error.into()))?;
        let base = Base::new(ImageFile::own(self.file.clone()), Some(aside));
        Ok((frozen(shape, base.clone(), FreezeMethod::Remapped, 0), Some(Private::mapped(base))))
    }

    fn copy(&self, shape: &Shape, mapping: &Mapping) -> Result<Frozen, FreezeError> {
        let pages = file::data(&self.file, mapping.all()).map_err(FreezeError::Copy)?;
        copied(shape, mapping, &pages)
    }
}

impl Private {
    fn freeze(
        &self,
        shape: &Shape,
        mapping: &Mapping,
        pagemap: Option<&Pagemap>,
    ) -> Result<Freeze, FreezeError> {
        let copies = pagemap.map(|pagemap| pagemap.copies(mapping, mapping.all()));
        let copies = copies.transpose().map_err(FreezeError::Scan)?;
        if let Some(copies) = &copies {
            let pages = self.layer_pages(copies).map_err(FreezeError::Copy)?;
            if pages.bytes() <= shape.file_bytes() / 2 {
                return Ok((self.layered(shape, mapping, &pages)?, None));
            }
        }
        self.rebased(shape, mapping, copies)
    }

    /// The pages that differ from the base, or may.
    fn layer_pages(&self, copies: &Runs) -> io::Result<Runs> {
        let mut discarded = Runs::default();
        for part in self.discarded.iter() {
            file::data(&self.base.file.file, part.clone())?
                .iter()
                .for_each(|run| discarded.push(run.clone()));
        }
        let pages = copies.union(&discarded);
        Ok(self.layer.iter().fold(pages, |pages, layer| pages.union(&layer.pages)))
    }

    fn layered(&self, shape: &Shape, mapping: &Mapping, pages: &Runs) -> Result<Frozen, FreezeError> {
        let layer = copy(mapping, pages).map_err(FreezeError::Copy)?;
        let mut frozen = frozen(shape, self.base.clone(), FreezeMethod::Layered, pages.bytes());
        frozen.layer = Some(layer);
        Ok(frozen)
    }

    /// A new base, which the memory is then mapped of.
    fn rebased(&self, shape: &Shape, mapping: &Mapping, copies: Option<Runs>) -> Result<Freeze, FreezeError> {
        let pages = self.pages(mapping, copies).map_err(FreezeError::Copy)?;
        let frozen = copied(shape, mapping, &pages)?;
        let private = Self::over(frozen.base.clone(), mapping).map_err(FreezeError::Map)?;
        Ok((frozen, Some(private)))
    }

    /// A file of the guest's own with what is there now.
    pub(super) fn copy(&self, mapping: &Mapping, pagemap: Option<&Pagemap>) -> io::Result<File> {
        let copies = pagemap.map(|pagemap| pagemap.copies(mapping, mapping.all())).transpose()?;
        let pages = self.pages(mapping, copies)?;
        copy(mapping, &without_zeros(mapping, &pages))
    }

    /// The pages that may not be zero, given the guest's copies: all, if these are not known.
    fn pages(&self, mapping: &Mapping, copies: Option<Runs>) -> io::Result<Runs> {
        match copies {
            Some(copies) => Ok(self.image_pages(&mapping.all())?.union(&copies)),
            None => Ok([mapping.all()].into_iter().collect()),
        }
    }
}

fn frozen(shape: &Shape, base: Arc<Base>, method: FreezeMethod, copied_bytes: u64) -> Frozen {
    let Shape { bytes, ref hotplug, .. } = *shape;
    Frozen { base, layer: None, bytes, hotplug: hotplug.clone(), method, copied_bytes }
}

/// An image of its own, of those pages that are not zero.
fn copied(shape: &Shape, mapping: &Mapping, pages: &Runs) -> Result<Frozen, FreezeError> {
    let pages = without_zeros(mapping, pages);
    let file = Arc::new(copy(mapping, &pages).map_err(FreezeError::Copy)?);
    let base = Base::new(ImageFile::own(file), None);
    Ok(frozen(shape, base, FreezeMethod::Copied, pages.bytes()))
}

/// A memfd as long as the mapping with these of its pages, and holes elsewhere.
fn copy(mapping: &Mapping, pages: &Runs) -> io::Result<File> {
    let file = file::create_copy(mapping.all().end)?;
    pages.iter().try_for_each(|run| mapping.copy_to(&file, run))?;
    Ok(file)
}

fn without_zeros(mapping: &Mapping, pages: &Runs) -> Runs {
    let page = usize::try_from(PAGE_BYTES).expect("fits");
    let pages = pages.iter().flat_map(|run| run.clone().step_by(page));
    pages.filter(|page| !mapping.is_zero(*page)).map(|page| page..page + PAGE_BYTES).collect()
}
