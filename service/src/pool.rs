//! VMMs that are started before anybody asks for them, so that a launch does not wait for a process to start.
//!
//! One task keeps the pool full. It starts one VMM at a time, and none while launches go on, which would be slower for it. A VMM is
//! ready once it has answered; one that never is, or ends before a launch takes it, is replaced after a pause that doubles.
//!
//! Limit: a VMM that is killed at the very moment that a launch takes it is that guest's loss, as if it was killed later.

use crate::process::{Process, Program};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::spawn_local;

/// How long after a launch the next VMM is started: its guest runs by then.
const LULL: Duration = Duration::from_millis(10);

/// How long a VMM may take until it answers.
const START: Duration = Duration::from_secs(10);

/// How long to wait after the loss of a VMM, and at most after many in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A VMM that waits for a launch.
struct Idle {
    process: Rc<Process>,
    since: Instant,
    ready: bool,
}

/// The VMMs that wait for launches.
pub(crate) struct Pool {
    size: usize,
    program: Rc<Program>,
    idle: RefCell<Vec<Idle>>,
    launched: Cell<Option<Instant>>,
    /// How many VMMs have been lost since one was of use.
    losses: Cell<u32>,
    closed: Cell<bool>,
    /// Wakes the keeper that has nothing to do.
    vacant: Notify,
    /// Wakes the keeper that rests.
    closing: Notify,
}

impl Pool {
    /// A pool of so many, which are kept ready until it is closed.
    pub fn start(size: usize, program: Rc<Program>) -> Rc<Self> {
        let pool = Rc::new(Self {
            size,
            program,
            idle: RefCell::default(),
            launched: Cell::default(),
            losses: Cell::default(),
            closed: Cell::default(),
            vacant: Notify::new(),
            closing: Notify::new(),
        });
        if size > 0 {
            spawn_local(pool.clone().keep());
        }
        pool
    }

    /// How many are ready.
    pub fn ready(&self) -> usize {
        self.idle.borrow().iter().filter(|idle| idle.ready).count()
    }

    /// For a launch: the VMM that has been ready for longest, if there is one.
    pub fn take(&self) -> Option<Rc<Process>> {
        self.launched.set(Some(Instant::now()));
        let mut idle = self.idle.borrow_mut();
        let usable = idle.iter().position(|idle| idle.ready && idle.process.runs())?;
        let taken = idle.remove(usable).process;
        self.losses.set(0);
        self.vacant.notify_one();
        Some(taken)
    }

    /// Ends all that are there, and starts no more; returns those whose end is to be waited for. Nothing is lost with them.
    pub fn close(&self) -> Vec<Rc<Process>> {
        self.closed.set(true);
        self.closing.notify_one();
        self.vacant.notify_one();
        let idle = self.idle.take();
        idle.iter().for_each(|idle| idle.process.kill());
        idle.into_iter().map(|idle| idle.process).collect()
    }

    async fn keep(self: Rc<Self>) {
        while !self.closed.get() {
            if !self.has_room() {
                self.vacant.notified().await;
                continue;
            }
            tokio::select! {
                () = self.rest() => self.add().await,
                () = self.closing.notified() => {}
            }
        }
    }

    fn has_room(&self) -> bool {
        self.idle.borrow().len() < self.size
    }

    /// Waits until a VMM may be started.
    async fn rest(&self) {
        tokio::time::sleep(pause(self.losses.get())).await;
        while let Some(left) = self.launched.get().and_then(|at| LULL.checked_sub(at.elapsed())) {
            tokio::time::sleep(left).await;
        }
    }

    /// Starts a VMM, and waits until it is ready or lost.
    async fn add(self: &Rc<Self>) {
        let process = match self.program.start() {
            Ok(process) => process,
            Err(failure) => {
                tracing::warn!(failure = failure.chain(), "no VMM is kept ready");
                return self.count_loss();
            }
        };
        self.idle.borrow_mut().push(Idle { process: process.clone(), since: Instant::now(), ready: false });
        spawn_local(self.clone().watch(process.clone()));
        if tokio::time::timeout(START, process.answers()).await == Ok(true) {
            self.is_ready(&process);
        } else {
            process.kill();
            process.ended().await;
            self.lose(&process);
        }
    }

    fn is_ready(&self, process: &Rc<Process>) {
        let mut idle = self.idle.borrow_mut();
        if let Some(idle) = idle.iter_mut().find(|idle| Rc::ptr_eq(&idle.process, process)) {
            idle.ready = true;
            tracing::debug!(pid = process.pid, "a VMM is ready");
        }
    }

    /// Notices the end of a VMM that no launch has taken.
    async fn watch(self: Rc<Self>, process: Rc<Process>) {
        process.ended().await;
        self.lose(&process);
    }

    /// Counts a VMM as lost, unless it was taken or counted before.
    fn lose(&self, process: &Rc<Process>) {
        let Some(lost) = self.forget(process) else { return };
        tracing::warn!(pid = process.pid, "a VMM has ended before a guest was launched in it");
        if lost.since.elapsed() > LONGEST_PAUSE {
            self.losses.set(0);
        }
        self.count_loss();
        self.vacant.notify_one();
    }

    fn forget(&self, process: &Rc<Process>) -> Option<Idle> {
        let mut idle = self.idle.borrow_mut();
        let index = idle.iter().position(|idle| Rc::ptr_eq(&idle.process, process))?;
        Some(idle.remove(index))
    }

    fn count_loss(&self) {
        self.losses.set(self.losses.get().saturating_add(1));
    }
}

/// How long to wait after so many losses in a row.
fn pause(losses: u32) -> Duration {
    match losses {
        0 => Duration::ZERO,
        more => FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(more - 1)).min(LONGEST_PAUSE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        assert_eq!(pause(0), Duration::ZERO);
        assert_eq!((pause(1), pause(2), pause(5)), (FIRST_PAUSE, FIRST_PAUSE * 2, FIRST_PAUSE * 16));
        assert_eq!((pause(12), pause(u32::MAX)), (LONGEST_PAUSE, LONGEST_PAUSE));
    }
}
