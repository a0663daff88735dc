//! Checksums of parts and of memory.

use std::fmt;
use std::ops::Range;
use twox_hash::xxhash3_128::Hasher;

/// XXH3 with 128 bits. It shows as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Checksum([u8; 16]);

impl Checksum {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_number(Hasher::oneshot(bytes))
    }

    /// One that was noted. `None` unless there are 16 bytes.
    pub fn noted(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// As it is noted.
    pub const fn bytes(&self) -> &[u8; 16] {
        &self.0
    }

    const fn from_number(number: u128) -> Self {
        Self(number.to_be_bytes())
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The checksum of bytes as they come.
#[derive(Default)]
pub(crate) struct PartHasher(Hasher);

impl PartHasher {
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    pub fn finish(&self) -> Checksum {
        Checksum::from_number(self.0.finish_128())
    }
}

/// The checksum of the pages of memory that are there. In which pieces they come makes no difference.
#[derive(Default)]
pub(crate) struct PagesHasher {
    hasher: Hasher,
    run: Range<u64>,
}

impl PagesHasher {
    /// Adds pages, which lie behind those that were added before.
    pub fn add(&mut self, offset: u64, pages: &[u8]) {
        if offset != self.run.end {
            self.end_run();
            self.run = offset..offset;
        }
        self.hasher.write(pages);
        self.run.end += pages.len() as u64;
    }

    fn end_run(&mut self) {
        if !self.run.is_empty() {
            self.hasher.write(&self.run.start.to_le_bytes());
            self.hasher.write(&self.run.end.to_le_bytes());
        }
    }

    pub fn finish(mut self) -> Checksum {
        self.end_run();
        Checksum::from_number(self.hasher.finish_128())
    }
}
