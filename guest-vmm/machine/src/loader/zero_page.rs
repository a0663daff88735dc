//! Linux's zero page: `struct boot_params` (`Documentation/arch/x86/zero-page.rst`).

use super::error::{LoadError, Occupant};
use super::{BootInfo, write as write_structure};
use crate::layout::{self, MemoryUse};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use std::ops::Range;
use vm_memory::{ByteValued, GuestMemoryMmap};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const LOADER_UNDEFINED: u8 = 0xff;
const VIDEO_MODE_NORMAL: u16 = 0xffff;

/// The header for a kernel whose file has none: what Linux looks at in it.
pub(super) fn header_without_image() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20c,
        loadflags: 1,
        kernel_alignment: 0x100_0000,
        ..setup_header::default()
    }
}

/// Writes the zero page, from the header of the kernel's file.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    header: setup_header,
    boot: &BootInfo,
) -> Result<(), LoadError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: boot.rsdp, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.vid_mode = VIDEO_MODE_NORMAL;
    params.hdr.cmd_line_ptr = low(layout::COMMAND_LINE.start);
    if let Some(initrd) = &boot.initrd {
        params.hdr.ramdisk_image = low(initrd.start);
        params.hdr.ramdisk_size = low(initrd.end - initrd.start);
    }
    let mut table = params.e820_table;
    for (entry, (range, usage)) in table.iter_mut().zip(&boot.announced) {
        *entry = e820(range, *usage);
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(boot.announced.len()).expect("two ranges more than the memory has");
    write_structure(memory, Occupant::ZeroPage, layout::ZERO_PAGE.start, params.as_slice())
}

fn e820(range: &Range<u64>, usage: MemoryUse) -> boot_e820_entry {
    let kind = match usage {
        MemoryUse::Ram => E820_RAM,
        MemoryUse::Reserved => E820_RESERVED,
    };
    boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: kind }
}

fn low(address: u64) -> u32 {
    u32::try_from(address).expect("the kernel's limit for the initrd is below 4 GiB, and so is the layout")
}
