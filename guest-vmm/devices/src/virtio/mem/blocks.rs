//! Which blocks of a memory device are plugged.

use super::Geometry;
use std::ops::Range;

/// A bit for each block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    bits: Vec<u8>,
    count: usize,
    plugged: usize,
}

impl Blocks {
    /// All unplugged.
    pub fn new(geometry: &Geometry) -> Self {
        let count = geometry.blocks();
        Self { bits: vec![0; count.div_ceil(8)], count, plugged: 0 }
    }

    /// As [`bits`](Self::bits) gave them; `None` if there are too few or too many.
    pub fn from_bits(geometry: &Geometry, bits: &[u8]) -> Option<Self> {
        let count = geometry.blocks();
        let beyond =
            |bits: &[u8]| (count..bits.len() * 8).any(|block| bits[block / 8] >> (block % 8) & 1 == 1);
        let fits = bits.len() == count.div_ceil(8) && !beyond(bits);
        let plugged = bits.iter().map(|byte| byte.count_ones() as usize).sum();
        fits.then(|| Self { bits: bits.to_vec(), count, plugged })
    }

    /// Bit n of byte m is block 8 m + n.
    pub fn bits(&self) -> &[u8] {
        &self.bits
    }

    /// How many are plugged.
    pub fn plugged(&self) -> usize {
        self.plugged
    }

    pub fn is_plugged(&self, block: usize) -> bool {
        self.bits[block / 8] >> (block % 8) & 1 == 1
    }

    /// How many of these are plugged.
    pub fn plugged_of(&self, blocks: Range<usize>) -> usize {
        blocks.filter(|block| self.is_plugged(*block)).count()
    }

    /// Plugs or unplugs them.
    pub fn set(&mut self, blocks: Range<usize>, plugged: bool) {
        self.plugged -= self.plugged_of(blocks.clone());
        self.plugged += if plugged { blocks.len() } else { 0 };
        for block in blocks {
            let bit = 1 << (block % 8);
            self.bits[block / 8] = self.bits[block / 8] & !bit | if plugged { bit } else { 0 };
        }
    }

    /// Unplugs all.
    pub fn clear(&mut self) {
        self.set(0..self.count, false);
    }
}
