//! The interrupt controllers: this VP's local APIC and the IOAPIC (Intel SDM 3A chapter 11, 82093AA datasheet).
//!
//! The local APIC stays in its memory-mapped mode until a VP must be reached whose number that mode cannot hold.

use core::ptr::{read_volatile, with_exposed_provenance_mut, write_volatile};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::gate;

/// The local APIC's page.
pub const LOCAL: u64 = 0xfee0_0000;
/// The IOAPIC's page.
pub const IO: u64 = 0xfec0_0000;
/// The IOAPIC's window: what the register at its base has selected.
pub const IO_WINDOW: u64 = IO + 0x10;

const ID: u64 = LOCAL + 0x20;
const SPURIOUS: u64 = LOCAL + 0xf0;
const COMMAND_LOW: u64 = LOCAL + 0x300;
const COMMAND_HIGH: u64 = LOCAL + 0x310;

const BASE_MSR: u32 = 0x1b;
const COMMAND_MSR: u32 = 0x830;

const SERIAL_PIN: u32 = 4;
const SERIAL_VECTOR: u32 = 0x40;
const WAKE_VECTOR: u32 = 0x41;
const SPURIOUS_VECTOR: u32 = 0x4f;

const INIT: u32 = 0x4500;
const START: u32 = 0x4600;
const ALL_BUT_SELF: u32 = 0xc_4000;

static WIDE_IDS: AtomicBool = AtomicBool::new(false);

/// Reads a register of four bytes.
pub fn read(address: u64) -> u32 {
    // SAFETY: device registers, mapped since the start.
    unsafe { read_volatile(with_exposed_provenance_mut(address as usize)) }
}

/// Writes a register of four bytes.
pub fn write(address: u64, value: u32) {
    // SAFETY: device registers, mapped since the start; none changes this program's memory.
    unsafe { write_volatile(with_exposed_provenance_mut(address as usize), value) }
}

/// Software-enables the local APIC of this VP, which its reset has disabled.
pub fn enable_local() {
    write(SPURIOUS, 0x100 | SPURIOUS_VECTOR);
}

/// This VP's APIC ID; meaningful in the memory-mapped mode only.
pub fn local_id() -> u32 {
    read(ID) >> 24
}

/// Routes the serial port's pin to the boot VP: edge, fixed.
pub fn route_serial() {
    write_io(0x11 + 2 * SERIAL_PIN, local_id() << 24);
    write_io(0x10 + 2 * SERIAL_PIN, SERIAL_VECTOR);
}

fn write_io(register: u32, value: u32) {
    write(IO, register);
    write(IO_WINDOW, value);
}

/// From here on IDs may exceed 254; the boot VP's local APIC changes to its register mode for good.
pub fn widen_ids() {
    if !WIDE_IDS.swap(true, Ordering::Relaxed) {
        gate::write_msr(BASE_MSR, LOCAL | 0xd00);
    }
}

/// Starts the VP with this APIC ID in real mode at `page * 4096`.
pub fn start(id: u32, page: u8) {
    command(id, INIT);
    command(id, START | u32::from(page));
}

/// Interrupts every other VP that is up.
pub fn wake_others() {
    command(0, ALL_BUT_SELF | WAKE_VECTOR);
}

fn command(id: u32, low: u32) {
    if WIDE_IDS.load(Ordering::Relaxed) {
        gate::write_msr(COMMAND_MSR, u64::from(id) << 32 | u64::from(low));
    } else {
        write(COMMAND_HIGH, id << 24);
        write(COMMAND_LOW, low);
    }
}
