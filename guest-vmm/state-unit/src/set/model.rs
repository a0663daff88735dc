//! Models of the signalling between a set and its units, on `loom`: each is run once for every order in which its threads
//! can meet, up to a bound on how often they interrupt each other. A wake-up that is lost shows as a deadlock.
//!
//! What is modelled is the crate's own: mailboxes, a phase's bookkeeping, removal. The turn of the set and the timers
//! are `tokio`'s; here, a deadline passes at once or never.

use super::{Shared, StateUnits};
use crate::phase::{OnFailure, Operation, Phase, Step};
use crate::{
    RequestReceiver, SaveSupport, SetState, StateRequest, StateUnit, UnitError, UnitFailures, UnitHandle,
    UnitState, run_unit,
};
use inspect::{Inspect, Request};
use loom::future::block_on;
use loom::model::Builder;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread::{self, JoinHandle};
use save_restore::{RestoreError, SaveError, SavedStateBlob};
use std::future::{Ready, pending, ready};
use std::sync::Arc;
use std::task::{Context, Waker};

/// Runs `model` in every order with at most this many interruptions of a thread that could have gone on.
const MAX_PREEMPTIONS: usize = 2;

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound.get_or_insert(MAX_PREEMPTIONS);
    builder.max_branches = 50_000;
    builder.check(model);
}

/// Counts the operations of all units; notes when its own were.
struct Unit {
    clock: Arc<AtomicUsize>,
    moments: Vec<usize>,
}

impl Unit {
    fn new(clock: &Arc<AtomicUsize>) -> Self {
        Self { clock: clock.clone(), moments: Vec::new() }
    }

    fn act(&mut self) {
        self.moments.push(self.clock.fetch_add(1, Ordering::Relaxed));
    }

    /// Serves the unit on a thread of its own.
    fn serve(self, requests: RequestReceiver) -> JoinHandle<Self> {
        thread::spawn(move || block_on(run_unit(self, requests)))
    }
}

impl Inspect for Unit {
    fn inspect(&self, request: Request<'_>) {
        request.value(self.moments.len());
    }
}

impl StateUnit for Unit {
    async fn start(&mut self) -> Result<(), UnitError> {
        self.act();
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        self.act();
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    fn can_save(&mut self) -> SaveSupport {
        SaveSupport::Saves
    }

    async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError> {
        Ok(None)
    }

    async fn restore(&mut self, _: SavedStateBlob) -> Result<(), RestoreError> {
        self.act();
        Ok(())
    }
}

fn add(units: &StateUnits, name: &str, needs: &[&UnitHandle]) -> (UnitHandle, RequestReceiver) {
    let builder = needs.iter().fold(units.add(name), |builder, other| builder.depends_on(other));
    builder.build().unwrap()
}

/// A start of all units whose deadline never passes.
fn start(shared: &Shared) -> Arc<Phase> {
    let phase = shared.phase(Operation::Start, OnFailure::SkipRest, |_| true);
    block_on(shared.run_until(phase, |_| pending::<()>()))
}

fn steps(phase: &Phase) -> Vec<Step> {
    phase.progress().iter().map(|unit| unit.step).collect()
}

fn reaches_both_in_order(operation: Operation, after: UnitState, moments: [[usize; 1]; 2]) {
    explore(move || {
        let (units, clock) = (StateUnits::new(), Arc::default());
        let (a, a_requests) = add(&units, "a", &[]);
        let (b, b_requests) = add(&units, "b", &[&a]);
        let threads = [Unit::new(&clock).serve(a_requests), Unit::new(&clock).serve(b_requests)];
        let phase = units.shared.phase(operation, OnFailure::SkipRest, |_| true);
        let phase = block_on(units.shared.run_until(phase, |_| pending::<()>()));
        assert_eq!(steps(&phase), [Step::Done, Step::Done]);
        assert_eq!((a.state(), b.state()), (after, after));
        drop(units);
        assert_eq!(threads.map(|unit| unit.join().unwrap().moments), moments);
    });
}

#[test]
fn a_start_reaches_each_unit_in_order_and_ends() {
    reaches_both_in_order(Operation::Start, UnitState::Running, [[0], [1]]);
}

#[test]
fn a_stop_reaches_each_unit_in_order_and_ends() {
    reaches_both_in_order(Operation::Stop, UnitState::Stopped, [[1], [0]]);
}

#[test]
fn independent_units_that_answer_at_once_end_the_phase_once() {
    explore(|| {
        let (units, clock) = (StateUnits::new(), Arc::default());
        let (a, a_requests) = add(&units, "a", &[]);
        let (b, b_requests) = add(&units, "b", &[]);
        let threads = [a_requests, b_requests].map(|requests| Unit::new(&clock).serve(requests));
        assert_eq!(steps(&start(&units.shared)), [Step::Done; 2]);
        assert_eq!([a, b].map(|unit| unit.state()), [UnitState::Running; 2]);
        drop(units);
        for unit in threads {
            unit.join().unwrap();
        }
    });
}

#[test]
fn requests_of_two_senders_all_arrive_and_then_the_end() {
    explore(|| {
        let units = StateUnits::new();
        let (unit, mut requests) = add(&units, "unit", &[]);
        let [one, two] = ["one", "two"].map(|_| {
            let cell = units.shared.topology().cells[0].clone();
            let phase = units.shared.phase(Operation::Reset, OnFailure::GoOn, |_| true);
            let phase = Arc::new(phase);
            thread::spawn(move || {
                let answer = crate::Answer::new(phase.clone(), 0);
                cell.send(StateRequest::Reset(answer)).unwrap();
                phase
            })
        });
        let receiver = thread::spawn(move || {
            let mut received = 0;
            while let Some(request) = block_on(requests.recv()) {
                let StateRequest::Reset(answer) = request else { panic!("{request:?}") };
                answer.complete(Ok(()));
                received += 1;
            }
            received
        });
        let phases = [one, two].map(|sender| sender.join().unwrap());
        unit.remove();
        assert_eq!(receiver.join().unwrap(), 2);
        assert!(phases.iter().all(|phase| steps(phase) == [Step::Done]));
    });
}

#[test]
fn a_receive_that_is_given_up_takes_nothing_with_it() {
    explore(|| {
        let (units, clock) = (StateUnits::new(), Arc::default());
        let (unit, mut requests) = add(&units, "unit", &[]);
        let served = thread::spawn(move || {
            let first = {
                let mut given_up = std::pin::pin!(requests.recv());
                given_up.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            };
            let request = match first {
                std::task::Poll::Ready(request) => request,
                std::task::Poll::Pending => block_on(requests.recv()),
            };
            let mut unit = Unit::new(&clock);
            block_on(request.expect("it is asked to start").apply(&mut unit));
        });
        assert_eq!(steps(&start(&units.shared)), [Step::Done]);
        served.join().unwrap();
        drop(unit);
    });
}

/// Neither a unit that the deadline finds at work nor one that it finds waiting is left in between.
#[test]
fn when_the_deadline_passes_each_unit_is_done_late_or_skipped() {
    explore(|| {
        let (units, clock) = (StateUnits::new(), Arc::default());
        let (a, a_requests) = add(&units, "a", &[]);
        let (b, b_requests) = add(&units, "b", &[&a]);
        let threads = [Unit::new(&clock).serve(a_requests), Unit::new(&clock).serve(b_requests)];
        let phase = units.shared.phase(Operation::Start, OnFailure::SkipRest, |_| true);
        let phase = block_on(units.shared.run_until(phase, |_| -> Ready<()> { ready(()) }));
        let ended = steps(&phase);
        let states = match ended[..] {
            [Step::Done, Step::Done] => [UnitState::Running, UnitState::Running],
            [Step::Done, Step::Late] => [UnitState::Running, UnitState::Faulted],
            [Step::Late, Step::Skipped] => [UnitState::Faulted, UnitState::Stopped],
            _ => panic!("{ended:?}"),
        };
        let late = UnitFailures::of(&phase, SetState::Faulted).map_or(0, |failures| failures.late.len());
        assert_eq!(late, ended.iter().filter(|step| **step == Step::Late).count());
        drop(units);
        let [a_asked, b_asked] = threads.map(|unit| unit.join().unwrap().moments.len());
        assert_eq!(a_asked, 1, "the deadline takes no request back");
        match ended[1] {
            Step::Done => assert_eq!(b_asked, 1),
            Step::Skipped => assert_eq!(b_asked, 0),
            // Its request may have been on the way when the set was dropped.
            _ => assert!(b_asked <= 1),
        }
        assert_eq!(steps(&phase), ended, "a late answer is not acted upon");
        assert_eq!([a, b].map(|unit| unit.state()), states);
        for unit in phase.progress() {
            assert!(unit.ended.get().is_some(), "a late answer is recorded");
        }
    });
}

#[test]
fn a_unit_that_vanishes_fails_the_transition_and_holds_nobody_up() {
    explore(|| {
        let (units, clock) = (StateUnits::new(), Arc::default());
        let (a, a_requests) = add(&units, "a", &[]);
        let (_b, b_requests) = add(&units, "b", &[]);
        let vanishing = thread::spawn(move || drop(a_requests));
        let staying = Unit::new(&clock).serve(b_requests);
        assert_eq!(steps(&start(&units.shared)), [Step::Gone, Step::Done]);
        assert_eq!(a.state(), UnitState::Faulted);
        drop(units);
        vanishing.join().unwrap();
        staying.join().unwrap();
    });
}

#[test]
fn a_unit_removed_at_any_time_holds_nobody_up() {
    explore(|| {
        let (units, clock) = (StateUnits::new(), Arc::default());
        // Nobody serves it: only its removal can settle it.
        let (a, mut a_requests) = add(&units, "a", &[]);
        let (b, b_requests) = add(&units, "b", &[&a]);
        let served = Unit::new(&clock).serve(b_requests);
        let phase = units.shared.phase(Operation::Start, OnFailure::SkipRest, |_| true);
        let removal = thread::spawn(move || a.remove());
        let phase = block_on(units.shared.run_until(phase, |_| pending::<()>()));
        assert_eq!(steps(&phase), [Step::Removed, Step::Done]);
        assert_eq!(b.state(), UnitState::Running);
        removal.join().unwrap();
        while let Some(request) = block_on(a_requests.recv()) {
            drop(request);
        }
        assert_eq!(steps(&phase), [Step::Removed, Step::Done], "what comes later changes nothing");
        drop(units);
        served.join().unwrap();
    });
}

/// Either the state was handed over, or the restore fails because it was not.
#[test]
fn a_saved_state_is_handed_over_or_missed_when_its_unit_is_removed() {
    explore(|| {
        let (units, clock) = (StateUnits::new(), Arc::default());
        let (a, a_requests) = add(&units, "a", &[]);
        let (b, mut b_requests) = add(&units, "b", &[&a]);
        let served = Unit::new(&clock).serve(a_requests);
        let phase = units.shared.phase(Operation::Restore, OnFailure::SkipRest, |_| true);
        phase.set_payload(vec![Some(SavedStateBlob::from_parts("state", [])); 2]);
        let removal = thread::spawn(move || b.remove());
        let phase = block_on(units.shared.run_until(phase, |_| pending::<()>()));
        removal.join().unwrap();
        let handed_over = matches!(block_on(b_requests.recv()), Some(StateRequest::Restore(..)));
        let expected = if handed_over { Step::Removed } else { Step::Failed };
        assert_eq!(steps(&phase), [Step::Done, expected]);
        assert_eq!(phase.is_troubled(), !handed_over);
        drop((a, units));
        served.join().unwrap();
    });
}

#[test]
fn a_set_that_is_dropped_ends_its_units_and_its_transition() {
    explore(|| {
        let (units, clock) = (StateUnits::new(), Arc::default());
        let (a, a_requests) = add(&units, "a", &[]);
        let (b, _b_requests) = add(&units, "b", &[&a]);
        let served = Unit::new(&clock).serve(a_requests);
        let shared = units.shared.clone();
        let phase = shared.phase(Operation::Start, OnFailure::SkipRest, |_| true);
        let dropped = thread::spawn(move || drop(units));
        let phase = block_on(shared.run_until(phase, |_| pending::<()>()));
        let ended = steps(&phase);
        assert!(matches!(ended[0], Step::Done | Step::Removed), "{ended:?}");
        assert_eq!(ended[1], Step::Removed);
        dropped.join().unwrap();
        served.join().unwrap();
        drop((a, b));
    });
}
