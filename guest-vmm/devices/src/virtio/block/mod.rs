//! The block device (VIRTIO 1.3, 5.2): a disk whose data is somewhere on the host.
//!
//! - [`Block`] is the device, [`BlockWorker`] what serves its queues, [`BlockHandle`] the host's end of it
//! - [`Disk`] is the seam to whatever keeps the data: several operations are under way at a time and end in any order
//! - [`UringDisk`] is a raw image through io_uring, in an [`ImageFile`] that is open and locked
//! - [`Qcow2Disk`] is an image in the qcow2 format, on a thread of its own
//! - [`ServiceDisk`] asks somebody else for everything: a client's block service
//! - [`Overlay`] keeps in memory what is written, over an image that is only read
//!
//! A request that the host fails ends as an I/O error for the guest, in the log, and at the host's [`OnError`]; the device goes on.
//!
//! Limits: sectors of 512 bytes; one range in a discard or a write of zeros; no secure erase, no zones, no lifetime.

mod blocking;
mod clusters;
mod device;
mod disk;
mod file;
mod overlay;
mod qcow2;
mod request;
mod service;
#[cfg(test)]
mod tests;
mod uring;
mod worker;

pub use device::{Block, BlockError, BlockHandle, BlockOptions, CapacityError, MAX_QUEUES, OnError};
pub use disk::{Disk, DiskImage, DiskSize, Ended, Operation};
pub use file::{ImageError, ImageFile};
pub use overlay::Overlay;
pub use qcow2::Qcow2Disk;
pub use service::{PIECE, ServiceCall, ServiceDisk, ServiceReply, ServiceRequest};
pub use uring::UringDisk;
pub use worker::BlockWorker;
