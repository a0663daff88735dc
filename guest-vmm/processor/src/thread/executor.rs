//! The executor of a VP's thread: one task, polled until it is done.
//!
//! The task blocks in the guest while it is polled, so a wake-up has to do one of three things, by what the thread is at:
//!
//! - asleep: unpark it;
//! - polling: kick the VP out of the guest, so that the poll ends and the next one sees what has changed;
//! - already woken: nothing, since the waker that came first does it, and the task will be polled again after it.
//!
//! No wake-up is lost: it is recorded before the kick, a kick that comes too early keeps the VP from entering the guest
//! ([`Partition::request_yield`]), and the thread falls asleep only if there was none since its last poll began.
//!
//! A VP wakes its own task whenever it leaves the guest for a kick. That must not kick it again, or it would never get
//! anywhere; so a wake-up from the VP's own thread is only recorded. There are two exceptions. A device that is called
//! from inside the guest's run may wake the task too, and would be waited for if nothing kicked the VP: [`Wakeup::in_device`]
//! tells these apart. And whoever polls what enters the guest asks [`Wakeup::is_woken`] first.

use crate::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use crate::sync::thread::{self, Thread};
use crate::{Partition, VpIndex};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

const ASLEEP: u8 = 0;
const POLLING: u8 = 1;
const WOKEN: u8 = 2;

/// What the wakers of one VP's task share with its thread.
pub(super) struct Wakeup {
    state: AtomicU8,
    in_device: AtomicBool,
    thread: Thread,
    vp: VpIndex,
    partition: Arc<dyn Partition>,
}

impl Wakeup {
    /// The wake-up of the calling thread.
    pub(super) fn new(vp: VpIndex, partition: Arc<dyn Partition>) -> Arc<Self> {
        Arc::new(Self {
            state: AtomicU8::new(WOKEN),
            in_device: AtomicBool::new(false),
            thread: thread::current(),
            vp,
            partition,
        })
    }

    /// Whether the task has been woken since its poll began, so that it should not enter the guest.
    pub(super) fn is_woken(&self) -> bool {
        self.state.load(Ordering::Acquire) == WOKEN
    }

    /// Calls a device on the VP's own thread, from inside the guest's run.
    pub(super) fn in_device<R>(&self, call: impl FnOnce() -> R) -> R {
        self.in_device.store(true, Ordering::Relaxed);
        let result = call();
        self.in_device.store(false, Ordering::Relaxed);
        result
    }

    fn begin_poll(&self) {
        self.state.swap(POLLING, Ordering::AcqRel);
    }

    /// Sleeps unless the task was woken during its last poll.
    fn sleep(&self) {
        let asleep = self.state.compare_exchange(POLLING, ASLEEP, Ordering::AcqRel, Ordering::Acquire);
        if asleep.is_ok() {
            while self.state.load(Ordering::Acquire) == ASLEEP {
                thread::park();
            }
        }
    }

    /// Whether a wake-up by the calling thread has to kick the VP.
    fn kick_needed(&self) -> bool {
        thread::current().id() != self.thread.id() || self.in_device.load(Ordering::Relaxed)
    }
}

impl Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        match self.state.swap(WOKEN, Ordering::AcqRel) {
            ASLEEP => self.thread.unpark(),
            POLLING if self.kick_needed() => self.partition.request_yield(self.vp),
            _ => {}
        }
    }
}

/// Runs a task on the calling thread, which `wakeup` was made on.
pub(super) fn block_on<F: Future>(wakeup: &Arc<Wakeup>, task: F) -> F::Output {
    let waker = Waker::from(wakeup.clone());
    let mut context = Context::from_waker(&waker);
    let mut task = pin!(task);
    loop {
        wakeup.begin_poll();
        if let Poll::Ready(output) = task.as_mut().poll(&mut context) {
            return output;
        }
        wakeup.sleep();
    }
}
