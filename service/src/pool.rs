//! VMMs that are started before anybody asks for them, so that a launch does not wait for a process to start.
//!
//! One task keeps the pool full. It starts one VMM at a time, and none while launches go on, which would be slower for it. A VMM is
//! ready once it has answered; one that never is, or ends before a launch takes it, is replaced after a pause that doubles.
//!
//! A VMM that is ready also prepares a guest's memory, partition and VPs, of one of the shapes that the latest guests had: the latest
//! of those that no other VMM has prepared, or else the latest. Nothing of that is touched before there is a guest, so a ready VMM
//! takes no more memory for it than page tables and what the kernel keeps of a partition.
//!
//! Limits: what shape a guest will have is not known when it is launched, unless it goes on from a snapshot; of unlike guests that
//! come in turns some find the other's. A VMM that is killed at the very moment that a launch takes it is that guest's loss, as if it was killed later.

use crate::process::{Process, Program};
use guest_schema::{GuestShape, SnapshotInfo};
use guest_transport::printable;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
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

/// Of how many guests the shapes are remembered.
const REMEMBERED: usize = 16;

/// How long a VMM may take to prepare a guest.
const PREPARATION: Duration = Duration::from_secs(10);

/// A VMM that waits for a launch.
struct Idle {
    process: Rc<Process>,
    since: Instant,
    ready: bool,
    prepared: Preparation,
}

impl Idle {
    /// Whether all is there for a guest that `fits` says something of.
    fn is_prepared(&self, fits: impl Fn(&GuestShape) -> bool) -> bool {
        matches!(&self.prepared, Preparation::Done(shape) if fits(shape))
    }
}

/// How far a VMM is with a guest's memory, partition and VPs.
enum Preparation {
    None,
    Begun(GuestShape),
    Done(GuestShape),
    /// It could not, and is not asked again for this shape.
    Failed(GuestShape),
}

impl Preparation {
    fn shape(&self) -> Option<&GuestShape> {
        match self {
            Self::None => None,
            Self::Begun(shape) | Self::Done(shape) | Self::Failed(shape) => Some(shape),
        }
    }
}

/// A VMM that a launch has taken.
pub(crate) struct Ready {
    pub process: Rc<Process>,
    /// Whether it has a guest's memory, partition and VPs. Whether they fit shows at create.
    pub is_prepared: bool,
}

/// The VMMs that wait for launches.
pub(crate) struct Pool {
    size: usize,
    program: Rc<Program>,
    idle: RefCell<Vec<Idle>>,
    /// The shapes of the latest guests, the latest first.
    shapes: RefCell<VecDeque<GuestShape>>,
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
            shapes: RefCell::default(),
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

    /// How many have a guest's memory, partition and VPs ready.
    pub fn prepared(&self) -> usize {
        self.idle.borrow().iter().filter(|idle| idle.is_prepared(|_| true)).count()
    }

    /// Takes note of the shape of a guest that was created.
    pub fn asked_for(&self, shape: GuestShape) {
        let mut shapes = self.shapes.borrow_mut();
        let is_latest = shapes.front() == Some(&shape);
        shapes.truncate(REMEMBERED - 1);
        shapes.push_front(shape);
        if !is_latest {
            self.vacant.notify_one();
        }
    }

    /// For a launch: a VMM that is ready, if there is one; rather one that has prepared a guest like the snapshot's that this one goes
    /// on from, or else like the last, and of such VMMs the one that has been ready for longest.
    pub fn take(&self, snapshot: Option<&SnapshotInfo>) -> Option<Ready> {
        self.launched.set(Some(Instant::now()));
        let latest = self.shapes.borrow().front().cloned();
        let fits = |shape: &GuestShape| match snapshot {
            Some(info) => (shape.vps, shape.memory_bytes) == (info.vps, info.memory_bytes),
            None => latest.as_ref() == Some(shape),
        };
        let mut idle = self.idle.borrow_mut();
        let mut usable: Vec<usize> =
            (0..idle.len()).filter(|&at| idle[at].ready && idle[at].process.runs()).collect();
        // A stable sort: those that are alike stay in the order in which they became ready.
        usable.sort_by_key(|&at| !idle[at].is_prepared(fits));
        let taken = idle.remove(*usable.first()?);
        self.losses.set(0);
        self.vacant.notify_one();
        Some(Ready { is_prepared: taken.is_prepared(|_| true), process: taken.process })
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
            if !self.has_room() && self.to_prepare().is_none() {
                self.vacant.notified().await;
                continue;
            }
            tokio::select! {
                () = self.rest() => match self.has_room() {
                    true => self.add().await,
                    false => self.prepare_next().await,
                },
                () = self.closing.notified() => {}
            }
        }
    }

    /// A VMM that has prepared nothing, or a guest of a kind that was not asked for lately, and what it is to prepare.
    fn to_prepare(&self) -> Option<(Rc<Process>, GuestShape)> {
        let (idle, shapes) = (self.idle.borrow(), self.shapes.borrow());
        let wanted = distinct(&shapes, self.size);
        let has = |idle: &Idle, shape: &GuestShape| idle.prepared.shape() == Some(shape);
        let unfit = idle.iter().find(|idle| idle.ready && !wanted.iter().any(|shape| has(idle, shape)))?;
        let lacking = wanted.iter().find(|shape| !idle.iter().any(|idle| has(idle, shape)));
        let shape = *lacking.or(wanted.first())?;
        Some((unfit.process.clone(), shape.clone()))
    }

    /// Has a VMM prepare a guest, and waits until it has. A launch may take the VMM meanwhile.
    async fn prepare_next(&self) {
        let Some((process, shape)) = self.to_prepare() else { return };
        self.mark(&process, Preparation::Begun(shape.clone()));
        let prepared = tokio::select! {
            biased;
            // Noticed elsewhere.
            _ = process.ended() => return,
            prepared = tokio::time::timeout(PREPARATION, process.prepare(&shape)) => prepared,
        };
        match prepared.unwrap_or_else(|_| Err(format!("not within {PREPARATION:?}"))) {
            Ok(()) => {
                tracing::debug!(pid = process.pid, "a VMM has prepared a guest");
                self.mark(&process, Preparation::Done(shape));
            }
            Err(problem) => {
                tracing::warn!(
                    pid = process.pid,
                    problem = printable(&problem),
                    "a VMM cannot prepare a guest"
                );
                self.mark(&process, Preparation::Failed(shape));
            }
        }
    }

    /// Says how far a VMM is, if no launch has taken it.
    fn mark(&self, process: &Rc<Process>, prepared: Preparation) {
        let mut idle = self.idle.borrow_mut();
        if let Some(idle) = idle.iter_mut().find(|idle| Rc::ptr_eq(&idle.process, process)) {
            idle.prepared = prepared;
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
        self.idle.borrow_mut().push(Idle {
            process: process.clone(),
            since: Instant::now(),
            ready: false,
            prepared: Preparation::None,
        });
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

/// The first so many of the shapes, each once.
fn distinct(shapes: &VecDeque<GuestShape>, most: usize) -> Vec<&GuestShape> {
    let mut found: Vec<&GuestShape> = Vec::new();
    for shape in shapes {
        if found.len() < most && !found.contains(&shape) {
            found.push(shape);
        }
    }
    found
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
    fn shapes_are_told_apart_the_latest_first() {
        let shape = |vps| GuestShape { vps, ..GuestShape::default() };
        let shapes: VecDeque<_> = [2, 1, 2, 3, 1].map(shape).into();
        let vps = |most| distinct(&shapes, most).iter().map(|shape| shape.vps).collect::<Vec<_>>();
        assert_eq!(vps(4), [2, 1, 3]);
        assert_eq!(vps(2), [2, 1]);
        assert_eq!(vps(0), []);
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        assert_eq!(pause(0), Duration::ZERO);
        assert_eq!((pause(1), pause(2), pause(5)), (FIRST_PAUSE, FIRST_PAUSE * 2, FIRST_PAUSE * 16));
        assert_eq!((pause(12), pause(u32::MAX)), (LONGEST_PAUSE, LONGEST_PAUSE));
    }
}
