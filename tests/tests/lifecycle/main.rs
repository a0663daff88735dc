//! The lifecycle protocol, state by state: each story is played on a scripted processor and on KVM, over a guest's own channel and
//! through the service.

use std::future::Future;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use guest_client::{ClientError, Event, EventKind, Observer, Rendering, StepOutcome, UnitConfig};
use guest_schema::{
    Failure, FileSource, GuestConfig, GuestError, MemoryConfig, OnReset, Outcome, Phase, VpAffinity, VpState,
};
use guest_tests::console::Console;
use guest_tests::requirements::{Requirement, run, trial};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Channel, Kind, Stage, Story, expect, gone, play_on, refusal, refused, says};
use guest_tests::unit::NotingUnit;
use guest_tests::wait;
use libtest_mimic::Trial;
use object::Endianness;
use object::elf::{FileHeader64, NT_PRSTATUS, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use tokio::sync::mpsc;

type Played = Pin<Box<dyn Future<Output = Story>>>;

/// A story, and what is injected into scripted guests for it; such a story is played on scripts only, as are those of what only
/// a script can do.
struct Script {
    name: &'static str,
    faults: &'static str,
    scripts_only: bool,
    play: fn(Stage) -> Played,
}

macro_rules! stories {
    ($($name:ident $(with $faults:literal)? $(on $only:ident)?;)*) => {
        const STORIES: &[Script] = &[$(Script {
            name: stringify!($name),
            faults: concat!($($faults)?),
            scripts_only: !concat!($($faults)? $(stringify!($only))?).is_empty(),
            play: |stage| Box::pin($name(stage)),
        }),*];
    };
}

stories! {
    the_end_of_the_lease_ends_the_vmm;
    a_create_before_run_destroys_the_guest_before;
    a_create_while_running_is_refused_and_the_run_stays_pending;
    a_run_before_create_is_refused;
    a_second_run_is_refused_and_the_first_stays_pending;
    vps_that_cannot_start_fail_the_run with ",fail-start=0";
    a_unit_that_cannot_start_fails_the_run with ",fail-unit=start";
    a_vp_that_cannot_be_bound_fails_the_create with ",fail-bind=0";
    a_vp_whose_thread_panics_is_a_runtime_failure with ",panic=0";
    a_unit_that_cannot_stop_is_named with ",fail-unit=stop";
    a_unit_that_never_stops_is_late with ",fail-unit=stop-hangs";
    a_failed_reset_leaves_only_stop with ",fail-unit=reset";
    stop_without_create_is_nothing_to_do;
    stop_without_run_takes_the_guest_away;
    a_forced_stop_answers_run_and_tells_holders;
    a_clean_shutdown_answers_run_and_tells_holders;
    many_may_bind_and_dropping_a_guest_changes_nothing;
    a_failed_create_is_told_to_all_who_came_after;
    all_faults_of_a_config_come_at_once;
    stop_cancels_a_create;
    calls_behind_a_create_wait_for_it;
    calls_sent_after_a_stop_are_not_refused_by_it;
    an_operator_of_a_former_guest_does_not_touch_the_next;
    an_id_is_free_again_once_its_lease_was_given_up;
    a_create_may_follow_a_stop_at_once;
    a_guest_is_paused_and_resumed;
    a_crash_is_a_runtime_failure_with_registers;
    a_fault_of_any_name_is_told_with_it on scripts;
    a_triple_fault_is_a_runtime_failure_with_registers;
    a_guest_that_hibernates_ends_cleanly on scripts;
    a_reset_restarts_the_guest;
    a_reset_stops_the_guest_if_it_is_to;
    an_operators_reset_restarts_the_guest;
    a_halted_guest_keeps_running_and_shows_as_halted;
    a_late_reader_sees_what_was_written_before;
    input_to_a_guest_that_has_ended_fails;
    the_service_finds_the_guest_and_its_operator_stops_it;
    the_service_tells_how_the_guest_ended;
    an_observer_hears_of_all_that_becomes_of_the_guest;
    a_failed_transition_is_told_with_its_reason with ",fail-unit=reset";
    subscriptions_are_bounded_and_end_when_they_are_dropped;
    an_observer_sees_the_units_and_what_depends_on_what;
    a_timeline_tells_who_waited_for_whom;
    only_an_operator_sees_what_is_the_guests_own;
    an_operator_dumps_the_guest;
    an_operator_sends_a_non_maskable_interrupt;
    an_operator_inspects_and_updates_what_is_writable;
    an_inspected_node_that_cannot_be_updated_says_why;
    an_operators_deadline_holds_for_a_unit_that_never_stops with ",fail-unit=stop-hangs";
    a_clients_units_move_with_the_guest;
    a_clients_unit_that_refuses_to_start_fails_the_run;
    faults_of_a_clients_units_are_listed;
    a_unit_joins_a_guest_at_any_time;
}

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for script in STORIES {
        for kind in [Kind::Scripted, Kind::BuiltIn] {
            for channel in [Channel::Direct, Channel::Proxied] {
                if kind == Kind::Scripted || !script.scripts_only {
                    trials.push(rehearse(script, kind, channel));
                }
            }
        }
    }
    run(trials, || {})
}

fn rehearse(script: &'static Script, kind: Kind, channel: Channel) -> Trial {
    let held = if channel == Channel::Direct { "direct" } else { "proxied" };
    let needs: &[Requirement] = if kind == Kind::BuiltIn { &[Requirement::Kvm] } else { &[] };
    trial(&format!("{}::{held}::{}", kind.name(), script.name), needs, move || {
        play_on(Stage::set(kind, channel, script.faults)?, script.play)
    })
}

async fn the_end_of_the_lease_ends_the_vmm(stage: Stage) -> Story {
    let player = stage.launch("leased").await?;
    let running = player.play(Act::Spin).await?;
    player.cue(&running, Act::Spin).await?;
    let pid = player.pid().await?;
    let exit = player.exit.clone();
    drop((player.lifecycle, running));
    expect("outcome", exit.terminated().await?.outcome, Outcome::Forced)?;
    gone(pid).await
}

async fn a_create_before_run_destroys_the_guest_before(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    let first = player.lifecycle.bind();
    first.bound().await?;
    let running = player.play(Act::PowerOff).await?;
    expect("the first guest", first.terminated().await?.outcome, Outcome::Forced)?;
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;

    // Also if the new config is worth nothing.
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    let second = player.lifecycle.bind();
    second.bound().await?;
    let bad = GuestConfig { cpus: 0, ..player.config(Act::Spin)? };
    expect("the bad config", refusal(player.lifecycle.create(&bad).await)?, GuestError::BadConfig)?;
    expect("the second guest", second.terminated().await?.outcome, Outcome::Forced)?;
    expect("run", refusal(player.lifecycle.run().await)?, GuestError::NotCreated)
}

async fn a_create_while_running_is_refused_and_the_run_stays_pending(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let again = player.lifecycle.create(&player.config(Act::Spin)?).await;
    expect("create", refusal(again)?, GuestError::AlreadyRunning)?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn a_run_before_create_is_refused(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    expect("run", refusal(player.lifecycle.run().await)?, GuestError::NotCreated)?;
    expect("bind", refusal(player.lifecycle.bind().bound().await)?, GuestError::NotCreated)?;
    expect("control", refusal(player.lifecycle.control().opened().await)?, GuestError::NotCreated)
}

async fn a_second_run_is_refused_and_the_first_stays_pending(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    expect("second run", refusal(player.lifecycle.run().await)?, GuestError::AlreadyRunning)?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn vps_that_cannot_start_fail_the_run(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    let guest = player.lifecycle.bind();
    expect("run", refusal(player.lifecycle.run().await)?, GuestError::VcpuStartFailure)?;
    let exit = guest.terminated().await?;
    expect("exit", (exit.outcome, exit.code), (Outcome::Crashed, Some(GuestError::VcpuStartFailure)))?;
    expect("run again", refusal(player.lifecycle.run().await)?, GuestError::NotCreated)
}

async fn a_unit_that_cannot_start_fails_the_run(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    let Err(ClientError::Refused(failure)) = player.lifecycle.run().await else {
        return Err(anyhow!("the run was not refused"));
    };
    expect("code", failure.code, GuestError::DeviceStartFailure)?;
    expect("units", failure.units, vec!["injected".to_owned()])?;
    expect("run again", refusal(player.lifecycle.run().await)?, GuestError::NotCreated)
}

async fn a_vp_that_cannot_be_bound_fails_the_create(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let created = player.lifecycle.create(&player.config(Act::Spin)?).await;
    expect("create", refusal(created)?, GuestError::GuestInitializationFailure)?;
    expect("run", refusal(player.lifecycle.run().await)?, GuestError::NotCreated)
}

async fn a_vp_whose_thread_panics_is_a_runtime_failure(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    let (code, detail) = refused(player.lifecycle.run().await)?;
    expect("run", code, GuestError::VcpuRuntimeFailure)?;
    expect("the panic is told", detail.contains("panicked"), true)?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    Ok(())
}

async fn a_unit_that_cannot_stop_is_named(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let Err(ClientError::Refused(failure)) = player.lifecycle.stop().await else {
        return Err(anyhow!("the stop did not fail"));
    };
    expect("code", failure.code, GuestError::InternalError)?;
    expect("units", failure.units, vec!["injected".to_owned()])?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    Ok(())
}

async fn a_unit_that_never_stops_is_late(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let (stopped, control) = (player.lifecycle.stop(), player.lifecycle.bind());
    expect("bind while stopping", refusal(control.bound().await)?, GuestError::NotCreated)?;
    expect("run while stopping", refusal(player.lifecycle.run().await)?, GuestError::AlreadyRunning)?;
    let joined = player.lifecycle.stop();
    expect("stop", refusal(stopped.await)?, GuestError::TransitionTimedOut)?;
    expect("the other stop", refusal(joined.await)?, GuestError::TransitionTimedOut)?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn a_failed_reset_leaves_only_stop(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let control = player.lifecycle.control();
    expect("reset", refusal(control.reset().await)?, GuestError::Faulted)?;
    expect("phase", control.observer().state().await?.phase, Phase::Faulted)?;
    for (what, call) in [("pause", control.pause()), ("resume", control.resume()), ("reset", control.reset())]
    {
        expect(what, refusal(call.await)?, GuestError::Faulted)?;
    }
    let again = player.lifecycle.create(&player.config(Act::Spin)?).await;
    expect("create", refusal(again)?, GuestError::AlreadyRunning)?;
    expect("run again", refusal(player.lifecycle.run().await)?, GuestError::AlreadyRunning)?;
    player.lifecycle.bind().bound().await?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn stop_without_create_is_nothing_to_do(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    player.lifecycle.stop().await?;
    Ok(player.lifecycle.stop().await?)
}

async fn stop_without_run_takes_the_guest_away(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    let guest = player.lifecycle.bind();
    player.lifecycle.stop().await?;
    expect("guest", guest.terminated().await?.outcome, Outcome::Forced)?;
    expect("run", refusal(player.lifecycle.run().await)?, GuestError::NotCreated)
}

async fn a_forced_stop_answers_run_and_tells_holders(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    player.cue(&running, Act::Spin).await?;
    running.console.saw("spinning").await?;
    let told = running.guest.terminated();
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    let exit = told.await?;
    expect("exit", (exit.outcome, exit.code), (Outcome::Forced, Some(GuestError::ControllerForcedHalt)))?;
    expect("run again", refusal(player.lifecycle.run().await)?, GuestError::NotCreated)
}

async fn a_clean_shutdown_answers_run_and_tells_holders(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    let exit = running.guest.terminated().await?;
    expect("exit", (exit.outcome, exit.code), (Outcome::Clean, None))?;
    expect("all output came", running.console.whole().await?.starts_with("READY\n"), true)?;
    expect("run again", refusal(player.lifecycle.run().await)?, GuestError::NotCreated)
}

async fn many_may_bind_and_dropping_a_guest_changes_nothing(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let consoles: Vec<Console> = (0..5).map(|_| Console::default()).collect();
    for console in &consoles {
        let guest = player.lifecycle.bind();
        let input = guest.serial(console.writer());
        console.saw("READY").await?;
        drop((guest, input));
    }
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    for console in &consoles {
        expect("what a reader saw", console.whole().await?, running.console.whole().await?)?;
    }
    Ok(())
}

async fn a_failed_create_is_told_to_all_who_came_after(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let bad = player.config_of(b"this is no kernel")?;
    let created = player.lifecycle.create(&bad);
    let guest = player.lifecycle.bind();
    let input = guest.serial(Console::default().writer());
    let run = player.lifecycle.run();
    let (code, detail) = refused(created.await)?;
    expect("create", code, GuestError::KernelLoadFailure)?;
    for (what, answer) in [("bind", refused(guest.bound().await)?), ("run", refused(run.await)?)] {
        expect(what, answer.0, GuestError::NotCreated)?;
        expect(what, answer.1.contains(&detail), true)?;
    }
    expect("serial", refusal(input.opened().await)?, GuestError::NotCreated)?;
    let running = player.play(Act::PowerOff).await?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn all_faults_of_a_config_come_at_once(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let bad = GuestConfig {
        kernel: Some(FileSource::Descriptor(77)),
        ramdisk: None,
        cmdline: "x".repeat(70_000),
        cpus: 100_000,
        affinity: VpAffinity::Any,
        cpuid_mask: Vec::new(),
        memory: MemoryConfig::of_bytes(0),
        on_reset: OnReset::Restart,
        units: Vec::new(),
        catch_up_time: false,
    };
    let (code, detail) = refused(player.lifecycle.create(&bad).await)?;
    expect("create", code, GuestError::BadConfig)?;
    for fault in
        ["source.boot.kernel: descriptor 77", "cmdline: 70000 bytes", "cpus: 100000", "memory.bytes: 0"]
    {
        expect(fault, detail.contains(fault), true)?;
    }
    let huge = GuestConfig { memory: MemoryConfig::of_bytes(u64::MAX), ..player.config(Act::Spin)? };
    let (code, detail) = refused(player.lifecycle.create(&huge).await)?;
    expect("create", code, GuestError::BadConfig)?;
    expect("the value is named", detail.contains(&u64::MAX.to_string()), true)
}

/// A file that the client promises and never gives: a create that waits for it.
struct NeverRead;

impl guest_schema::common_capnp::file::Server for NeverRead {
    async fn size(
        self: std::rc::Rc<Self>,
        _: guest_schema::common_capnp::file::SizeParams,
        _: guest_schema::common_capnp::file::SizeResults,
    ) -> capnp::Result<()> {
        std::future::pending().await
    }
}

fn endless_config() -> GuestConfig {
    GuestConfig {
        kernel: Some(FileSource::File(capnp_rpc::new_client(NeverRead))),
        ramdisk: None,
        cmdline: String::new(),
        cpus: 1,
        affinity: VpAffinity::Any,
        cpuid_mask: Vec::new(),
        memory: MemoryConfig::of_bytes(16 << 20),
        on_reset: OnReset::Restart,
        units: Vec::new(),
        catch_up_time: false,
    }
}

async fn stop_cancels_a_create(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let created = player.lifecycle.create(&endless_config());
    let run = player.lifecycle.run();
    let queued = player.lifecycle.create(&player.config(Act::Spin)?);
    player.lifecycle.stop().await?;
    expect("create", refusal(created.await)?, GuestError::ControllerForcedHalt)?;
    expect("the create behind it", refusal(queued.await)?, GuestError::ControllerForcedHalt)?;
    let (code, detail) = refused(run.await)?;
    expect("run", code, GuestError::NotCreated)?;
    expect("the cause is told", detail.contains("controllerForcedHalt"), true)?;
    let running = player.play(Act::PowerOff).await?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn calls_behind_a_create_wait_for_it(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let first = player.lifecycle.create(&player.config(Act::Spin)?);
    let second = player.lifecycle.create(&player.config(Act::PowerOff)?);
    let running = player.play(Act::PowerOff);
    let running = running.await?;
    first.await?;
    second.await?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn calls_sent_after_a_stop_are_not_refused_by_it(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let first = player.lifecycle.stop();
    let endless = player.lifecycle.create(&endless_config());
    let second = player.lifecycle.stop();
    let next = player.play(Act::PowerOff).await?;
    first.await?;
    second.await?;
    expect("the create between", refusal(endless.await)?, GuestError::ControllerForcedHalt)?;
    expect("the first run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    player.cue(&next, Act::PowerOff).await?;
    Ok(next.run.await?)
}

async fn an_operator_of_a_former_guest_does_not_touch_the_next(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let former = player.lifecycle.control();
    former.opened().await?;
    let (stopped, created) = (player.lifecycle.stop(), player.lifecycle.create(&player.config(Act::Spin)?));
    former.stop().await?;
    stopped.await?;
    created.await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    // Nor while the next one takes its place.
    let former = player.lifecycle.control();
    former.opened().await?;
    let created = player.lifecycle.create(&player.config(Act::PowerOff)?);
    former.stop().await?;
    expect("pause", refusal(former.pause().await)?, GuestError::NotRunning)?;
    created.await?;
    player.lifecycle.bind().bound().await?;
    Ok(())
}

async fn an_id_is_free_again_once_its_lease_was_given_up(stage: Stage) -> Story {
    for _ in 0..5 {
        let player = stage.launch("again").await?;
        player.play(Act::Spin).await?;
    }
    Ok(())
}

async fn a_create_may_follow_a_stop_at_once(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let mut running = player.play(Act::Spin).await?;
    for _ in 0..5 {
        let stopped = player.lifecycle.stop();
        let next = player.play(Act::PowerOff).await?;
        stopped.await?;
        expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
        running = next;
    }
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn a_guest_is_paused_and_resumed(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let control = player.lifecycle.control();
    expect("resume while running", refusal(control.resume().await)?, GuestError::NotRunning)?;
    control.pause().await?;
    control.pause().await?;
    let state = control.observer().state().await?;
    expect("phase", state.phase, Phase::Paused)?;
    expect("VPs", state.vps, vec![VpState::Stopped])?;
    expect("units", state.units.iter().all(|unit| unit.state == "stopped"), true)?;
    player.cue(&running, Act::PowerOff).await?;
    expect("run", refusal(player.lifecycle.run().await)?, GuestError::AlreadyRunning)?;
    let again = player.lifecycle.create(&player.config(Act::Spin)?).await;
    expect("create", refusal(again)?, GuestError::AlreadyRunning)?;
    player.lifecycle.bind().bound().await?;
    control.resume().await?;
    running.run.await?;
    expect("pause after the end", refusal(control.pause().await)?, GuestError::NotRunning)?;

    let running = player.play(Act::Spin).await?;
    player.lifecycle.control().pause().await?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn a_crash_is_a_runtime_failure_with_registers(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Crash).await?;
    player.cue(&running, Act::Crash).await?;
    let (code, detail) = refused(running.run.await)?;
    expect("run", code, GuestError::VcpuRuntimeFailure)?;
    for word in ["VP 0", "rip=0x", "rax=0x"] {
        expect(&format!("{word} in {detail}"), detail.contains(word), true)?;
    }
    if stage.kind == Kind::BuiltIn {
        expect(&format!("KVM's name in {detail}"), detail.contains("KVM_EXIT_SHUTDOWN"), true)?;
    }
    let exit = running.guest.terminated().await?;
    expect("exit", (exit.outcome, exit.code), (Outcome::Crashed, Some(GuestError::VcpuRuntimeFailure)))
}

async fn a_fault_of_any_name_is_told_with_it(stage: Stage) -> Story {
    for name in ["KVM_EXIT_HYPERCALL", "the processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY)"] {
        let player = stage.launch("").await?;
        let act = Act::Fault(name);
        let running = player.play(act).await?;
        player.cue(&running, act).await?;
        let (code, detail) = refused(running.run.await)?;
        expect("run", code, GuestError::VcpuRuntimeFailure)?;
        for words in [&format!("VP 0: {name}; "), "rip=0x"] {
            says(&detail, words)?;
        }
    }
    Ok(())
}

async fn a_triple_fault_is_a_runtime_failure_with_registers(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::TripleFault).await?;
    player.cue(&running, Act::TripleFault).await?;
    let (code, detail) = refused(running.run.await)?;
    expect("run", code, GuestError::VcpuRuntimeFailure)?;
    for words in ["VP 0: triple fault", "rip=0x"] {
        says(&detail, words)?;
    }
    let exit = running.guest.terminated().await?;
    expect("exit", (exit.outcome, exit.code), (Outcome::Crashed, Some(GuestError::VcpuRuntimeFailure)))
}

async fn a_guest_that_hibernates_ends_cleanly(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Hibernate).await?;
    player.cue(&running, Act::Hibernate).await?;
    running.run.await?;
    let exit = running.guest.terminated().await?;
    expect("exit", (exit.outcome, exit.code), (Outcome::Clean, None))?;
    says(&exit.detail, "the guest hibernated itself")
}

async fn a_reset_restarts_the_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Reset).await?;
    for lives in 2..5 {
        player.cue(&running, Act::Reset).await?;
        running.console.saw_times("READY", lives).await?;
    }
    let state = running.guest.observer().state().await?;
    expect("phase and resets", (state.phase, state.resets), (Phase::Running, 3))?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn a_reset_stops_the_guest_if_it_is_to(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let config = GuestConfig { on_reset: OnReset::Stop, ..player.config(Act::Reset)? };
    let running = player.play_config(&config).await?;
    player.cue(&running, Act::Reset).await?;
    running.run.await?;
    expect("outcome", running.guest.terminated().await?.outcome, Outcome::Clean)
}

async fn an_operators_reset_restarts_the_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let control = player.lifecycle.control();
    control.reset().await?;
    running.console.saw_times("READY", 2).await?;
    control.pause().await?;
    control.reset().await?;
    expect("phase", control.observer().state().await?.phase, Phase::Paused)?;
    control.resume().await?;
    running.console.saw_times("READY", 3).await?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn a_halted_guest_keeps_running_and_shows_as_halted(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Halt).await?;
    player.cue(&running, Act::Halt).await?;
    running.console.saw("halting").await?;
    let observer = running.guest.observer();
    let halted = || async {
        let state = observer.state().await.map_err(|error| error.to_string())?;
        if state.vps == [VpState::Halted] { Ok(state.phase) } else { Err(format!("VPs are {:?}", state.vps)) }
    };
    let phase = wait::found_async("VP 0 to halt", PATIENCE, halted).await?;
    expect("phase", phase, Phase::Running)?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn a_late_reader_sees_what_was_written_before(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let late = Console::default();
    let _input = player.lifecycle.bind().serial(late.writer());
    late.saw("READY").await?;
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    let last = Console::default();
    let _input = running.guest.serial(last.writer());
    expect("a reader after the end", last.whole().await?, late.whole().await?)
}

async fn input_to_a_guest_that_has_ended_fails(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    player.lifecycle.stop().await?;
    let written = running.input.write(b"hello").await;
    let ended = running.input.end().await;
    expect("write or end fails", written.is_err() || ended.is_err(), true)
}

async fn the_service_finds_the_guest_and_its_operator_stops_it(stage: Stage) -> Story {
    let player = stage.launch("finder-1").await?;
    let _other = stage.launch("finder-2").await?;
    let running = player.play(Act::Spin).await?;
    let host = stage.service.connect().await?;
    let listed = host.list().await?;
    let ids: Vec<&str> = listed.iter().map(|guest| &guest.id[..]).collect();
    expect("ids", ids, vec!["finder-1", "finder-2"])?;
    expect("phases", (listed[0].phase, listed[1].phase), (Phase::Running, Phase::Empty))?;
    expect("VPs", listed[0].vps, 1)?;
    for (prefix, what) in [("finder", "begins the ids of 2"), ("nobody", "no guest")] {
        let (code, detail) = refused(host.find(prefix).await)?;
        expect(prefix, code, GuestError::BadConfig)?;
        expect(&detail, detail.contains(what), true)?;
    }
    let found = host.find("finder-1").await?;
    expect("phase", found.observer.state().await?.phase, Phase::Running)?;
    found.control.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("exit", found.exit.terminated().await?.outcome, Outcome::Forced)
}

async fn the_service_tells_how_the_guest_ended(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let (one, other) = (player.exit.terminated(), player.exit.terminated());
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    expect("one waiter", one.await?.outcome, Outcome::Clean)?;
    expect("another", other.await?.outcome, Outcome::Clean)?;
    let running = player.play(Act::Crash).await?;
    let next = player.exit.terminated();
    player.cue(&running, Act::Crash).await?;
    expect("the guest of the last create", next.await?.outcome, Outcome::Crashed)
}

/// All events from a sequence number on, to the last.
async fn events(observer: &Observer, from: u64) -> anyhow::Result<Vec<Event>> {
    let (sender, mut arriving) = mpsc::channel(1);
    let _subscription = observer.subscribe(from, sender).await?;
    let mut events = Vec::new();
    while let Some(event) = arriving.recv().await {
        events.push(event);
    }
    Ok(events)
}

fn told(events: &[Event]) -> Vec<String> {
    let word = |event: &Event| match &event.kind {
        EventKind::Phase(phase) => phase.name().to_owned(),
        EventKind::Transition(end) if end.failure.is_some() => format!("{} failed", end.operation),
        EventKind::Transition(end) => format!("{} done", end.operation),
        EventKind::Terminated(exit) => format!("{:?}", exit.outcome),
    };
    events.iter().map(word).collect()
}

async fn an_observer_hears_of_all_that_becomes_of_the_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let observer = running.guest.observer();
    let (sender, mut arriving) = mpsc::channel(1);
    let subscription = observer.subscribe(0, sender).await?;
    let control = player.lifecycle.control();
    control.pause().await?;
    control.resume().await?;
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    let mut heard = Vec::new();
    while let Some(event) = arriving.recv().await {
        heard.push(event);
    }
    drop(subscription);
    // A guest is running from when it is to run until it has paused or begins to stop.
    let expected = [
        "created",
        "running",
        "start done",
        "pause done",
        "paused",
        "running",
        "resume done",
        "stopping",
        "stop done",
        "Clean",
    ];
    expect("what was told", told(&heard), expected.map(str::to_owned).to_vec())?;
    let numbers: Vec<u64> = heard.iter().map(|event| event.sequence).collect();
    expect("sequence", numbers, (0..heard.len() as u64).collect())?;
    expect("missed", heard.iter().map(|event| event.missed).sum::<u64>(), 0)?;
    expect("times in order", heard.is_sorted_by_key(|event| event.at_us), true)?;
    // Whoever asks after the end gets the same, from where it asks.
    expect("a late subscriber", events(&observer, 0).await?, heard.clone())?;
    expect("from the seventh on", &events(&observer, 7).await?[..], &heard[7..])
}

async fn a_failed_transition_is_told_with_its_reason(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let observer = running.guest.observer();
    let (_, detail) = refused(player.lifecycle.control().reset().await)?;
    player.lifecycle.stop().await?;
    let heard = events(&observer, 0).await?;
    let failures = heard.iter().filter_map(|event| match &event.kind {
        EventKind::Transition(end) if end.operation == "reset" => end.failure.as_ref(),
        _ => None,
    });
    let reasons: Vec<String> = failures.map(Failure::chain).collect();
    expect("the reason", reasons, vec![detail])
}

async fn subscriptions_are_bounded_and_end_when_they_are_dropped(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let observer = running.guest.observer();
    let (sender, mut arriving) = mpsc::channel(1);
    let first = observer.subscribe(u64::MAX, sender).await?;
    let mut others = Vec::new();
    for _ in 1..64 {
        let (sender, _) = mpsc::channel(1);
        others.push(observer.subscribe(u64::MAX, sender).await?);
    }
    let (sender, _) = mpsc::channel(1);
    let one_more = observer.subscribe(0, sender).await.map(drop);
    expect("one more", refusal(one_more)?, GuestError::LimitExceeded)?;
    drop(first);
    expect("no event any more", arriving.recv().await, None)?;
    let (sender, mut arriving) = mpsc::channel(1);
    let _again = observer.subscribe(0, sender).await?;
    expect("an event", arriving.recv().await.map(|event| event.sequence), Some(0))?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn an_observer_sees_the_units_and_what_depends_on_what(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let observer = running.guest.observer();
    let units = observer.unit_graph().await?;
    let names: Vec<&str> = units.iter().map(|unit| &unit.name[..]).collect();
    for unit in &units {
        expect(&unit.name, &unit.state[..], "running")?;
        expect(&unit.name, unit.depends_on.iter().all(|name| names.contains(&&name[..])), true)?;
    }
    let vps = units.iter().find(|unit| unit.name == "vps").ok_or_else(|| anyhow!("no vps in {names:?}"))?;
    expect("what the VPs depend on", vps.depends_on.len(), units.len() - 1)?;
    player.lifecycle.control().pause().await?;
    let paused = observer.unit_graph().await?;
    expect("paused", paused.iter().all(|unit| unit.state == "stopped"), true)?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("after its end", observer.unit_graph().await?, Vec::new())
}

async fn a_timeline_tells_who_waited_for_whom(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let observer = running.guest.observer();
    player.lifecycle.control().pause().await?;
    let passes = observer.timeline().await?;
    let operations: Vec<&str> = passes.iter().map(|pass| &pass.operation[..]).collect();
    expect("passes", operations, vec!["start", "stop"])?;
    expect("in order", passes[0].began_at_us <= passes[1].began_at_us, true)?;
    for pass in &passes {
        let step = |name: &str| pass.units.iter().find(|step| step.name == name);
        let (vps, memory) = (step("vps"), step("memory"));
        let (first, last) = if pass.operation == "start" { (memory, vps) } else { (vps, memory) };
        let (first, last) = first.zip(last).ok_or_else(|| anyhow!("no vps or no memory in {pass:?}"))?;
        expect("outcomes", (first.outcome, last.outcome), (StepOutcome::Done, StepOutcome::Done))?;
        expect("the last waits", first.ended_us.is_some() && first.ended_us <= last.ready_us, true)?;
    }
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("after its end", observer.timeline().await?, Vec::new())
}

async fn only_an_operator_sees_what_is_the_guests_own(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let (observer, control) = (running.guest.observer(), player.lifecycle.control());
    let shown: serde_json::Value = serde_json::from_str(&observer.inspect("", 32, Rendering::Json).await?)?;
    let memory = &shown["units"]["memory"]["unit"];
    expect("memory", memory["bytes"].as_u64(), Some(player.config(Act::Spin)?.memory.bytes))?;
    expect("the VP", shown["vps"]["0"].get("activity").is_some(), true)?;
    let secrets = [&shown["vps"]["0"]["state"], &memory["boot"]["command_line"]];
    expect("secrets", secrets.map(serde_json::Value::is_null), [true; 2])?;
    let registers = observer.inspect("vps/0/state", 1, Rendering::Json).await;
    expect("registers", refusal(registers)?, GuestError::BadConfig)?;
    control.inspect("vps/0/state", 1, Rendering::Json).await?;
    let text = control.inspect("units/vps/unit_state", 0, Rendering::Text).await?;
    expect("text", &text[..], "running\n")?;
    let (code, detail) = refused(control.inspect("units/nobody", 0, Rendering::Text).await)?;
    expect("code", code, GuestError::BadConfig)?;
    expect(&detail, detail.contains("units/nobody"), true)?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    let late = control.inspect("", 1, Rendering::Text).await;
    expect("after its end", refusal(late)?, GuestError::NotRunning)
}

async fn an_operator_dumps_the_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let config = GuestConfig { cpus: 2, ..player.config(Act::Spin)? };
    let running = player.play_config(&config).await?;
    let control = player.lifecycle.control();
    let begun_before = control.dump().await?;
    control.pause().await?;
    let shown = control.inspect("vps/0/state/registers/rip", 0, Rendering::Text).await?;

    let core = control.dump().await?;
    let file = tempfile::tempfile()?;
    let mut told = Vec::new();
    core.save(&file, |done, bytes| told.push((done, bytes))).await?;
    let bytes = core.bytes().await?;
    expect("progress", (told.first(), told.last()), (Some(&(0, bytes)), Some(&(bytes, bytes))))?;
    let mut read = Vec::new();
    (&file).read_to_end(&mut read)?;
    expect("size", read.len() as u64, bytes)?;
    expect("holes", file.metadata()?.blocks() * 512 < bytes / 2, true)?;
    let core_file = CoreFile::read(&read)?;
    expect("memory", core_file.memory_bytes, config.memory.bytes)?;
    expect("threads", core_file.instruction_pointers.len(), 2)?;
    expect("rip", format!("{:#x}\n", core_file.instruction_pointers[0]), shown)?;

    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("after its end", refusal(control.dump().await.map(drop))?, GuestError::NotRunning)?;
    expect("memory is gone", begun_before.read(1 << 20, 1).await.is_err(), true)
}

/// What a core file says of a guest.
struct CoreFile {
    memory_bytes: u64,
    instruction_pointers: Vec<u64>,
}

impl CoreFile {
    fn read(file: &[u8]) -> anyhow::Result<Self> {
        let header = FileHeader64::<Endianness>::parse(file)?;
        let endian = header.endian()?;
        let segments = header.program_headers(endian, file)?;
        let loads = segments.iter().filter(|segment| segment.p_type(endian) == PT_LOAD);
        let memory_bytes = loads.map(|segment| segment.p_filesz(endian)).sum();
        let mut notes = segments[0].notes(endian, file)?.ok_or_else(|| anyhow!("no notes"))?;
        let mut instruction_pointers = Vec::new();
        while let Some(note) = notes.next()? {
            if note.n_type(endian) == NT_PRSTATUS {
                // The registers begin at byte 112, and RIP is the 17th.
                let rip = note.desc()[112 + 16 * 8..].first_chunk().ok_or_else(|| anyhow!("a short note"))?;
                instruction_pointers.push(u64::from_le_bytes(*rip));
            }
        }
        Ok(Self { memory_bytes, instruction_pointers })
    }
}

async fn an_operator_sends_a_non_maskable_interrupt(stage: Stage) -> Story {
    let (player, kind) = (stage.launch("").await?, stage.kind);
    let running = player.play(Act::Halt).await?;
    let control = player.lifecycle.control();
    player.cue(&running, Act::Halt).await?;
    let observer = running.guest.observer();
    let does = |wanted: VpState| {
        let observer = observer.clone();
        move || {
            let observer = observer.clone();
            async move {
                let state = observer.state().await.map_err(|error| error.to_string())?;
                if state.vps == [wanted] { Ok(()) } else { Err(format!("VPs are {:?}", state.vps)) }
            }
        }
    };
    wait::found_async("VP 0 to halt", PATIENCE, does(VpState::Halted)).await?;
    control.nmi().await?;
    match kind {
        // What is behind the halt spins.
        Kind::Scripted => wait::found_async("VP 0 to go on", PATIENCE, does(VpState::Running)).await?,
        // Its handler tells the vector.
        Kind::BuiltIn => running.console.saw("fault 2 ").await?,
    }
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("after its end", refusal(control.nmi().await)?, GuestError::NotRunning)
}

async fn an_operator_inspects_and_updates_what_is_writable(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Reset).await?;
    let (observer, control) = (running.guest.observer(), player.lifecycle.control());
    let shown = async |path| anyhow::Ok(observer.inspect(path, 0, Rendering::Text).await?);
    expect("at first", shown("deadline").await?, "10s\n".to_owned())?;
    expect("the deadline", control.update("deadline", "2500ms").await?, "2.5s".to_owned())?;
    expect("the deadline", shown("deadline").await?, "2.5s\n".to_owned())?;

    // What the VMM logs only in detail comes once that is asked for.
    let detail = "the guest reset itself";
    player.cue(&running, Act::Reset).await?;
    running.console.saw_times("READY", 2).await?;
    let filter = "guest_vmm=debug,info";
    expect("the log", control.update("log", "info,guest_vmm=debug").await?, filter.to_owned())?;
    expect("the log", shown("log").await?, format!("{filter}\n"))?;
    wait::until_async("the update to be logged", PATIENCE, async || {
        stage.service.log().contains("a node was updated path=\"log\"")
    })
    .await?;
    expect("details before", stage.service.log().contains(detail), false)?;
    player.cue(&running, Act::Reset).await?;
    wait::until_async("the detail to be logged", PATIENCE, async || stage.service.log().contains(detail))
        .await?;
    running.console.saw_times("READY", 3).await?;

    expect("at first", shown("on_reset").await?, "restart\n".to_owned())?;
    expect("a reset", control.update("on_reset", "stop").await?, "stop".to_owned())?;
    player.cue(&running, Act::Reset).await?;
    // A guest that starts anew instead would go on for ever.
    tokio::time::timeout(PATIENCE, running.run).await??;
    expect("outcome", running.guest.terminated().await?.outcome, Outcome::Clean)?;
    expect("after its end", refusal(control.update("on_reset", "stop").await)?, GuestError::NotRunning)
}

async fn an_inspected_node_that_cannot_be_updated_says_why(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let control = player.lifecycle.control();
    let long = "9".repeat(4097);
    let cases = [
        ("", "1", GuestError::NotSupported, "not writable"),
        ("state", "running", GuestError::NotSupported, "\"state\": the node is not writable"),
        ("units/memory/unit/bytes", "1", GuestError::NotSupported, "not writable"),
        ("vps/0/state/registers/rip", "0", GuestError::NotSupported, "not writable"),
        ("units/nobody", "1", GuestError::BadConfig, "there is no node \"units/nobody\""),
        ("deadline/low", "10s", GuestError::BadConfig, "there is no node"),
        ("deadline\0", "10s", GuestError::BadConfig, "there is no node"),
        ("deadline", "soon", GuestError::BadConfig, "\"deadline\": \"soon\" is not a duration, such as 10s"),
        ("deadline", "10s\0", GuestError::BadConfig, "\"10s\\0\" is not a duration"),
        ("deadline", "1h", GuestError::BadConfig, "3600s is not within 100ms to 600s"),
        ("deadline", &long, GuestError::LimitExceeded, "4097 bytes"),
        ("on_reset", "explode", GuestError::BadConfig, "\"explode\" is not restart or stop"),
        ("log", "info,guest_vmm=loud", GuestError::BadConfig, "refused: error parsing level filter"),
        ("log", "", GuestError::BadConfig, "no directive"),
    ];
    for (path, value, code, reason) in cases {
        let (refused_with, detail) = refused(control.update(path, value).await)?;
        expect(&format!("{path} = {value}: {detail}"), refused_with, code)?;
        says(&detail, reason)?;
    }
    for (path, before) in [("deadline", "10s\n"), ("on_reset", "restart\n"), ("log", "info\n")] {
        expect(path, &control.inspect(path, 0, Rendering::Text).await?[..], before)?;
    }
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn an_operators_deadline_holds_for_a_unit_that_never_stops(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let control = player.lifecycle.control();
    control.update("deadline", "100ms").await?;
    let begun = Instant::now();
    expect("pause", refusal(control.pause().await)?, GuestError::TransitionTimedOut)?;
    expect("within the default", begun.elapsed() < Duration::from_secs(10), true)?;
    // The unit is still at it, and answers nothing.
    let (code, detail) = refused(control.update("units/injected/unit/fails_at", "Start").await)?;
    expect(&detail, code, GuestError::TransitionTimedOut)?;
    says(&detail, "not answered in time")?;
    expect("stop", refusal(player.lifecycle.stop().await)?, GuestError::TransitionTimedOut)?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn a_clients_units_move_with_the_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let unit = NotingUnit::default();
    let units = vec![
        UnitConfig { depends_on: vec!["serial".into()], ..unit.part("backup") },
        UnitConfig { depends_on: vec!["backup".into()], ..unit.part("second") },
        UnitConfig { depends_on: vec!["vps".into()], ..unit.part("monitor") },
    ];
    let running = player.play_config(&GuestConfig { units, ..player.config(Act::Spin)? }).await?;
    let (observer, control) = (running.guest.observer(), player.lifecycle.control());
    let asked = |words: &str| -> Vec<String> { words.split(", ").map(str::to_owned).collect() };
    // The guest speaks before what needs the VPs has started; a pause waits for that.
    control.pause().await?;
    let started_and_paused =
        "backup start, second start, monitor start, monitor stop, second stop, backup stop";
    expect("run and pause", unit.take_notes(), asked(started_and_paused))?;
    control.reset().await?;
    expect("reset", unit.take_notes(), asked("backup reset, second reset, monitor reset"))?;
    control.resume().await?;
    expect("resume", unit.take_notes(), asked("backup start, second start, monitor start"))?;
    let graph = observer.unit_graph().await?;
    let needs = |name: &str| -> Vec<String> {
        graph.iter().find(|unit| unit.name == name).map(|unit| unit.depends_on.clone()).unwrap_or_default()
    };
    expect("backup", needs("backup"), asked("serial"))?;
    expect("monitor", needs("monitor"), asked("vps"))?;
    let vps = needs("vps");
    expect("the VPs", ["backup", "second"].map(|name| vps.iter().any(|other| other == name)), [true; 2])?;
    let shown = observer.inspect("units/second/unit/id", 0, Rendering::Text).await?;
    expect("what it shows", &shown[..], "second\n")?;
    player.lifecycle.stop().await?;
    expect("stop", unit.take_notes(), asked("monitor stop, second stop, backup stop"))?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn a_clients_unit_that_refuses_to_start_fails_the_run(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let unit = NotingUnit::default();
    unit.refuse("start");
    let config = GuestConfig { units: vec![unit.part("backup")], ..player.config(Act::Spin)? };
    player.lifecycle.create(&config).await?;
    let (code, detail) = refused(player.lifecycle.run().await)?;
    expect("code", code, GuestError::DeviceStartFailure)?;
    says(&detail, "backup does not start today")
}

async fn faults_of_a_clients_units_are_listed(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let unit = NotingUnit::default();
    let create = async |units| {
        let config = GuestConfig { units, ..player.config(Act::Spin)? };
        let (code, detail) = refused(player.lifecycle.create(&config).await)?;
        expect(&detail, code, GuestError::BadConfig)?;
        anyhow::Ok(detail)
    };
    let detail =
        create(vec![unit.part("a b"), UnitConfig { deadline_ms: 0, ..unit.part("late") }, unit.part("late")])
            .await?;
    for words in
        ["units[0].id: \"a b\" is not", "units[1].deadlineMs: 0", "units[2].id: \"late\" is there before"]
    {
        says(&detail, words)?;
    }
    let detail = create(vec![
        unit.part("serial"),
        UnitConfig { depends_on: vec!["nobody".into()], ..unit.part("one") },
        UnitConfig { depends_on: vec!["three".into()], ..unit.part("two") },
        unit.part("three"),
    ])
    .await?;
    for words in ["units[0].id: ", "units[1].dependsOn: there is no unit \"nobody\"", "units[2].dependsOn: "]
    {
        says(&detail, words)?;
    }
    // Nothing of a refused guest is left in the way of the next.
    let config = GuestConfig { units: vec![unit.part("serial-2")], ..player.config(Act::Spin)? };
    player.lifecycle.create(&config).await?;
    expect("asked", unit.take_notes(), Vec::new())
}

async fn a_unit_joins_a_guest_at_any_time(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let unit = NotingUnit::default();
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    let control = player.lifecycle.control();
    control.add_unit(&unit.part("early")).await?;
    expect("created", unit.take_notes(), Vec::new())?;
    let run = player.lifecycle.run();
    // Waits for the start of the others, and is started then.
    control.add_unit(&UnitConfig { depends_on: vec!["early".into()], ..unit.part("late") }).await?;
    expect("running", unit.take_notes(), vec!["early start".to_owned(), "late start".to_owned()])?;
    let again = control.add_unit(&unit.part("late")).await;
    let (code, detail) = refused(again)?;
    expect(&detail, code, GuestError::BadConfig)?;
    let other = NotingUnit::default();
    other.refuse("start");
    let refusing = control.add_unit(&other.part("refusing")).await;
    expect("one that does not start", refusal(refusing)?, GuestError::DeviceStartFailure)?;
    control.pause().await?;
    expect("paused", unit.take_notes(), vec!["late stop".to_owned(), "early stop".to_owned()])?;
    control.add_unit(&unit.part("last")).await?;
    expect("added while paused", unit.take_notes(), Vec::new())?;
    control.resume().await?;
    let mut started = unit.take_notes();
    started.sort();
    expect("resumed", started, ["early start", "last start", "late start"].map(str::to_owned).to_vec())?;
    let names: Vec<String> =
        control.observer().unit_graph().await?.into_iter().map(|unit| unit.name).collect();
    expect("the refusing one", names.iter().any(|name| name == "refusing"), false)?;
    player.lifecycle.stop().await?;
    expect("run", refusal(run.await)?, GuestError::ControllerForcedHalt)?;
    let after = control.add_unit(&unit.part("after")).await;
    expect("after its end", refusal(after)?, GuestError::NotRunning)
}
