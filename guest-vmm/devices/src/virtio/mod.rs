//! Virtio devices (VIRTIO 1.3), whatever transport they are reached by.
//!
//! A device has two halves. What its registers show is a [`VirtioDevice`]: it answers VPs under the transport's lock, at once. What
//! serves its queues is a [`QueueWorker`], which owns the backend: it runs on the [`IoThread`] while the driver has the device
//! and its unit runs, and is at rest in between. A worker that is asked to stop first finishes what it has begun, then hands back its
//! queues: so pause, reset, saving and restoring are one path, and a request that was taken is answered exactly once.
//!
//! - [`Interrupt`] tells the driver of used buffers, of a changed configuration, and that the device needs a reset
//! - [`VirtQueue`] hands out [`Chain`]s: checked in whole before a device sees them; what is wrong with one is a [`QueueFault`],
//!   at which the device reports that it needs a reset
//! - [`VirtioMmio`] is the transport; a [`VirtioSpec`] is a device on its way into a machine
//! - [`block`] is a disk; [`rate_limit`] bounds what a device does
//! - `fake_driver`, a feature, is a guest's side of a device, for tests, fuzzing and benchmarks; `fake_back_end` another process that
//!   serves a network device by vhost-user
//!
//! Limits: split queues (the queue library has no packed ones); no shared memory regions; a queue keeps its buffers until the whole
//! device is reset.

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
mod device;
mod event;
mod interrupt;
mod io_thread;
mod log;
pub mod mem;
mod mmio;
pub mod net;
mod queue;
mod ram;
pub mod rate_limit;
mod rng;
mod saved;
#[cfg(test)]
mod tests;
pub mod vsock;

#[cfg(any(test, feature = "fake-back-end"))]
pub mod fake_back_end;
#[cfg(any(test, feature = "fake-driver"))]
pub mod fake_driver;

pub use chain::{BufferReader, BufferWriter, Buffers, Chain};
pub use device::{
    DeviceFault, DeviceType, QueueWorker, Session, Stop, VirtioDevice, VirtioHost, VirtioSpec, read_config,
};
pub use event::{EventFd, watch};
pub use interrupt::{EdgeLine, Interrupt};
pub use io_thread::{IoHandle, IoThread};
pub use log::LogLimit;
pub use mmio::{MmioPlace, NOTIFY_OFFSET, VirtioMmio, WINDOW_BYTES};
pub use queue::{QueueFault, VirtQueue};
pub use ram::GuestRam;
pub use rng::{Rng, RngWorker};
