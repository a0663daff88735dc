//! The time slice that a VP's thread asks the host's scheduler for: sched_setattr(2).
//!
//! A guest computes for as long as it is let; the threads that serve it, and those who hear from it, run for some microseconds at a time.
//! Linux lets a thread that wakes up run at once beside one whose slice is longer (EEVDF, from 6.12 on); beside one whose slice is as
//! long as its own it may wait for that to end, which is milliseconds. The share of the CPU that each gets is the same either way.
//!
//! Limit: earlier kernels take no slice from threads that are not real-time ones, and ignore this.

// UNSAFETY: the system call has no wrapper.
#![expect(unsafe_code, reason = "sched_setattr has no wrapper")]

use std::io;
use std::time::Duration;

/// Twice the longest slice that Linux gives by itself, on hosts of eight CPUs and more.
const SLICE: Duration = Duration::from_millis(6);

/// Gives the calling thread a long slice, unless it is scheduled in a special way; all else stays as it is.
///
/// # Errors
/// What the system says: it may be kept from this.
pub(super) fn lengthen_this_threads() -> io::Result<()> {
    let mut attributes = of_this_thread()?;
    let policy = attributes.sched_policy.cast_signed();
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&policy) {
        return Ok(());
    }
    attributes.sched_runtime = u64::try_from(SLICE.as_nanos()).expect("some milliseconds");
    // SAFETY: the structure is the kernel's, and says how long it is; 0 is the calling thread.
    succeeded(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}

/// How the calling thread is scheduled.
fn of_this_thread() -> io::Result<libc::sched_attr> {
    let size = u32::try_from(size_of::<libc::sched_attr>()).expect("some dozens of bytes");
    let mut attributes = libc::sched_attr {
        size,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: as many bytes are written as there are; 0 is the calling thread.
    succeeded(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) })?;
    Ok(attributes)
}

fn succeeded(returned: libc::c_long) -> io::Result<()> {
    if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gets_a_long_slice_and_keeps_its_niceness() {
        let thread = std::thread::spawn(|| {
            // SAFETY: changes a number of the calling thread, which is the test's own.
            succeeded(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 5) }.into()).unwrap();
            let before = of_this_thread().unwrap();
            lengthen_this_threads().unwrap();
            let after = of_this_thread().unwrap();
            assert_eq!((after.sched_policy, after.sched_nice), (before.sched_policy, 5));
            // Kernels before 6.12 say 0, and take none.
            let slice = if before.sched_runtime == 0 { 0 } else { SLICE.as_nanos() };
            assert_eq!(u128::from(after.sched_runtime), slice);
        });
        thread.join().unwrap();
    }

    #[test]
    fn what_is_scheduled_in_a_special_way_stays_so() {
        let thread = std::thread::spawn(|| {
            let idle = libc::sched_param { sched_priority: 0 };
            // SAFETY: the parameters are the kernel's, for the calling thread.
            let changed = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const idle) };
            succeeded(changed.into()).unwrap();
            lengthen_this_threads().unwrap();
            let after = of_this_thread().unwrap();
            assert_eq!(after.sched_policy.cast_signed(), libc::SCHED_IDLE);
            assert_ne!(u128::from(after.sched_runtime), SLICE.as_nanos());
        });
        thread.join().unwrap();
    }
}
