//! A part that is not memory.

use super::Piece;
use crate::checksum::PartHasher;
use crate::error::WriteError;
use crate::layout::Part;
use crate::{BLOCK, Checksum};
use guest_schema::SnapshotFile;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// What is in a part.
pub(super) enum Body {
    Bytes(Vec<u8>),
    File { file: Arc<File>, bytes: u64, of: SnapshotFile },
}

impl Body {
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { bytes, .. } => *bytes,
        }
    }
}

pub(super) struct PartEncoder {
    /// `None` for the file's end.
    pub part: Option<Part>,
    pub start: u64,
    /// How many zeros come before it.
    padding: u64,
    body: Body,
    /// How much of it was read.
    read: u64,
    buffer: Vec<u8>,
    ready: Range<usize>,
    hasher: PartHasher,
}

impl PartEncoder {
    pub fn new(part: Option<Part>, start: u64, padding: u64, body: Body) -> Self {
        Self {
            part,
            start,
            padding,
            body,
            read: 0,
            buffer: Vec::new(),
            ready: 0..0,
            hasher: PartHasher::default(),
        }
    }

    pub fn checksum(&self) -> Checksum {
        self.hasher.finish()
    }

    /// Reads on; whether there was more.
    pub fn fill(&mut self) -> Result<bool, WriteError> {
        if self.padding > 0 {
            return Ok(true);
        }
        let length = usize::try_from(self.body.bytes() - self.read).unwrap_or(BLOCK).min(BLOCK);
        match &self.body {
            Body::Bytes(bytes) => {
                let from = usize::try_from(self.read).expect("it is in memory");
                self.ready = from..from + length;
                self.hasher.add(&bytes[self.ready.clone()]);
            }
            Body::File { file, of, .. } => {
                self.buffer.resize(length, 0);
                file.read_exact_at(&mut self.buffer, self.read).map_err(WriteError::read(*of))?;
                self.ready = 0..length;
                self.hasher.add(&self.buffer);
            }
        }
        self.read += length as u64;
        Ok(length > 0)
    }

    /// What was read.
    pub fn piece(&mut self) -> Piece<'_> {
        match (std::mem::take(&mut self.padding), &self.body) {
            (0, Body::Bytes(bytes)) => Piece::Bytes(&bytes[self.ready.clone()]),
            (0, Body::File { .. }) => Piece::Bytes(&self.buffer[self.ready.clone()]),
            (padding, _) => Piece::Zeros(padding),
        }
    }
}
