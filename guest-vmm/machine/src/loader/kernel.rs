//! What the loader has to know of a kernel, whatever its format.

use super::error::{LoadError, Occupant};
use super::file::ImageFile;
use super::placement::Placement;
use super::{bzimage, elf};
use linux_loader::loader::bootparam::setup_header;
use std::fmt;

/// How much of a file is looked at to tell its format: all headers of usual kernels are in it.
const HEAD_BYTES: usize = 4096;

/// How a kernel starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// PVH: 32 bits, no paging.
    Pvh,
    /// Linux: 32 bits, no paging.
    Linux32,
    /// Linux: 64 bits, the first 4 GiB mapped.
    Linux64,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pvh => "PVH",
            Self::Linux32 => "Linux, 32 bits",
            Self::Linux64 => "Linux, 64 bits",
        })
    }
}

/// A part of the kernel file and its place in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) what: Occupant,
    pub(super) file_offset: u64,
    pub(super) file_bytes: u64,
    pub(super) address: u64,
    /// At least `file_bytes`; the rest is zero.
    pub(super) memory_bytes: u64,
}

/// A kernel whose headers have been checked.
pub(super) struct Kernel {
    pub(super) protocol: Protocol,
    pub(super) entry: u64,
    pub(super) segments: Vec<Segment>,
    /// The longest command line, without its NUL.
    pub(super) cmdline_max: u64,
    /// The end of where the initrd may lie.
    pub(super) initrd_end: u64,
    /// What becomes part of the zero page; unused with PVH.
    pub(super) header: setup_header,
}

impl Kernel {
    pub(super) fn parse(file: &ImageFile<'_>) -> Result<Self, LoadError> {
        let head = file.head(HEAD_BYTES)?;
        if elf::is_elf(&head) {
            elf::parse(file, &head)
        } else if bzimage::is_bzimage(&head) {
            bzimage::parse(file, &head)
        } else {
            Err(LoadError::UnknownFormat { first: head[..head.len().min(8)].to_vec() })
        }
    }

    /// Claims the memory of all segments.
    pub(super) fn claim(&self, placement: &mut Placement) -> Result<(), LoadError> {
        for segment in &self.segments {
            let range = segment.address..segment.address.saturating_add(segment.memory_bytes);
            placement.claim(range, segment.what).map_err(LoadError::Place)?;
        }
        Ok(())
    }
}

/// Little-endian numbers of a header. The caller has checked its length.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn u8(&self, at: usize) -> u8 {
        self.0[at]
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("a slice of N bytes")
    }
}
