//! What the rate limits let one queue do.
//!
//! All queues of a direction have a limiter in common, and wait for it in the order in which they came. What was granted for frames
//! that the back end did not take is kept for the next ones of the queue.

use crate::virtio::rate_limit::{RateLimiter, RateLimits};
use std::sync::Arc;
use tokio::sync::Mutex;

/// A device's limiters: each direction has the rates for itself.
#[derive(Debug)]
pub(super) struct Limiters {
    pub receive: Mutex<RateLimiter>,
    pub transmit: Mutex<RateLimiter>,
}

impl Limiters {
    pub(super) fn new(rates: &Arc<RateLimits>) -> Self {
        let limiter = || Mutex::new(RateLimiter::new(rates.clone()));
        Self { receive: limiter(), transmit: limiter() }
    }
}

/// What the rate limits let one queue do.
pub(super) struct Allowance<'a> {
    limiter: &'a Mutex<RateLimiter>,
    /// Granted, and not used yet.
    frames: u64,
    bytes: u64,
}

impl<'a> Allowance<'a> {
    pub(super) fn new(limiter: &'a Mutex<RateLimiter>) -> Self {
        Self { limiter, frames: 0, bytes: 0 }
    }

    /// Whether a frame of so many bytes may pass now; it does then.
    pub(super) fn take(&mut self, bytes: usize) -> bool {
        let bytes = bytes as u64;
        if self.frames > 0 && self.bytes >= bytes {
            self.frames -= 1;
            self.bytes -= bytes;
            return true;
        }
        // Whoever has the lock waits for the limiter, and others behind it.
        self.limiter.try_lock().is_ok_and(|mut limiter| limiter.try_admit(bytes).is_ok())
    }

    /// A frame of so many bytes did not pass, and was meant to.
    pub(super) fn give_back(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes as u64;
    }

    /// Waits until a frame of so many bytes may pass: then it may. Nothing is lost when it is cancelled.
    pub(super) async fn wait_for(&mut self, bytes: usize) {
        self.limiter.lock().await.admit(bytes as u64).await;
        self.give_back(bytes);
    }
}
