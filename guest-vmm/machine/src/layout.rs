//! The memory map: every guest physical address and port that the machine decides on.
//!
//! | from | to | what |
//! | --- | --- | --- |
//! | `0x0000_0500` | `0x0000_0530` | [`GDT`] for the first instructions |
//! | `0x0000_6000` | `0x0000_7000` | [`PVH_START_INFO`] with its module list and memory map |
//! | `0x0000_7000` | `0x0000_8000` | [`ZERO_PAGE`]: Linux's boot parameters |
//! | `0x0000_9000` | `0x0000_f000` | [`PAGE_TABLES`]: the first 4 GiB, identical |
//! | `0x0002_0000` | `0x0003_0000` | [`COMMAND_LINE`] |
//! | `0x000a_0000` | `0x000e_0000` | memory that is not announced: a PC has its VGA there |
//! | `0x000e_0000` | `0x000f_e000` | [`ACPI_AREA`]: RSDP and tables, where a PC has its BIOS |
//! | `0x000f_e000` | `0x000f_f000` | [`GENERATION_ID`]: a page of its own, as its specification wants it |
//! | `0x000f_fff0` | `0x0010_0000` | [`RESET_VECTOR`]: what of a BIOS guests jump to |
//! | `0x0010_0000` | `0xc000_0000` | memory, up to [`LOW_MEMORY_END`] |
//! | `0xc000_0000` | `0x1_0000_0000` | no memory: registers |
//! | `0xd000_0000` | `0xd100_0000` | [`DEVICE_WINDOWS`]: memory-mapped devices |
//! | `0xfec0_0000` | `0xfec0_1000` | [`IOAPIC`] |
//! | `0xfee0_0000` | `0xfee0_1000` | [`LOCAL_APIC`] |
//! | `0xfffb_c000` | `0xfffc_0000` | [`HYPERVISOR_PAGES`]: what KVM needs for real mode on Intel |
//! | `0x1_0000_0000` | | the rest of the memory, from [`HIGH_MEMORY`] |
//!
//! Below the first megabyte everything from 0x500 to 0xa0000 that the table leaves out is free for kernels.

use devices::PIN_COUNT;
use std::ops::{Range, RangeInclusive};

/// The global descriptor table for the first instructions.
pub const GDT: Range<u64> = 0x500..0x530;
/// PVH's start info, its module list and its memory map.
pub const PVH_START_INFO: Range<u64> = 0x6000..0x7000;
/// Linux's boot parameters.
pub const ZERO_PAGE: Range<u64> = 0x7000..0x8000;
/// PML4, PDPT and four page directories that map the first 4 GiB to themselves.
pub const PAGE_TABLES: Range<u64> = 0x9000..0xf000;
/// The kernel command line with its NUL.
pub const COMMAND_LINE: Range<u64> = 0x2_0000..0x3_0000;
/// Where the memory below the first megabyte ends that kernels may use.
pub const CONVENTIONAL_MEMORY_END: u64 = 0xa_0000;
/// The ACPI tables; the RSDP is the first.
pub const ACPI_AREA: Range<u64> = 0xe_0000..0xf_e000;
/// The page that begins with the VM generation ID.
pub const GENERATION_ID: Range<u64> = 0xf_e000..0xf_f000;
/// The address `0xffff:0` of real mode, where a PC starts; guests jump there to start it anew.
pub const RESET_VECTOR: Range<u64> = 0xf_fff0..0x10_0000;
/// Where the memory begins that kernels are usually loaded to.
pub const EXTENDED_MEMORY: u64 = 0x10_0000;
/// Where the memory below 4 GiB ends at most.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// The windows of memory-mapped devices.
pub const DEVICE_WINDOWS: Range<u64> = 0xd000_0000..0xd100_0000;
/// The IOAPIC's pins of memory-mapped devices. Those below are a PC's.
pub const DEVICE_PINS: RangeInclusive<u8> = 24..=PIN_COUNT - 1;
/// The IOAPIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Pages that the hypervisor uses for itself: KVM's identity map and TSS.
pub const HYPERVISOR_PAGES: Range<u64> = 0xfffb_c000..0xfffc_0000;
/// Where the memory above the hole begins.
pub const HIGH_MEMORY: u64 = 0x1_0000_0000;

/// Ports and the interrupt of the first serial port.
pub const COM1_PORT: u16 = 0x3f8;
/// See [`COM1_PORT`].
pub const COM1_IRQ: u8 = 4;
/// The ports of a PC's other serial ports, where there is none.
pub const ABSENT_SERIAL_PORTS: [(&str, u16); 3] = [("com2", 0x2f8), ("com3", 0x3e8), ("com4", 0x2e8)];
/// The keyboard controller and port B.
pub const I8042_PORT: u16 = 0x60;
/// The real-time clock.
pub const RTC_PORT: u16 = 0x70;
/// The registers for power-off and reset.
pub const ACPI_POWER_PORT: u16 = 0x600;
/// The Generic Event Device, and its interrupt.
pub const GENERIC_EVENT_PORT: u16 = 0x604;
/// See [`GENERIC_EVENT_PORT`].
pub const GENERIC_EVENT_IRQ: u8 = 9;
/// pvpanic, where QEMU has it.
pub const PVPANIC_PORT: u16 = 0x505;
/// The debug-exit port of test guests, where QEMU's users have it.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// A page of memory, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Where a guest's memory of this many bytes lies: one range, or two around the hole.
pub fn memory_ranges(bytes: u64) -> Vec<Range<u64>> {
    let low = bytes.min(LOW_MEMORY_END);
    let high = HIGH_MEMORY..HIGH_MEMORY.saturating_add(bytes - low);
    [0..low, high].into_iter().filter(|range| !range.is_empty()).collect()
}

/// Where memory can be plugged later beside a guest's memory of so many bytes: so much, at a multiple of the alignment. Above all of
/// the other memory.
pub fn hotplug_region(memory_bytes: u64, bytes: u64, alignment: u64) -> Range<u64> {
    let above = memory_ranges(memory_bytes).last().map_or(HIGH_MEMORY, |range| range.end.max(HIGH_MEMORY));
    let start = above.next_multiple_of(alignment);
    start..start.saturating_add(bytes)
}

/// How a kernel may use a range of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryUse {
    /// Freely.
    Ram,
    /// Not at all.
    Reserved,
}

/// The memory map that kernels are told, in ascending order, for memory that lies in the given ranges.
pub fn announced_memory(memory: &[Range<u64>]) -> Vec<(Range<u64>, MemoryUse)> {
    let firmware = ACPI_AREA.start..RESET_VECTOR.end;
    let mut map = vec![(0..CONVENTIONAL_MEMORY_END, MemoryUse::Ram), (firmware, MemoryUse::Reserved)];
    let above = memory.iter().map(|range| range.start.max(EXTENDED_MEMORY)..range.end);
    map.extend(above.filter(|range| !range.is_empty()).map(|range| (range, MemoryUse::Ram)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(memory_ranges(GIB), std::slice::from_ref(&(0..GIB)));
        assert_eq!(memory_ranges(3 * GIB), std::slice::from_ref(&(0..3 * GIB)));
        assert_eq!(memory_ranges(5 * GIB), [0..3 * GIB, 4 * GIB..6 * GIB]);
    }

    #[test]
    fn memory_for_later_is_above_all_other() {
        assert_eq!(hotplug_region(GIB, GIB, 1 << 27), 4 * GIB..5 * GIB);
        assert_eq!(hotplug_region(5 * GIB, GIB, 4 * GIB), 8 * GIB..9 * GIB);
    }

    #[test]
    fn the_first_megabyte_alone_is_announced() {
        let low = vec![(0..0xa_0000, MemoryUse::Ram), (0xe_0000..0x10_0000, MemoryUse::Reserved)];
        assert_eq!(announced_memory(&memory_ranges(1 << 20)), low);
    }

    #[test]
    fn nothing_in_the_table_overlaps() {
        let windows = [
            GDT,
            PVH_START_INFO,
            ZERO_PAGE,
            PAGE_TABLES,
            COMMAND_LINE,
            CONVENTIONAL_MEMORY_END..ACPI_AREA.start,
            ACPI_AREA,
            GENERATION_ID,
            RESET_VECTOR,
            EXTENDED_MEMORY..LOW_MEMORY_END,
            DEVICE_WINDOWS,
            IOAPIC..IOAPIC + 0x1000,
            LOCAL_APIC..LOCAL_APIC + 0x1000,
            HYPERVISOR_PAGES,
            HIGH_MEMORY..u64::MAX,
        ];
        assert!(windows.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}
