//! Accesses of every kind to every port and to addresses without memory: a VMM must stand them all.

use core::ptr::{read_volatile, with_exposed_provenance_mut, write_volatile};

use crate::apic;
use crate::port;
use crate::start_info::StartInfo;

/// An access beyond the last port is an exception in ring 3.
const PORTS: u32 = 0x1_0000;

/// Ports that are left alone, first and last: each would end the guest or its console.
const LEFT_ALONE: [(u32, u32); 6] =
    [(0x64, 0x64), (0x92, 0x92), (0xf4, 0xf7), (0x3f8, 0x3ff), (0x600, 0x607), (0xcf9, 0xcf9)];

const HOLE: u64 = 0xc000_0000;
const HOLE_END: u64 = 0x1_0000_0000;
const STRIDE: u64 = 1 << 20;
const APIC_PAGE: u64 = 0x1000;
/// The page behind the IOAPIC's is probed like it.
const IOAPIC_SWEEP: u64 = 2 * APIC_PAGE;
/// A register that no IOAPIC has.
const NO_REGISTER: u32 = 0xff;

/// Reads and writes (zeros, for no device takes those as an order) every port with 1, 2 and 4 bytes.
pub fn ports() {
    for port in 0..=u16::MAX {
        if may_access(port, 1) {
            port::read_u8(port);
            port::write_u8(port, 0);
        }
        if may_access(port, 2) {
            port::read_u16(port);
            port::write_u16(port, 0);
        }
        if may_access(port, 4) {
            port::read_u32(port);
            port::write_u32(port, 0);
        }
    }
}

fn may_access(port: u16, bytes: u32) -> bool {
    let first = u32::from(port);
    if first + bytes > PORTS {
        return false;
    }
    LEFT_ALONE.iter().all(|(start, end)| first + bytes <= *start || first > *end)
}

/// Reads and writes the hole below 4 GiB where there is neither RAM nor an APIC, then the IOAPIC.
pub fn mmio(start_info: &StartInfo) {
    for address in (HOLE..HOLE_END).step_by(STRIDE as usize) {
        if !is_used(address, start_info) {
            access::<u8>(address);
            access::<u16>(address);
            access::<u32>(address);
            access::<u64>(address);
        }
    }
    sweep_ioapic();
}

fn is_used(address: u64, start_info: &StartInfo) -> bool {
    let in_page = |page: u64| (page..page + APIC_PAGE).contains(&address);
    in_page(apic::LOCAL)
        || in_page(apic::IO)
        || start_info
            .memory_map
            .all()
            .iter()
            .any(|range| range.is_ram() && (range.start..range.end).contains(&address))
}

/// Every register is written while the window shows one that does not exist; then the serial port is routed again.
fn sweep_ioapic() {
    for address in (apic::IO..apic::IO + IOAPIC_SWEEP).step_by(4) {
        apic::write(apic::IO, NO_REGISTER);
        apic::read(address);
        apic::write(address, NO_REGISTER);
    }
    apic::route_serial();
}

fn access<T: Default>(address: u64) {
    let place = with_exposed_provenance_mut::<T>(address as usize);
    // SAFETY: mapped, and no memory of this program.
    unsafe {
        read_volatile(place);
        write_volatile(place, T::default());
    }
}
