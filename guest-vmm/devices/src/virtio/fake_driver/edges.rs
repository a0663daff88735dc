//! The interrupts of a device under test.

use super::PATIENCE;
use crate::virtio::EdgeLine;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long to wait for an edge before looking again: not everything makes one.
const LOOK: Duration = Duration::from_millis(2);

/// Counts edges, and wakes who waits for one.
#[derive(Debug, Default)]
pub(super) struct Edges {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Edges {
    pub(super) fn count(&self) -> u64 {
        *self.lock()
    }

    /// Asks `look` until it finds something.
    pub(super) fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.count();
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < deadline, "no {what} after {PATIENCE:?}");
            let waited = self.changed.wait_timeout_while(self.lock(), LOOK, |count| *count == seen);
            drop(waited);
        }
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EdgeLine for Arc<Edges> {
    fn pulse(&self) {
        *self.lock() += 1;
        self.changed.notify_all();
    }
}
