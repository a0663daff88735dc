//! Why there is no guest memory, or none that can be frozen or restored.

use super::{HUGE_PAGE_BYTES, MINIMUM_BYTES};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::io;

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

impl MemoryError {
    /// The error of a call, for memory of so many bytes.
    pub(super) fn system(call: &'static str, bytes: u64) -> impl FnOnce(Errno) -> Self {
        move |error| Self::System { call, bytes, source: error.into() }
    }

    pub(super) fn no_huge_pages(bytes: u64) -> impl FnOnce(Errno) -> Self {
        move |error| Self::NoHugePages { pages: bytes / HUGE_PAGE_BYTES, source: error.into() }
    }

    pub(super) fn lock(bytes: u64) -> impl FnOnce(Errno) -> Self {
        let limit = getrlimit(Resource::Memlock).current;
        let limit = limit.map_or_else(|| "none".to_owned(), |limit| format!("{limit} bytes"));
        move |error| Self::Lock { bytes, limit, source: error.into() }
    }
}

/// Why memory is not frozen. It is as it was before, and may be frozen later.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The host does not tell which pages the guest has written.
    #[error("the pages that were written since the last freeze cannot be told (/proc/self/pagemap)")]
    Scan(#[source] io::Error),
    /// Memory cannot be copied: the host has too little of it.
    #[error("the guest's memory cannot be copied")]
    Copy(#[source] io::Error),
    /// Memory cannot be mapped anew.
    #[error("the guest's memory cannot be mapped privately")]
    Map(#[source] io::Error),
    /// The frozen memory cannot be protected from writing: somebody has it mapped.
    #[error("the frozen memory cannot be sealed")]
    Seal(#[source] io::Error),
}

/// What is wrong with a descriptor that memory was to be restored from.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is a folder, a socket, a device or the like.
    #[error("is not a regular file")]
    NotAFile,
    /// It was opened for writing alone.
    #[error("was not opened for reading")]
    NotReadable,
    /// It can still be written or cut short.
    #[error("is not sealed: {missing} is missing")]
    NotSealed {
        /// The names of the seals that it lacks.
        missing: String,
    },
    /// It does not have the memory's size.
    #[error("has {bytes} bytes, but the memory has {expected}")]
    Size {
        /// The file's size.
        bytes: u64,
        /// The memory's size, with the region for what is plugged later.
        expected: u64,
    },
    /// The system does not tell what it is.
    #[error("cannot be looked at")]
    Stat(#[source] io::Error),
}

/// Which part of an image is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImagePart {
    /// What all of the memory was once.
    Base,
    /// The pages that differ.
    Layer,
}

impl std::fmt::Display for ImagePart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Base => "base",
            Self::Layer => "layer",
        })
    }
}

/// Why memory is not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreMemoryError {
    /// There is no memory to restore into.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A descriptor is not one of this memory's image. Nothing has changed.
    #[error("the memory image's {part} {source}")]
    Image {
        /// Which one.
        part: ImagePart,
        /// What is wrong with it.
        source: ImageError,
    },
    /// An image cannot be read or mapped.
    #[error("the memory image's {part} cannot be mapped")]
    Map {
        /// Which part.
        part: ImagePart,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}
