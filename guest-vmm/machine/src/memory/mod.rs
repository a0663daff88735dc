//! Guest memory: one range of the VMM's addresses, mapped once, that shows the guest's memfd or an image of another's.
//!
//! The memory lies in its file without the hole: what lies above 4 GiB follows what lies below 3 GiB. The mapping is one range of
//! addresses whose base is aligned to 2 MiB, so that it can be moved aside with its page tables whole; its addresses never change,
//! because the hypervisor and the views have them. Nothing is allocated before it is touched unless [`MemoryOptions`] says so.
//!
//! Parts: `mapping` the range of addresses; `backing` what it shows, a memfd of the guest's own or an image's pages with the guest's
//! copies; `freeze`; `image` what a freeze leaves and memory is restored from; `pagemap` which pages are copies; `shape`, `file` and
//! `runs` sizes, files and sets of pages.
//!
//! Limits: from [`MINIMUM_BYTES`] to the host's memory; no NUMA, no growing. Freezing needs Linux 5.13 (MREMAP_DONTUNMAP for shared
//! mappings). A page that a guest writes after a freeze costs the host both the image's page and the guest's, also when nobody needs
//! the image any more, until the memory is zeroed, restored or frozen into a new base; where the image has a hole, that is a page of
//! zeros in its memfd.

// UNSAFETY: hands the regions of its views the address that they lie at.
#![expect(unsafe_code, reason = "views of a mapping")]

mod backing;
mod error;
mod file;
mod freeze;
mod image;
mod mapping;
mod pagemap;
mod runs;
mod shape;
#[cfg(test)]
mod tests;

pub use error::{FreezeError, ImageError, ImagePart, MemoryError, RestoreMemoryError};
pub use freeze::Frozen;
pub use image::{FreezeMethod, FrozenMemory, ImageFile, MemoryImage};

#[cfg(doc)]
use crate::layout;
use backing::Backing;
use devices::virtio::GuestRam;
use mapping::Mapping;
use pagemap::Pagemap;
use shape::Shape;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// The least memory that a guest can have: the loader's structures lie in the first megabyte.
pub const MINIMUM_BYTES: u64 = 1 << 20;

/// The size of a huge page, and the alignment of the mapping.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// How guest memory is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryOptions {
    /// Use huge pages of 2 MiB from the host's pool. All of them are reserved at once.
    pub huge_pages: bool,
    /// Allocate all of it at once, instead of page by page when the guest touches it.
    pub prefault: bool,
    /// Keep it from being swapped. Implies that it is allocated at once.
    pub lock: bool,
}

/// The memory of one guest.
///
/// Views of it (clones of [`GuestMemory::view`]) have to be gone before it is dropped. If one is not, the mapping stays for the life of
/// the process rather than going away under its user, and an error is logged.
#[derive(Debug)]
pub struct GuestMemory {
    mapping: Mapping,
    shape: Shape,
    /// Locked for as long as what is mapped is looked at or changed.
    backing: Mutex<Backing>,
    /// Opened ahead, for `/proc` may be out of reach when it is needed.
    pagemap: Option<Pagemap>,
    /// What counts the users of the mapping: one `Arc` here, one in each region of a view.
    regions: Mutex<Vec<Arc<MmapRegion>>>,
    /// `None` only while dropping.
    view: Option<GuestMemoryMmap>,
    /// The view of whoever shares it, once it is shared.
    shared_view: OnceLock<GuestMemoryMmap>,
}

impl GuestMemory {
    /// Makes memory of at least this many bytes, all zero: rounded up to whole pages, huge ones if the options say so.
    ///
    /// May block for as long as the host takes to allocate all of it, if the options ask for that.
    pub fn new(bytes: u64, options: MemoryOptions) -> Result<Self, MemoryError> {
        Self::with_hotplug(bytes, options, None)
    }

    /// The same, with a region beside it that the guest is told of by its memory device, and not by its firmware: see
    /// [`layout::hotplug_region`]. Nothing of it is allocated before it is touched, but for huge pages, which are reserved at once.
    pub fn with_hotplug(
        bytes: u64,
        options: MemoryOptions,
        hotplug: Option<Range<u64>>,
    ) -> Result<Self, MemoryError> {
        let shape = Shape::new(bytes, options, hotplug)?;
        let mapping = reserve(&shape)?;
        let backing = Backing::zeros(&shape, &mapping)?;
        Ok(Self::assemble(shape, mapping, backing))
    }

    /// Makes memory with an image's contents, of the size and with the region that the image was frozen with.
    ///
    /// Pages are read when they are touched and shared with all who have the image until they are written, unless the options ask
    /// for pages that are there at once, huge or locked: then all is copied here. This may block for as long as that takes.
    ///
    /// # Errors
    /// [`RestoreMemoryError::Image`] if a file of the image has not the memory's size.
    pub fn restore(
        image: &MemoryImage,
        bytes: u64,
        options: MemoryOptions,
        hotplug: Option<Range<u64>>,
    ) -> Result<Self, RestoreMemoryError> {
        let shape = Shape::new(bytes, options, hotplug)?;
        image.check(shape.file_bytes())?;
        let mapping = reserve(&shape)?;
        let backing = Backing::of_image(image, &shape, &mapping)?;
        Ok(Self::assemble(shape, mapping, backing))
    }

    /// Puts an image's contents into this memory, at the same addresses; what it held is gone. The VPs and devices must not run.
    ///
    /// # Errors
    /// As [`GuestMemory::restore`]. With [`RestoreMemoryError::Image`] nothing has changed; after others the contents are undefined
    /// until [`GuestMemory::zero`] or this succeeds.
    pub fn remap(&self, image: &MemoryImage) -> Result<(), RestoreMemoryError> {
        image.check(self.shape.file_bytes())?;
        self.backing().replace(image, &self.shape, &self.mapping)
    }

    /// Prepares a freeze while the guest runs, which then stands still the shorter for it: takes the page tables away that would have to
    /// be put aside. What a hypervisor keeps of these (in KVM each page by itself) goes with them, and that is what takes long. The
    /// contents stay; a page that is touched again before the freeze is found again.
    ///
    /// Blocks for as long as there are pages, about 50 ns each, and the guest for what it touches in the same 2 MiB meanwhile. Does
    /// nothing to memory that a freeze copies.
    ///
    /// # Errors
    /// The memory is as it was, and can be frozen.
    pub fn prepare_freeze(&self) -> io::Result<()> {
        let all = self.mapping.all();
        let parts = all.clone().step_by(usize::try_from(HUGE_PAGE_BYTES).expect("fits"));
        parts.map(|start| start..all.end.min(start + HUGE_PAGE_BYTES)).try_for_each(|part| {
            // Locked anew each time: devices discard pages meanwhile.
            self.backing().loosen(&part, &self.shape, &self.mapping)
        })
    }

    /// Freezes the contents. The guest goes on at the same addresses as soon as this returns, with copies of what it writes.
    ///
    /// The VPs and devices must not run, and nobody else write. Blocks for some system calls, or for as long as it takes to copy the
    /// pages that the guest has written since memory was frozen or restored before; copies all of memory that is of huge pages,
    /// locked or shared with another process.
    ///
    /// # Errors
    /// The memory is as it was then, and the guest can go on.
    pub fn freeze(&self) -> Result<Frozen, FreezeError> {
        self.backing().freeze(&self.shape, &self.mapping, self.pagemap.as_ref())
    }

    /// Guest memory as the loaders, the devices and the hypervisor see it. Its regions name no file, since that may change; see
    /// [`GuestRam::share`].
    pub fn view(&self) -> &GuestMemoryMmap {
        self.view.as_ref().expect("only dropping takes it")
    }

    /// Its size in bytes, without the region for memory that is plugged later.
    pub fn bytes(&self) -> u64 {
        self.shape.bytes
    }

    /// Where it is, in the order in which it lies in its file: what firmware tells of, then the region for what is plugged later.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.shape.ranges()
    }

    /// How it is allocated.
    pub fn options(&self) -> MemoryOptions {
        self.shape.options
    }

    /// The VMM's own address of its first byte, a multiple of 2 MiB. The mapping is contiguous, in the order of its ranges.
    pub fn host_address(&self) -> usize {
        self.mapping.address()
    }

    /// Whether it shows an image's pages, and the guest's copies of them: it was frozen, or restored.
    pub fn is_private(&self) -> bool {
        matches!(*self.backing(), Backing::Private(_))
    }

    /// Gives the guest fresh memory, all zero, at the same addresses. The VPs and devices must not run.
    pub fn zero(&self) -> Result<(), MemoryError> {
        self.backing().zero(&self.shape, &self.mapping)
    }

    /// Copies what is there at an offset in the order of its ranges. What was never touched reads as zeros and stays untouched. The
    /// guest may run.
    ///
    /// # Errors
    /// If it is not all in memory, or the host cannot tell what is.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.shape.file_bytes()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.backing().read(offset, bytes, &self.mapping, self.pagemap.as_ref())
    }

    /// The memfd of its own.
    #[cfg(test)]
    pub(crate) fn file(&self) -> Arc<File> {
        match &*self.backing() {
            Backing::Shared(shared) => shared.file.clone(),
            Backing::Private(_) => panic!("private memory has no file of its own"),
        }
    }

    fn assemble(shape: Shape, mapping: Mapping, backing: Backing) -> Self {
        let pagemap = Pagemap::open();
        if let Err(error) = &pagemap {
            tracing::warn!(%error, "no page map: second snapshots of a guest will copy all of its memory");
        }
        let (pagemap, backing) = (pagemap.ok(), backing.into());
        let regions = Mutex::default();
        let shared_view = OnceLock::new();
        let mut memory = Self { mapping, shape, backing, pagemap, regions, view: None, shared_view };
        memory.view = Some(memory.make_view(None));
        memory
    }

    fn backing(&self) -> MutexGuard<'_, Backing> {
        self.backing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A view whose regions name the file, if there is one.
    fn make_view(&self, file: Option<&Arc<File>>) -> GuestMemoryMmap {
        let mut offset = 0;
        let mut regions = Vec::new();
        for range in self.ranges() {
            let file = file.map(|file| FileOffset::from_arc(file.clone(), offset));
            let region = Arc::new(self.region(offset, &range, file));
            offset += range.end - range.start;
            self.regions.lock().unwrap_or_else(PoisonError::into_inner).push(region.clone());
            let region = GuestRegionMmap::with_arc(region, GuestAddress(range.start));
            regions.push(region.expect("the layout's addresses do not wrap"));
        }
        GuestMemoryMmap::from_regions(regions).expect("the layout's ranges are sorted and apart")
    }

    fn region(&self, offset: u64, range: &Range<u64>, file: Option<FileOffset>) -> MmapRegion {
        let length = usize::try_from(range.end - range.start).expect("part of the mapping");
        let mut builder = MmapRegionBuilder::new(length)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED)
            .with_hugetlbfs(self.shape.options.huge_pages);
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        // SAFETY: the bytes are part of the mapping, which is unmapped only once no region is left that refers to it.
        let builder = unsafe { builder.with_raw_mmap_pointer(self.mapping.pointer(offset)) };
        builder.build().expect("the pointer is aligned to a page")
    }
}

fn reserve(shape: &Shape) -> Result<Mapping, MemoryError> {
    let bytes = shape.file_bytes();
    let length = usize::try_from(bytes).expect("checked against the host's memory");
    Mapping::reserve(length).map_err(MemoryError::system("mmap", bytes))
}

impl GuestRam for GuestMemory {
    fn view(&self) -> &GuestMemoryMmap {
        self.view()
    }

    fn discard(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        let page = self.shape.page_bytes();
        let whole = [start.0, bytes].iter().all(|value| value.is_multiple_of(page));
        let part = self.shape.file_range(start.0, bytes).filter(|_| whole && bytes > 0);
        let Some(part) = part else {
            let text = format!("{bytes:#x} bytes at {:#x} are not whole pages of memory", start.0);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        self.backing().discard(part, &self.mapping)
    }

    fn share(&self) -> io::Result<GuestMemoryMmap> {
        let mut backing = self.backing();
        if let Some(view) = self.shared_view.get() {
            return Ok(view.clone());
        }
        let file = backing.give_away(&self.mapping, self.pagemap.as_ref())?;
        Ok(self.shared_view.get_or_init(|| self.make_view(Some(&file))).clone())
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        (self.view, self.shared_view) = (None, OnceLock::new());
        let regions = self.regions.get_mut().unwrap_or_else(PoisonError::into_inner);
        if regions.iter().any(|region| Arc::strong_count(region) > 1) {
            self.mapping.keep();
            tracing::error!(
                bytes = self.shape.bytes,
                "guest memory is still in use when it is dropped: its mapping stays"
            );
        }
    }
}

/// The host's memory in bytes, used or not.
pub fn host_memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    u64::from(info.mem_unit).saturating_mul(info.totalram)
}
