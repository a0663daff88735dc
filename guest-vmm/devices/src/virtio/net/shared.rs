//! What a network device's registers and its worker share.

use super::link::Link;
use crate::virtio::rate_limit::RateLimits;
use inspect::{Inspect, Request};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A hardware address.
pub type MacAddress = [u8; 6];

/// What the driver has set by the control queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DriverSetup {
    pub mac: MacAddress,
    /// How many queue pairs it uses.
    pub pairs: u16,
    pub receive_mode: ReceiveMode,
}

/// Which frames it wants beyond those for its own address (5.1.6.5.1). It gets all that the back end has: the specification allows
/// that, and the guest's own stack drops the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct ReceiveMode {
    pub promiscuous: bool,
    pub all_multicast: bool,
}

impl DriverSetup {
    /// As a driver finds it.
    pub(super) fn new(mac: MacAddress) -> Self {
        Self { mac, pairs: 1, receive_mode: ReceiveMode::default() }
    }
}

/// Counts frames in one direction.
#[derive(Debug, Default)]
pub(super) struct Counters {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

impl Counters {
    pub(super) fn pass(&self, frames: u64, bytes: usize) {
        self.frames.fetch_add(frames, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn drop(&self, frames: usize) {
        self.dropped.fetch_add(frames as u64, Ordering::Relaxed);
    }
}

impl Inspect for Counters {
    fn inspect(&self, request: Request<'_>) {
        let Self { frames, bytes, dropped } = self;
        request.respond().field("frames", frames).field("bytes", bytes).field("dropped", dropped);
    }
}

/// The request to the driver to tell the network where the guest is (5.1.4.2, VIRTIO_NET_S_ANNOUNCE): it may have moved.
#[derive(Debug, Default)]
pub(super) struct Announcement {
    due: AtomicBool,
    shown: AtomicBool,
}

impl Announcement {
    /// The guest may have moved.
    pub(super) fn set_due(&self) {
        self.due.store(true, Ordering::Release);
    }

    /// Shows the request to a driver that can follow it, if it is due; whether it was.
    pub(super) fn show(&self) -> bool {
        let due = self.due.swap(false, Ordering::AcqRel);
        if due {
            self.shown.store(true, Ordering::Release);
        }
        due
    }

    pub(super) fn is_shown(&self) -> bool {
        self.shown.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self) {
        self.shown.store(false, Ordering::Release);
    }
}

/// What a network device's registers and its worker share.
#[derive(Debug)]
pub(super) struct Shared {
    pub link: Link,
    pub rates: Arc<RateLimits>,
    setup: Mutex<DriverSetup>,
    pub announcement: Announcement,
    /// Frames to the driver, and from it.
    pub received: Counters,
    pub transmitted: Counters,
}

impl Shared {
    pub(super) fn new(link: Link, mac: MacAddress, rates: Arc<RateLimits>) -> Self {
        let setup = Mutex::new(DriverSetup::new(mac));
        Self {
            link,
            rates,
            setup,
            announcement: Announcement::default(),
            received: Counters::default(),
            transmitted: Counters::default(),
        }
    }

    /// Locked for no longer than a look or a change.
    pub(super) fn setup(&self) -> MutexGuard<'_, DriverSetup> {
        self.setup.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
