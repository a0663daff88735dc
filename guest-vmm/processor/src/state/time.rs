//! What a guest knows of time: each VP's time-stamp counter, and the partition's clock.

use inspect::{Inspect, Request};
use std::time::Duration;

/// A VP's time-stamp counter (Intel SDM volume 3, section 18.17).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tsc {
    /// What it counted when the partition's time was stopped; now, if that is not stopped.
    pub value: u64,
    /// IA32_TSC_ADJUST.
    pub adjust: u64,
    /// How often it counts, in kHz. 0 if the host does not say.
    pub frequency_khz: u32,
}

impl Inspect for Tsc {
    fn inspect(&self, request: Request<'_>) {
        let Self { value, adjust, frequency_khz } = self;
        request.respond().field("value", value).hex("adjust", *adjust).field("frequency_khz", frequency_khz);
    }
}

/// The clock that a partition offers its guest beside the time-stamp counters (kvmclock).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Clock {
    /// What it showed when the partition's time was stopped; now, if that is not stopped.
    pub elapsed: Duration,
    /// The host's time then, since 1970-01-01 00:00 UTC.
    pub host_time: Duration,
}

impl Inspect for Clock {
    fn inspect(&self, request: Request<'_>) {
        request.respond().field("elapsed", &self.elapsed).field("host_time", &self.host_time);
    }
}
