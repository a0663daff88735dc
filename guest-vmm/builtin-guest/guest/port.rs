//! I/O ports. Safe to call: no port of this guest's machine changes its memory.

use core::arch::asm;

/// Writes one byte.
pub fn write_u8(port: u16, value: u8) {
    // SAFETY: see the module.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes two bytes.
pub fn write_u16(port: u16, value: u16) {
    // SAFETY: see the module.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes four bytes.
pub fn write_u32(port: u16, value: u32) {
    // SAFETY: see the module.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads one byte.
pub fn read_u8(port: u16) -> u8 {
    let value;
    // SAFETY: see the module.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Reads two bytes.
pub fn read_u16(port: u16) -> u16 {
    let value;
    // SAFETY: see the module.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Reads four bytes.
pub fn read_u32(port: u16) -> u32 {
    let value;
    // SAFETY: see the module.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) }
    value
}
