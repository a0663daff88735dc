//! What lies where in guest memory: everything that a load puts there claims its range first.

use super::error::{Occupant, PlaceError};
use crate::layout::{self, MemoryUse};
use std::ops::Range;

/// The usable memory and the claims on it.
pub(super) struct Placement {
    usable: Vec<Range<u64>>,
    claims: Vec<(Range<u64>, Occupant)>,
}

impl Placement {
    /// All of the memory that a kernel is told it may use, unclaimed.
    pub(super) fn new(memory: &[Range<u64>]) -> Self {
        let announced = layout::announced_memory(memory).into_iter();
        let usable = announced.filter(|(_, usage)| *usage == MemoryUse::Ram).map(|(range, _)| range);
        Self { usable: usable.collect(), claims: Vec::new() }
    }

    /// Claims a range. An empty one is always free.
    pub(super) fn claim(&mut self, range: Range<u64>, what: Occupant) -> Result<(), PlaceError> {
        if range.is_empty() {
            return Ok(());
        }
        if !self.usable.iter().any(|usable| usable.start <= range.start && range.end <= usable.end) {
            return Err(PlaceError::Outside { what, range, usable: self.usable.clone() });
        }
        if let Some((other_range, other)) = self.claimed(&range).cloned() {
            return Err(PlaceError::Overlap { what, range, other, other_range });
        }
        self.claims.push((range, what));
        Ok(())
    }

    fn claimed(&self, range: &Range<u64>) -> Option<&(Range<u64>, Occupant)> {
        self.claims.iter().find(|(claim, _)| claim.start < range.end && range.start < claim.end)
    }

    /// The highest aligned address below `end` at which this many bytes are free.
    pub(super) fn highest(&self, bytes: u64, alignment: u64, end: u64) -> Option<u64> {
        let fits = |free: Range<u64>| {
            let address = free.end.checked_sub(bytes)? / alignment * alignment;
            (address >= free.start).then_some(address)
        };
        self.free(end).into_iter().filter_map(fits).max()
    }

    /// The size of the largest free range below `end`.
    pub(super) fn largest(&self, end: u64) -> u64 {
        self.free(end).into_iter().map(|free| free.end - free.start).max().unwrap_or(0)
    }

    /// What is usable below `end` and unclaimed.
    fn free(&self, end: u64) -> Vec<Range<u64>> {
        let below = |range: &Range<u64>| range.start..range.end.min(end);
        let mut free: Vec<_> = self.usable.iter().map(below).filter(|range| !range.is_empty()).collect();
        for (claim, _) in &self.claims {
            free = free.into_iter().flat_map(|range| without(&range, claim)).collect();
        }
        free
    }
}

/// What is left of a range without another: up to two ranges.
fn without(range: &Range<u64>, taken: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let before = range.start..range.end.min(taken.start);
    let after = range.start.max(taken.end)..range.end;
    [before, after].into_iter().filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn claims_have_to_lie_in_usable_memory() {
        let mut placement = Placement::new(&layout::memory_ranges(16 * MIB));
        assert!(placement.claim(MIB..16 * MIB, Occupant::Kernel).is_ok());
        for range in [0..0xa_0001, 0xe_0000..0xe_0001, 16 * MIB..16 * MIB + 1, u64::MAX - 1..u64::MAX] {
            let error = placement.claim(range.clone(), Occupant::Initrd).unwrap_err();
            assert!(matches!(error, PlaceError::Outside { .. }), "{range:x?}: {error}");
        }
    }

    #[test]
    fn an_overlap_names_both() {
        let mut placement = Placement::new(&layout::memory_ranges(16 * MIB));
        placement.claim(MIB..2 * MIB, Occupant::Segment(1)).unwrap();
        let error = placement.claim(2 * MIB - 1..3 * MIB, Occupant::Segment(2)).unwrap_err();
        let text = "kernel segment 2 needs 0x1fffff..0x300000, but 0x100000..0x200000 holds kernel segment 1";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn the_highest_place_is_below_claims_and_the_end() {
        let mut placement = Placement::new(&layout::memory_ranges(16 * MIB));
        assert_eq!(placement.highest(100, 4096, u64::MAX), Some(16 * MIB - 4096));
        placement.claim(12 * MIB..16 * MIB, Occupant::Kernel).unwrap();
        assert_eq!(placement.highest(MIB, 4096, u64::MAX), Some(11 * MIB));
        assert_eq!(placement.highest(MIB, 4096, 4 * MIB), Some(3 * MIB));
        assert_eq!(placement.highest(12 * MIB, 4096, u64::MAX), None);
        assert_eq!(placement.largest(u64::MAX), 11 * MIB);
    }

    proptest! {
        #[test]
        fn a_place_found_can_be_claimed(
            claims in prop::collection::vec((0u64..4096, 1u64..300), 0..20), bytes in 1u64..MIB, end in 0..20 * MIB,
        ) {
            let mut placement = Placement::new(&layout::memory_ranges(16 * MIB));
            for (page, pages) in claims {
                let _ = placement.claim(page * 4096..(page + pages) * 4096, Occupant::Kernel);
            }
            if let Some(address) = placement.highest(bytes, 4096, end) {
                prop_assert!(address % 4096 == 0 && address + bytes <= end);
                prop_assert!(placement.claim(address..address + bytes, Occupant::Initrd).is_ok());
            } else {
                // What is free may still be too small once it is aligned.
                prop_assert!(placement.largest(end) < bytes + 4096);
            }
        }
    }
}
