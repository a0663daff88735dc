//! Linux's bzImage (`Documentation/arch/x86/boot.rst`): the protected-mode kernel goes to its preferred address and unpacks itself.
//!
//! Offsets below are those of the document, from the beginning of the file.

use super::error::{CMDLINE_MAX, LoadError, Occupant};
use super::file::ImageFile;
use super::kernel::{Fields, Kernel, Protocol, Segment};
use crate::layout::EXTENDED_MEMORY;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

const HEADER_START: usize = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: &[u8] = b"HdrS";

/// The first version that tells its command line's limit.
const VERSION_MINIMUM: u16 = 0x206;
/// The first version that tells its preferred address and how much memory it needs there.
const VERSION_PREFERRED_ADDRESS: u16 = 0x20a;
/// The first version with the flags that tell of a 64-bit entry.
const VERSION_EXTENDED_FLAGS: u16 = 0x20c;

const LOADED_HIGH: u8 = 1 << 0;
const KERNEL_64: u16 = 1 << 0;
const ENTRY_64_OFFSET: u64 = 0x200;
const SECTOR_BYTES: u64 = 512;
const PARAGRAPH_BYTES: u64 = 16;

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(0x202..0x206) == Some(MAGIC)
}

fn bad_field(field: &'static str, value: impl Into<u64>, reason: &'static str) -> LoadError {
    LoadError::Field { format: "bzImage", field, value: value.into(), reason }
}

pub(super) fn parse(file: &ImageFile<'_>, head: &[u8]) -> Result<Kernel, LoadError> {
    file.check(0, HEADER_START as u64 + size_of::<setup_header>() as u64, "the setup header")?;
    let fields = Fields(head);
    check_header(&fields)?;
    let header = header(head);
    let segment = segment(file, &fields)?;
    let long_mode = fields.u16(0x206) >= VERSION_EXTENDED_FLAGS && fields.u16(0x236) & KERNEL_64 != 0;
    let (protocol, entry_offset) =
        if long_mode { (Protocol::Linux64, ENTRY_64_OFFSET) } else { (Protocol::Linux32, 0) };
    if entry_offset >= segment.file_bytes {
        return Err(LoadError::EntryOutside { entry: segment.address.saturating_add(entry_offset) });
    }
    Ok(Kernel {
        protocol,
        entry: segment.address + entry_offset,
        segments: vec![segment],
        cmdline_max: u64::from(fields.u32(0x238)).min(CMDLINE_MAX),
        initrd_end: u64::from(fields.u32(0x22c)) + 1,
        header,
    })
}

fn check_header(fields: &Fields<'_>) -> Result<(), LoadError> {
    let (boot_flag, version, flags) = (fields.u16(0x1fe), fields.u16(0x206), fields.u8(0x211));
    if boot_flag != BOOT_FLAG {
        return Err(bad_field("boot_flag", boot_flag, "it has to be 0xaa55"));
    }
    if version < VERSION_MINIMUM {
        return Err(bad_field("version", version, "protocol 2.06 is the oldest that can be loaded"));
    }
    if flags & LOADED_HIGH == 0 {
        return Err(bad_field("loadflags", flags, "a zImage cannot be loaded"));
    }
    Ok(())
}

/// The setup header as the file has it, without what follows its end as the jump at 0x200 tells it.
fn header(head: &[u8]) -> setup_header {
    let mut header = setup_header::default();
    let end = 0x202 + usize::from(head[0x201]);
    let length = (end - HEADER_START).min(size_of::<setup_header>());
    header.as_mut_slice()[..length].copy_from_slice(&head[HEADER_START..HEADER_START + length]);
    header
}

/// The protected-mode kernel: what follows the real-mode sectors, all of it.
fn segment(file: &ImageFile<'_>, fields: &Fields<'_>) -> Result<Segment, LoadError> {
    // For old kernels' sake 0 means 4; the boot sector is not counted.
    let sectors = match fields.u8(0x1f1) {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let file_offset = (sectors + 1) * SECTOR_BYTES;
    let kernel_bytes = u64::from(fields.u32(0x1f4)) * PARAGRAPH_BYTES;
    file.check(file_offset, kernel_bytes.max(1), "the kernel")?;
    let file_bytes = file.bytes() - file_offset;
    let (address, needed) = if fields.u16(0x206) >= VERSION_PREFERRED_ADDRESS {
        (fields.u64(0x258), u64::from(fields.u32(0x260)))
    } else {
        // Before, kernels were always loaded here and did not tell how much they need.
        (EXTENDED_MEMORY, 0)
    };
    if address < EXTENDED_MEMORY || address > u64::from(u32::MAX) {
        return Err(bad_field(
            "pref_address",
            address,
            "from 1 MiB to 4 GiB is where a kernel can be loaded",
        ));
    }
    Ok(Segment {
        what: Occupant::Kernel,
        file_offset,
        file_bytes,
        address,
        memory_bytes: file_bytes.max(needed),
    })
}
