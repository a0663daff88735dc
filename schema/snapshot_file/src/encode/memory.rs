//! The memory of a snapshot: its pages that are not those of zeros or, for a layer, not those of the base.

use super::{Piece, SnapshotSource};
use crate::checksum::{Checksum, PagesHasher};
use crate::error::{OpenError, WriteError};
use crate::layout::Part;
use crate::memory::MemorySource;
use crate::{BLOCK, PAGE};
use guest_schema::SnapshotFile;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

/// A page's length in memory.
pub(crate) const PAGE_LENGTH: usize = 4096;
const _: () = assert!(PAGE_LENGTH as u64 == PAGE);
pub(crate) static ZERO_PAGE: [u8; PAGE_LENGTH] = [0; PAGE_LENGTH];

/// The file that a layer is made against.
pub(super) struct Against {
    pub file: Arc<File>,
    pub noted: Checksum,
}

struct Base {
    memory: MemorySource,
    block: Vec<u8>,
    hasher: PagesHasher,
    noted: Checksum,
}

/// What was made.
pub(super) struct Made {
    pub checksum: Checksum,
    pub data_bytes: u64,
    /// Which ranges of bytes are in the layer.
    pub layer: Option<Vec<Range<u64>>>,
}

pub(super) struct MemoryEncoder {
    memory: MemorySource,
    base: Option<Base>,
    bytes: u64,
    /// Up to where pieces have been made.
    at: u64,
    /// What of memory is in the buffer.
    block: Range<u64>,
    buffer: Vec<u8>,
    ready: Ready,
    hasher: PagesHasher,
    data_bytes: u64,
    layer: Vec<Range<u64>>,
}

/// The piece that comes next.
enum Ready {
    Hole(u64),
    Pages(Range<usize>),
}

impl MemoryEncoder {
    pub fn new(source: &SnapshotSource, bytes: u64, against: Option<Against>) -> Result<Self, WriteError> {
        let layer = source.files.get(&SnapshotFile::Layer).cloned();
        let base = against.map(|Against { file, noted }| Base {
            memory: MemorySource::new(file, None, bytes),
            block: Vec::new(),
            hasher: PagesHasher::default(),
            noted,
        });
        Ok(Self {
            memory: MemorySource::new(source.file(SnapshotFile::Memory)?.clone(), layer, bytes),
            base,
            bytes,
            at: 0,
            block: 0..0,
            buffer: vec![0; BLOCK],
            ready: Ready::Hole(0),
            hasher: PagesHasher::default(),
            data_bytes: 0,
            layer: Vec::new(),
        })
    }

    /// Makes the next piece; whether there is one.
    pub fn fill(&mut self) -> Result<bool, WriteError> {
        if self.at == self.bytes {
            return Ok(false);
        }
        if self.at >= self.block.end {
            self.read_block()?;
        }
        if self.at < self.block.start {
            self.ready = Ready::Hole(self.block.start - self.at);
            self.at = self.block.start;
            return Ok(true);
        }
        let from = usize::try_from(self.at - self.block.start).expect("within a block");
        let to = usize::try_from(self.block.end - self.block.start).expect("within a block");
        let (kept, length) = self.run(from..to);
        self.ready = if kept { self.keep(from..from + length) } else { Ready::Hole(length as u64) };
        self.at += length as u64;
        Ok(true)
    }

    pub fn piece(&self) -> Piece<'_> {
        match &self.ready {
            Ready::Hole(bytes) => Piece::Zeros(*bytes),
            Ready::Pages(range) => Piece::Bytes(&self.buffer[range.clone()]),
        }
    }

    fn read_block(&mut self) -> Result<(), WriteError> {
        let mut block = self.memory.next(self.at).map_err(read_memory)?;
        if let Some(base) = &mut self.base {
            let other = base.memory.next(self.at).map_err(read_base)?;
            block = joined(block, other);
        }
        // A file system's blocks may be smaller than pages.
        let start = block.start / PAGE * PAGE;
        self.block = start..block.end.next_multiple_of(PAGE).min(start + BLOCK as u64).min(self.bytes);
        let buffer = &mut self.buffer[..usize::try_from(self.block.end - self.block.start).expect("a block")];
        self.memory.read(self.block.start, buffer).map_err(read_memory)?;
        match &mut self.base {
            Some(base) => base.read(&self.block),
            None => Ok(()),
        }
    }

    /// Whether the first page of a part of the block is kept, and for how many bytes that is so.
    fn run(&self, part: Range<usize>) -> (bool, usize) {
        let is_kept = |at: usize| {
            let page = at..at + PAGE_LENGTH;
            let other = self.base.as_ref().map_or(&ZERO_PAGE[..], |base| &base.block[page.clone()]);
            self.buffer[page] != *other
        };
        let kept = is_kept(part.start);
        let end = part.clone().step_by(PAGE_LENGTH).find(|at| is_kept(*at) != kept);
        (kept, end.unwrap_or(part.end) - part.start)
    }

    fn keep(&mut self, part: Range<usize>) -> Ready {
        self.hasher.add(self.at, &self.buffer[part.clone()]);
        let end = self.at + part.len() as u64;
        self.data_bytes += part.len() as u64;
        match self.layer.last_mut() {
            Some(last) if last.end == self.at => last.end = end,
            _ if self.base.is_some() => self.layer.push(self.at..end),
            _ => {}
        }
        Ready::Pages(part)
    }

    pub fn finish(self) -> Result<Made, WriteError> {
        let layer = self.base.map(|base| base.check().map(|()| self.layer)).transpose()?;
        Ok(Made { checksum: self.hasher.finish(), data_bytes: self.data_bytes, layer })
    }
}

/// The first of both, with as much of the other as is read with it; both are of a block at most.
fn joined(one: Range<u64>, other: Range<u64>) -> Range<u64> {
    let (first, second) = if one.start <= other.start { (one, other) } else { (other, one) };
    let end = if second.start <= first.end { first.end.max(second.end) } else { first.end };
    let most = first.start.saturating_add(BLOCK as u64);
    if first.is_empty() { second } else { first.start..end.min(most) }
}

fn read_memory(error: std::io::Error) -> WriteError {
    WriteError::read(SnapshotFile::Memory)(error)
}

fn read_base(error: std::io::Error) -> WriteError {
    WriteError::BadBase(OpenError::read(Part::Memory.name())(error))
}

impl Base {
    fn read(&mut self, block: &Range<u64>) -> Result<(), WriteError> {
        self.block.resize(usize::try_from(block.end - block.start).expect("a block"), 0);
        self.memory.read(block.start, &mut self.block).map_err(read_base)?;
        for (offset, page) in (block.start..).step_by(PAGE_LENGTH).zip(self.block.chunks(PAGE_LENGTH)) {
            if *page != ZERO_PAGE[..] {
                self.hasher.add(offset, page);
            }
        }
        Ok(())
    }

    fn check(self) -> Result<(), WriteError> {
        let (found, noted) = (self.hasher.finish(), self.noted);
        if found == noted {
            return Ok(());
        }
        Err(WriteError::BadBase(OpenError::Checksum { part: Part::Memory.name(), found, noted }))
    }
}
