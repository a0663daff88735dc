//! One pass over the graph: each unit that takes part is asked once, in order, and settles once.
//!
//! A phase is driven by its answers: whoever settles a unit counts down the units that wait for it and sends the request
//! to those that wait for nothing more. The task behind the transition only waits for the end or for the deadline. Nothing
//! is scanned and no timer is set per unit, so that a phase costs O(units + edges).
//!
//! Units that do not take part pass order, and failure, through from those they wait for to those that wait for them.
//!
//! The lock is never held while a request is sent or dropped, or a waker called: each of these may run code of others.

use crate::graph::{Edges, Topology, UnitCell, UnitState};
use crate::request::Ticket;
use crate::span::{PhaseSpan, UnitSpan};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::{Answer, SaveSupport, StateRequest, UnitError};
use save_restore::SavedStateBlob;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

/// What units are asked in a transition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Begin to run; dependencies first.
    Start,
    /// Stop running; dependants first.
    Stop,
    /// Go back to the state after creation; dependencies first.
    Reset,
    /// Say whether they can be saved; in any order.
    CanSave,
    /// Give their state; in any order.
    Save,
    /// Replace their state; dependencies first.
    Restore,
    /// All are restored; in any order.
    PostRestore,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Reset => "reset",
            Self::CanSave => "can-save",
            Self::Save => "save",
            Self::Restore => "restore",
            Self::PostRestore => "post-restore",
        })
    }
}

impl Operation {
    /// The edges from a unit to those it waits for, if there is an order.
    fn predecessors(self, topology: &Topology) -> Option<&Edges> {
        match self {
            Self::Start | Self::Reset | Self::Restore => Some(&topology.dependencies),
            Self::Stop => Some(&topology.dependents),
            Self::CanSave | Self::Save | Self::PostRestore => None,
        }
    }

    /// The edges from a unit to those that wait for it, if there is an order.
    fn successors(self, topology: &Topology) -> Option<&Edges> {
        match self {
            Self::Start | Self::Reset | Self::Restore => Some(&topology.dependents),
            Self::Stop => Some(&topology.dependencies),
            Self::CanSave | Self::Save | Self::PostRestore => None,
        }
    }

    /// What a unit is doing while it has not answered.
    fn interim(self) -> Option<UnitState> {
        match self {
            Self::Start => Some(UnitState::Starting),
            Self::Stop => Some(UnitState::Stopping),
            Self::Reset => Some(UnitState::Resetting),
            Self::CanSave => None,
            Self::Save => Some(UnitState::Saving),
            Self::Restore | Self::PostRestore => Some(UnitState::Restoring),
        }
    }

    /// What a unit is known to be once it has settled so; `None` if that changes nothing.
    fn settled(self, step: Step, on_failure: OnFailure) -> Option<UnitState> {
        match (self, step) {
            (_, Step::Gone) => Some(UnitState::Faulted),
            (Self::CanSave, _) => None,
            (Self::Start, Step::Done) => Some(UnitState::Running),
            (Self::Start, Step::Failed) => Some(UnitState::Stopped),
            (Self::Stop, Step::Failed) if on_failure == OnFailure::SkipRest => Some(UnitState::Running),
            (_, Step::Done) | (Self::Save, Step::Failed | Step::Late) => Some(UnitState::Stopped),
            (_, Step::Failed | Step::Late) => Some(UnitState::Faulted),
            (_, Step::Removed) => Some(UnitState::Stopped),
            _ => None,
        }
    }
}

/// What a failed unit means for those that wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnFailure {
    /// They are skipped.
    SkipRest,
    /// They are asked all the same.
    GoOn,
}

/// A unit's error, which both the transition and the timeline hold.
pub(crate) type SharedError = Arc<dyn std::error::Error + Send + Sync>;

/// How a unit settles.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done,
    Saved(Option<SavedStateBlob>),
    Support(SaveSupport),
    Failed(UnitError),
    /// Its channel has ended, or it dropped the request.
    Gone,
    /// It was taken out of the set.
    Removed,
}

/// How far a unit has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Takes no part; order passes through it.
    Passive,
    /// Waits for others.
    Waiting,
    /// Has been asked.
    Asked,
    Done,
    Failed,
    Gone,
    Removed,
    Skipped,
    Late,
}

impl Step {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Passive => "passive",
            Self::Waiting => "waiting",
            Self::Asked => "asked",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Gone => "gone",
            Self::Removed => "removed",
            Self::Skipped => "skipped",
            Self::Late => "late",
        }
    }
}

/// A moment of a phase: nanoseconds since it began, or never.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark(u64);

impl Mark {
    const NEVER: Self = Self(u64::MAX);

    fn since(start: Instant) -> Self {
        Self(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX - 1))
    }

    pub(crate) fn get(self) -> Option<Duration> {
        (self.0 != u64::MAX).then(|| Duration::from_nanos(self.0))
    }
}

/// Whether a unit's saved state is on its way to it. Only who sends it knows whether it arrives, so that a removal in that
/// time is left to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handover {
    None,
    UnderWay,
    /// The unit was removed meanwhile.
    Overtaken,
}

/// One unit's part in a phase.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    /// How many units it still waits for.
    waiting: usize,
    pub(crate) step: Step,
    /// One that it waited for has failed or was skipped.
    blocked: bool,
    handover: Handover,
    pub(crate) ready: Mark,
    pub(crate) ended: Mark,
}

#[derive(Debug, Default)]
struct PhaseState {
    units: Vec<Progress>,
    /// Units that take part and have not settled.
    open: usize,
    /// Some unit has not done what it was to do.
    troubled: bool,
    waker: Option<Waker>,
    /// State to restore, by position.
    payload: Vec<Option<SavedStateBlob>>,
    saved: Vec<(usize, SavedStateBlob)>,
    support: Vec<(usize, SaveSupport)>,
    errors: Vec<(usize, SharedError)>,
}

/// What follows from a settled unit, to be done without the lock.
#[derive(Default)]
struct Consequences {
    ready: Vec<usize>,
    /// Settled without having been asked; noted only if somebody listens.
    passed_over: Vec<usize>,
    waker: Option<Waker>,
}

/// One pass over the graph. See the [module](self).
#[derive(Debug)]
pub(crate) struct Phase {
    pub(crate) operation: Operation,
    pub(crate) topology: Arc<Topology>,
    pub(crate) began_at: SystemTime,
    pub(crate) span: PhaseSpan,
    on_failure: OnFailure,
    start: Instant,
    /// When units took up their requests; apart from the rest, so that noting it needs no lock.
    begun: Vec<AtomicU64>,
    state: Mutex<PhaseState>,
}

impl Phase {
    /// A phase in which those units take part that `takes_part` picks by position.
    pub(crate) fn new(
        operation: Operation,
        on_failure: OnFailure,
        topology: Arc<Topology>,
        takes_part: impl Fn(usize, &UnitCell) -> bool,
    ) -> Self {
        let predecessors = operation.predecessors(&topology);
        let units: Vec<Progress> = (topology.cells.iter().enumerate())
            .map(|(position, cell)| Progress {
                waiting: predecessors.map_or(0, |edges| edges.of(position).len()),
                step: if takes_part(position, cell) { Step::Waiting } else { Step::Passive },
                blocked: false,
                handover: Handover::None,
                ready: Mark::NEVER,
                ended: Mark::NEVER,
            })
            .collect();
        let open = units.iter().filter(|unit| unit.step == Step::Waiting).count();
        let begun = units.iter().map(|_| AtomicU64::new(Mark::NEVER.0)).collect();
        let state = Mutex::new(PhaseState { units, open, ..PhaseState::default() });
        let (began_at, start) = (SystemTime::now(), Instant::now());
        Self { operation, topology, began_at, span: PhaseSpan::current(), on_failure, start, begun, state }
    }

    /// Gives the states to restore, by position.
    pub(crate) fn set_payload(&self, payload: Vec<Option<SavedStateBlob>>) {
        self.lock().payload = payload;
    }

    fn lock(&self) -> MutexGuard<'_, PhaseState> {
        // Nothing panics while the lock is held, but a unit may settle while it unwinds.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the units that wait for nothing. The rest follows from the answers.
    pub(crate) fn begin(self: &Arc<Self>) {
        let predecessors = self.operation.predecessors(&self.topology);
        let mut then = Consequences::default();
        let mut state = self.lock();
        let now = Mark::since(self.start);
        then.ready.reserve(if predecessors.is_some() { 0 } else { state.open });
        for position in 0..state.units.len() {
            if predecessors.is_some_and(|edges| !edges.of(position).is_empty()) {
                continue;
            }
            if let Some(blocks) = self.release(&mut state, position, now, &mut then) {
                self.let_go(&mut state, position, blocks, now, &mut then);
            }
        }
        drop(state);
        self.pursue(then);
    }

    /// A unit waits for nothing more. If that settles it, says whether it blocks those that wait for it.
    fn release(
        &self,
        state: &mut PhaseState,
        position: usize,
        now: Mark,
        then: &mut Consequences,
    ) -> Option<bool> {
        let unit = &mut state.units[position];
        match unit.step {
            Step::Passive => Some(unit.blocked),
            Step::Waiting if unit.blocked => {
                unit.step = Step::Skipped;
                unit.ended = now;
                state.open -= 1;
                self.note_passed_over(position, then);
                Some(true)
            }
            Step::Waiting => {
                unit.step = Step::Asked;
                unit.ready = now;
                if let Some(interim) = self.operation.interim() {
                    self.topology.cells[position].set_state(interim);
                }
                then.ready.push(position);
                None
            }
            // Removed while it waited: it has let go of its successors then.
            _ => None,
        }
    }

    fn note_passed_over(&self, position: usize, then: &mut Consequences) {
        if self.span.is_enabled() {
            then.passed_over.push(position);
        }
    }

    /// Counts down those that wait for `position`, and so on through those that this settles.
    fn let_go(
        &self,
        state: &mut PhaseState,
        position: usize,
        blocks: bool,
        now: Mark,
        then: &mut Consequences,
    ) {
        let Some(successors) = self.operation.successors(&self.topology) else { return };
        if successors.of(position).is_empty() {
            return;
        }
        let mut settled = vec![(position, blocks)];
        while let Some((position, blocks)) = settled.pop() {
            for &next in successors.of(position) {
                let unit = &mut state.units[next];
                unit.waiting -= 1;
                unit.blocked |= blocks;
                if unit.waiting == 0
                    && let Some(blocks) = self.release(state, next, now, then)
                {
                    settled.push((next, blocks));
                }
            }
        }
    }

    /// Settles a unit and asks those that waited for it. A unit settles once: what comes later is ignored, but for the
    /// answer of a late unit, which is recorded.
    pub(crate) fn settle(self: &Arc<Self>, position: usize, outcome: Outcome, span: UnitSpan) {
        let then = self.record(position, outcome);
        span.close(self, position);
        self.pursue(then);
    }

    fn pursue(self: &Arc<Self>, mut then: Consequences) {
        let mut next = 0;
        while let Some(&position) = then.ready.get(next) {
            next += 1;
            if let Err((outcome, span)) = self.ask(position) {
                let more = self.record(position, outcome);
                span.close(self, position);
                then.ready.extend(more.ready);
                then.passed_over.extend(more.passed_over);
                then.waker = then.waker.or(more.waker);
            }
        }
        self.trace_passed_over(then.passed_over);
        if let Some(waker) = then.waker {
            waker.wake();
        }
    }

    fn trace_passed_over(&self, positions: Vec<usize>) {
        for position in positions {
            UnitSpan::open(self, position).close(self, position);
        }
    }

    fn record(&self, position: usize, outcome: Outcome) -> Consequences {
        let mut then = Consequences::default();
        let mut guard = self.lock();
        let state = &mut *guard;
        let now = Mark::since(self.start);
        let unit = &mut state.units[position];
        match unit.step {
            Step::Asked if unit.handover != Handover::None && matches!(outcome, Outcome::Removed) => {
                unit.handover = Handover::Overtaken;
                return then;
            }
            Step::Asked | Step::Waiting => {}
            Step::Late => {
                unit.ended = now;
                drop(guard);
                self.report_late_answer(position, &outcome);
                return then;
            }
            _ => return then,
        }
        let waited = unit.step == Step::Waiting;
        if waited {
            self.note_passed_over(position, &mut then);
        }
        let step = self.enter(state, position, outcome);
        state.units[position].step = step;
        state.units[position].ended = now;
        state.open -= 1;
        if let Some(settled) = self.operation.settled(step, self.on_failure).filter(|_| !waited) {
            self.topology.cells[position].set_state(settled);
        }
        let failed = matches!(step, Step::Failed | Step::Gone);
        state.troubled |= failed;
        let blocks = failed && self.on_failure == OnFailure::SkipRest;
        self.let_go(state, position, blocks, now, &mut then);
        if state.open == 0 {
            then.waker = state.waker.take();
        }
        then
    }

    /// Keeps what the unit answered.
    fn enter(&self, state: &mut PhaseState, position: usize, outcome: Outcome) -> Step {
        match outcome {
            Outcome::Done | Outcome::Saved(None) => Step::Done,
            Outcome::Saved(Some(blob)) => {
                state.saved.push((position, blob));
                Step::Done
            }
            Outcome::Support(support) => {
                state.support.push((position, support));
                Step::Done
            }
            Outcome::Failed(error) => {
                state.errors.push((position, error.into()));
                Step::Failed
            }
            Outcome::Gone if self.topology.cells[position].is_removed() => Step::Removed,
            Outcome::Gone => Step::Gone,
            Outcome::Removed if state.payload.get(position).is_some_and(Option::is_some) => {
                state.errors.push((position, Arc::new(StateUnconsumed)));
                Step::Failed
            }
            Outcome::Removed => Step::Removed,
        }
    }

    /// Sends the request to a unit, or says how the unit settles because it could not be sent.
    fn ask(self: &Arc<Self>, position: usize) -> Result<(), (Outcome, UnitSpan)> {
        let request = match self.operation {
            Operation::Start => StateRequest::Start(Answer::new(self.clone(), position)),
            Operation::Stop => StateRequest::Stop(Answer::new(self.clone(), position)),
            Operation::Reset => StateRequest::Reset(Answer::new(self.clone(), position)),
            Operation::CanSave => StateRequest::CanSave(Answer::new(self.clone(), position)),
            Operation::Save => StateRequest::Save(Answer::new(self.clone(), position)),
            Operation::PostRestore => StateRequest::PostRestore(Answer::new(self.clone(), position)),
            Operation::Restore => {
                let Some(payload) = self.hand_over(position) else { return Ok(()) };
                StateRequest::Restore(payload, Answer::new(self.clone(), position))
            }
        };
        let cell = &self.topology.cells[position];
        let Err(mut undelivered) = cell.send(request) else { return self.handed_over(position) };
        if let StateRequest::Restore(state, _) = &mut undelivered {
            self.take_back(position, std::mem::take(state));
        }
        let span = undelivered.into_ticket().map(Ticket::disarm).unwrap_or_default();
        Err((if cell.is_removed() { Outcome::Removed } else { Outcome::Gone }, span))
    }

    /// The state of a unit that is to restore it; none if the phase is over, the unit having been removed or late before
    /// it could be asked.
    fn hand_over(&self, position: usize) -> Option<SavedStateBlob> {
        let mut state = self.lock();
        let payload = state.payload.get_mut(position)?.take()?;
        state.units[position].handover = Handover::UnderWay;
        Some(payload)
    }

    /// The request was delivered; says how the unit settles if it was removed meanwhile.
    fn handed_over(&self, position: usize) -> Result<(), (Outcome, UnitSpan)> {
        if self.operation != Operation::Restore {
            return Ok(());
        }
        match std::mem::replace(&mut self.lock().units[position].handover, Handover::None) {
            // Its ticket, which is out, has the span.
            Handover::Overtaken => Err((Outcome::Removed, UnitSpan::default())),
            Handover::None | Handover::UnderWay => Ok(()),
        }
    }

    fn take_back(&self, position: usize, payload: SavedStateBlob) {
        let mut state = self.lock();
        state.units[position].handover = Handover::None;
        if let Some(place) = state.payload.get_mut(position) {
            *place = Some(payload);
        }
    }

    pub(crate) fn mark_begun(&self, position: usize) {
        self.begun[position].store(Mark::since(self.start).0, Ordering::Relaxed);
    }

    /// When a unit took up its request.
    pub(crate) fn begun(&self, position: usize) -> Mark {
        Mark(self.begun[position].load(Ordering::Relaxed))
    }

    /// Resolves once every unit that takes part has settled.
    pub(crate) async fn finished(&self) {
        std::future::poll_fn(|context| {
            let mut state = self.lock();
            if state.open == 0 {
                return Poll::Ready(());
            }
            state.waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The deadline has passed: who was asked is late, who still waits is skipped.
    pub(crate) fn close(&self) {
        let mut then = Consequences::default();
        let mut state = self.lock();
        let now = Mark::since(self.start);
        state.troubled |= state.open > 0;
        state.open = 0;
        for (position, unit) in state.units.iter_mut().enumerate() {
            unit.step = match unit.step {
                Step::Asked => Step::Late,
                Step::Waiting => Step::Skipped,
                settled => settled,
            };
            if unit.step == Step::Skipped && unit.ended.get().is_none() {
                unit.ended = now;
                self.note_passed_over(position, &mut then);
            }
            if unit.step == Step::Late
                && let Some(settled) = self.operation.settled(Step::Late, self.on_failure)
            {
                self.topology.cells[position].set_state(settled);
            }
        }
        drop(state);
        self.trace_passed_over(then.passed_over);
    }

    fn report_late_answer(&self, position: usize, outcome: &Outcome) {
        let unit = &**self.topology.name(position);
        let operation = self.operation;
        tracing::warn!(unit, %operation, ?outcome, "a unit answered after the deadline");
    }

    /// Whether some unit failed, is gone, was skipped or is late.
    pub(crate) fn is_troubled(&self) -> bool {
        self.lock().troubled
    }

    /// Forgets what is of no use after the phase.
    pub(crate) fn finish(&self) {
        let payload = std::mem::take(&mut self.lock().payload);
        drop(payload);
        self.span.close();
    }

    pub(crate) fn take_saved(&self) -> Vec<(usize, SavedStateBlob)> {
        let mut saved = std::mem::take(&mut self.lock().saved);
        saved.sort_unstable_by_key(|(position, _)| *position);
        saved
    }

    pub(crate) fn take_support(&self) -> Vec<(usize, SaveSupport)> {
        let mut support = std::mem::take(&mut self.lock().support);
        support.sort_unstable_by_key(|(position, _)| *position);
        support
    }

    pub(crate) fn progress(&self) -> Vec<Progress> {
        self.lock().units.clone()
    }

    pub(crate) fn progress_of(&self, position: usize) -> Progress {
        self.lock().units[position]
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// The errors that units answered, by position.
    pub(crate) fn errors(&self) -> HashMap<usize, SharedError> {
        self.lock().errors.iter().cloned().collect()
    }

    /// The error that a unit answered, if it did; cheap for the latest.
    pub(crate) fn error_of(&self, position: usize) -> Option<SharedError> {
        let state = self.lock();
        let found = state.errors.iter().rev().find(|(at, _)| *at == position);
        found.map(|(_, error)| error.clone())
    }

    /// Units that have not been asked yet, with those that they wait for.
    pub(crate) fn waits(&self) -> HashMap<Arc<str>, Vec<Arc<str>>> {
        let units = self.progress();
        let waiting = units.iter().enumerate().filter(|(_, unit)| unit.step == Step::Waiting);
        waiting.map(|(at, _)| (self.topology.name(at).clone(), self.culprits(&units, at))).collect()
    }

    /// Those that a unit waited for and that did not do what they were to do, units that took no part looked through.
    pub(crate) fn culprits(&self, units: &[Progress], position: usize) -> Vec<Arc<str>> {
        let Some(predecessors) = self.operation.predecessors(&self.topology) else { return Vec::new() };
        let mut seen = BTreeSet::new();
        let mut open: Vec<usize> = predecessors.of(position).to_vec();
        while let Some(at) = open.pop() {
            match units[at].step {
                Step::Done | Step::Removed => {}
                Step::Passive => open.extend(predecessors.of(at)),
                _ => drop(seen.insert(at)),
            }
        }
        seen.into_iter().map(|at| self.topology.name(at).clone()).collect()
    }
}

/// A unit was removed before it had taken its saved state.
#[derive(Debug, thiserror::Error)]
#[error("the unit was removed before it had taken its saved state")]
struct StateUnconsumed;
