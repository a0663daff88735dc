//! The set of units, and the transitions that move it.
//!
//! Each transition runs in a task of its own, so that it reaches its end whatever becomes of the caller, and holds the
//! set's turn until then, so that there is one at a time. What a failure leads to is decided here; how units are asked, in
//! [`phase`](crate::phase).

use crate::builder::UnitBuilder;
use crate::error::{IllegalReason, IllegalTransition, StateTransitionError, UnitFailures};
use crate::graph::{Graph, Topology, UnitCell, UnitState};
use crate::inspector::{StateUnitsInspector, UnitView};
use crate::phase::{OnFailure, Operation, Outcome, Phase, Step};
use crate::restore::{self, SavedStateUnit};
use crate::span::{self, UnitSpan};
use crate::sync::{Mutex, MutexGuard};
use crate::timeline::{Timeline, TransitionRecord};
use crate::{SaveSupport, UnitState as State};
use futures::future::{Either, select};
use save_restore::SavedStateBlob;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, PoisonError};
use std::task::Poll;
use std::time::Duration;
use tracing::Instrument;

#[cfg(test)]
mod model;

/// The deadline of a transition unless [`StateUnits::set_deadline`] says otherwise.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);

/// What the set as a whole is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetState {
    /// All units are stopped.
    Stopped,
    /// The units run, but for those added since.
    Running,
    /// A transition failed in a way that could not be undone. Only stop and inspection are legal.
    Faulted,
}

impl fmt::Display for SetState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Running => "running",
            Self::Faulted => "faulted",
        })
    }
}

/// A unit's answer to [`StateUnits::can_save`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitSaveSupport {
    /// The unit.
    pub name: Arc<str>,
    /// Its answer.
    pub support: SaveSupport,
}

/// What handles, inspectors and transitions share.
#[derive(Debug)]
pub(crate) struct Shared {
    graph: Mutex<Graph>,
    control: Mutex<Control>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug)]
struct Control {
    state: SetState,
    deadline: Duration,
    current: Option<Arc<Phase>>,
    timeline: Timeline,
}

impl Shared {
    pub(crate) fn graph(&self) -> MutexGuard<'_, Graph> {
        self.graph.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn topology(&self) -> Arc<Topology> {
        self.graph().topology()
    }

    /// The graph at this moment; see [`Graph::snapshot`].
    pub(crate) fn snapshot(&self) -> Topology {
        self.graph().snapshot()
    }

    pub(crate) fn state(&self) -> SetState {
        self.control().state
    }

    pub(crate) fn set_state(&self, state: SetState) {
        self.control().state = state;
    }

    pub(crate) fn deadline(&self) -> Duration {
        self.control().deadline
    }

    pub(crate) fn set_deadline(&self, deadline: Duration) {
        self.control().deadline = deadline;
    }

    pub(crate) fn timeline(&self) -> Vec<TransitionRecord> {
        let control = self.control();
        let phases: Vec<Arc<Phase>> = control.timeline.phases().chain(&control.current).cloned().collect();
        drop(control);
        phases.iter().map(|phase| TransitionRecord::of(phase)).collect()
    }

    pub(crate) fn view(&self) -> Vec<UnitView> {
        let current = self.control().current.clone();
        UnitView::all(&self.snapshot(), current.as_deref())
    }

    /// Takes a unit out of the graph and out of the phase in flight.
    pub(crate) fn remove(&self, cell: &Arc<UnitCell>) {
        if self.graph().remove(cell.id) {
            self.let_go(cell);
        }
    }

    /// Ends the channel of a unit that is no longer in the graph, and its part in the phase in flight.
    fn let_go(&self, cell: &Arc<UnitCell>) {
        cell.close();
        let current = self.control().current.clone();
        if let Some(phase) = current
            && phase.topology.cells.get(cell.position()).is_some_and(|found| Arc::ptr_eq(found, cell))
        {
            phase.settle(cell.position(), Outcome::Removed, UnitSpan::default());
        }
    }

    /// Refuses `operation` unless the set is in one of the `legal` states; gives the state.
    pub(crate) fn admit(
        &self,
        operation: Operation,
        legal: &[SetState],
    ) -> Result<SetState, IllegalTransition> {
        let state = self.state();
        if legal.contains(&state) {
            return Ok(state);
        }
        Err(IllegalTransition { operation, reason: IllegalReason::State(state) })
    }

    /// Runs a phase to its end or its deadline.
    pub(crate) async fn run(&self, phase: Phase) -> Arc<Phase> {
        self.run_until(phase, tokio::time::sleep).await
    }

    /// Runs a phase to its end, or to that of the `timer` that the deadline is given to.
    async fn run_until<T: Future>(&self, phase: Phase, timer: impl FnOnce(Duration) -> T) -> Arc<Phase> {
        let phase = Arc::new(phase);
        let deadline = self.enter(&phase);
        phase.begin();
        let timer = pin!(after_a_turn(timer(deadline)));
        // An end before the deadline counts, even if both are found at once.
        let late = matches!(select(pin!(phase.finished()), timer).await, Either::Right(_));
        if late {
            phase.close();
        }
        phase.finish();
        self.leave(&phase);
        phase
    }

    /// Makes `phase` the one in flight; gives its deadline.
    fn enter(&self, phase: &Arc<Phase>) -> Duration {
        let mut control = self.control();
        control.current = Some(phase.clone());
        control.deadline
    }

    fn leave(&self, phase: &Arc<Phase>) {
        let mut control = self.control();
        control.current = None;
        control.timeline.push(phase.clone());
    }

    /// A phase over the units in a state that `takes_part` picks.
    fn phase(
        &self,
        operation: Operation,
        on_failure: OnFailure,
        takes_part: impl Fn(State) -> bool,
    ) -> Phase {
        Phase::new(operation, on_failure, self.topology(), |_, cell| takes_part(cell.state()))
    }

    async fn start(&self) -> Result<(), StateTransitionError> {
        let before = self.admit(Operation::Start, &[SetState::Stopped, SetState::Running])?;
        let stopped = |state| state != UnitState::Running;
        let phase = self.run(self.phase(Operation::Start, OnFailure::SkipRest, stopped)).await;
        match UnitFailures::of(&phase, before) {
            None => self.set_state(SetState::Running),
            Some(failures) => {
                return Err(self.move_back(&phase, failures, Operation::Stop, OnFailure::GoOn).await);
            }
        }
        Ok(())
    }

    async fn start_stopped_units(&self) -> Result<(), StateTransitionError> {
        match self.admit(Operation::Start, &[SetState::Stopped, SetState::Running])? {
            SetState::Running => self.start().await,
            _ => Ok(()),
        }
    }

    async fn pause(&self) -> Result<(), StateTransitionError> {
        if self.admit(Operation::Stop, &[SetState::Stopped, SetState::Running])? == SetState::Stopped {
            return Ok(());
        }
        let moving = |state| state != UnitState::Stopped;
        let phase = self.run(self.phase(Operation::Stop, OnFailure::SkipRest, moving)).await;
        match UnitFailures::of(&phase, SetState::Running) {
            None => self.set_state(SetState::Stopped),
            Some(failures) => {
                return Err(self.move_back(&phase, failures, Operation::Start, OnFailure::SkipRest).await);
            }
        }
        Ok(())
    }

    /// Undoes `phase` for the units that have moved or, being late, may have.
    async fn move_back(
        &self,
        phase: &Phase,
        mut failures: Box<UnitFailures>,
        operation: Operation,
        on_failure: OnFailure,
    ) -> StateTransitionError {
        let moved = phase.progress();
        let takes_part = |position: usize, _: &UnitCell| {
            moved.get(position).is_some_and(|unit| matches!(unit.step, Step::Done | Step::Late))
        };
        // The topology of the failed phase, whose positions these are: units added since are not concerned.
        let back = Phase::new(operation, on_failure, phase.topology.clone(), takes_part);
        let back = self.run(back).await;
        if let Some(rollback) = UnitFailures::of(&back, SetState::Faulted) {
            failures.end = SetState::Faulted;
            failures.rollback = Some(rollback);
        }
        self.set_state(failures.end);
        failures.into()
    }

    async fn stop(&self) -> Result<(), StateTransitionError> {
        let before = self.state();
        if before == SetState::Stopped {
            return Ok(());
        }
        let moving = |state| state != UnitState::Stopped;
        let phase = self.run(self.phase(Operation::Stop, OnFailure::GoOn, moving)).await;
        let Some(mut failures) = UnitFailures::of(&phase, SetState::Faulted) else {
            if before == SetState::Running {
                self.set_state(SetState::Stopped);
            }
            return Ok(());
        };
        if !failures.skipped.is_empty() {
            self.stop_skipped(&phase, &mut failures).await;
        }
        self.set_state(SetState::Faulted);
        Err(failures.into())
    }

    /// Those that waited for a late unit when the deadline passed are stopped without it.
    async fn stop_skipped(&self, phase: &Phase, failures: &mut UnitFailures) {
        let units = phase.progress();
        let takes_part = |position: usize, _: &UnitCell| {
            units.get(position).is_some_and(|unit| unit.step == Step::Skipped)
        };
        let rest = Phase::new(Operation::Stop, OnFailure::GoOn, phase.topology.clone(), takes_part);
        let rest = self.run(rest).await;
        failures.resume(&rest, UnitFailures::of(&rest, SetState::Faulted));
    }

    async fn reset(&self) -> Result<(), StateTransitionError> {
        self.admit(Operation::Reset, &[SetState::Stopped])?;
        let phase = self.run(self.phase(Operation::Reset, OnFailure::SkipRest, |_| true)).await;
        self.fault_if_troubled(&phase)
    }

    pub(crate) fn fault_if_troubled(&self, phase: &Phase) -> Result<(), StateTransitionError> {
        let Some(failures) = UnitFailures::of(phase, SetState::Faulted) else { return Ok(()) };
        self.set_state(SetState::Faulted);
        Err(failures.into())
    }

    async fn can_save(&self) -> Result<Vec<UnitSaveSupport>, StateTransitionError> {
        let state = self.admit(Operation::CanSave, &[SetState::Stopped, SetState::Running])?;
        let phase = self.run(self.phase(Operation::CanSave, OnFailure::GoOn, |_| true)).await;
        if let Some(failures) = UnitFailures::of(&phase, state) {
            return Err(failures.into());
        }
        let name = |position| phase.topology.name(position).clone();
        let support = phase.take_support().into_iter();
        Ok(support.map(|(at, support)| UnitSaveSupport { name: name(at), support }).collect())
    }

    async fn save(&self) -> Result<Vec<SavedStateUnit>, StateTransitionError> {
        self.admit(Operation::Save, &[SetState::Stopped])?;
        let phase = self.run(self.phase(Operation::Save, OnFailure::GoOn, |_| true)).await;
        if let Some(failures) = UnitFailures::of(&phase, SetState::Stopped) {
            return Err(failures.into());
        }
        let entry = |(at, state): (usize, SavedStateBlob)| SavedStateUnit {
            name: phase.topology.name(at).to_string(),
            state: Some(state),
        };
        Ok(phase.take_saved().into_iter().map(entry).collect())
    }
}

/// Polls `timer`, which runs already, from when the task comes round again. Many a phase is over by then, and tokio makes a
/// system call for the first timer of a thread.
async fn after_a_turn<T: Future>(timer: T) -> T::Output {
    let mut came_round = false;
    poll_fn(|context| match std::mem::replace(&mut came_round, true) {
        true => Poll::Ready(()),
        false => {
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
    timer.await
}

/// A set of units that move together. See the [crate](crate).
///
/// Every transition returns once it has ended. The future does not have to be awaited for that: once it has been polled
/// and the transition before it has ended, the transition goes on by itself. Dropping the set ends all units' channels.
#[derive(Debug)]
pub struct StateUnits {
    shared: Arc<Shared>,
}

impl Default for StateUnits {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for StateUnits {
    fn drop(&mut self) {
        let cells = self.shared.graph().drain();
        cells.iter().for_each(|cell| self.shared.let_go(cell));
    }
}

impl StateUnits {
    /// An empty set, stopped.
    #[must_use]
    pub fn new() -> Self {
        let control = Control {
            state: SetState::Stopped,
            deadline: DEFAULT_DEADLINE,
            current: None,
            timeline: Timeline::default(),
        };
        let (graph, control) = (Mutex::new(Graph::default()), Mutex::new(control));
        Self { shared: Arc::new(Shared { graph, control, turn: Arc::default() }) }
    }

    /// Sets how long each pass over the units may take, 10 s at first. It applies from the next pass on.
    ///
    /// A transition is one pass; moving back after a failure, post-restore, and the second part of a stop with late
    /// units are one more each.
    pub fn set_deadline(&self, deadline: Duration) {
        self.shared.set_deadline(deadline);
    }

    /// Begins to add a unit. Its name has to be unique in the set, and is its name in saved state.
    pub fn add(&self, name: impl Into<Arc<str>>) -> UnitBuilder<'_> {
        UnitBuilder::new(&self.shared, name.into())
    }

    /// Whether the units run. False in [`SetState::Faulted`], though some may.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.state() == SetState::Running
    }

    /// What the set is doing; during a transition, what it did before.
    #[must_use]
    pub fn state(&self) -> SetState {
        self.shared.state()
    }

    /// Shows the set and its units, at any time; does not keep the set alive.
    #[must_use]
    pub fn inspector(&self) -> StateUnitsInspector {
        StateUnitsInspector::new(&self.shared)
    }

    /// The units as they are at this moment, in the order of their addition; also during a transition.
    #[must_use]
    pub fn graph(&self) -> Vec<UnitView> {
        self.shared.view()
    }

    /// The latest passes over the units, the oldest first; the last may be in flight.
    #[must_use]
    pub fn timeline(&self) -> Vec<TransitionRecord> {
        self.shared.timeline()
    }

    /// Starts the units that do not run, dependencies first.
    ///
    /// # Errors
    /// If a unit fails or is late, those started are stopped again, and the set is as before; if that fails too, it is
    /// faulted. Illegal in a faulted set.
    pub async fn start(&self) -> Result<(), StateTransitionError> {
        self.transition(Operation::Start, |shared| async move { shared.start().await }).await
    }

    /// Starts units that were added while the set was running. Does nothing if the set is stopped.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_stopped_units(&self) -> Result<(), StateTransitionError> {
        self.transition(Operation::Start, |shared| async move { shared.start_stopped_units().await }).await
    }

    /// Stops all units with the intention to start them again, dependants first. Does nothing if the set is stopped.
    ///
    /// # Errors
    /// If a unit fails or is late, those stopped are started again, and the set is running; if that fails too, it is
    /// faulted. Illegal in a faulted set.
    pub async fn pause(&self) -> Result<(), StateTransitionError> {
        self.transition(Operation::Stop, |shared| async move { shared.pause().await }).await
    }

    /// Stops all units for good, dependants first. Does nothing if the set is stopped; legal in a faulted set.
    ///
    /// # Errors
    /// Failed and late units are recorded, and the rest is stopped all the same. The set is faulted then.
    pub async fn stop(&self) -> Result<(), StateTransitionError> {
        self.transition(Operation::Stop, |shared| async move { shared.stop().await }).await
    }

    /// Resets all units, dependencies first. Legal only in a stopped set.
    ///
    /// # Errors
    /// If a unit fails or is late, the set is faulted.
    pub async fn reset(&self) -> Result<(), StateTransitionError> {
        self.transition(Operation::Reset, |shared| async move { shared.reset().await }).await
    }

    /// Asks every unit whether it can be saved, in the order of their addition. Legal unless the set is faulted.
    ///
    /// # Errors
    /// If a unit does not answer; nothing has changed then.
    pub async fn can_save(&self) -> Result<Vec<UnitSaveSupport>, StateTransitionError> {
        self.transition(Operation::CanSave, |shared| async move { shared.can_save().await }).await
    }

    /// The state of every unit that has one, in the order of their addition. Legal only in a stopped set.
    ///
    /// # Errors
    /// If a unit fails or is late; the set is as before.
    pub async fn save(&self) -> Result<Vec<SavedStateUnit>, StateTransitionError> {
        self.transition(Operation::Save, |shared| async move { shared.save().await }).await
    }

    /// Restores the units that have an entry, dependencies first, and then tells all units that this is done. Legal only
    /// in a stopped set.
    ///
    /// # Errors
    /// [`SavedStateMismatch`](crate::SavedStateMismatch), before anything is restored, if the entries do not fit the
    /// units. If a unit fails or is late, the set is faulted.
    pub async fn restore(&self, states: Vec<SavedStateUnit>) -> Result<(), StateTransitionError> {
        self.transition(Operation::Restore, |shared| async move { restore::restore(&shared, states).await })
            .await
    }

    /// Runs `work` in a task of its own as soon as it is its turn.
    async fn transition<T, F>(
        &self,
        operation: Operation,
        work: impl FnOnce(Arc<Shared>) -> F,
    ) -> Result<T, StateTransitionError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StateTransitionError>> + Send + 'static,
    {
        let no_runtime = || IllegalTransition { operation, reason: IllegalReason::NoRuntime };
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| no_runtime())?;
        let turn = self.shared.turn.clone().lock_owned().await;
        let span = span::transition(operation);
        let work = work(self.shared.clone()).instrument(span.clone());
        let task = runtime.spawn(async move {
            let result = work.await;
            span::record_end(&span, &result);
            drop((span, turn));
            result
        });
        task.await.map_err(|_| no_runtime())?
    }
}

#[cfg(test)]
mod tests {
    use super::after_a_turn;
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll, Wake, Waker};

    #[derive(Default)]
    struct WakeUps(AtomicUsize);

    impl Wake for WakeUps {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_timer_is_polled_once_its_task_has_come_round() {
        let wake_ups = Arc::new(WakeUps::default());
        let waker = Waker::from(wake_ups.clone());
        let mut context = Context::from_waker(&waker);
        let mut polls = 0;
        let timer = poll_fn(|_| {
            polls += 1;
            if polls < 2 { Poll::Pending } else { Poll::Ready(polls) }
        });
        let mut timer = pin!(after_a_turn(timer));
        assert_eq!(timer.as_mut().poll(&mut context), Poll::Pending);
        assert_eq!(wake_ups.0.load(Ordering::Relaxed), 1, "it asks for the next turn itself");
        assert_eq!(timer.as_mut().poll(&mut context), Poll::Pending, "this is the timer's first poll");
        assert_eq!(wake_ups.0.load(Ordering::Relaxed), 1, "and from now on it is the timer that wakes");
        assert_eq!(timer.as_mut().poll(&mut context), Poll::Ready(2));
    }
}
