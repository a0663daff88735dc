//! The small guest that guestctl boots when it is given no kernel.
//!
//! [`IMAGE`] is a complete guest: it says `READY`, then answers the [`COMMANDS`] it reads from its serial port. It shows
//! that a host works, and it is the guest of most tests, so it can also misbehave when told to.
//!
//! The image is built by this crate's build script out of `guest/`; nothing of it runs in this process.

include!("commands.rs");

/// The guest: a static ELF64 executable for x86-64, to be loaded at its physical addresses and entered through its PVH
/// note (`XEN_ELFNOTE_PHYS32_ENTRY`, 18) as the PVH boot ABI says: protected mode, no paging, `start_info` in EBX.
///
/// It needs 2 MiB of RAM from address 0, a 16550 at port 0x3f8 whose interrupt is pin 4 of an IOAPIC at 0xfec00000, and a
/// local APIC at 0xfee00000. It writes `READY\n` within its first 20 instructions. On a reset it must be loaded again.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
