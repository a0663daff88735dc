//! Random graphs with random failures, checked against a sequential model of what each transition leads to.

use crate::support::{CounterState, Machine, Script, TestUnit};
use proptest::collection::vec;
use proptest::prelude::*;
use save_restore::SavedStateBlob;
use state_unit::{
    SavedStateUnit, SetState, SpawnedUnit, StateTransitionError, UnitFailures, UnitOutcome, UnitState,
};
use std::collections::BTreeSet;

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

fn unit(index: usize) -> impl Strategy<Value = UnitPlan> {
    let needs = vec(0..index.max(1), 0..4).prop_map(move |needs| match index {
        0 => BTreeSet::new(),
        _ => needs.into_iter().collect(),
    });
    let deeds = [deed(), deed(), deed(), deed(), deed(), deed()];
    (needs, deeds, any::<bool>()).prop_map(|(needs, deeds, saves)| UnitPlan { needs, deeds, saves })
}

fn units() -> impl Strategy<Value = Vec<UnitPlan>> {
    prop_oneof![9 => 1..25_usize, 1 => 150..200_usize]
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
        2 => Just(Step::Restore),
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

/// One unit of the model.
#[derive(Debug, Clone)]
struct ModelUnit {
    plan: UnitPlan,
    present: bool,
    gone: bool,
    hung: bool,
    state: UnitState,
}

/// How a unit that others wait for has settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settled {
    Free,
    Blocking,
    Never,
}

struct Model {
    units: Vec<ModelUnit>,
    state: SetState,
}

impl Model {
    fn new(plans: &[UnitPlan]) -> Self {
        let units = plans.iter().cloned().map(|plan| ModelUnit {
            plan,
            present: true,
            gone: false,
            hung: false,
            state: UnitState::Stopped,
        });
        Self { units: units.collect(), state: SetState::Stopped }
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
        let mut trouble = Trouble::default();
        let mut settled = vec![Settled::Free; self.units.len()];
        let mut order: Vec<usize> = (0..self.units.len()).filter(|&at| self.units[at].present).collect();
        if operation == "stop" {
            order.reverse();
        }
        for at in order {
            let before: Vec<Settled> =
                self.predecessors(operation, at).into_iter().map(|other| settled[other]).collect();
            let waits = before.contains(&Settled::Never);
            let blocked = before.contains(&Settled::Blocking);
            settled[at] = if !takes_part(at, &self.units[at]) {
                if waits {
                    Settled::Never
                } else if blocked {
                    Settled::Blocking
                } else {
                    Settled::Free
                }
            } else if waits || blocked {
                trouble.skipped.insert(at);
                if waits { Settled::Never } else { Settled::Blocking }
            } else {
                self.act(operation, skip_rest, at, &mut trouble)
            };
        }
        trouble
    }

    fn act(&mut self, operation: &str, skip_rest: bool, at: usize, trouble: &mut Trouble) -> Settled {
        let unit = &mut self.units[at];
        let scripted = SCRIPTED.iter().position(|name| *name == operation);
        let deed = scripted.map_or(Deed::Well, |index| unit.plan.deeds[index]);
        let blocking = if skip_rest { Settled::Blocking } else { Settled::Free };
        if unit.gone || (!unit.hung && deed == Deed::Panic) {
            trouble.failed.insert(at);
            // A panic is an answer; only the next request finds nobody.
            let answered = !unit.gone;
            unit.gone = true;
            unit.state = if answered { after_failure(operation, skip_rest) } else { UnitState::Faulted };
            return blocking;
        }
        if unit.hung || deed == Deed::Hang {
            trouble.late.insert(at);
            unit.hung = true;
            match operation {
                "can-save" => {}
                "save" => unit.state = UnitState::Stopped,
                _ => unit.state = UnitState::Faulted,
            }
            return Settled::Never;
        }
        if deed == Deed::Fail {
            trouble.failed.insert(at);
            unit.state = after_failure(operation, skip_rest);
            return blocking;
        }
        match operation {
            "can-save" => {}
            "start" => unit.state = UnitState::Running,
            _ => unit.state = UnitState::Stopped,
        }
        Settled::Free
    }

    /// Moves back those that have moved or may have.
    fn move_back(
        &mut self,
        operation: &str,
        skip_rest: bool,
        asked: &BTreeSet<usize>,
        trouble: Trouble,
    ) -> Failure {
        let moved = |at: usize| {
            asked.contains(&at) && !trouble.failed.contains(&at) && !trouble.skipped.contains(&at)
        };
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
        let further = self.pass("stop", false, |at, _| rest.contains(&at));
        trouble.failed.extend(further.failed);
        trouble.late.extend(further.late);
        trouble.skipped = further.skipped;
        self.state = SetState::Faulted;
        Err(Box::new((trouble, None)))
    }

    fn restore(&mut self) -> Result<(), Failure> {
        plain(self.pass("can-save", false, |_, unit| !unit.plan.saves))?;
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

    async fn step(&mut self, step: Step, plans: &[UnitPlan]) -> Result<(), StateTransitionError> {
        let units = &self.machine.units;
        match step {
            Step::Start => units.start().await,
            Step::Pause => units.pause().await,
            Step::Stop => units.stop().await,
            Step::Reset => units.reset().await,
            Step::CanSave => units.can_save().await.map(drop),
            Step::Save => units.save().await.map(drop),
            Step::Restore => units.restore(self.states(plans)).await,
            Step::Remove(at) => {
                self.units[at] = None;
                Ok(())
            }
        }
    }

    fn states(&self, plans: &[UnitPlan]) -> Vec<SavedStateUnit> {
        (0..plans.len())
            .filter(|&at| plans[at].saves && self.units[at].is_some())
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
    if plan.saves { unit } else { unit.stateless() }
}

/// A unit begins only once those that it waits for, and that began too, have ended.
fn check_order(model: &Model, log: &[String]) {
    let when = |line: String| log.iter().position(|entry| *entry == line);
    for operation in ["start", "stop", "reset", "restore"] {
        for at in 0..model.units.len() {
            let Some(begun) = when(format!("{at} {operation}")) else { continue };
            for other in model.predecessors(operation, at) {
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

async fn live(plans: &[UnitPlan], backwards: bool, steps: &[Step]) {
    let mut model = Model::new(plans);
    let mut real = Real::new(plans, backwards);
    for &step in steps {
        let step = match step {
            Step::Remove(at) => Step::Remove(at % plans.len()),
            step => step,
        };
        if let Step::Remove(at) = step {
            model.units[at].present = false;
        }
        let expected = model.step(step);
        let result = real.step(step, plans).await;
        check_order(&model, &real.machine.happened());
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
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_random_graph_lives_as_the_model_says(
        plans in units(),
        backwards in any::<bool>(),
        steps in vec(step(), 1..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
        runtime.block_on(live(&plans, backwards, &steps));
    }
}
