//! The lifecycle protocol, state by state: each story is played on a scripted processor and on KVM, over a guest's own channel and
//! through the service. What is seen of a guest meanwhile, and done to its VMM, is in `operator`; clients' state units in
//! `client_units`, the virtio console in `consoles`, disks in `disks`, a network by vhost-user in `networks`, vsock in `sockets`, guests that
//! go on from others in `snapshots`, a hundred of them in `forks`; files of those in `snapshots_on_disk`, and guests that go on from
//! them in `saved_snapshots`, of every format in `fixtures`; what the board's small devices tell, in `board`.

mod board;
mod client_units;
mod consoles;
mod disks;
mod fixtures;
mod forks;
mod networks;
mod operator;
mod saved_snapshots;
mod snapshots;
mod snapshots_on_disk;
mod sockets;

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;

use anyhow::anyhow;
use guest_client::ClientError;
use guest_schema::{
    DevicesConfig, FileSource, GuestConfig, GuestError, MemoryConfig, OnReset, Outcome, Phase, VpAffinity,
    VpState,
};
use guest_tests::console::Console;
use guest_tests::requirements::{Requirement, run, trial};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Channel, Kind, Stage, Story, expect, gone, play_on, refusal, refused, says};
use guest_tests::wait;
use libtest_mimic::Trial;

use board::*;
use client_units::*;
use consoles::*;
use disks::*;
use fixtures::*;
use networks::*;
use operator::*;
use saved_snapshots::*;
use snapshots::*;
use snapshots_on_disk::*;
use sockets::*;

type Played = Pin<Box<dyn Future<Output = Story>>>;

/// A story, and what is injected into scripted guests for it; such a story is played on scripts only, as are those of what only
/// a script can do.
struct Script {
    name: &'static str,
    faults: &'static str,
    scripts_only: bool,
    /// The one channel that it is played on, by name; empty if both.
    channel: &'static str,
    play: fn(Stage) -> Played,
}

macro_rules! stories {
    ($($name:ident $(with $faults:literal)? $(on $only:ident)? $(over $channel:ident)?;)*) => {
        const STORIES: &[Script] = &[$(Script {
            name: stringify!($name),
            faults: concat!($($faults)?),
            scripts_only: !concat!($($faults)? $(stringify!($only))?).is_empty(),
            channel: concat!($(stringify!($channel))?),
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
    a_unit_that_never_stops_is_late with ",hold-unit=stop";
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
    an_operators_deadline_holds_for_a_unit_that_never_stops with ",hold-unit=stop";
    a_guest_shuts_down_by_its_power_button on scripts;
    a_paused_guest_hears_of_its_power_button_when_it_goes_on on scripts;
    a_guest_that_ignores_its_power_button_runs_on;
    guestctl_stops_a_guest_gracefully on scripts;
    guestctl_forces_a_guest_that_ignores_its_power_button;
    a_panic_is_an_event_and_in_the_exit on scripts;
    a_panic_that_ends_in_a_reset_is_in_the_exit_if_the_reset_ends_the_guest on scripts;
    a_panic_before_a_reset_is_counted_and_not_the_end on scripts;
    a_guest_that_panics_all_the_time_is_told_of_now_and_then on scripts;
    a_test_guest_ends_itself_with_a_value;
    a_guest_has_no_debug_exit_port_unless_asked_for;
    a_clients_units_move_with_the_guest;
    a_clients_unit_that_refuses_to_start_fails_the_run;
    faults_of_a_clients_units_are_listed;
    a_unit_joins_a_guest_at_any_time;
    a_console_is_read_and_resized on scripts;
    a_consoles_sender_waits_for_room on scripts;
    a_console_without_a_config_of_its_own_has_no_ports on scripts;
    an_image_has_one_writer_or_any_number_of_readers over direct;
    what_is_no_image_is_named_by_its_field over direct;
    an_image_does_not_go_over_a_proxied_channel over proxied;
    a_create_that_is_given_up_lets_go_of_its_disks over direct;
    a_disk_that_the_host_fails_is_an_event on scripts over direct;
    a_disk_that_its_client_fails_is_an_event on scripts;
    a_guest_talks_to_a_listener_of_its_config on scripts;
    unclaimed_ports_are_accepted_or_refused_one_by_one on scripts;
    a_client_listens_for_as_long_as_it_likes on scripts;
    a_client_connects_to_its_guest on scripts;
    a_guest_without_a_socket_device_says_so;
    a_guest_talks_by_vhost_user on scripts;
    vhost_user_back_ends_that_cannot_be_are_refused on scripts;
    guestctl_runs_a_guest_with_vhost_user on scripts;
    a_fork_goes_on_where_its_parent_was;
    a_snapshot_tells_what_it_has;
    a_paused_guest_stays_paused_and_its_fork_runs;
    a_fork_lives_on_after_its_parent;
    a_snapshot_outlives_a_vmm_that_is_killed;
    ten_forks_go_on_at_once;
    a_fork_of_a_fork_goes_on;
    a_forks_lease_begins_at_its_snapshot_again;
    a_guest_that_does_not_run_makes_no_snapshot;
    a_fork_brings_no_kernel;
    nobody_sees_what_another_writes on scripts;
    a_fork_reads_the_disk_that_it_is_granted on scripts over direct;
    a_fork_without_its_disks_is_refused on scripts over direct;
    snapshots_leave_nothing_in_the_service;
    guestctl_forks_a_guest;
    a_snapshot_is_saved_while_its_guest_runs_on on scripts;
    an_export_has_the_bytes_of_the_file_that_is_saved on scripts;
    a_layer_is_saved_against_a_file on scripts;
    an_output_that_fails_ends_its_export on scripts;
    an_export_that_nobody_takes_holds_up_nobody on scripts;
    a_snapshot_from_its_guests_channel_alone_hands_over_no_files on scripts over direct;
    a_save_comes_to_its_end_without_guest_and_service on scripts;
    a_guestctl_that_is_killed_leaves_the_old_file_or_the_new;
    a_disk_that_is_full_leaves_what_was_there on scripts;
    saving_leaves_nothing_in_the_service on scripts;
    guestctl_saves_a_guest_and_shows_it on scripts;
    a_guest_goes_on_from_a_file;
    a_guest_from_a_file_is_another_generation;
    a_guest_from_a_file_boots_again_when_it_is_reset;
    a_guest_from_a_file_is_paused_saved_and_forked;
    a_lease_takes_a_file_a_kernel_and_a_file;
    a_layer_goes_on_with_its_base_alone;
    a_file_that_is_not_whole_is_refused;
    a_file_whose_memory_is_damaged_on_its_way_is_refused over proxied;
    a_state_of_other_units_is_refused;
    a_states_newer_field_is_ignored;
    a_file_that_can_be_written_by_its_descriptor_is_refused over direct;
    files_that_are_refused_leave_nothing;
    guestctl_runs_a_guest_from_a_file over direct;
    files_of_every_format_go_on on scripts;
}

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for script in STORIES {
        for kind in [Kind::Scripted, Kind::BuiltIn] {
            for channel in [Channel::Direct, Channel::Proxied] {
                let is_played = script.channel.is_empty() || script.channel == name(channel);
                if is_played && (kind == Kind::Scripted || !script.scripts_only) {
                    trials.push(rehearse(script, kind, channel));
                }
            }
        }
    }
    trials.push(trial("a_hundred_forks_live_at_once", &[Requirement::Kvm], || {
        play_on(Stage::set(Kind::BuiltIn, Channel::Direct, "")?, forks::a_hundred_live_at_once)
    }));
    run(trials, || {})
}

fn name(channel: Channel) -> &'static str {
    if channel == Channel::Direct { "direct" } else { "proxied" }
}

fn rehearse(script: &'static Script, kind: Kind, channel: Channel) -> Trial {
    let held = name(channel);
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
        saved: None,
        kernel: Some(FileSource::Descriptor(77)),
        ramdisk: None,
        cmdline: "x".repeat(70_000),
        cpus: 100_000,
        affinity: VpAffinity::Any,
        cpuid_mask: Vec::new(),
        memory: MemoryConfig::of_bytes(0),
        on_reset: OnReset::Restart,
        units: Vec::new(),
        devices: DevicesConfig::default(),
        catch_up_time: false,
        debug_exit: false,
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
    GuestConfig::new(Some(FileSource::File(capnp_rpc::new_client(NeverRead))), 16 << 20)
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
