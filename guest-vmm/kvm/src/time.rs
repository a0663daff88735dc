//! A partition's time: kvmclock, and by how much the VPs' time-stamp counters lag behind the host's.
//!
//! While time is stopped nothing moves: the clock is kept here, and a VP's counter is what it was at one moment of the host's
//! counter, the same for all VPs, so that they stay in step to the tick. When time goes on, the clock is set, and each VP moves its
//! own counter, on its thread, before it enters the guest ([`crate::tsc::follow`]).

// UNSAFETY: the host's time-stamp counter is read.
#![expect(unsafe_code, reason = "the host's time-stamp counter is read")]

use crate::error::Named;
use crate::hypervisor::Host;
use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use kvm_ioctls::VmFd;
use processor::{Clock, PartitionError, TimePolicy};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// A partition's time. Runs when it is made.
#[derive(Default)]
pub(crate) struct Time {
    pub(crate) policy: TimePolicy,
    stopped: Mutex<Option<Stopped>>,
    /// How often time has gone on.
    starts: AtomicU64,
    /// By how many ticks of the host's the counters are to lag behind where they would be had time never been stopped.
    lag: AtomicU64,
}

/// Time that is stopped.
#[derive(Clone, Copy)]
struct Stopped {
    host_tsc: u64,
    clock: Clock,
    /// The clock was set meanwhile, or is to be kept: from when time was stopped none of it is the guest's.
    set: bool,
}

/// What a VP has to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Pace {
    pub(crate) starts: u64,
    pub(crate) lag: u64,
}

impl Time {
    pub(crate) fn new(policy: TimePolicy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// A panic of another thread leaves it whole: it is only replaced.
    fn stopped(&self) -> MutexGuard<'_, Option<Stopped>> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stop(&self, vm: &VmFd) -> Result<(), PartitionError> {
        let mut stopped = self.stopped();
        if stopped.is_none() {
            let (clock, host_tsc) = read_clock(vm)?;
            *stopped = Some(Stopped { host_tsc, clock, set: false });
        }
        Ok(())
    }

    pub(crate) fn start(&self, vm: &VmFd, host: &Host) -> Result<(), PartitionError> {
        let mut guard = self.stopped();
        let Some(Stopped { host_tsc: then, clock, set }) = *guard else { return Ok(()) };
        // A guest that is yet to run has seen no time that could be hidden from it.
        let has_run = self.starts.load(Ordering::Relaxed) > 0;
        if set || has_run && self.policy == TimePolicy::Hidden {
            let away = match self.policy {
                TimePolicy::Hidden => Duration::ZERO,
                TimePolicy::CatchUp => since_1970().saturating_sub(clock.host_time),
            };
            set_clock(vm, clock.elapsed.saturating_add(away))?;
            let lag = host_tsc().wrapping_sub(then).wrapping_sub(ticks(away, host.tsc_khz()));
            self.lag.fetch_add(lag, Ordering::Relaxed);
        }
        *guard = None;
        self.starts.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// The guest comes only now: what has passed since time was stopped is none of its.
    pub(crate) fn forget_stopped(&self) {
        if let Some(stopped) = &mut *self.stopped() {
            (stopped.clock.host_time, stopped.set) = (since_1970(), true);
        }
    }

    /// The clock, as it stands or as it runs.
    pub(crate) fn clock(&self, vm: &VmFd) -> Result<Clock, PartitionError> {
        match *self.stopped() {
            Some(stopped) => Ok(stopped.clock),
            None => Ok(read_clock(vm)?.0),
        }
    }

    /// Stops time and sets the clock, from which it goes on.
    pub(crate) fn set_clock(&self, vm: &VmFd, clock: Clock) -> Result<(), PartitionError> {
        self.stop(vm)?;
        if let Some(stopped) = &mut *self.stopped() {
            (stopped.clock, stopped.set) = (clock, true);
        }
        Ok(())
    }

    /// The moment, by the host's counter, for which VPs say what their counters show.
    pub(crate) fn moment(&self) -> u64 {
        self.stopped().map_or_else(host_tsc, |stopped| stopped.host_tsc)
    }

    /// What the VPs have to follow.
    pub(crate) fn pace(&self) -> Pace {
        let starts = self.starts.load(Ordering::Acquire);
        Pace { starts, lag: self.lag.load(Ordering::Relaxed) }
    }
}

/// The clock, and the host's counter at the same moment: KVM says which that was, where it computes the one from the other.
fn read_clock(vm: &VmFd) -> Result<(Clock, u64), PartitionError> {
    let read = vm.get_clock().for_partition("KVM_GET_CLOCK")?;
    let told = read.flags & KVM_CLOCK_HOST_TSC != 0;
    let clock = Clock { elapsed: Duration::from_nanos(read.clock), host_time: since_1970() };
    Ok((clock, if told { read.host_tsc } else { host_tsc() }))
}

fn set_clock(vm: &VmFd, elapsed: Duration) -> Result<(), PartitionError> {
    let clock = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
    vm.set_clock(&kvm_clock_data { clock, ..Default::default() }).for_partition("KVM_SET_CLOCK")
}

/// The host's time. A host that lives before 1970 has none.
pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// How many ticks a counter of so many kHz does in a time.
fn ticks(time: Duration, khz: u32) -> u64 {
    u64::try_from(time.as_nanos() * u128::from(khz) / 1_000_000).unwrap_or(u64::MAX)
}

fn host_tsc() -> u64 {
    // SAFETY: it has no effect but its result.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_do_not_overflow() {
        assert_eq!(ticks(Duration::from_secs(1), 2_500_000), 2_500_000_000);
        assert_eq!(ticks(Duration::from_micros(3), 1_000), 3);
        assert_eq!(ticks(Duration::MAX, u32::MAX), u64::MAX);
    }
}
