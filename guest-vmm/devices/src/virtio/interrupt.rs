//! How a virtio device reaches its driver.

use super::event::EventFd;
use crate::IrqLine;
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

/// A line on which an edge interrupts the guest. May be called from any thread; does not block.
pub trait EdgeLine: Send + Sync {
    /// Makes an edge.
    fn pulse(&self);
}

impl EdgeLine for IrqLine {
    fn pulse(&self) {
        IrqLine::pulse(self);
    }
}

/// An irqfd: the hypervisor itself takes the edge to the local APICs.
impl EdgeLine for EventFd {
    fn pulse(&self) {
        self.signal();
    }
}

/// What a device tells its driver by interrupts (VIRTIO 1.3, 4.2.2, InterruptStatus). Shared by the device's registers, its worker, and
/// whoever on the host changes its configuration.
///
/// Nothing is told before a transport has connected it.
#[derive(Default)]
pub struct Interrupt {
    /// The causes that the driver has not acknowledged.
    status: AtomicU32,
    /// Counts the changes of the configuration.
    generation: AtomicU32,
    needs_reset: AtomicBool,
    line: OnceLock<Box<dyn EdgeLine>>,
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupt").field("status", &self.status).finish_non_exhaustive()
    }
}

impl Interrupt {
    /// Buffers were used.
    pub fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The device's configuration has changed. To be called after what [`read_config`](super::VirtioDevice::read_config) gives has.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The driver has done what the device cannot go on from (VIRTIO 1.3, 2.1.2, DEVICE_NEEDS_RESET).
    pub(super) fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!causes, Ordering::AcqRel);
    }

    /// The device is as new; its configuration goes on counting its changes.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    pub(super) fn restore(&self, status: u32, generation: u32, needs_reset: bool) {
        self.status.store(status, Ordering::Release);
        self.generation.store(generation, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// Says where the edges go. Only the first connection counts.
    pub(super) fn connect(&self, line: Box<dyn EdgeLine>) {
        let _ = self.line.set(line);
    }

    /// Every cause makes an edge of its own: an edge between the driver's look at the causes and its acknowledgement would be
    /// lost otherwise.
    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::AcqRel);
        self.pulse();
    }

    fn pulse(&self) {
        if let Some(line) = self.line.get() {
            line.pulse();
        }
    }
}
