//! What memory is to be like: its size, where it lies, how it is allocated.

use super::{HUGE_PAGE_BYTES, MINIMUM_BYTES, MemoryError, MemoryOptions, host_memory_bytes};
use crate::layout::{self, PAGE_BYTES};
use std::ops::Range;

/// Checked against the host's memory.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    /// Without the region for memory that is plugged later.
    pub bytes: u64,
    pub hotplug: Option<Range<u64>>,
    pub options: MemoryOptions,
}

impl Shape {
    pub(super) fn new(
        bytes: u64,
        options: MemoryOptions,
        hotplug: Option<Range<u64>>,
    ) -> Result<Self, MemoryError> {
        let host_bytes = host_memory_bytes();
        let page = if options.huge_pages { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        if bytes < MINIMUM_BYTES {
            return Err(MemoryError::TooSmall { bytes });
        }
        let rounded = bytes.checked_next_multiple_of(page).filter(|rounded| *rounded <= host_bytes);
        let bytes = rounded.ok_or(MemoryError::TooLarge { bytes, host_bytes })?;
        let region = hotplug.as_ref().map_or(0, |region| region.end - region.start);
        let all = bytes.checked_add(region);
        all.ok_or(MemoryError::TooLarge { bytes: region, host_bytes: bytes })?;
        Ok(Self { bytes, hotplug, options })
    }

    /// Where it is, in the order in which it lies in its file.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        layout::memory_ranges(self.bytes).into_iter().chain(self.hotplug.clone()).collect()
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.ranges().iter().map(|range| range.end - range.start).sum()
    }

    pub(super) fn page_bytes(&self) -> u64 {
        if self.options.huge_pages { HUGE_PAGE_BYTES } else { PAGE_BYTES }
    }

    /// How much of the mapping is what firmware tells of.
    pub(super) fn told_bytes(&self) -> usize {
        usize::try_from(self.bytes).expect("part of the mapping")
    }

    /// Whether all of it is to be there before the guest touches it, or in pages that files for images do not have: it cannot show
    /// an image's pages then, and has to copy them.
    pub(super) fn is_eager(&self) -> bool {
        let MemoryOptions { huge_pages, prefault, lock } = self.options;
        huge_pages || prefault || lock
    }

    /// Where guest physical addresses are in the file, if all of them are in one range.
    pub(super) fn file_range(&self, start: u64, bytes: u64) -> Option<Range<u64>> {
        let end = start.checked_add(bytes)?;
        let mut offset = 0;
        for range in self.ranges() {
            if range.start <= start && end <= range.end {
                let start = offset + start - range.start;
                return Some(start..start + bytes);
            }
            offset += range.end - range.start;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_above_the_hole_is_behind_that_below_in_the_file() {
        let options = MemoryOptions::default();
        let range = |bytes, start, count| Shape { bytes, hotplug: None, options }.file_range(start, count);
        assert_eq!(range(MIB, 0, MIB), Some(0..MIB));
        assert_eq!(range(MIB, layout::HIGH_MEMORY, 4096), None);
        assert_eq!(range(5 * GIB, 4 * GIB + 8192, 4096), Some(3 * GIB + 8192..3 * GIB + 12288));
        assert_eq!(range(5 * GIB, 3 * GIB - 4096, 8192), None, "into the hole");
    }
}
