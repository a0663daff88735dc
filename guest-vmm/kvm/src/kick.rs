//! Getting a VP out of the guest, from any thread.
//!
//! A kick asks KVM_RUN to come back at once (`immediate_exit`), and interrupts it with a signal if it has been entered.
//!
//! `requested` is set before `immediate_exit` and cleared after it, so that a kick that finds it set may leave the rest to the
//! one that set it: the VP will have left the guest after both. Where a flag is looked at, it is by a read-modify-write: that
//! sees the newest value, and whoever changes it next sees all that came before the look.

#[cfg(test)]
mod model;

use crate::run_thread::RunThread;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, thread};
use std::sync::{Arc, PoisonError};

/// A thread that runs a VP, as others interrupt it.
pub(crate) trait RunsVp {
    /// Has KVM_RUN come back at once when it is entered, or not any more.
    fn set_immediate_exit(&self, exit: bool);

    /// Interrupts a KVM_RUN that has been entered. False if the system refuses it for now.
    fn send_signal(&self) -> bool;
}

/// A VP bound to a thread.
pub(crate) struct Kick<T = RunThread> {
    thread: T,
    in_run: AtomicBool,
    requested: AtomicBool,
}

impl<T: RunsVp> Kick<T> {
    /// For a VP that is run by the thread.
    pub(crate) fn new(thread: T) -> Arc<Self> {
        Arc::new(Self { thread, in_run: AtomicBool::new(false), requested: AtomicBool::new(false) })
    }

    fn kick(&self) {
        if self.requested.swap(true, Ordering::AcqRel) {
            return;
        }
        self.thread.set_immediate_exit(true);
        // A VP that is not in KVM_RUN finds `immediate_exit` set when it enters, and no signal disturbs what it is at.
        while look(&self.in_run) && !self.thread.send_signal() {
            thread::yield_now();
        }
    }

    /// The VP's thread calls KVM_RUN now.
    pub(crate) fn in_run<R>(&self, run: impl FnOnce() -> R) -> R {
        self.in_run.swap(true, Ordering::AcqRel);
        let result = run();
        self.in_run.swap(false, Ordering::AcqRel);
        result
    }

    /// The VP has left the guest for a kick.
    pub(crate) fn answer(&self) {
        self.thread.set_immediate_exit(false);
        self.requested.swap(false, Ordering::AcqRel);
    }

    /// Calls KVM_RUN so that it comes back without having entered the guest. A kick meanwhile stays in force.
    pub(crate) fn without_entering<R>(&self, run: impl FnOnce() -> R) -> R {
        self.thread.set_immediate_exit(true);
        let result = run();
        self.thread.set_immediate_exit(false);
        if look(&self.requested) {
            self.thread.set_immediate_exit(true);
        }
        result
    }
}

fn look(flag: &AtomicBool) -> bool {
    flag.fetch_or(false, Ordering::AcqRel)
}

/// Where the partition finds the kick of a VP, and leaves it what only the VP's own thread can do.
pub(crate) struct KickSlot<T = RunThread> {
    slot: Mutex<Slot<T>>,
    nmi: AtomicBool,
}

struct Slot<T> {
    kick: Option<Arc<Kick<T>>>,
    /// Somebody has kicked a VP that was not bound yet.
    early: bool,
}

impl<T> Default for KickSlot<T> {
    fn default() -> Self {
        Self { slot: Mutex::new(Slot { kick: None, early: false }), nmi: AtomicBool::new(false) }
    }
}

impl<T: RunsVp> KickSlot<T> {
    /// A panic of another thread leaves the slot whole: it is only set and taken.
    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kicks the VP. One that is not bound yet does not enter the guest when it is first run.
    pub(crate) fn kick(&self) {
        let mut slot = self.lock();
        match &slot.kick {
            Some(kick) => kick.kick(),
            None => slot.early = true,
        }
    }

    /// Has the VP take a non-maskable interrupt.
    pub(crate) fn send_nmi(&self) {
        self.nmi.swap(true, Ordering::AcqRel);
        self.kick();
    }

    /// Whether the VP is to take a non-maskable interrupt.
    pub(crate) fn take_nmi(&self) -> bool {
        self.nmi.swap(false, Ordering::AcqRel)
    }

    /// The VP is bound.
    pub(crate) fn bind(&self, kick: Arc<Kick<T>>) {
        let mut slot = self.lock();
        if slot.early {
            kick.kick();
        }
        slot.kick = Some(kick);
    }

    /// The VP's thread goes away.
    pub(crate) fn unbind(&self) {
        self.lock().kick = None;
    }
}
