//! The boot loaders: a kernel, its initrd and its command line, from files into guest memory, and the first VP's registers.
//!
//! | the kernel file | how it starts |
//! | --- | --- |
//! | ELF with a PVH note | 32-bit protected mode, EBX = start info (Xen `docs/misc/pvh.pandoc`) |
//! | ELF without one | Linux's 64-bit boot protocol, RSI = zero page (`Documentation/arch/x86/boot.rst`) |
//! | bzImage, protocol 2.06 or later | the same, or its 32-bit form if the kernel has no 64-bit entry |
//!
//! A load is checked whole before the first byte is written: format, sizes, and that all that is placed lies in memory and apart
//! from each other. Only a file that cannot be read, or shrinks meanwhile, leaves a part behind. Segments go from the
//! file into guest memory directly.
//!
//! Limits: 64-bit x86 ELF files; regular files and memfds, read at explicit offsets, so that their file offset does not matter.

mod bzimage;
mod elf;
mod error;
mod file;
mod kernel;
mod placement;
mod pvh;
#[cfg(test)]
mod tests;
mod vp_state;
mod zero_page;

pub use error::{FileKind, LoadError, Occupant, PlaceError};
pub use kernel::Protocol;
pub use vp_state::InitialVpState;

use crate::layout::{self, PAGE_BYTES};
use crate::memory::GuestMemory;
use file::ImageFile;
use kernel::Kernel;
use placement::Placement;
use std::fs::File;
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What a guest starts with.
#[derive(Debug, Clone, Copy)]
pub struct BootSource<'a> {
    /// The kernel.
    pub kernel: &'a File,
    /// The initial RAM disk.
    pub initrd: Option<&'a File>,
    /// The kernel's command line, without a NUL.
    pub cmdline: &'a str,
}

/// A guest that lies in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedGuest {
    /// How its kernel starts.
    pub protocol: Protocol,
    /// Where its initial RAM disk lies: guest physical addresses.
    pub initrd: Option<Range<u64>>,
    /// The state in which the first VP has to start, RIP being the kernel's entry.
    pub vp: InitialVpState,
}

/// Loads a kernel into memory that is all zero, and says in which state the first VP has to start.
///
/// `rsdp` is where [`crate::acpi::write_tables`] has put the ACPI tables' root; the two do not touch each other's memory. Blocks for
/// as long as the files take to be read.
pub fn load(
    memory: &GuestMemory,
    source: &BootSource<'_>,
    rsdp: GuestAddress,
) -> Result<LoadedGuest, LoadError> {
    let plan = Plan::new(layout::memory_ranges(memory.bytes()), source)?;
    plan.write(memory.view(), source.cmdline, rsdp)
}

/// A file that has its place.
struct Initrd<'a> {
    file: ImageFile<'a>,
    address: u64,
}

/// Everything that will be written, checked.
struct Plan<'a> {
    ranges: Vec<Range<u64>>,
    kernel_file: ImageFile<'a>,
    kernel: Kernel,
    initrd: Option<Initrd<'a>>,
}

impl<'a> Plan<'a> {
    fn new(ranges: Vec<Range<u64>>, source: &BootSource<'a>) -> Result<Self, LoadError> {
        let kernel_file = ImageFile::open(FileKind::Kernel, source.kernel)?;
        let kernel = Kernel::parse(&kernel_file)?;
        check_cmdline(source.cmdline, kernel.cmdline_max)?;
        let mut placement = Placement::new(&ranges);
        claim_structures(&mut placement, kernel.protocol, source.cmdline)?;
        kernel.claim(&mut placement)?;
        let initrd = source.initrd.map(|file| place_initrd(&mut placement, file, kernel.initrd_end));
        let initrd = initrd.transpose()?;
        Ok(Self { ranges, kernel_file, kernel, initrd })
    }

    fn write(
        self,
        memory: &GuestMemoryMmap,
        cmdline: &str,
        rsdp: GuestAddress,
    ) -> Result<LoadedGuest, LoadError> {
        for segment in &self.kernel.segments {
            self.kernel_file.read_into(memory, segment.file_offset, segment.address, segment.file_bytes)?;
        }
        if let Some(initrd) = &self.initrd {
            initrd.file.read_into(memory, 0, initrd.address, initrd.file.bytes())?;
        }
        // The NUL is there: the memory is zero.
        write(memory, Occupant::CommandLine, layout::COMMAND_LINE.start, cmdline.as_bytes())?;
        let initrd = self.initrd.map(|initrd| initrd.address..initrd.address + initrd.file.bytes());
        let announced = layout::announced_memory(&self.ranges);
        let boot = BootInfo { announced, initrd: initrd.clone(), rsdp: rsdp.0 };
        let protocol = self.kernel.protocol;
        match protocol {
            Protocol::Pvh => pvh::write(memory, &boot)?,
            Protocol::Linux32 | Protocol::Linux64 => zero_page::write(memory, self.kernel.header, &boot)?,
        }
        let vp = vp_state::prepare(memory, protocol, self.kernel.entry)?;
        Ok(LoadedGuest { protocol, initrd, vp })
    }
}

/// What a kernel is told besides its command line.
struct BootInfo {
    announced: Vec<(Range<u64>, layout::MemoryUse)>,
    initrd: Option<Range<u64>>,
    rsdp: u64,
}

fn check_cmdline(cmdline: &str, limit: u64) -> Result<(), LoadError> {
    if let Some(position) = cmdline.find('\0') {
        return Err(LoadError::CommandLineNul { position });
    }
    let bytes = cmdline.len() as u64;
    if bytes > limit { Err(LoadError::CommandLineTooLong { bytes, limit }) } else { Ok(()) }
}

fn claim_structures(placement: &mut Placement, protocol: Protocol, cmdline: &str) -> Result<(), LoadError> {
    let cmdline_start = layout::COMMAND_LINE.start;
    let cmdline = cmdline_start..cmdline_start + cmdline.len() as u64 + 1;
    let mut structures = vec![(layout::GDT, Occupant::Gdt), (cmdline, Occupant::CommandLine)];
    match protocol {
        Protocol::Pvh => structures.push((layout::PVH_START_INFO, Occupant::StartInfo)),
        Protocol::Linux32 => structures.push((layout::ZERO_PAGE, Occupant::ZeroPage)),
        Protocol::Linux64 => {
            structures.push((layout::ZERO_PAGE, Occupant::ZeroPage));
            structures.push((layout::PAGE_TABLES, Occupant::PageTables));
        }
    }
    let claims = structures.into_iter().map(|(range, what)| placement.claim(range, what));
    claims.collect::<Result<(), PlaceError>>().map_err(LoadError::Place)
}

/// Places the initrd as high as it may lie, away from a kernel that unpacks itself.
fn place_initrd<'a>(placement: &mut Placement, file: &'a File, end: u64) -> Result<Initrd<'a>, LoadError> {
    let file = ImageFile::open(FileKind::Initrd, file)?;
    let bytes = file.bytes();
    let place = placement.highest(bytes, PAGE_BYTES, end);
    let address =
        place.ok_or_else(|| LoadError::InitrdTooLarge { bytes, end, largest: placement.largest(end) })?;
    placement.claim(address..address + bytes, Occupant::Initrd).map_err(LoadError::Place)?;
    Ok(Initrd { file, address })
}

/// Writes one of the loader's structures.
fn write(memory: &GuestMemoryMmap, what: Occupant, address: u64, bytes: &[u8]) -> Result<(), LoadError> {
    let written = memory.write_slice(bytes, GuestAddress(address));
    written.map_err(|source| LoadError::Memory { what, address, source })
}
