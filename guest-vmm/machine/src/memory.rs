//! Guest memory: one memfd, mapped once.
//!
//! The memfd holds the guest's memory without the hole: what lies above 4 GiB follows what lies below 3 GiB. The mapping is one
//! range of addresses whose base is aligned to 2 MiB, so that it can be moved aside with its page tables whole. It is shared, and
//! nothing is allocated before it is touched unless [`MemoryOptions`] says so.
//!
//! Limits: from [`MINIMUM_BYTES`] to the host's memory; no NUMA, no growing.

// UNSAFETY: reserves an address range and maps the memfd into it at a chosen, aligned address, which no safe interface does.
#![expect(unsafe_code, reason = "mapping at a chosen address")]

use crate::layout::{self, PAGE_BYTES};
use devices::virtio::GuestRam;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, mmap_anonymous, munmap};
use rustix::process::{Resource, getrlimit};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::Arc;
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

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Fewer bytes than [`MINIMUM_BYTES`].
    #[error("memory of {bytes} bytes is too small: {MINIMUM_BYTES} bytes are the least")]
    TooSmall {
        /// What was asked for.
        bytes: u64,
    },
    /// More bytes than the host has.
    #[error("memory of {bytes} bytes is too large: the host has {host_bytes} bytes")]
    TooLarge {
        /// What was asked for.
        bytes: u64,
        /// What the host has in total.
        host_bytes: u64,
    },
    /// The host's pool has too few huge pages, or none.
    #[error("the host has no {pages} free huge pages of 2 MiB (vm.nr_hugepages)")]
    NoHugePages {
        /// How many are needed.
        pages: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The memory may not be locked.
    #[error("cannot lock {bytes} bytes of memory: the limit is {limit} (RLIMIT_MEMLOCK)")]
    Lock {
        /// How many were to be locked.
        bytes: u64,
        /// The limit in bytes, or `none`.
        limit: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another system call failed.
    #[error("{call} failed for guest memory of {bytes} bytes")]
    System {
        /// The call.
        call: &'static str,
        /// The size of the memory.
        bytes: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A range of the VMM's addresses that belongs to one guest's memory.
#[derive(Debug)]
struct Mapping {
    base: *mut c_void,
    bytes: usize,
}

// SAFETY: the pointer is only used as an address; what lies there is accessed through `GuestMemoryMmap` alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves an aligned range in which nothing can be accessed yet.
    fn reserve(bytes: usize) -> rustix::io::Result<Self> {
        let alignment = usize::try_from(HUGE_PAGE_BYTES).expect("fits");
        let padded = bytes.checked_add(alignment).ok_or(rustix::io::Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the system's choice takes nothing from anybody.
        let start = unsafe { mmap_anonymous(null_mut(), padded, ProtFlags::empty(), flags) }?;
        let before = start.align_offset(alignment);
        let base = start.wrapping_byte_add(before);
        // SAFETY: both ranges are parts of the mapping just made, on both sides of what is kept.
        unsafe {
            trim(start, before)?;
            trim(base.wrapping_byte_add(bytes), padded - before - bytes)?;
        }
        Ok(Self { base, bytes })
    }

    /// Maps a file's first bytes over the whole range.
    fn fill(&self, file: &File, flags: MapFlags) -> rustix::io::Result<()> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the range belongs to `self`, and nothing refers to what it held.
        unsafe { mmap(self.base, self.bytes, access, flags | MapFlags::SHARED | MapFlags::FIXED, file, 0) }?;
        Ok(())
    }

    /// Allocates every page of the first `bytes`, as far as that has not happened.
    fn populate(&self, bytes: usize) -> rustix::io::Result<()> {
        // SAFETY: allocates pages of the range; their contents stay.
        unsafe { madvise(self.base, bytes.min(self.bytes), Advice::LinuxPopulateWrite) }
    }

    fn lock(&self, bytes: usize) -> rustix::io::Result<()> {
        // SAFETY: locks pages of the range; their contents stay.
        unsafe { mlock(self.base, bytes.min(self.bytes)) }
    }

    fn unmap(&self) {
        // SAFETY: the range belongs to `self`; the caller has made sure that nobody refers to it.
        if let Err(error) = unsafe { munmap(self.base, self.bytes) } {
            tracing::error!(%error, bytes = self.bytes, "cannot unmap guest memory");
        }
    }
}

/// Unmaps a range, which may be empty.
///
/// # Safety
///
/// Nobody may refer to the range.
unsafe fn trim(start: *mut c_void, bytes: usize) -> rustix::io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { munmap(start, bytes) }
}

/// The memory of one guest.
///
/// Views of it (clones of [`GuestMemory::view`]) have to be gone before it is dropped. If one is not, the mapping stays for the life of
/// the process rather than going away under its user, and an error is logged.
#[derive(Debug)]
pub struct GuestMemory {
    mapping: Mapping,
    /// What counts the users of the mapping: one `Arc` here, one in each of the view's regions.
    regions: Vec<Arc<MmapRegion>>,
    /// `None` only while dropping.
    view: Option<GuestMemoryMmap>,
    file: Arc<File>,
    bytes: u64,
    hotplug: Option<Range<u64>>,
    options: MemoryOptions,
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
        let bytes = checked_size(bytes, options)?;
        let region = hotplug.as_ref().map_or(0, |region| region.end - region.start);
        let all =
            bytes.checked_add(region).ok_or(MemoryError::TooLarge { bytes: region, host_bytes: bytes })?;
        let length = usize::try_from(all).expect("checked against the host's memory");
        let file = Arc::new(create_file(all, options)?);
        let mapping = Mapping::reserve(length).map_err(|e| system("mmap", all, e))?;
        // From here on dropping `memory` unmaps the range, whatever fails.
        let mut memory = Self { mapping, regions: Vec::new(), view: None, file, bytes, hotplug, options };
        memory.fill()?;
        memory.allocate()?;
        memory.build_view();
        Ok(memory)
    }

    /// Guest memory as the loaders, the devices and the hypervisor see it.
    pub fn view(&self) -> &GuestMemoryMmap {
        self.view.as_ref().expect("only dropping takes it")
    }

    /// The memfd. Offset 0 is guest physical address 0; the memory above 4 GiB follows at [`layout::LOW_MEMORY_END`], the region for
    /// memory that is plugged later after that.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Its size in bytes, without the region for memory that is plugged later.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it is, in the order in which it lies in the memfd: what firmware tells of, then the region for what is plugged later.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        layout::memory_ranges(self.bytes).into_iter().chain(self.hotplug.clone()).collect()
    }

    fn file_bytes(&self) -> u64 {
        self.ranges().iter().map(|range| range.end - range.start).sum()
    }

    /// How it is allocated.
    pub fn options(&self) -> MemoryOptions {
        self.options
    }

    /// The VMM's own address of the memfd's first byte, a multiple of 2 MiB. The mapping is contiguous and as long as the memfd.
    pub fn host_address(&self) -> usize {
        self.mapping.base.addr()
    }

    /// Gives the guest fresh memory, all zero, at the same addresses. The VPs and devices must not run.
    pub fn zero(&self) -> Result<(), MemoryError> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let bytes = self.file_bytes();
        fallocate(&self.file, punch, 0, bytes).map_err(|e| system("fallocate", bytes, e))?;
        if self.options.huge_pages {
            // Punching has given the pages back to the pool with their reservation; a guest that found it empty would get SIGBUS.
            fallocate(&self.file, FallocateFlags::empty(), 0, bytes).map_err(|e| self.no_huge_pages(e))?;
        }
        if self.options.prefault || self.options.lock {
            self.populate()?;
        }
        Ok(())
    }

    fn page_bytes(&self) -> u64 {
        if self.options.huge_pages { HUGE_PAGE_BYTES } else { PAGE_BYTES }
    }

    fn fill(&self) -> Result<(), MemoryError> {
        if self.options.huge_pages {
            // Without NORESERVE, so that a pool with too few pages fails here and not in the guest.
            return self.mapping.fill(&self.file, MapFlags::empty()).map_err(|e| self.no_huge_pages(e));
        }
        self.mapping.fill(&self.file, MapFlags::NORESERVE).map_err(|e| system("mmap", self.bytes, e))
    }

    fn allocate(&self) -> Result<(), MemoryError> {
        if self.options.lock {
            self.mapping.lock(self.told_bytes()).map_err(|e| lock_error(self.bytes, e))?;
        }
        if self.options.prefault {
            self.populate()?;
        }
        Ok(())
    }

    /// How much of the mapping is what firmware tells of.
    fn told_bytes(&self) -> usize {
        usize::try_from(self.bytes).expect("part of the mapping")
    }

    fn populate(&self) -> Result<(), MemoryError> {
        self.mapping.populate(self.told_bytes()).map_err(|e| system("madvise", self.bytes, e))
    }

    fn build_view(&mut self) {
        let mut offset = 0;
        let mut regions = Vec::new();
        for range in self.ranges() {
            let region = Arc::new(self.region(offset, &range));
            offset += range.end - range.start;
            self.regions.push(region.clone());
            let region = GuestRegionMmap::with_arc(region, GuestAddress(range.start));
            regions.push(region.expect("the layout's addresses do not wrap"));
        }
        let view = GuestMemoryMmap::from_regions(regions).expect("the layout's ranges are sorted and apart");
        self.view = Some(view);
    }

    fn region(&self, offset: u64, range: &Range<u64>) -> MmapRegion {
        let length = usize::try_from(range.end - range.start).expect("part of the mapping");
        let start = usize::try_from(offset).expect("part of the mapping");
        let builder = MmapRegionBuilder::new(length)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED)
            .with_hugetlbfs(self.options.huge_pages)
            .with_file_offset(FileOffset::from_arc(self.file.clone(), offset));
        // SAFETY: the bytes are part of the mapping, which is unmapped only once no region is left that refers to it.
        let builder =
            unsafe { builder.with_raw_mmap_pointer(self.mapping.base.cast::<u8>().wrapping_add(start)) };
        builder.build().expect("the pointer is aligned to a page")
    }

    fn no_huge_pages(&self, error: rustix::io::Errno) -> MemoryError {
        no_huge_pages(self.bytes, error)
    }
}

impl GuestRam for GuestMemory {
    fn view(&self) -> &GuestMemoryMmap {
        self.view()
    }

    fn discard(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        let whole = [start.0, bytes].iter().all(|value| value.is_multiple_of(self.page_bytes()));
        let Some(offset) = file_offset(&self.ranges(), start.0, bytes).filter(|_| whole && bytes > 0) else {
            let text = format!("{bytes:#x} bytes at {:#x} are not whole pages of memory", start.0);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, punch, offset, bytes)?)
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        self.view = None;
        if self.regions.iter().all(|region| Arc::strong_count(region) == 1) {
            self.mapping.unmap();
        } else {
            tracing::error!(
                bytes = self.bytes,
                "guest memory is still in use when it is dropped: its mapping stays"
            );
        }
    }
}

/// Where guest physical addresses are in the memfd of memory in these ranges, if all of them are in one.
fn file_offset(ranges: &[Range<u64>], start: u64, bytes: u64) -> Option<u64> {
    let end = start.checked_add(bytes)?;
    let mut offset = 0;
    for range in ranges {
        if range.start <= start && end <= range.end {
            return Some(offset + start - range.start);
        }
        offset += range.end - range.start;
    }
    None
}

fn checked_size(bytes: u64, options: MemoryOptions) -> Result<u64, MemoryError> {
    let host_bytes = host_memory_bytes();
    let page = if options.huge_pages { HUGE_PAGE_BYTES } else { PAGE_BYTES };
    if bytes < MINIMUM_BYTES {
        return Err(MemoryError::TooSmall { bytes });
    }
    let rounded = bytes.checked_next_multiple_of(page).filter(|rounded| *rounded <= host_bytes);
    rounded.ok_or(MemoryError::TooLarge { bytes, host_bytes })
}

/// The host's memory in bytes, used or not.
pub fn host_memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    u64::from(info.mem_unit).saturating_mul(info.totalram)
}

fn create_file(bytes: u64, options: MemoryOptions) -> Result<File, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = if options.huge_pages {
        let flags = flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        memfd_create("guest-memory", flags).map_err(|e| no_huge_pages(bytes, e))?
    } else {
        memfd_create("guest-memory", flags).map_err(|e| system("memfd_create", bytes, e))?
    };
    ftruncate(&file, bytes).map_err(|e| system("ftruncate", bytes, e))?;
    // A file that shrinks would turn every access to it into SIGBUS, for whomever it is passed to.
    let seals = SealFlags::SHRINK | SealFlags::GROW;
    fcntl_add_seals(&file, seals).map_err(|e| system("fcntl(F_ADD_SEALS)", bytes, e))?;
    Ok(file.into())
}

fn system(call: &'static str, bytes: u64, error: rustix::io::Errno) -> MemoryError {
    MemoryError::System { call, bytes, source: error.into() }
}

fn no_huge_pages(bytes: u64, error: rustix::io::Errno) -> MemoryError {
    MemoryError::NoHugePages { pages: bytes / HUGE_PAGE_BYTES, source: error.into() }
}

fn lock_error(bytes: u64, error: rustix::io::Errno) -> MemoryError {
    let limit = getrlimit(Resource::Memlock).current;
    let limit = limit.map_or_else(|| "none".to_owned(), |limit| format!("{limit} bytes"));
    MemoryError::Lock { bytes, limit, source: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fstat;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn memory(bytes: u64) -> GuestMemory {
        GuestMemory::new(bytes, MemoryOptions::default()).unwrap()
    }

    #[test]
    fn discarded_pages_go_back_to_the_host_and_read_as_zeros() {
        let memory = memory(4 * MIB);
        memory.view().write_slice(&[7; 3 * 4096], GuestAddress(0x10_0000)).unwrap();
        let before = allocated_bytes(&memory);
        memory.discard(GuestAddress(0x10_1000), 4096).unwrap();
        assert_eq!(allocated_bytes(&memory), before - 4096);
        let byte = |at| memory.view().read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!([byte(0x10_0fff), byte(0x10_1000), byte(0x10_1fff), byte(0x10_2000)], [7, 0, 0, 7]);
        for (start, bytes) in [
            (0x800, 4096),
            (0, 100),
            (0, 0),
            (4 * MIB, 4096),
            (4 * MIB - 4096, 8192),
            (u64::MAX - 4095, 4096),
        ] {
            assert!(memory.discard(GuestAddress(start), bytes).is_err(), "{bytes:#x} at {start:#x}");
        }
    }

    #[test]
    fn memory_above_the_hole_is_behind_that_below_in_the_file() {
        let offset = |memory, start, bytes| file_offset(&layout::memory_ranges(memory), start, bytes);
        assert_eq!(offset(MIB, 0, MIB), Some(0));
        assert_eq!(offset(MIB, layout::HIGH_MEMORY, 4096), None);
        assert_eq!(offset(5 * GIB, 4 * GIB + 8192, 4096), Some(3 * GIB + 8192));
        assert_eq!(offset(5 * GIB, 3 * GIB - 4096, 8192), None, "into the hole");
    }

    #[test]
    fn a_region_for_later_is_memory_that_nobody_is_told_of() {
        let region = layout::hotplug_region(4 * MIB, 8 * MIB, 2 * MIB);
        let options = MemoryOptions { prefault: true, ..MemoryOptions::default() };
        let memory = GuestMemory::with_hotplug(4 * MIB, options, Some(region.clone())).unwrap();
        assert_eq!((memory.bytes(), memory.ranges()), (4 * MIB, vec![0..4 * MIB, region.clone()]));
        assert_eq!(allocated_bytes(&memory), 4 * MIB, "nothing of it is there before it is touched");
        let last = GuestAddress(region.end - 4096);
        memory.view().write_obj(7u8, last).unwrap();
        assert_eq!(allocated_bytes(&memory), 4 * MIB + 4096);
        memory.discard(last, 4096).unwrap();
        assert_eq!((allocated_bytes(&memory), memory.view().read_obj::<u8>(last).unwrap()), (4 * MIB, 0));
        memory.view().write_obj(7u8, last).unwrap();
        memory.zero().unwrap();
        assert_eq!(allocated_bytes(&memory), 4 * MIB);
    }

    fn allocated_bytes(memory: &GuestMemory) -> u64 {
        u64::try_from(fstat(memory.file()).unwrap().st_blocks).unwrap() * 512
    }

    #[test]
    fn the_size_is_rounded_up_to_a_page() {
        assert_eq!(memory(MIB).bytes(), MIB);
        assert_eq!(memory(MIB + 1).bytes(), MIB + 4096);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused_with_both_numbers() {
        let error = GuestMemory::new(MIB - 1, MemoryOptions::default()).unwrap_err();
        assert_eq!(error.to_string(), "memory of 1048575 bytes is too small: 1048576 bytes are the least");
        for bytes in [host_memory_bytes() + 1, u64::MAX] {
            let error = GuestMemory::new(bytes, MemoryOptions::default()).unwrap_err();
            let host_bytes = host_memory_bytes();
            let text = format!("memory of {bytes} bytes is too large: the host has {host_bytes} bytes");
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn the_file_and_the_memory_are_the_same() {
        let memory = memory(8 * MIB);
        memory.view().write_slice(b"guest", GuestAddress(5 * MIB)).unwrap();
        let mut found = [0; 5];
        memory.file().read_exact_at(&mut found, 5 * MIB).unwrap();
        assert_eq!(&found, b"guest");
        assert_eq!(memory.host_address() % (2 << 20), 0);
        assert_eq!(memory.view().get_host_address(GuestAddress(0)).unwrap().addr(), memory.host_address());
    }

    #[test]
    fn memory_above_the_hole_follows_in_the_file() {
        let memory = memory(3 * GIB + MIB);
        let view = memory.view();
        assert_eq!(view.num_regions(), 2);
        assert!(!view.address_in_range(GuestAddress(3 * GIB)));
        view.write_slice(b"high", GuestAddress(4 * GIB)).unwrap();
        let mut found = [0; 4];
        memory.file().read_exact_at(&mut found, 3 * GIB).unwrap();
        assert_eq!(&found, b"high");
        let high = view.find_region(GuestAddress(4 * GIB)).unwrap();
        assert_eq!(high.file_offset().unwrap().start(), 3 * GIB);
        assert_eq!(high.len(), MIB);
    }

    #[test]
    fn memory_is_allocated_when_touched_and_given_back_by_zeroing() {
        let memory = memory(64 * MIB);
        assert_eq!(allocated_bytes(&memory), 0);
        memory.view().write_slice(&[1], GuestAddress(32 * MIB)).unwrap();
        assert_ne!(allocated_bytes(&memory), 0);
        memory.zero().unwrap();
        assert_eq!(allocated_bytes(&memory), 0);
        assert_eq!(memory.view().read_obj::<u8>(GuestAddress(32 * MIB)).unwrap(), 0);
    }

    #[test]
    fn prefaulted_memory_is_allocated_at_once_and_again_after_zeroing() {
        let options = MemoryOptions { prefault: true, ..MemoryOptions::default() };
        let memory = GuestMemory::new(4 * MIB, options).unwrap();
        assert_eq!(allocated_bytes(&memory), 4 * MIB);
        memory.zero().unwrap();
        assert_eq!(allocated_bytes(&memory), 4 * MIB);
    }

    /// Either outcome is right, depending on the host's pool; each has to be whole.
    #[test]
    fn huge_pages_are_there_or_named_in_the_error() {
        let options = MemoryOptions { huge_pages: true, ..MemoryOptions::default() };
        match GuestMemory::new(3 * MIB, options) {
            Ok(memory) => {
                assert_eq!(memory.bytes(), 4 * MIB);
                memory.view().write_slice(&[1], GuestAddress(3 * MIB)).unwrap();
                memory.zero().unwrap();
                assert_eq!(memory.view().read_obj::<u8>(GuestAddress(3 * MIB)).unwrap(), 0);
            }
            Err(error) => {
                let text = "the host has no 2 free huge pages of 2 MiB (vm.nr_hugepages)";
                assert_eq!(error.to_string(), text);
            }
        }
    }

    #[test]
    fn locking_works_or_names_the_limit() {
        let options = MemoryOptions { lock: true, ..MemoryOptions::default() };
        match GuestMemory::new(2 * MIB, options) {
            Ok(memory) => assert_eq!(allocated_bytes(&memory), 2 * MIB),
            Err(error) => assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}"),
        }
    }

    #[test]
    fn the_file_can_be_sealed_but_not_resized() {
        let memory = memory(MIB);
        assert!(memory.file().set_len(2 * MIB).is_err());
        assert!(memory.file().set_len(0).is_err());
        fcntl_add_seals(memory.file(), SealFlags::FUTURE_WRITE).unwrap();
    }

    fn is_mapped(address: usize) -> bool {
        // madvise fails with ENOMEM for addresses that are not mapped.
        // SAFETY: the advice changes nothing about the pages' contents.
        unsafe { madvise(address as *mut c_void, 4096, Advice::Normal) }.is_ok()
    }

    #[test]
    fn a_view_that_outlives_the_memory_keeps_the_mapping() {
        let memory = memory(MIB);
        let (address, view) = (memory.host_address(), memory.view().clone());
        drop(memory);
        assert!(is_mapped(address));
        view.write_slice(b"still there", GuestAddress(0)).unwrap();
    }
}
