//! What a guest does to ports and memory-mapped registers, on its way to the devices.

use crate::VpIndex;
use std::ops::ControlFlow;
use std::sync::Arc;

/// A guest's request to end or restart itself, made by a write to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Power the guest off.
    PowerOff,
    /// Power the guest off: it has saved itself to its disk.
    Hibernate,
    /// Reset the guest.
    Reset,
    /// End the guest, which leaves this value: it is a test.
    DebugExit(u32),
}

/// The bus as a VP sees it.
///
/// Called on VP threads, several at a time. Data is 1, 2, 4 or 8 bytes, little endian. A read of an address at which there
/// is no device gives all ones; a write to one is ignored. Neither is an error.
pub trait CpuIo: Send + Sync {
    /// Reads from an I/O port.
    fn read_io(&self, vp: VpIndex, port: u16, data: &mut [u8]);

    /// Writes to an I/O port. `Break` halts the VP with the request as its reason.
    fn write_io(&self, vp: VpIndex, port: u16, data: &[u8]) -> ControlFlow<PowerRequest>;

    /// Reads from a guest physical address without memory behind it.
    fn read_mmio(&self, vp: VpIndex, address: u64, data: &mut [u8]);

    /// Writes to a guest physical address without memory behind it. `Break` as in [`CpuIo::write_io`].
    fn write_mmio(&self, vp: VpIndex, address: u64, data: &[u8]) -> ControlFlow<PowerRequest>;

    /// A local APIC has ended the level-triggered interrupt with this vector (split irqchip: KVM_EXIT_IOAPIC_EOI).
    fn handle_eoi(&self, vector: u8);
}

impl<T: ?Sized + CpuIo> CpuIo for Arc<T> {
    fn read_io(&self, vp: VpIndex, port: u16, data: &mut [u8]) {
        (**self).read_io(vp, port, data);
    }

    fn write_io(&self, vp: VpIndex, port: u16, data: &[u8]) -> ControlFlow<PowerRequest> {
        (**self).write_io(vp, port, data)
    }

    fn read_mmio(&self, vp: VpIndex, address: u64, data: &mut [u8]) {
        (**self).read_mmio(vp, address, data);
    }

    fn write_mmio(&self, vp: VpIndex, address: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        (**self).write_mmio(vp, address, data)
    }

    fn handle_eoi(&self, vector: u8) {
        (**self).handle_eoi(vector);
    }
}
