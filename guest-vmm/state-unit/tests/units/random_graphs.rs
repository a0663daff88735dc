//! Random graphs with random failures, checked against a sequential model of what each transition leads to.

use crate::support::{CounterState, Machine, Script, TestUnit};
use proptest::collection::vec;
use proptest::prelude::*;
use save_restore::SavedStateBlob;
use state_unit::{
    SavedStateUnit, SetState, SpawnedUnit, StateTransitionError, UnitFailures, UnitOutcome, UnitState,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The deadline of a pass, in ms. Delays are multiples of 64 ms and removals come 32 ms later than one, so that no two of
/// these fall together, be there up to 31 deadlines before them.
const DEADLINE: u64 = 1001;

/// In ms; for what does not happen.
const NEVER: u64 = u64::MAX;

const SCRIPTED: [&str; 6] = ["start", "stop", "reset", "save", "restore", "post-restore"];

/// What a unit does when asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Well,
    Fail,
    Panic,
    Hang,
}

#[derive(Debug, Clone)]
struct UnitPlan {
    /// The units it depends on, all of a lower index.
    needs: BTreeSet<usize>,
    deeds: [Deed; SCRIPTED.len()],
    /// How long it takes for each, in ms.
    delays: [u64; SCRIPTED.len()],
    saves: bool,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Start,
    Pause,
    Stop,
    Reset,
    CanSave,
    Save,
    Restore,
    Remove(usize),
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![60 => Just(Deed::Well), 2 => Just(Deed::Fail), 1 => Just(Deed::Panic), 1 => Just(Deed::Hang)]
}

/// In ms; a few chains of the longer ones meet the deadline.
fn delay() -> impl Strategy<Value = u64> {
    prop_oneof![20 => Just(0), 8 => (1..4_u64).prop_map(|count| count * 64), 1 => Just(8 * 64), 1 => Just(20 * 64)]
}

/// A unit to remove during the step, and after how many ms.
fn removal() -> impl Strategy<Value = Option<(usize, u64)>> {
    let delay = prop_oneof![3 => 0..3_u64, 1 => 0..20_u64].prop_map(|count| count * 64 + 32);
    prop_oneof![1 => Just(None), 1 => (any::<usize>(), delay).prop_map(Some)]
}

fn unit(index: usize) -> impl Strategy<Value = UnitPlan> {
    let needs = vec(0..index.max(1), 0..4).prop_map(move |needs| match index {
        0 => BTreeSet::new(),
        _ => needs.into_iter().collect(),
    });
    let deeds = std::array::from_fn::<_, { SCRIPTED.len() }, _>(|_| deed());
    let delays = std::array::from_fn::<_, { SCRIPTED.len() }, _>(|_| delay());
    (needs, deeds, delays, any::<bool>()).prop_map(|(needs, deeds, delays, saves)| UnitPlan {
        needs,
        deeds,
        delays,
        saves,
    })
}

fn units() -> impl Strategy<Value = Vec<UnitPlan>> {
    prop_oneof![9 => 2..25_usize, 1 => 150..200_usize]
        .prop_flat_map(|count| (0..count).map(unit).collect::<Vec<_>>())
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => Just(Step::Start),
        3 => Just(Step::Pause),
        3 => Just(Step::Stop),
        2 => Just(Step::Reset),
        1 => Just(Step::CanSave),
        2 => Just(Step::Save),
        4 => Just(Step::Restore),
        1 => any::<usize>().prop_map(Step::Remove),
    ]
}

/// Indices of the units that did not do what they were asked.
#[derive(Debug, Default, PartialEq, Eq)]
struct Trouble {
    failed: BTreeSet<usize>,
    skipped: BTreeSet<usize>,
    late: BTreeSet<usize>,
}

impl Trouble {
    fn is_none(&self) -> bool {
        *self == Self::default()
    }

    fn seen(failures: &UnitFailures) -> Self {
        let index = |name: &str| name.parse().expect("units are called by their index");
        Self {
            failed: failures.failed.iter().map(|unit| index(&unit.name)).collect(),
            skipped: failures.skipped.iter().map(|unit| index(&unit.name)).collect(),
            late: failures.late.iter().map(|unit| index(&unit.name)).collect(),
        }
    }
}

/// A failed transition: its trouble, and that of moving back.
type Failure = Box<(Trouble, Option<Trouble>)>;

/// One unit of the model. Times are in ms since the test began.
#[derive(Debug, Clone)]
struct ModelUnit {
    plan: UnitPlan,
    present: bool,
    /// From when on it is no longer in the set.
    removed_at: u64,
    /// From when on its channel has ended, because it panicked.
    gone_at: u64,
    /// Until when it works on what it was asked earlier.
    busy_until: u64,
    /// It has answered after a deadline.
    was_late: bool,
    state: UnitState,
}

/// How a unit that others wait for has settled, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settled {
    Free(u64),
    Blocking(u64),
    Never,
}

/// A pass as the timeline is to show it.
#[derive(Debug, PartialEq, Eq)]
struct Pass {
    operation: String,
    outcomes: BTreeMap<usize, &'static str>,
}

struct Model {
    units: Vec<ModelUnit>,
    state: SetState,
    now: u64,
    /// Those of the latest step.
    passes: Vec<Pass>,
}

impl Model {
    fn new(plans: &[UnitPlan]) -> Self {
        let units = plans.iter().cloned().map(|plan| ModelUnit {
            plan,
            present: true,
            removed_at: NEVER,
            gone_at: NEVER,
            busy_until: 0,
            was_late: false,
            state: UnitState::Stopped,
        });
        Self { units: units.collect(), state: SetState::Stopped, now: 0, passes: Vec::new() }
    }

    /// The units that `at` waits for in `operation`.
    fn predecessors(&self, operation: &str, at: usize) -> Vec<usize> {
        let present = |&index: &usize| self.units[index].present;
        match operation {
            "start" | "reset" | "restore" => {
                self.units[at].plan.needs.iter().copied().filter(present).collect()
            }
            "stop" => (0..self.units.len())
                .filter(|&other| self.units[other].plan.needs.contains(&at))
                .filter(present)
                .collect(),
            _ => Vec::new(),
        }
    }

    /// One pass over the units, one after the other in an order that fits.
    fn pass(
        &mut self,
        operation: &str,
        skip_rest: bool,
        takes_part: impl Fn(usize, &ModelUnit) -> bool,
    ) -> Trouble {
        let mut outcomes = BTreeMap::new();
        let mut settled = vec![Settled::Free(self.now); self.units.len()];
        let mut order: Vec<usize> = (0..self.units.len()).filter(|&at| self.units[at].present).collect();
        if operation == "stop" {
            order.reverse();
        }
        let deadline = self.now + DEADLINE;
        for at in order {
            let before: Vec<Settled> =
                self.predecessors(operation, at).into_iter().map(|other| settled[other]).collect();
            let ready = before.into_iter().fold(Settled::Free(self.now), after_both);
            settled[at] = ready;
            if takes_part(at, &self.units[at]) {
                let (outcome, end) = self.act(operation, skip_rest, at, ready);
                outcomes.insert(at, outcome);
                settled[at] = end;
            }
        }
        let ends = outcomes.keys().map(|&at| match settled[at] {
            Settled::Free(end) | Settled::Blocking(end) => end,
            Settled::Never => deadline,
        });
        self.now = ends.max().unwrap_or(self.now);
        let with = |wanted: &[&str]| {
            outcomes.iter().filter(|(_, outcome)| wanted.contains(outcome)).map(|(&at, _)| at).collect()
        };
        let trouble =
            Trouble { failed: with(&["failed", "gone"]), skipped: with(&["skipped"]), late: with(&["late"]) };
        self.passes.push(Pass { operation: operation.to_owned(), outcomes });
        trouble
    }

    /// What becomes of a unit that takes part and waits for others until they have settled so.
    fn act(
        &mut self,
        operation: &str,
        skip_rest: bool,
        at: usize,
        before: Settled,
    ) -> (&'static str, Settled) {
        let (began, deadline) = (self.now, self.now + DEADLINE);
        let unit = &mut self.units[at];
        let removed_at = unit.removed_at;
        let blocked_at = |end| if skip_rest { Settled::Blocking(end) } else { Settled::Free(end) };
        let ready = match before {
            Settled::Free(ready) | Settled::Blocking(ready) => ready,
            Settled::Never => NEVER,
        };
        if removed_at < ready.min(deadline) {
            // Removed before the pass, it is missed when its turn comes; in the pass, at once.
            let missed = if removed_at > began { removed_at } else { ready };
            match (operation, before) {
                _ if removed_at > began => {}
                (_, Settled::Blocking(_)) => return ("skipped", before),
                (_, Settled::Never) => return ("skipped", Settled::Never),
                _ => {}
            }
            return match operation {
                "restore" => ("failed", blocked_at(missed)),
                _ => ("removed", Settled::Free(missed)),
            };
        }
        match before {
            Settled::Free(_) => {}
            Settled::Blocking(_) | Settled::Never => return ("skipped", before),
        }
        let scripted = SCRIPTED.iter().position(|name| *name == operation);
        let deed = scripted.map_or(Deed::Well, |index| unit.plan.deeds[index]);
        let delay = scripted.map_or(0, |index| unit.plan.delays[index]);
        let vanishes = unit.gone_at < NEVER;
        let end = match deed {
            _ if vanishes => unit.gone_at.max(ready),
            Deed::Hang => NEVER,
            _ => unit.busy_until.max(ready).saturating_add(delay),
        };
        unit.busy_until = unit.busy_until.max(end);
        if deed == Deed::Panic && !vanishes && end < NEVER {
            unit.gone_at = end;
        }
        if removed_at < end.min(deadline) {
            return ("removed", Settled::Free(removed_at));
        }
        if end > deadline {
            unit.was_late = true;
            match operation {
                "can-save" => {}
                "save" => unit.state = UnitState::Stopped,
                _ => unit.state = UnitState::Faulted,
            }
            return ("late", Settled::Never);
        }
        if vanishes {
            unit.state = UnitState::Faulted;
            return ("gone", blocked_at(end));
        }
        if deed != Deed::Well {
            // A panic is an answer; only the next request finds nobody.
            unit.state = after_failure(operation, skip_rest);
            return ("failed", blocked_at(end));
        }
        match operation {
            "can-save" => {}
            "start" => unit.state = UnitState::Running,
            _ => unit.state = UnitState::Stopped,
        }
        ("done", Settled::Free(end))
    }

    /// Takes a unit out from then on.
    fn remove(&mut self, at: usize, when: u64) {
        self.units[at].removed_at = self.units[at].removed_at.min(when);
    }

    /// Ends a step: units that were removed in it are no longer there.
    fn forget_removed(&mut self) {
        for unit in &mut self.units {
            if unit.removed_at < NEVER {
                unit.present = false;
                self.now = self.now.max(unit.removed_at);
            }
        }
    }

    /// Moves back those that have moved or may have.
    fn move_back(
        &mut self,
        operation: &str,
        skip_rest: bool,
        asked: &BTreeSet<usize>,
        trouble: Trouble,
    ) -> Failure {
        let outcomes = self.passes.last().expect("a pass has failed").outcomes.clone();
        let moved = |at: usize| asked.contains(&at) && matches!(outcomes.get(&at), Some(&("done" | "late")));
        let back = self.pass(operation, skip_rest, |at, _| moved(at));
        if back.is_none() {
            return Box::new((trouble, None));
        }
        self.state = SetState::Faulted;
        Box::new((trouble, Some(back)))
    }

    fn participants(&self, takes_part: impl Fn(&ModelUnit) -> bool) -> BTreeSet<usize> {
        (0..self.units.len()).filter(|&at| self.units[at].present && takes_part(&self.units[at])).collect()
    }

    /// What `step` leads to; `None` if it is illegal.
    fn step(&mut self, step: Step) -> Option<Result<(), Failure>> {
        match (step, self.state) {
            (Step::Remove(_), _) | (Step::Stop | Step::Pause, SetState::Stopped) => Some(Ok(())),
            (Step::Stop, _) => Some(self.stop()),
            (_, SetState::Faulted) => None,
            (Step::Start, _) => {
                let asked = self.participants(|unit| unit.state != UnitState::Running);
                let trouble = self.pass("start", true, |at, _| asked.contains(&at));
                if trouble.is_none() {
                    self.state = SetState::Running;
                    return Some(Ok(()));
                }
                Some(Err(self.move_back("stop", false, &asked, trouble)))
            }
            (Step::Pause, _) => {
                let asked = self.participants(|unit| unit.state != UnitState::Stopped);
                let trouble = self.pass("stop", true, |at, _| asked.contains(&at));
                if trouble.is_none() {
                    self.state = SetState::Stopped;
                    return Some(Ok(()));
                }
                Some(Err(self.move_back("start", true, &asked, trouble)))
            }
            (Step::CanSave, _) => Some(plain(self.pass("can-save", false, |_, _| true))),
            (_, SetState::Running) => None,
            (Step::Reset, _) => Some(self.or_fault("reset", true, |_| true)),
            (Step::Save, _) => Some(plain(self.pass("save", false, |_, _| true))),
            (Step::Restore, _) => Some(self.restore()),
        }
    }

    fn stop(&mut self) -> Result<(), Failure> {
        let asked = self.participants(|unit| unit.state != UnitState::Stopped);
        let mut trouble = self.pass("stop", false, |at, _| asked.contains(&at));
        if trouble.is_none() {
            if self.state == SetState::Running {
                self.state = SetState::Stopped;
            }
            return Ok(());
        }
        let rest = std::mem::take(&mut trouble.skipped);
        if !rest.is_empty() {
            let further = self.pass("stop", false, |at, _| rest.contains(&at));
            trouble.failed.extend(further.failed);
            trouble.late.extend(further.late);
            trouble.skipped = further.skipped;
        }
        self.state = SetState::Faulted;
        Err(Box::new((trouble, None)))
    }

    fn restore(&mut self) -> Result<(), Failure> {
        if !self.participants(|unit| !unit.plan.saves).is_empty() {
            plain(self.pass("can-save", false, |_, unit| !unit.plan.saves))?;
        }
        self.or_fault("restore", true, |unit| unit.plan.saves)?;
        self.or_fault("post-restore", false, |_| true)
    }

    fn or_fault(
        &mut self,
        operation: &str,
        skip_rest: bool,
        takes_part: impl Fn(&ModelUnit) -> bool,
    ) -> Result<(), Failure> {
        let trouble = self.pass(operation, skip_rest, |_, unit| takes_part(unit));
        if !trouble.is_none() {
            self.state = SetState::Faulted;
        }
        plain(trouble)
    }
}

/// When, and whether, a unit that waits for two others can go on.
fn after_both(one: Settled, other: Settled) -> Settled {
    match (one, other) {
        (Settled::Never, _) | (_, Settled::Never) => Settled::Never,
        (Settled::Free(one), Settled::Free(other)) => Settled::Free(one.max(other)),
        (Settled::Free(one) | Settled::Blocking(one), Settled::Free(other) | Settled::Blocking(other)) => {
            Settled::Blocking(one.max(other))
        }
    }
}

fn plain(trouble: Trouble) -> Result<(), Failure> {
    if trouble.is_none() { Ok(()) } else { Err(Box::new((trouble, None))) }
}

fn after_failure(operation: &str, skip_rest: bool) -> UnitState {
    match operation {
        "start" | "save" => UnitState::Stopped,
        "stop" if skip_rest => UnitState::Running,
        _ => UnitState::Faulted,
    }
}

/// The real set under test.
struct Real {
    machine: Machine,
    units: Vec<Option<SpawnedUnit<TestUnit>>>,
}

impl Real {
    /// Adds the units, the last first if `backwards`, so that edges are given from either end.
    fn new(plans: &[UnitPlan], backwards: bool) -> Self {
        let machine = Machine::new();
        machine.units.set_deadline(Duration::from_millis(DEADLINE));
        let mut units: Vec<Option<SpawnedUnit<TestUnit>>> = plans.iter().map(|_| None).collect();
        let mut order: Vec<usize> = (0..plans.len()).collect();
        if backwards {
            order.reverse();
        }
        for at in order {
            let unit = scripted(machine.unit(&at.to_string()), &plans[at]);
            let mut builder = machine.units.add(unit.name.as_str());
            for (other, spawned) in units.iter().enumerate() {
                let Some(spawned) = spawned else { continue };
                if plans[at].needs.contains(&other) {
                    builder = builder.depends_on(spawned.handle());
                }
                if plans[other].needs.contains(&at) {
                    builder = builder.dependency_of(spawned.handle());
                }
            }
            units[at] = Some(builder.spawn(|requests| state_unit::run_unit(unit, requests)).unwrap());
        }
        Self { machine, units }
    }

    async fn step(&mut self, step: Step, states: Vec<SavedStateUnit>) -> Result<(), StateTransitionError> {
        let units = &self.machine.units;
        match step {
            Step::Start => units.start().await,
            Step::Pause => units.pause().await,
            Step::Stop => units.stop().await,
            Step::Reset => units.reset().await,
            Step::CanSave => units.can_save().await.map(drop),
            Step::Save => units.save().await.map(drop),
            Step::Restore => units.restore(states).await,
            Step::Remove(at) => {
                self.units[at] = None;
                Ok(())
            }
        }
    }

    /// A state for each unit that saves and is there.
    fn states(&self, plans: &[UnitPlan], model: &Model) -> Vec<SavedStateUnit> {
        (0..plans.len())
            .filter(|&at| plans[at].saves && model.units[at].present)
            .map(|at| SavedStateUnit {
                name: at.to_string(),
                state: Some(SavedStateBlob::new(&CounterState { count: 1 })),
            })
            .collect()
    }
}

fn scripted(mut unit: TestUnit, plan: &UnitPlan) -> TestUnit {
    for (operation, deed) in SCRIPTED.into_iter().zip(plan.deeds) {
        unit = match deed {
            Deed::Well => unit,
            Deed::Fail => unit.on(operation, Script::Fail("scripted")),
            Deed::Panic => unit.on(operation, Script::Panic),
            Deed::Hang => unit.on(operation, Script::Hang),
        };
    }
    let delays = plan.delays.iter().map(|&delay| Duration::from_millis(delay));
    unit.delays = SCRIPTED.into_iter().zip(delays).filter(|(_, delay)| !delay.is_zero()).collect();
    if plan.saves { unit } else { unit.stateless() }
}

/// A unit begins only once those that it waits for, and that began too, have ended.
fn check_order(model: &Model, log: &[String]) {
    let when = |line: String| log.iter().position(|entry| *entry == line);
    // Others may take up, or end, long after what was asked.
    let in_time = |at: &usize| !model.units[*at].was_late && model.units[*at].removed_at == NEVER;
    for operation in ["start", "stop", "reset", "restore"] {
        for at in (0..model.units.len()).filter(in_time) {
            let Some(begun) = when(format!("{at} {operation}")) else { continue };
            for other in model.predecessors(operation, at).into_iter().filter(in_time) {
                let theirs = [when(format!("{other} {operation}")), when(format!("{other} {operation}!"))];
                for moment in theirs.into_iter().flatten() {
                    assert!(moment < begun, "{at} did not wait for {other} to {operation}: {log:?}");
                }
            }
        }
    }
}

fn check_states(model: &Model, real: &Real) {
    assert_eq!(real.machine.units.state(), model.state);
    for (at, (unit, spawned)) in model.units.iter().zip(&real.units).enumerate() {
        let Some(spawned) = spawned else { continue };
        assert_eq!(spawned.handle().state(), unit.state, "unit {at}");
        assert!(!unit.state.is_interim());
    }
    for record in real.machine.units.timeline() {
        for unit in record.units {
            let open = matches!(unit.outcome, UnitOutcome::Asked | UnitOutcome::Waiting(_));
            assert!(!open, "{:?} of {} is left open in the timeline", record.operation, unit.name);
            assert!(unit.ready <= unit.begun.or(unit.ready));
        }
    }
}

fn check_timeline(model: &Model, real: &Real) {
    let timeline = real.machine.units.timeline();
    let latest = &timeline[timeline.len() - model.passes.len()..];
    for (expected, record) in model.passes.iter().zip(latest) {
        let outcomes = record.units.iter().map(|unit| {
            let outcome = match unit.outcome {
                UnitOutcome::Done => "done",
                UnitOutcome::Failed(_) => "failed",
                UnitOutcome::Gone => "gone",
                UnitOutcome::Removed => "removed",
                UnitOutcome::Skipped => "skipped",
                UnitOutcome::Late => "late",
                UnitOutcome::Waiting(_) | UnitOutcome::Asked => "open",
            };
            (unit.name.parse().expect("units are called by their index"), outcome)
        });
        let pass = Pass { operation: record.operation.to_string(), outcomes: outcomes.collect() };
        assert_eq!(pass, *expected);
    }
}

/// What happens in one step: the transition, and the removal of a unit while it is under way.
type Deeds = (Step, Option<(usize, u64)>);

async fn live(plans: &[UnitPlan], backwards: bool, steps: &[Deeds]) {
    let began = tokio::time::Instant::now();
    let mut model = Model::new(plans);
    let mut real = Real::new(plans, backwards);
    for &(step, removal) in steps {
        let step = match step {
            Step::Remove(at) => Step::Remove(at % plans.len()),
            step => step,
        };
        model.passes.clear();
        if let Step::Remove(at) = step {
            model.units[at].removed_at = model.now;
            model.units[at].present = false;
        }
        let removal = removal.filter(|_| !matches!(step, Step::Remove(_)));
        let removed = removal.and_then(|(at, delay)| {
            let at = at % plans.len();
            let unit = real.units[at].take()?;
            model.remove(at, model.now + delay);
            Some((unit, Duration::from_millis(delay)))
        });
        let states = real.states(plans, &model);
        let expected = model.step(step);
        let removal = async {
            if let Some((unit, delay)) = removed {
                tokio::time::sleep(delay).await;
                drop(unit);
            }
        };
        let (result, ()) = tokio::join!(real.step(step, states), removal);
        check_order(&model, &real.machine.happened());
        model.forget_removed();
        match (expected, result) {
            (None, Err(StateTransitionError::Illegal(_))) | (Some(Ok(())), Ok(())) => {}
            (Some(Err(expected)), Err(StateTransitionError::Units(failures))) => {
                let (trouble, rollback) = *expected;
                assert_eq!(Trouble::seen(&failures), trouble, "{step:?}");
                assert_eq!(failures.rollback.as_deref().map(Trouble::seen), rollback, "{step:?}");
                assert_eq!(failures.end, model.state);
            }
            (expected, result) => panic!("{step:?}: expected {expected:?}, got {result:?}"),
        }
        check_states(&model, &real);
        check_timeline(&model, &real);
        let passed = began.elapsed();
        assert_eq!(passed, Duration::from_millis(model.now), "units move concurrently where they may");
    }
}

/// Times `GUESTD_TEST_SCALE`.
fn cases() -> u32 {
    let scale = std::env::var("GUESTD_TEST_SCALE").ok();
    let scale: f64 = scale.map_or(1.0, |text| text.parse().expect("GUESTD_TEST_SCALE is a number"));
    let cases = (300.0 * scale).round().clamp(1.0, 1e9);
    format!("{cases}").parse().expect("clamped to the range of the type")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_random_graph_lives_as_the_model_says(
        plans in units(),
        backwards in any::<bool>(),
        steps in vec((step(), removal()), 1..10),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
        runtime.block_on(live(&plans, backwards, &steps));
    }
}
