//! Free RAM: what the memory map calls RAM, above the image, without what the VMM has put there.

use core::ptr::{with_exposed_provenance_mut, write_volatile};

use crate::address_space;
use crate::start_info::{Range, StartInfo};

/// Bytes per page.
pub const PAGE: u64 = 4096;

/// Page 0 is left to the VMM, which may keep its own tables there.
const LOWEST: u64 = PAGE;
const ONE_MIB: u64 = 1 << 20;
const LEGACY_DEVICES: u64 = 0xa_0000;

unsafe extern "C" {
    static image_end: u8;
}

/// The RAM that is free, and where its unused part begins.
pub struct Ram<'s> {
    start_info: &'s StartInfo,
    next: u64,
}

impl<'s> Ram<'s> {
    /// All RAM above the image.
    pub fn new(start_info: &'s StartInfo) -> Self {
        Self { start_info, next: (&raw const image_end).addr() as u64 }
    }

    /// Takes consecutive pages for good and clears them; `None` if there are not that many.
    pub fn take(&mut self, pages: u64) -> Option<u64> {
        let mut start = self.free_page(self.next)?;
        let mut end = start;
        while end < start + pages * PAGE {
            let page = self.free_page(end).filter(|page| address_space::is_mapped(*page))?;
            if page != end {
                start = page;
            }
            end = page + PAGE;
        }
        self.next = end;
        // SAFETY: free and mapped; nobody else knows of it.
        unsafe { with_exposed_provenance_mut::<u8>(start as usize).write_bytes(0, (pages * PAGE) as usize) }
        Some(start)
    }

    /// Writes one byte to each of the next `pages` free pages; returns how many there were.
    pub fn touch(&mut self, pages: u64) -> u64 {
        let mut touched = 0;
        let mut from = self.next;
        while touched < pages {
            let Some(page) = self.free_page(from).filter(|page| self.reach(*page)) else { break };
            // SAFETY: free and mapped now.
            unsafe { write_volatile(with_exposed_provenance_mut(page as usize), (page / PAGE) as u8 | 1) }
            touched += 1;
            from = page + PAGE;
        }
        touched
    }

    /// A free page of conventional memory, where a VP can start in real mode.
    pub fn real_mode_page(&self) -> Option<u64> {
        self.free_page(LOWEST).filter(|page| *page < LEGACY_DEVICES)
    }

    /// Maps the page if it is not; `false` if it is out of reach.
    fn reach(&mut self, page: u64) -> bool {
        if address_space::is_mapped(page) {
            return true;
        }
        let table = if page < address_space::REACH { self.take(1) } else { None };
        table.inspect(|table| address_space::map_with(page, *table)).is_some()
    }

    /// The first free page at or after an address.
    fn free_page(&self, from: u64) -> Option<u64> {
        let mut page = from.next_multiple_of(PAGE);
        while let Some(behind) = self.taken_until(page) {
            page = behind.next_multiple_of(PAGE);
        }
        let ram = self.start_info.memory_map.all().iter().filter(|range| range.is_ram());
        if ram.clone().any(|range| range.start <= page && page + PAGE <= range.end) {
            return Some(page);
        }
        let next = ram.map(|range| range.start.next_multiple_of(PAGE)).filter(|start| *start > page).min()?;
        self.free_page(next)
    }

    /// The end of something that the VMM has put into this page, or of the image.
    fn taken_until(&self, page: u64) -> Option<u64> {
        let image = Range::of(ONE_MIB, (&raw const image_end).addr() as u64 - ONE_MIB);
        let info = self.start_info;
        let taken = info.modules.all().iter().chain(info.origin.all());
        let mut taken = taken.chain(core::iter::once(&image)).filter(|range| range.bytes() > 0);
        taken.find(|range| range.start < page + PAGE && page < range.end).map(|range| range.end)
    }
}
