//! What can be wrong with a kernel, an initrd or a command line.

use crate::layout;
use std::fmt;
use std::io;
use std::ops::Range;
use vm_memory::GuestMemoryError;

/// Which file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        })
    }
}

/// What lies in a range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occupant {
    /// A segment of the kernel, by its number among the file's program headers.
    Segment(usize),
    /// The kernel, with the memory that it unpacks itself into.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// The kernel command line.
    CommandLine,
    /// Linux's boot parameters.
    ZeroPage,
    /// PVH's start info.
    StartInfo,
    /// The first page tables.
    PageTables,
    /// The first global descriptor table.
    Gdt,
}

impl fmt::Display for Occupant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Segment(number) => return write!(f, "kernel segment {number}"),
            Self::Kernel => "the kernel",
            Self::Initrd => "the initrd",
            Self::CommandLine => "the command line",
            Self::ZeroPage => "the zero page",
            Self::StartInfo => "the PVH start info",
            Self::PageTables => "the first page tables",
            Self::Gdt => "the first GDT",
        })
    }
}

/// Why something cannot lie where it has to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// There is no memory that it may use, or not as much.
    #[error("{what} needs {:#x}..{:#x}, usable memory is {}", .range.start, .range.end, ranges(.usable))]
    Outside {
        /// What has to lie there.
        what: Occupant,
        /// Where.
        range: Range<u64>,
        /// Where there is memory that it may use.
        usable: Vec<Range<u64>>,
    },
    /// Something else lies there.
    #[error(
        "{what} needs {:#x}..{:#x}, but {:#x}..{:#x} holds {other}",
        .range.start, .range.end, .other_range.start, .other_range.end
    )]
    Overlap {
        /// What has to lie there.
        what: Occupant,
        /// Where.
        range: Range<u64>,
        /// What lies there.
        other: Occupant,
        /// Where.
        other_range: Range<u64>,
    },
}

fn ranges(ranges: &[Range<u64>]) -> String {
    let shown: Vec<_> = ranges.iter().map(|range| format!("{:#x}..{:#x}", range.start, range.end)).collect();
    shown.join(" and ")
}

/// Why a guest cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Neither a regular file nor a memfd.
    #[error("{file}: {found} cannot be loaded, only a regular file or a memfd")]
    NotRegular {
        /// Which file.
        file: FileKind,
        /// What it is.
        found: &'static str,
    },
    /// The file is empty.
    #[error("{file}: the file is empty")]
    Empty {
        /// Which file.
        file: FileKind,
    },
    /// The file ends before something that it has to hold.
    #[error("{file}: truncated: {what} ends at byte {end}, the file at byte {bytes}")]
    Truncated {
        /// Which file.
        file: FileKind,
        /// What is cut.
        what: &'static str,
        /// Where it ends.
        end: u64,
        /// Where the file ends.
        bytes: u64,
    },
    /// The file cannot be read.
    #[error("{file}: cannot read {bytes} bytes at {offset}")]
    Read {
        /// Which file.
        file: FileKind,
        /// Where.
        offset: u64,
        /// How much.
        bytes: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel is in no format that is known.
    #[error("kernel: neither an ELF file nor a bzImage: it begins with {first:02x?}")]
    UnknownFormat {
        /// The file's first bytes, up to eight.
        first: Vec<u8>,
    },
    /// A field of the kernel's headers has a value that cannot be served.
    #[error("kernel: {format} field {field} is {value:#x}: {reason}")]
    Field {
        /// ELF or bzImage.
        format: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The kernel starts outside of what it loads.
    #[error("kernel: entry {entry:#x} is in no loaded segment")]
    EntryOutside {
        /// The guest physical address.
        entry: u64,
    },
    /// Something does not fit.
    #[error(transparent)]
    Place(PlaceError),
    /// The initrd does not fit beside the kernel.
    #[error(
        "initrd: {bytes} bytes do not fit below {end:#x}: the largest free range there has {largest} bytes"
    )]
    InitrdTooLarge {
        /// Its size.
        bytes: u64,
        /// The end of what the kernel can reach.
        end: u64,
        /// What is free in one piece, in bytes.
        largest: u64,
    },
    /// The command line is longer than the kernel's limit.
    #[error("command line: {bytes} bytes, the kernel takes {limit}")]
    CommandLineTooLong {
        /// Its size.
        bytes: u64,
        /// The kernel's limit, at most what [`layout::COMMAND_LINE`] holds.
        limit: u64,
    },
    /// The command line has a NUL within it.
    #[error("command line: NUL at byte {position}")]
    CommandLineNul {
        /// Where.
        position: usize,
    },
    /// The guest's memory does not hold what the machine's layout puts there.
    #[error("cannot write {what} at {address:#x}")]
    Memory {
        /// What.
        what: Occupant,
        /// Where.
        address: u64,
        /// What the memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// The longest command line that the layout holds, without its NUL.
pub(super) const CMDLINE_MAX: u64 = layout::COMMAND_LINE.end - layout::COMMAND_LINE.start - 1;
