//! Rate limits: token buckets for bytes and for operations, whose rates may be changed from any thread.
//!
//! A bucket fills at its rate up to its burst. Work is admitted once both buckets hold what it costs, and takes it. What costs more
//! than a burst waits for a full bucket and leaves it in debt: those behind it wait the longer, and the average holds.

use inspect::{Inspect, Request};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

const NANOS: i128 = 1_000_000_000;

/// How fast a bucket fills, and how much it holds. Zero a second stands for no limit, a burst of zero for what comes in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// Bytes or operations a second.
    pub per_second: u64,
    /// Bytes or operations.
    pub burst: u64,
}

impl Rate {
    fn capacity(self) -> u64 {
        if self.burst == 0 { self.per_second } else { self.burst }
    }
}

#[derive(Debug, Default)]
struct AtomicRate {
    per_second: AtomicU64,
    burst: AtomicU64,
}

impl AtomicRate {
    fn new(rate: Rate) -> Self {
        Self { per_second: rate.per_second.into(), burst: rate.burst.into() }
    }

    fn load(&self) -> Rate {
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        Rate { per_second: load(&self.per_second), burst: load(&self.burst) }
    }
}

/// The limits of one device: what whoever sets them, and whoever keeps to them, share.
#[derive(Debug, Default)]
pub struct RateLimits {
    bytes: AtomicRate,
    operations: AtomicRate,
    changed: Notify,
}

impl RateLimits {
    /// Limits of bytes and of operations.
    pub fn new(bytes: Rate, operations: Rate) -> Self {
        Self {
            bytes: AtomicRate::new(bytes),
            operations: AtomicRate::new(operations),
            changed: Notify::new(),
        }
    }

    fn set(&self, place: &AtomicU64, value: u64) -> u64 {
        place.store(value, Ordering::Relaxed);
        self.changed.notify_waiters();
        value
    }
}

/// Shows the rates, each of which an update replaces; work that waits goes by the new ones at once.
impl Inspect for RateLimits {
    fn inspect(&self, request: Request<'_>) {
        let mut response = request.respond();
        for (name, place) in [
            ("bytes_per_second", &self.bytes.per_second),
            ("bytes_burst", &self.bytes.burst),
            ("operations_per_second", &self.operations.per_second),
            ("operations_burst", &self.operations.burst),
        ] {
            let write = |value| Ok::<_, Infallible>(self.set(place, value));
            response.writable(name, || place.load(Ordering::Relaxed), write);
        }
    }
}

/// A token bucket. It may be in debt.
#[derive(Debug)]
struct Bucket {
    /// What there is, in billionths. `None` until there is a limit: the first one finds it full.
    level: Option<i128>,
    filled_at: Instant,
}

impl Bucket {
    fn new() -> Self {
        Self { level: None, filled_at: Instant::now() }
    }

    /// How long it is until so much can be taken; `None` if it can now.
    fn wait(&mut self, rate: Rate, cost: u64, now: Instant) -> Option<Duration> {
        if rate.per_second == 0 {
            self.level = None;
            return None;
        }
        let (full, per_second) = (i128::from(rate.capacity()) * NANOS, i128::from(rate.per_second));
        let elapsed = now.saturating_duration_since(self.filled_at).as_nanos();
        let gained = i128::try_from(elapsed).unwrap_or(i128::MAX).saturating_mul(per_second);
        let level = self.level.map_or(full, |level| level.saturating_add(gained).min(full));
        (self.level, self.filled_at) = (Some(level), now);
        let missing = (i128::from(cost) * NANOS).min(full) - level;
        let nanos = (missing > 0).then(|| (missing + per_second - 1) / per_second)?;
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, cost: u64) {
        if let Some(level) = &mut self.level {
            *level -= i128::from(cost) * NANOS;
        }
    }
}

/// Keeps work to its limits.
#[derive(Debug)]
pub struct RateLimiter {
    limits: Arc<RateLimits>,
    bytes: Bucket,
    operations: Bucket,
}

impl RateLimiter {
    /// With full buckets.
    pub fn new(limits: Arc<RateLimits>) -> Self {
        Self { limits, bytes: Bucket::new(), operations: Bucket::new() }
    }

    /// Admits one operation of so many bytes, if that may be now.
    ///
    /// # Errors
    /// How long it has to wait, unless the limits change.
    pub fn try_admit(&mut self, bytes: u64) -> Result<(), Duration> {
        let (byte_rate, operation_rate) = (self.limits.bytes.load(), self.limits.operations.load());
        if byte_rate.per_second == 0 && operation_rate.per_second == 0 {
            (self.bytes.level, self.operations.level) = (None, None);
            return Ok(());
        }
        let now = Instant::now();
        let waits = [self.bytes.wait(byte_rate, bytes, now), self.operations.wait(operation_rate, 1, now)];
        if let Some(wait) = waits.into_iter().flatten().max() {
            return Err(wait);
        }
        self.bytes.take(bytes);
        self.operations.take(1);
        Ok(())
    }

    /// Waits until one operation of so many bytes is admitted. May be cancelled at any time: nothing was admitted then.
    pub async fn admit(&mut self, bytes: u64) {
        let limits = self.limits.clone();
        loop {
            let mut changed = std::pin::pin!(limits.changed.notified());
            changed.as_mut().enable();
            let Err(wait) = self.try_admit(bytes) else { return };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use inspect::Update;

    fn limiter(bytes: (u64, u64), operations: (u64, u64)) -> RateLimiter {
        let rate = |(per_second, burst)| Rate { per_second, burst };
        RateLimiter::new(Arc::new(RateLimits::new(rate(bytes), rate(operations))))
    }

    /// How long so many operations of so many bytes take.
    async fn time_of(limiter: &mut RateLimiter, operations: u32, bytes: u64) -> Duration {
        let begin = Instant::now();
        for _ in 0..operations {
            limiter.admit(bytes).await;
        }
        begin.elapsed()
    }

    #[track_caller]
    fn about(took: Duration, expected: Duration) {
        // The runtime's clock has milliseconds.
        let least = expected.saturating_sub(Duration::from_millis(2));
        assert!(took >= least && took <= expected + expected / 50 + Duration::from_millis(20), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_limits_nothing_waits() {
        let mut limiter = limiter((0, 5), (0, 0));
        assert_eq!(time_of(&mut limiter, 100_000, u64::MAX).await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_at_once_and_the_rate_holds_after_it() {
        let mut limiter = limiter((1000, 500), (0, 0));
        assert_eq!(time_of(&mut limiter, 5, 100).await, Duration::ZERO);
        about(time_of(&mut limiter, 100, 100).await, Duration::from_secs(10));
    }

    #[tokio::test(start_paused = true)]
    async fn operations_are_limited_whatever_their_bytes() {
        let mut limiter = limiter((0, 0), (10, 1));
        about(time_of(&mut limiter, 21, u64::MAX).await, Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn the_slower_of_two_limits_holds() {
        let mut limiter = limiter((100, 1), (10, 1));
        about(time_of(&mut limiter, 11, 100).await, Duration::from_secs(10));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_larger_than_a_burst_passes_and_is_paid_for() {
        let mut limiter = limiter((1000, 10), (0, 0));
        assert_eq!(time_of(&mut limiter, 1, 5010).await, Duration::ZERO);
        about(time_of(&mut limiter, 1, 1).await, Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_used_is_kept_up_to_the_burst() {
        let mut limiter = limiter((10, 20), (0, 0));
        tokio::time::sleep(Duration::from_secs(3600)).await;
        about(time_of(&mut limiter, 30, 1).await, Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_goes_by_new_limits_at_once() {
        let mut limiter = limiter((1, 1), (0, 0));
        limiter.admit(1_000_000).await;
        let limits = limiter.limits.clone();
        let mut waiting = Box::pin(limiter.admit(1));
        assert!(waiting.as_mut().now_or_never().is_none());
        let begin = Instant::now();
        let update = Update::start("bytes_per_second", "0", |request| limits.inspect(request));
        update.finish(Duration::ZERO).await.expect("taken");
        waiting.await;
        assert_eq!(begin.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_is_cancelled_has_taken_nothing() {
        let mut limiter = limiter((10, 1), (0, 0));
        limiter.admit(1).await;
        for _ in 0..1000 {
            assert!(limiter.admit(1000).now_or_never().is_none());
        }
        about(time_of(&mut limiter, 1, 1).await, Duration::from_millis(100));
    }

    #[tokio::test(start_paused = true)]
    async fn the_largest_rates_do_not_overflow() {
        let mut limiter = limiter((u64::MAX, u64::MAX), (u64::MAX, 0));
        assert_eq!(time_of(&mut limiter, 1, u64::MAX).await, Duration::ZERO);
        tokio::time::sleep(Duration::from_secs(1 << 32)).await;
        assert_eq!(time_of(&mut limiter, 1, u64::MAX).await, Duration::ZERO);
    }
}
