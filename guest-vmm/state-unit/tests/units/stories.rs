//! Stories over the public interface: what a set of units does in fair and in foul weather.

use crate::support::{Machine, Script};
use inspect::{Inspect, Inspection, Update, UpdateError, Value, View};
use state_unit::{
    BuildError, IllegalReason, SavedStateUnit, SetState, StateRequest, StateTransitionError, StateUnits,
    UnitError, UnitFailures, UnitOutcome, UnitState,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

fn names<'a>(names: impl IntoIterator<Item = &'a Arc<str>>) -> Vec<&'a str> {
    names.into_iter().map(|name| &**name).collect()
}

fn failures(error: &StateTransitionError) -> &UnitFailures {
    error.units().expect("units failed")
}

#[tokio::test]
async fn units_start_and_stop_in_the_order_of_their_dependencies() {
    let machine = Machine::new();
    let memory = machine.add(machine.unit("memory"), &[]);
    let device = machine.add(machine.unit("device"), &[&memory]);
    let vps = machine.add(machine.unit("vps"), &[&device, &memory, &memory]);

    assert!(!machine.units.is_running());
    machine.units.start().await.unwrap();
    assert!(machine.units.is_running());
    assert_eq!(
        machine.happened(),
        ["memory start", "memory start!", "device start", "device start!", "vps start", "vps start!"]
    );
    assert_eq!(vps.handle().state(), UnitState::Running);

    machine.units.stop().await.unwrap();
    assert_eq!(
        machine.happened(),
        ["vps stop", "vps stop!", "device stop", "device stop!", "memory stop", "memory stop!"]
    );
    assert_eq!(vps.handle().state(), UnitState::Stopped);
}

#[tokio::test]
async fn independent_units_move_concurrently() {
    let machine = Machine::new();
    let gate = Arc::new(Notify::new());
    let _slow = machine.add(machine.unit("slow").on("start", Script::WaitFor(gate.clone())), &[]);
    let quick = machine.add(machine.unit("quick"), &[]);
    let start = machine.units.start();
    tokio::pin!(start);
    while quick.handle().state() != UnitState::Running {
        tokio::select! {
            biased;
            result = &mut start => panic!("slow cannot have started: {result:?}"),
            () = tokio::task::yield_now() => {}
        }
    }
    gate.notify_one();
    start.await.unwrap();
}

#[tokio::test]
async fn a_unit_added_to_a_running_set_waits_for_start_stopped_units() {
    let machine = Machine::new();
    let first = machine.add(machine.unit("first"), &[]);
    machine.units.start_stopped_units().await.unwrap();
    assert_eq!(machine.happened(), [""; 0], "a stopped set stays stopped");
    machine.units.start().await.unwrap();
    machine.happened();

    let second = machine.add(machine.unit("second"), &[&first]);
    assert_eq!(second.handle().state(), UnitState::Stopped);
    machine.units.start_stopped_units().await.unwrap();
    assert_eq!(machine.happened(), ["second start", "second start!"]);
}

#[tokio::test]
async fn names_are_unique_and_free_again_after_removal() {
    let machine = Machine::new();
    let unit = machine.add(machine.unit("clock"), &[]);
    let error = machine.units.add("clock").build().unwrap_err();
    assert_eq!(error.to_string(), "a unit called clock is in the set already");
    assert_eq!(unit.remove().await.unwrap().name, "clock");
    drop(machine.units.add("clock").build().unwrap());
    machine.units.add("clock").build().unwrap().0.detach();
    assert!(matches!(machine.units.add("clock").build(), Err(BuildError::NameInUse(_))));
}

#[tokio::test]
async fn a_cycle_is_refused_with_the_cycle_printed() {
    let machine = Machine::new();
    let a = machine.add(machine.unit("a"), &[]);
    let b = machine.add(machine.unit("b"), &[&a]);
    let c = machine.add(machine.unit("c"), &[&b]);
    let error = machine.units.add("d").depends_on(c.handle()).dependency_of(a.handle()).build().unwrap_err();
    assert_eq!(error.to_string(), "the unit would close a dependency cycle: d → c → b → a → d");
    machine.units.start().await.unwrap();
}

#[tokio::test]
async fn a_handle_of_another_set_is_refused() {
    let (one, other) = (Machine::new(), Machine::new());
    let stranger = other.add(other.unit("stranger"), &[]);
    let error = one.units.add("unit").depends_on(stranger.handle()).build().unwrap_err();
    assert!(matches!(error, BuildError::ForeignUnit { .. }), "{error}");
    let error = one.units.add("unit").dependency_of(stranger.handle()).build().unwrap_err();
    assert!(matches!(error, BuildError::ForeignUnit { .. }), "{error}");
    assert!(one.units.graph().is_empty());
}

#[tokio::test]
async fn edges_given_twice_count_once() {
    let machine = Machine::new();
    let memory = machine.add(machine.unit("memory"), &[]);
    let vps = machine.add(machine.unit("vps"), &[&memory, &memory]);
    let builder = machine.units.add("disk").depends_on(memory.handle()).depends_on(memory.handle());
    let builder = builder.dependency_of(vps.handle()).dependency_of(vps.handle());
    let (disk, _requests) = builder.build().unwrap();
    let graph = machine.units.graph();
    assert_eq!(names(&graph[0].dependents), ["vps", "disk"]);
    assert_eq!(names(&graph[1].dependencies), ["memory", "disk"]);
    assert_eq!((names(&graph[2].dependencies), names(&graph[2].dependents)), (vec!["memory"], vec!["vps"]));
    drop(disk);
    assert_eq!(names(&machine.units.graph()[1].dependencies), ["memory"]);
}

#[tokio::test]
async fn a_failed_start_skips_the_dependants_and_stops_what_has_started() {
    let machine = Machine::new();
    let memory = machine.add(machine.unit("memory"), &[]);
    let clock = machine.add(machine.unit("clock"), &[&memory]);
    let disk = machine.add(machine.unit("disk").on("start", Script::Fail("no such image")), &[&clock]);
    let vps = machine.add(machine.unit("vps"), &[&disk, &clock]);

    let error = machine.units.start().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "start failed, the units are stopped; disk failed: no such image; vps was skipped because of disk"
    );
    assert_eq!(
        machine.happened()[4..],
        ["disk start", "clock stop", "clock stop!", "memory stop", "memory stop!"]
    );
    assert_eq!(machine.units.state(), SetState::Stopped);
    for unit in [&memory, &clock, &disk, &vps] {
        assert_eq!(unit.handle().state(), UnitState::Stopped);
    }
}

#[tokio::test]
async fn a_failed_pause_starts_again_what_has_stopped() {
    let machine = Machine::new();
    let memory = machine.add(machine.unit("memory"), &[]);
    let disk = machine.add(machine.unit("disk").on("stop", Script::Fail("a write is stuck")), &[&memory]);
    let vps = machine.add(machine.unit("vps"), &[&disk]);
    machine.units.start().await.unwrap();
    machine.happened();

    let error = machine.units.pause().await.unwrap_err();
    assert_eq!(failures(&error).failed.len(), 1);
    assert_eq!(failures(&error).skipped[0].to_string(), "memory was skipped because of disk");
    assert_eq!(machine.happened(), ["vps stop", "vps stop!", "disk stop", "vps start", "vps start!"]);
    assert!(machine.units.is_running());
    for unit in [&memory, &disk, &vps] {
        assert_eq!(unit.handle().state(), UnitState::Running);
    }
}

#[tokio::test]
async fn a_final_stop_goes_on_with_the_rest_and_leaves_the_set_faulted() {
    let machine = Machine::new();
    let memory = machine.add(machine.unit("memory"), &[]);
    let disk = machine.add(machine.unit("disk").on("stop", Script::Fail("a write is stuck")), &[&memory]);
    machine.units.start().await.unwrap();
    machine.happened();

    let error = machine.units.stop().await.unwrap_err();
    assert_eq!(failures(&error).failed[0].to_string(), "disk failed: a write is stuck");
    assert!(failures(&error).skipped.is_empty());
    assert_eq!(machine.happened(), ["disk stop", "memory stop", "memory stop!"]);
    assert_eq!((disk.handle().state(), memory.handle().state()), (UnitState::Faulted, UnitState::Stopped));

    let error = machine.units.start().await.unwrap_err();
    assert_eq!(error.to_string(), "start is not possible: the units are faulted");
    assert!(machine.units.stop().await.is_err(), "stop stays legal, and asks again who has not stopped");
    assert_eq!(machine.happened(), ["disk stop"]);
}

#[tokio::test]
async fn what_is_illegal_is_refused_with_a_typed_reason() {
    let machine = Machine::new();
    let _unit = machine.add(machine.unit("unit"), &[]);
    machine.units.start().await.unwrap();
    let errors = [
        machine.units.reset().await.unwrap_err(),
        machine.units.save().await.map(|_| ()).unwrap_err(),
        machine.units.restore(Vec::new()).await.unwrap_err(),
    ];
    for error in errors {
        let StateTransitionError::Illegal(illegal) = error else { panic!("{error}") };
        assert_eq!(illegal.reason, IllegalReason::State(SetState::Running));
    }
}

#[tokio::test]
async fn a_panic_fails_the_transition_and_not_the_process() {
    let machine = Machine::new();
    let memory = machine.add(machine.unit("memory"), &[]);
    let disk = machine.add(machine.unit("disk").on("start", Script::Panic), &[&memory]);
    let error = machine.units.start().await.unwrap_err();
    assert_eq!(failures(&error).failed[0].to_string(), "disk failed: the unit panicked: disk cannot start");
    assert_eq!((memory.handle().state(), machine.units.state()), (UnitState::Stopped, SetState::Stopped));

    let error = machine.units.start().await.unwrap_err();
    assert_eq!(failures(&error).failed[0].to_string(), "disk is gone");
    assert!(disk.remove().await.is_err());
    machine.units.start().await.unwrap();
}

#[tokio::test]
async fn a_unit_that_drops_its_request_is_gone() {
    let machine = Machine::new();
    let (handle, mut requests) = machine.units.add("careless").build().unwrap();
    tokio::spawn(async move {
        requests.recv().await;
    });
    let error = machine.units.start().await.unwrap_err();
    assert_eq!(failures(&error).failed[0].to_string(), "careless is gone");
    assert_eq!(handle.state(), UnitState::Faulted);
}

#[tokio::test(start_paused = true)]
async fn a_late_unit_is_named_and_its_late_answer_is_recorded() {
    let machine = Machine::new();
    let gate = Arc::new(Notify::new());
    let memory = machine.add(machine.unit("memory"), &[]);
    let disk = machine.add(machine.unit("disk").on("stop", Script::WaitFor(gate.clone())), &[&memory]);
    let vps = machine.add(machine.unit("vps"), &[&disk]);
    machine.units.start().await.unwrap();

    let error = machine.units.stop().await.unwrap_err();
    assert_eq!(names(failures(&error).late.iter().map(|unit| &unit.name)), ["disk"]);
    assert!(failures(&error).skipped.is_empty(), "memory is stopped without it");
    assert_eq!(machine.units.state(), SetState::Faulted);
    let states = [&vps, &disk, &memory].map(|unit| unit.handle().state());
    assert_eq!(states, [UnitState::Stopped, UnitState::Faulted, UnitState::Stopped]);

    let outcome = |machine: &Machine| machine.units.timeline()[1].units[1].clone();
    assert_eq!((outcome(&machine).outcome, outcome(&machine).ended), (UnitOutcome::Late, None));
    gate.notify_one();
    while outcome(&machine).ended.is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(disk.handle().state(), UnitState::Faulted, "not acted upon");
}

#[tokio::test(start_paused = true)]
async fn a_late_start_is_rolled_back_with_a_stop_for_the_late_unit_too() {
    let machine = Machine::new();
    let memory = machine.add(machine.unit("memory"), &[]);
    let _disk = machine.add(machine.unit("disk").on("start", Script::Hang), &[&memory]);
    let error = machine.units.start().await.unwrap_err();
    let rollback = failures(&error).rollback.as_ref().expect("disk does not stop either");
    assert_eq!(names(rollback.late.iter().map(|unit| &unit.name)), ["disk"]);
    assert_eq!(names(rollback.skipped.iter().map(|unit| &unit.name)), ["memory"]);
    assert_eq!(machine.units.state(), SetState::Faulted);
}

#[tokio::test]
async fn dropping_the_caller_does_not_cancel_the_transition() {
    let machine = Machine::new();
    let gate = Arc::new(Notify::new());
    let slow = machine.add(machine.unit("slow").on("start", Script::WaitFor(gate.clone())), &[]);
    let after = machine.add(machine.unit("after"), &[&slow]);
    {
        let start = machine.units.start();
        tokio::pin!(start);
        while slow.handle().state() != UnitState::Starting {
            assert!(futures::poll!(&mut start).is_pending());
            tokio::task::yield_now().await;
        }
    }
    gate.notify_one();
    machine.units.stop().await.unwrap();
    assert_eq!(after.handle().state(), UnitState::Stopped);
    assert_eq!(
        machine.happened()[..4],
        ["slow start", "slow start!", "after start", "after start!"],
        "the start ended before the stop began"
    );
}

#[tokio::test]
async fn a_local_unit_moves_on_a_local_set() {
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async {
            let machine = Machine::new();
            let local = std::rc::Rc::new(());
            let (unit, kept) = (machine.unit("local"), local.clone());
            let spawned = machine.units.add("local").spawn_local(|requests| async move {
                state_unit::run_unit(unit, requests).await;
                kept
            });
            machine.units.start().await.unwrap();
            machine.units.stop().await.unwrap();
            assert_eq!(machine.happened().len(), 4);
            assert!(std::rc::Rc::ptr_eq(&spawned.unwrap().remove().await.unwrap(), &local));
        })
        .await;
}

#[tokio::test]
async fn removal_in_mid_transition_is_no_failure() {
    let machine = Machine::new();
    let slow = machine.add(machine.unit("slow").on("start", Script::Hang), &[]);
    let waiting = machine.add(machine.unit("waiting"), &[&slow]);
    let last = machine.add(machine.unit("last"), &[&waiting, &slow]);
    let start = machine.units.start();
    tokio::pin!(start);
    while slow.handle().state() != UnitState::Starting {
        assert!(futures::poll!(&mut start).is_pending());
        tokio::task::yield_now().await;
    }
    drop(waiting);
    drop(slow);
    start.await.unwrap();
    assert_eq!(machine.happened(), ["slow start", "last start", "last start!"]);
    assert_eq!(last.handle().state(), UnitState::Running);
}

#[tokio::test]
async fn a_unit_may_remove_another_while_it_starts() {
    let machine = Machine::new();
    let stuck = machine.add(machine.unit("stuck").on("start", Script::Hang), &[]);
    let (_bus, mut requests) = machine.units.add("bus").build().unwrap();
    let _last = machine.add(machine.unit("last"), &[&stuck]);
    let bus = tokio::spawn(async move {
        let Some(StateRequest::Start(answer)) = requests.recv().await else { panic!("the bus is to start") };
        let work = async {
            drop(stuck);
            Ok::<_, UnitError>(())
        };
        answer.answer_with(work).await;
    });
    machine.units.start().await.unwrap();
    bus.await.unwrap();
    assert_eq!(machine.happened(), ["stuck start", "last start", "last start!"]);
    let outcomes = machine.units.timeline().remove(0).units.into_iter().map(|unit| unit.outcome);
    assert_eq!(outcomes.collect::<Vec<_>>(), [UnitOutcome::Removed, UnitOutcome::Done, UnitOutcome::Done]);
}

#[tokio::test]
async fn a_unit_removed_before_it_took_its_saved_state_fails_the_restore() {
    let machine = Machine::new();
    let gate = Arc::new(Notify::new());
    let slow = machine.add(machine.unit("slow").on("restore", Script::WaitFor(gate.clone())), &[]);
    let waiting = machine.add(machine.unit("waiting"), &[&slow]);
    let saved = machine.units.save().await.unwrap();
    let restore = machine.units.restore(saved);
    tokio::pin!(restore);
    while slow.handle().state() != UnitState::Restoring {
        assert!(futures::poll!(&mut restore).is_pending());
        tokio::task::yield_now().await;
    }
    drop(waiting);
    gate.notify_one();
    let error = restore.await.unwrap_err();
    assert_eq!(
        failures(&error).failed[0].to_string(),
        "waiting failed: the unit was removed before it had taken its saved state"
    );
}

#[tokio::test]
async fn state_is_saved_and_restored_in_order_and_told_to_all() {
    let machine = Machine::new();
    let memory = machine.add(machine.unit("memory"), &[]);
    let glue = machine.add(machine.unit("glue").stateless(), &[&memory]);
    let vps = machine.add(machine.unit("vps"), &[&glue]);
    let saved = machine.units.save().await.unwrap();
    let saved_names: Vec<&str> = saved.iter().map(|unit| &*unit.name).collect();
    assert_eq!(saved_names, ["memory", "vps"]);
    machine.units.reset().await.unwrap();
    machine.happened();

    machine.units.restore(saved).await.unwrap();
    let happened = machine.happened();
    assert_eq!(
        happened[..4],
        ["memory restore", "memory restore!", "vps restore", "vps restore!"],
        "glue is skipped and still orders its neighbours"
    );
    assert_eq!(happened.iter().filter(|line| line.ends_with("post-restore!")).count(), 3);
    assert_eq!(memory.remove().await.unwrap().count, 1);
    assert_eq!(vps.remove().await.unwrap().count, 1);
}

#[tokio::test]
async fn saved_state_that_does_not_match_is_listed_whole_before_anything_is_restored() {
    let machine = Machine::new();
    let _a = machine.add(machine.unit("a"), &[]);
    let _b = machine.add(machine.unit("b"), &[]);
    let _c = machine.add(machine.unit("c").stateless(), &[]);
    let mut states = machine.units.save().await.unwrap();
    machine.happened();
    states.remove(1);
    states.push(states[0].clone());
    states.push(states[0].clone());
    states.push(SavedStateUnit { name: "ghost".to_owned(), ..states[0].clone() });
    states.push(SavedStateUnit { name: "c".to_owned(), state: None });
    let error = machine.units.restore(states).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the saved state does not match the units; unknown: ghost; duplicate: a; missing: b; without a state: c"
    );
    assert_eq!(machine.happened(), [""; 0]);
    assert_eq!(machine.units.state(), SetState::Stopped);
}

#[tokio::test]
async fn a_failed_restore_leaves_the_set_faulted_and_a_failed_save_as_it_was() {
    let machine = Machine::new();
    let a = machine.add(machine.unit("a"), &[]);
    let b = machine.add(machine.unit("b"), &[&a]);
    let mut saved = machine.units.save().await.unwrap();
    let c = machine.add(machine.unit("c").on("save", Script::Fail("no")), &[]);
    let error = machine.units.save().await.unwrap_err();
    assert_eq!(failures(&error).failed[0].to_string(), "c failed: the state could not be saved: no");
    assert_eq!((machine.units.state(), c.handle().state()), (SetState::Stopped, UnitState::Stopped));
    drop(c);

    saved[0].state = Some(save_restore::SavedStateBlob::from_parts("other.Type", []));
    let error = machine.units.restore(saved).await.unwrap_err();
    assert_eq!(
        failures(&error).failed[0].to_string(),
        "a failed: the saved state is of type other.Type, not state_unit.tests.CounterState"
    );
    assert_eq!(names(&failures(&error).skipped[0].because), ["a"]);
    assert_eq!((machine.units.state(), b.handle().state()), (SetState::Faulted, UnitState::Stopped));
}

#[tokio::test]
async fn a_failed_reset_or_post_restore_leaves_nothing_legal_but_stop() {
    for operation in ["reset", "post-restore"] {
        let machine = Machine::new();
        let unit = machine.add(machine.unit("unit").on(operation, Script::Fail("no")), &[]);
        let error = match operation {
            "reset" => machine.units.reset().await.unwrap_err(),
            _ => machine.units.restore(machine.units.save().await.unwrap()).await.unwrap_err(),
        };
        assert_eq!(failures(&error).operation.to_string(), operation);
        assert_eq!((machine.units.state(), failures(&error).end), (SetState::Faulted, SetState::Faulted));
        machine.happened();
        let refused = [
            machine.units.start().await.unwrap_err(),
            machine.units.start_stopped_units().await.unwrap_err(),
            machine.units.pause().await.unwrap_err(),
            machine.units.reset().await.unwrap_err(),
            machine.units.can_save().await.map(drop).unwrap_err(),
            machine.units.save().await.map(drop).unwrap_err(),
            machine.units.restore(Vec::new()).await.unwrap_err(),
        ];
        for error in refused {
            let StateTransitionError::Illegal(illegal) = error else { panic!("{error}") };
            assert_eq!(illegal.reason, IllegalReason::State(SetState::Faulted));
        }
        assert_eq!(machine.happened(), [""; 0]);
        machine.units.stop().await.unwrap();
        assert_eq!(machine.happened(), ["unit stop", "unit stop!"]);
        assert_eq!((unit.handle().state(), machine.units.state()), (UnitState::Stopped, SetState::Faulted));
    }
}

#[tokio::test]
async fn can_save_asks_every_unit_also_while_running() {
    let machine = Machine::new();
    let _a = machine.add(machine.unit("a"), &[]);
    let mut refusing = machine.unit("b");
    refusing.support = state_unit::SaveSupport::Refused("vhost".to_owned());
    let _b = machine.add(refusing, &[]);
    machine.units.start().await.unwrap();
    let support: Vec<_> =
        machine.units.can_save().await.unwrap().into_iter().map(|unit| unit.support).collect();
    assert_eq!(
        support,
        [state_unit::SaveSupport::Saves, state_unit::SaveSupport::Refused("vhost".to_owned())]
    );
    assert!(machine.units.is_running());
}

#[tokio::test(start_paused = true)]
async fn the_inspector_shows_the_graph_during_a_transition_and_the_stuck_unit_as_such() {
    let machine = Machine::new();
    let stuck = machine.add(machine.unit("stuck").on("start", Script::Hang), &[]);
    let free = machine.add(machine.unit("free"), &[]);
    let _after = machine.add(machine.unit("after"), &[&stuck, &free]);
    let inspector = machine.units.inspector();
    let start = machine.units.start();
    tokio::pin!(start);
    while free.handle().state() != UnitState::Running {
        assert!(futures::poll!(&mut start).is_pending());
        tokio::task::yield_now().await;
    }
    let tree = Inspection::start("", 9, View::Everything, |request| inspector.inspect(request))
        .finish(Duration::from_millis(50));
    let text = tree.await.to_string();
    assert_eq!(
        text,
        "state: stopped
deadline: 10s
units:
  stuck:
    dependencies: 
    dependents: after
    unit_state: starting
    unit: (unanswered)
  free:
    dependencies: 
    dependents: after
    unit_state: running
    unit:
      count: 1
  after:
    dependencies: stuck, free
    dependents: 
    unit_state: stopped
    unit:
      count: 1
"
    );
    let view = &machine.units.graph()[2];
    assert_eq!(names(&view.dependencies), ["stuck", "free"]);
    assert_eq!(names(&view.waits_for), ["stuck"]);
    assert_eq!(inspector.graph(), machine.units.graph());
    assert_eq!(inspector.timeline(), machine.units.timeline());
    let waits = &inspector.timeline()[0].units[2].outcome;
    assert_eq!(*waits, UnitOutcome::Waiting(vec!["stuck".into()]));
}

async fn update(machine: &Machine, path: &str, text: &str) -> Result<Value, UpdateError> {
    let inspector = machine.units.inspector();
    Update::start(path, text, |request| inspector.inspect(request)).finish(Duration::from_secs(1)).await
}

#[tokio::test(start_paused = true)]
async fn an_operators_deadline_holds_from_the_next_pass_on() {
    let machine = Machine::new();
    let _stuck = machine.add(machine.unit("stuck").on("start", Script::Hang), &[]);
    let begun = tokio::time::Instant::now();
    let start = machine.units.start();
    tokio::pin!(start);
    assert!(futures::poll!(&mut start).is_pending());
    tokio::task::yield_now().await;
    assert_eq!(update(&machine, "deadline", "250ms").await, Ok(Value::Duration(Duration::from_millis(250))));
    start.await.unwrap_err();
    // The pass in flight keeps its 10 s; moving back has the new deadline.
    assert_eq!(begun.elapsed(), Duration::from_millis(10_250));

    for (text, reason) in [
        ("99ms", "refused: 99ms is not within 100ms to 600s"),
        ("601s", "refused: 601s is not within 100ms to 600s"),
        ("0", "refused: 0ns is not within 100ms to 600s"),
        ("soon", "\"soon\" is not a duration, such as 10s, 1.5s, 250ms or 2min"),
    ] {
        assert_eq!(update(&machine, "deadline", text).await.unwrap_err().to_string(), reason);
    }
    assert_eq!(update(&machine, "deadline", "10min").await, Ok(Value::Duration(Duration::from_secs(600))));
    assert_eq!(update(&machine, "state", "running").await, Err(UpdateError::NotWritable));
}

#[tokio::test(start_paused = true)]
async fn a_units_own_nodes_are_updated_by_the_unit_unless_it_is_stuck() {
    let machine = Machine::new();
    let free = machine.add(machine.unit("free"), &[]);
    let _stuck = machine.add(machine.unit("stuck").on("start", Script::Hang), &[]);
    assert_eq!(update(&machine, "units/free/unit/count", "7").await, Ok(Value::Unsigned(7)));
    let refused = update(&machine, "units/free/unit/count", "1000").await.unwrap_err();
    assert_eq!(refused, UpdateError::Refused { reason: "a test counts to 999".to_owned() });
    assert_eq!(update(&machine, "units/free/unit", "7").await, Err(UpdateError::NotWritable));
    assert_eq!(update(&machine, "units/free/unit/sum", "7").await, Err(UpdateError::NotFound));
    let start = machine.units.start();
    tokio::pin!(start);
    assert!(futures::poll!(&mut start).is_pending());
    tokio::task::yield_now().await;
    assert_eq!(update(&machine, "units/stuck/unit/count", "7").await, Err(UpdateError::Unanswered));
    assert_eq!(update(&machine, "units/free/unit/count", "8").await, Ok(Value::Unsigned(8)));
    assert_eq!(free.remove().await.unwrap().count, 8);
}

#[tokio::test]
async fn many_units_may_fail_at_once() {
    let machine = Machine::new();
    let hub = machine.add(machine.unit("hub"), &[]);
    let units: Vec<_> = (0..5_000)
        .map(|index| machine.add(machine.unit(&index.to_string()).on("reset", Script::Fail("no")), &[&hub]))
        .collect();
    let error = machine.units.reset().await.unwrap_err();
    assert_eq!(failures(&error).failed.len(), units.len());
    drop(machine);
    assert_eq!(hub.remove().await.unwrap().name, "hub");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn units_on_several_threads_keep_the_order() {
    let machine = Machine::new();
    let mut layers: Vec<Vec<_>> = Vec::new();
    for layer in 0..20 {
        let needs: Vec<_> = layers.last().into_iter().flatten().collect();
        let units =
            (0..8).map(|index| machine.add(machine.unit(&format!("{layer}/{index}")), &needs)).collect();
        layers.push(units);
    }
    for _ in 0..20 {
        machine.units.start().await.unwrap();
        check_layers(&machine.happened(), &(0..20).collect::<Vec<_>>());
        machine.units.stop().await.unwrap();
        check_layers(&machine.happened(), &(0..20).rev().collect::<Vec<_>>());
    }
}

/// Each layer, all 8 units of it, has begun and ended before the next begins.
fn check_layers(log: &[String], expected: &[usize]) {
    let layers: Vec<usize> =
        log.iter().map(|line| line.split('/').next().unwrap().parse().unwrap()).collect();
    let whole: Vec<usize> = expected.iter().flat_map(|&layer| [layer; 16]).collect();
    assert_eq!(layers, whole);
}

#[tokio::test]
async fn an_empty_set_moves_and_a_dropped_one_ends_its_units() {
    let units = StateUnits::new();
    units.start().await.unwrap();
    units.stop().await.unwrap();
    let machine = Machine::new();
    let unit = machine.add(machine.unit("unit"), &[]);
    machine.units.start().await.unwrap();
    let inspector = machine.units.inspector();
    assert_eq!((inspector.graph().len(), inspector.timeline().len()), (1, 1));
    drop(machine);
    assert_eq!((inspector.graph(), inspector.timeline()), (Vec::new(), Vec::new()));
    assert_eq!(unit.remove().await.unwrap().name, "unit");
}

#[test]
fn without_a_runtime_a_transition_is_refused() {
    let error = futures::executor::block_on(StateUnits::new().start()).unwrap_err();
    assert_eq!(error.to_string(), "start is not possible: there is no tokio runtime to run it");
}

/// The futures of transitions, and the set, can move between threads.
#[test]
fn the_set_and_its_futures_are_send() {
    fn send<T: Send>(_: &T) {}
    let units = StateUnits::new();
    send(&units);
    send(&units.start());
    send(&units.restore(Vec::new()));
    send(&units.inspector());
}
