//! Descriptors that a worker waits for, and eventfds: counters that wake whoever waits for them, which the hypervisor can count up or
//! wait for itself.

// UNSAFETY: the runtime waits for descriptors by number, so somebody has to promise that they stay open.
#![expect(unsafe_code, reason = "the runtime waits for descriptors by number")]

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use tokio::io::unix::AsyncFd;

/// An eventfd (eventfd(2)), non-blocking.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one, silent.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Something to wait with, on the I/O thread.
    ///
    /// # Errors
    /// If the runtime cannot wait for it.
    pub fn watch(self: Arc<Self>) -> io::Result<AsyncFd<Arc<Self>>> {
        // SAFETY: the descriptor is owned by the eventfd, which is never given another, and which the result keeps.
        Ok(unsafe { AsyncFd::register(self) }?)
    }

    /// Wakes whoever waits for it.
    pub fn signal(&self) {
        // Fails only when the counter is at its limit, and then it is signalled already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Silences it; whether it was signalled.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The runtime knows its descriptors by number.
impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Something to wait for a descriptor with, on the I/O thread; it should not block.
///
/// # Errors
/// If the runtime cannot wait for it: it is a regular file, say.
pub fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned, and the result keeps it.
    Ok(unsafe { AsyncFd::register(descriptor) }?)
}
