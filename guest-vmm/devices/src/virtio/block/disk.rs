//! What a block device needs of whatever keeps its data.

use crate::virtio::{Buffers, GuestRam};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

/// What a disk is to do. Offsets and lengths are in bytes, multiples of 512, and inside the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffers from this offset on.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to.
        buffers: Buffers,
    },
    /// Write the buffers from this offset on.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where from.
        buffers: Buffers,
        /// Ends only once the data would survive the host's crash.
        durable: bool,
    },
    /// All writes that have ended are to survive the host's crash.
    Flush,
    /// The data is not needed any more. May do nothing.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        bytes: u64,
    },
    /// The data is to be zeros.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        bytes: u64,
        /// The host may give back the space.
        unmap: bool,
        /// Ends only once the zeros would survive the host's crash.
        durable: bool,
    },
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Ended {
    /// The number under which it was begun.
    pub tag: usize,
    /// How it ended. A read that failed has written no matter what into its buffers.
    pub result: io::Result<()>,
}

/// Something that keeps a block device's data. Several operations are under way at a time and end in any order.
///
/// Used on the I/O thread alone, from [`start`](Self::start) to [`stop`](Self::stop); made and dropped anywhere. Dropped while
/// operations are under way, it waits until nothing touches their buffers any more.
pub trait Disk: Send + fmt::Debug {
    /// Operations follow, with buffers in this memory.
    ///
    /// # Errors
    /// If the host lacks what is needed.
    fn start(&mut self, ram: &Arc<dyn GuestRam>) -> io::Result<()>;

    /// Begins an operation under a number that no other one has that is under way. It need not be told to the host before
    /// [`submit`](Self::submit).
    fn begin(&mut self, tag: usize, operation: Operation);

    /// Tells the host of what was begun.
    ///
    /// # Errors
    /// If nothing will ever end.
    fn submit(&mut self) -> io::Result<()>;

    /// Appends what has ended.
    fn take_ended(&mut self, ended: &mut Vec<Ended>);

    /// Waits until something may have ended.
    fn poll_ended(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// No operation is under way, and none follows before the next start.
    fn stop(&mut self);

    /// Why a device on this disk cannot be saved: its data would not be there where the guest goes on. `None` if it can be.
    fn unsaveable(&self) -> Option<&'static str> {
        None
    }
}

/// A disk with its measures, ready to become a device.
#[derive(Debug)]
pub struct DiskImage {
    /// The disk.
    pub disk: Box<dyn Disk>,
    /// How large it is now.
    pub size: Arc<dyn DiskSize>,
    /// The block that the host writes without reading around it, in bytes: a power of two from 512 to 64 KiB.
    pub physical_block_bytes: u32,
}

/// Knows how large a disk is.
pub trait DiskSize: Send + Sync + fmt::Debug {
    /// How many bytes it has now. Does not wait.
    ///
    /// # Errors
    /// If the host does not say.
    fn bytes(&self) -> io::Result<u64>;
}

/// A size that does not change.
impl DiskSize for u64 {
    fn bytes(&self) -> io::Result<u64> {
        Ok(*self)
    }
}
