//! What can go wrong with a snapshot's file.

use crate::checksum::Checksum;
use guest_schema::SnapshotFile;
use std::io;

/// Why a file was not opened as a snapshot's, or its memory not found whole.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It could not be read there.
    #[error("{part}: it cannot be read")]
    Read {
        /// Which part.
        part: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It does not end as a snapshot's file does.
    #[error("it is no snapshot's file, or its end is missing: the last of its {bytes} bytes are no footer")]
    NotASnapshot {
        /// How long it is.
        bytes: u64,
    },
    /// It is of another version of the format.
    #[error("footer: its format is {format}, and {known} is known here")]
    Format {
        /// Its version.
        format: u32,
        /// The one that is known.
        known: u32,
    },
    /// A part is not what was written.
    #[error("{part}: its checksum is {found}, and {noted} is noted for it")]
    Checksum {
        /// Which part.
        part: &'static str,
        /// The checksum of what is there.
        found: Checksum,
        /// The one of what was written.
        noted: Checksum,
    },
    /// A field has a value that it cannot have.
    #[error("{part}: {field}: {problem}")]
    Field {
        /// In which part.
        part: &'static str,
        /// Which field.
        field: String,
        /// The value, and what is wrong with it.
        problem: String,
    },
    /// A part is not the message that it should be.
    #[error("{part}: it cannot be decoded")]
    Decode {
        /// Which part.
        part: &'static str,
        /// Why not.
        #[source]
        source: prost::DecodeError,
    },
}

impl OpenError {
    pub(crate) fn read(part: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Read { part, source }
    }

    pub(crate) fn decode(part: &'static str) -> impl Fn(prost::DecodeError) -> Self {
        move |source| Self::Decode { part, source }
    }

    pub(crate) fn field(part: &'static str, field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field { part, field: field.into(), problem: problem.into() }
    }
}

/// Why a snapshot was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A file of the snapshot is missing.
    #[error("the snapshot has no {}", .0.name())]
    Missing(SnapshotFile),
    /// A file of the snapshot could not be read.
    #[error("the snapshot's {} cannot be read", .file.name())]
    Read {
        /// Which one.
        file: SnapshotFile,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What the snapshot has makes no file.
    #[error("the snapshot's {}: {problem}", .file.name())]
    Unfit {
        /// Which of its files.
        file: SnapshotFile,
        /// The value, and what is wrong with it.
        problem: String,
    },
    /// The file that a layer is to be written against is not a base for it.
    #[error("the base: {0}")]
    Base(String),
    /// The base's memory is damaged, or cannot be read.
    #[error("the base cannot be used")]
    BadBase(#[source] OpenError),
    /// The file could not be written.
    #[error("it cannot be written")]
    Output(#[source] io::Error),
    /// Whoever was told of the progress wanted no more.
    #[error("it was ended")]
    Ended,
}

impl WriteError {
    pub(crate) fn read(file: SnapshotFile) -> impl Fn(io::Error) -> Self {
        move |source| Self::Read { file, source }
    }

    pub(crate) fn unfit(file: SnapshotFile, problem: impl Into<String>) -> Self {
        Self::Unfit { file, problem: problem.into() }
    }
}
