//! The memory balloon (VIRTIO 1.3, 5.5): the guest gives pages back to the host, because the host asks for them or because they
//! are free.
//!
//! [`Balloon`] is what its registers show, [`BalloonWorker`] gives the pages back, and a [`BalloonHandle`] is the host's end.
//! Pages are of 4 KiB whatever the host's are. What is deflated needs nothing: a page comes back when it is touched.
//!
//! Limits: no free page hints, no page poison; memory of huge pages cannot be given back in smaller ones.

mod statistics;
mod worker;

pub use statistics::{MemoryStatistic, StatisticsError};
pub use worker::BalloonWorker;

use super::{DeviceType, Interrupt, VirtioDevice, VirtioSpec, read_config};
use crate::saved::invalid;
use guest_saved_state::devices::balloon::BalloonState;
use inspect::{Inspect, Request};
use save_restore::{RestoreError, SaveError};
use statistics::{Asking, StatisticsSource};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// The size of the balloon's pages, in bytes.
pub const PAGE_BYTES: u64 = 4096;

const QUEUE_SIZE: u16 = 128;
const QUEUES: usize = 4;
const QUEUE_INFLATE: usize = 0;
const QUEUE_DEFLATE: usize = 1;
const QUEUE_STATISTICS: usize = 2;
/// The queues follow each other: as the device has no free page hints, this is where drivers look for it.
const QUEUE_REPORTING: usize = 3;

const FEATURE_STATS_VQ: u32 = 1;
const FEATURE_DEFLATE_ON_OOM: u32 = 2;
const FEATURE_REPORTING: u32 = 5;

/// Where the driver writes how many pages are in the balloon.
const CONFIG_ACTUAL: u64 = 4;

/// What the registers, the worker and the host share.
#[derive(Debug)]
struct Shared {
    /// How many pages the guest has.
    limit: u32,
    requested: AtomicU32,
    actual: AtomicU32,
    /// Bytes that were given back, ever.
    discarded: AtomicU64,
    interrupt: Arc<Interrupt>,
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
}

/// The host's end of a balloon. Clones are of the same one.
#[derive(Debug, Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
    statistics: Asking,
}

/// More pages than the guest has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pages} pages are more than the guest's {limit}")]
pub struct TooManyPages {
    /// What was asked for.
    pub pages: u32,
    /// How many the guest has.
    pub limit: u32,
}

impl Balloon {
    /// An empty balloon of a guest with so much memory, as a unit of this name, and its host's end.
    pub fn spec(name: impl Into<String>, memory_bytes: u64) -> (VirtioSpec, BalloonHandle) {
        let interrupt = Arc::new(Interrupt::default());
        let limit = u32::try_from(memory_bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        let shared = Arc::new(Shared {
            limit,
            requested: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            discarded: AtomicU64::new(0),
            interrupt: interrupt.clone(),
        });
        let (statistics, source) = StatisticsSource::new();
        let worker = BalloonWorker::new(shared.clone(), source);
        let spec = VirtioSpec::new(name, Self { shared: shared.clone() }, worker, interrupt);
        (spec, BalloonHandle { shared, statistics })
    }
}

impl BalloonHandle {
    /// How many pages are in the balloon.
    pub fn actual_pages(&self) -> u32 {
        self.shared.actual.load(Ordering::Relaxed)
    }

    /// How many pages the host wants in it.
    pub fn requested_pages(&self) -> u32 {
        self.shared.requested.load(Ordering::Relaxed)
    }

    /// Asks the guest for so many pages in the balloon. It takes its time, and may never get there.
    ///
    /// # Errors
    /// [`TooManyPages`] if the guest has fewer.
    pub fn request_pages(&self, pages: u32) -> Result<(), TooManyPages> {
        self.shared.request(pages)
    }

    /// What the guest says of its memory, asked now.
    ///
    /// # Errors
    /// [`StatisticsError`] says why there is no answer; one that does not come within `patience` is given up.
    pub async fn statistics(&self, patience: Duration) -> Result<Vec<MemoryStatistic>, StatisticsError> {
        self.statistics.ask(patience).await
    }
}

impl Shared {
    fn request(&self, pages: u32) -> Result<(), TooManyPages> {
        let limit = self.limit;
        if pages > limit {
            return Err(TooManyPages { pages, limit });
        }
        self.requested.store(pages, Ordering::Relaxed);
        self.interrupt.config_changed();
        Ok(())
    }

    fn config(&self) -> [u8; 8] {
        let [requested, actual] = [&self.requested, &self.actual].map(|pages| pages.load(Ordering::Relaxed));
        (u64::from(requested) | u64::from(actual) << 32).to_le_bytes()
    }
}

impl VirtioDevice for Balloon {
    type Worker = BalloonWorker;
    type SavedState = BalloonState;

    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        1 << FEATURE_STATS_VQ | 1 << FEATURE_DEFLATE_ON_OOM | 1 << FEATURE_REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.shared.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.shared.actual.store(u32::from_le_bytes(actual), Ordering::Relaxed);
        }
    }

    /// A driver that begins anew has nothing in the balloon; what the host wants stays.
    fn reset(&mut self) {
        self.shared.actual.store(0, Ordering::Relaxed);
    }

    fn save(&mut self, _: &mut BalloonWorker) -> Result<BalloonState, SaveError> {
        let Shared { limit: _, requested, actual, discarded: _, interrupt: _ } = &*self.shared;
        Ok(BalloonState {
            requested_pages: requested.load(Ordering::Relaxed),
            actual_pages: actual.load(Ordering::Relaxed),
        })
    }

    fn restore(&mut self, _: &mut BalloonWorker, state: BalloonState) -> Result<(), RestoreError> {
        let BalloonState { requested_pages, actual_pages } = state;
        if requested_pages > self.shared.limit {
            return Err(invalid("requested_pages", requested_pages));
        }
        self.shared.requested.store(requested_pages, Ordering::Relaxed);
        self.shared.actual.store(actual_pages, Ordering::Relaxed);
        Ok(())
    }
}

/// Shows its pages; those that are asked for can be written.
impl Inspect for Balloon {
    fn inspect(&self, request: Request<'_>) {
        let shared = &self.shared;
        request
            .respond()
            .field_with("actual_pages", || shared.actual.load(Ordering::Relaxed))
            .field("limit_pages", &shared.limit)
            .field_with("discarded_bytes", || shared.discarded.load(Ordering::Relaxed))
            .writable(
                "requested_pages",
                || shared.requested.load(Ordering::Relaxed),
                |pages| shared.request(pages).map(|()| pages).map_err(|error| error.to_string()),
            );
    }
}

#[cfg(test)]
mod tests;
