//! What becomes of snapshots, their guests and those that go on from them when a unit fails, or one of the processes is killed in
//! the middle.
//!
//! Phases of units are held by a unit of the machine's that a fault is injected into; what lies between them is found by kills at
//! many moments.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use guest_client::{Call, ClientError, Observer, Phase, Snapshot};
use guest_schema::{GuestConfig, GuestError, Outcome};
use guest_tests::process::{Process, Stdin};
use guest_tests::requirements::{scaled, trial};
use guest_tests::service::{PATIENCE, Service, program};
use guest_tests::stage::{
    Act, Channel, Kind, Player, Running, Stage, Story, expect, gone, play, refused, says,
};
use guest_tests::{census, wait};
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::kills::guestctl_run;

/// The units' steps while a snapshot is taken, and while a guest goes on from one, as `--hypervisor` takes them and as they are logged.
const TAKING: [(&str, &str); 4] =
    [("can-save", "CanSave"), ("stop", "Stop"), ("save", "Save"), ("resume", "Resume")];
const GOING_ON: [(&str, &str); 2] = [("restore", "Restore"), ("go-on", "GoOn")];

/// How many moments of a snapshot, and of a launch from one, something is killed at.
const MOMENTS: u32 = 60;
/// From the first to the last: longer than either takes.
const ALL_MOMENTS: Duration = Duration::from_millis(12);

/// The operator's deadline where a unit takes 2 s.
const DEADLINE: &str = "500ms";

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("snapshots::a_unit_that_cannot_be_saved_is_named", &[], || play(a_unit_refuses())),
        trial("snapshots::a_guest_goes_on_whose_unit_fails::save", &[], || play(a_unit_fails("save"))),
        trial("snapshots::a_guest_goes_on_whose_unit_fails::stop", &[], || play(a_unit_fails("stop"))),
        trial("snapshots::a_guest_goes_on_whose_unit_is_late_to_say", &[], || {
            play(a_unit_is_late("can-save"))
        }),
        trial("snapshots::a_late_unit_faults_the_guest::stop", &[], || play(a_unit_is_late("stop"))),
        trial("snapshots::a_late_unit_faults_the_guest::save", &[], || play(a_unit_is_late("save"))),
        trial("snapshots::a_guest_that_does_not_go_on_stays_paused", &[], || play(a_guest_does_not_go_on())),
        trial("snapshots::a_unit_that_is_not_restored_fails_the_fork", &[], || play(a_fork_fails("restore"))),
        trial("snapshots::a_unit_that_cannot_go_on_fails_the_fork", &[], || play(a_fork_fails("go-on"))),
        trial("snapshots::kills::handing_over::vmm", &[], || play(a_vmm_is_killed_while_it_hands_over())),
        trial("snapshots::kills::handing_over::service", &[], || {
            play(a_service_is_killed_that_is_handed_over_to())
        }),
        trial("snapshots::kills::handing_over::client", &[], || {
            play(a_client_goes_while_its_snapshot_is_handed_over())
        }),
        trial("snapshots::kills::attach::vmm", &[], || play(killed_at_attach(Victim::Vmm))),
        trial("snapshots::kills::attach::service", &[], || play(killed_at_attach(Victim::Service))),
        trial("snapshots::kills::attach::client", &[], || play(killed_at_attach(Victim::Client))),
        trial("snapshots::kills::any_moment::taking", &[], || play(killed_at_any_moment_of_taking())),
        trial("snapshots::kills::any_moment::going_on", &[], || play(killed_at_any_moment_of_going_on())),
    ];
    for (step, logged) in TAKING {
        for victim in [Victim::Vmm, Victim::Service, Victim::Client, Victim::Holder] {
            let name = format!("snapshots::kills::{step}::{}", victim.name());
            trials.push(trial(&name, &[], move || play(killed_while_taking(step, logged, victim))));
        }
    }
    for (step, logged) in GOING_ON {
        for victim in [Victim::Vmm, Victim::Service, Victim::Client] {
            let name = format!("snapshots::kills::{step}::{}", victim.name());
            trials.push(trial(&name, &[], move || play(killed_while_going_on(step, logged, victim))));
        }
    }
    trials
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// The guest's VMM, or the one of the guest that goes on.
    Vmm,
    /// guestd.
    Service,
    /// Who asked for the snapshot, and holds the lease of the guest that goes on from it.
    Client,
    /// Who holds the guest's lease.
    Holder,
}

impl Victim {
    fn name(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::Service => "service",
            Self::Client => "client",
            Self::Holder => "holder",
        }
    }
}

fn kill(pid: u32) -> Story {
    Ok(kill_process(Pid::from_raw(pid.cast_signed()).context("a process")?, Signal::KILL)?)
}

fn no_grants() -> GuestConfig {
    GuestConfig::new(None, 0)
}

/// A service whose scripted guests have an injected unit, and one of them that waits for its cue.
async fn parent(fault: &str) -> anyhow::Result<(Stage, Player, Running)> {
    parent_on(Stage::set(Kind::Scripted, Channel::Direct, &format!(",{fault}"))?).await
}

async fn parent_on(stage: Stage) -> anyhow::Result<(Stage, Player, Running)> {
    let player = stage.launch("parent").await?;
    let running = player.play(Act::PowerOff).await?;
    Ok((stage, player, running))
}

/// The guest runs, takes its cue and ends cleanly.
async fn goes_on(player: &Player, running: Running) -> Story {
    expect("phase", running.guest.observer().state().await?.phase, Phase::Running)?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

/// Waits until the service holds no file of any snapshot, and has these VMMs and no others.
async fn nothing_left(service: &Service, vmms: &[u32]) -> Story {
    let look = || async {
        let pid = service.pid();
        let files = census::memfds(pid).map_err(|error| error.to_string())?;
        let processes = census::children(pid).map_err(|error| error.to_string())?;
        let all = processes.len() == vmms.len() && vmms.iter().all(|vmm| processes.contains(vmm));
        if files == 0 && all { Ok(()) } else { Err(format!("{files} memfds, {processes:?}, not {vmms:?}")) }
    };
    wait::found_async("the service to hold nothing of a snapshot", PATIENCE, look).await?;
    ensure!(!service.log().contains("panicked"), "{}", service.log());
    Ok(())
}

/// A client of its own that forks the guest `parent`.
fn forker(service: &Service) -> anyhow::Result<Process> {
    let mut command = Command::new(program("guestctl")?);
    command.arg("--socket").arg(service.socket()).args(["fork", "parent", "--name", "child"]);
    Ok(Process::spawn(command, Stdin::Empty)?)
}

/// It has ended and failed.
fn failed(forker: &Process) -> Story {
    ensure!(forker.wait(PATIENCE)?.code() == Some(1), "{}", forker.last_words());
    Ok(())
}

async fn a_unit_refuses() -> Story {
    let (stage, player, running) = parent("fail-unit=can-save").await?;
    let (code, detail) = refused(player.lifecycle.control().snapshot().await)?;
    expect(&detail, code, GuestError::SnapshotNotSupported)?;
    says(&detail, "injected: an injected fault")?;
    let never_stopped = running.guest.observer().timeline().await?;
    ensure!(never_stopped.iter().all(|pass| pass.operation != "stop"), "{never_stopped:?}");
    nothing_left(&stage.service, &[player.pid().await?]).await?;
    goes_on(&player, running).await
}

async fn a_unit_fails(step: &str) -> Story {
    let (stage, player, running) = parent(&format!("fail-unit={step}")).await?;
    for _ in 0..2 {
        let (code, detail) = refused(player.lifecycle.control().snapshot().await)?;
        expect(&detail, code, GuestError::InternalError)?;
        says(&detail, "injected")?;
        expect("phase", running.guest.observer().state().await?.phase, Phase::Running)?;
    }
    nothing_left(&stage.service, &[player.pid().await?]).await?;
    player.cue(&running, Act::PowerOff).await?;
    // It is taken down by a stop, at which a unit that cannot stop fails again.
    let ended = running.run.await;
    ensure!(ended.is_ok(), "{ended:?}");
    Ok(())
}

/// A unit that is asked whether it can be saved is late without harm; once the guest stands still, nobody knows what it will be late
/// with next.
async fn a_unit_is_late(step: &str) -> Story {
    let (stage, player, running) = parent(&format!("slow-unit={step}")).await?;
    let control = player.lifecycle.control();
    control.update("deadline", DEADLINE).await?;
    let (code, detail) = refused(control.snapshot().await)?;
    expect(&detail, code, GuestError::TransitionTimedOut)?;
    says(&detail, "injected")?;
    nothing_left(&stage.service, &[player.pid().await?]).await?;
    if step == "can-save" {
        return goes_on(&player, running).await;
    }
    expect("phase", running.guest.observer().state().await?.phase, Phase::Faulted)?;
    // A stop waits for it no longer than for a step of its own.
    control.update("deadline", "10s").await?;
    player.lifecycle.stop().await?;
    expect("outcome", running.guest.terminated().await?.outcome, Outcome::Forced)
}

async fn a_guest_does_not_go_on() -> Story {
    let (stage, player, running) = parent("fail-unit=resume").await?;
    let (code, detail) = refused(player.lifecycle.control().snapshot().await)?;
    expect(&detail, code, GuestError::InternalError)?;
    says(&detail, "injected fault at Resume")?;
    nothing_left(&stage.service, &[player.pid().await?]).await?;
    expect("phase", running.guest.observer().state().await?.phase, Phase::Paused)?;
    // The unit has failed once.
    player.lifecycle.control().resume().await?;
    goes_on(&player, running).await
}

async fn a_fork_fails(step: &str) -> Story {
    let (stage, player, running) = parent(&format!("fail-unit={step}")).await?;
    let snapshot = player.lifecycle.control().snapshot().await?;
    let child = stage.launch_from(&snapshot, &player.host, "child").await?;
    let created = child.lifecycle.create(&no_grants()).await;
    let (code, detail) = match step {
        "restore" => refused(created)?,
        _ => created.map_err(Into::into).and(refused(child.lifecycle.run().await))?,
    };
    let expected =
        if step == "restore" { GuestError::SnapshotIncompatible } else { GuestError::DeviceStartFailure };
    expect(&detail, code, expected)?;
    says(&detail, "injected")?;
    drop((child, snapshot));
    nothing_left(&stage.service, &[player.pid().await?]).await?;
    goes_on(&player, running).await
}

async fn killed_while_taking(step: &str, logged: &str, victim: Victim) -> Story {
    // A VMM that is killed need not go on, and the others are to see how it does.
    let hold = if victim == Victim::Vmm { "hold" } else { "slow" };
    let fault = format!("{hold}-unit={step}");
    let word = if victim == Victim::Vmm { "held" } else { "slow" };
    let at = format!("injected unit: {word} at {logged}");
    if victim == Victim::Holder {
        return holder_killed(&fault, &at).await;
    }
    let (stage, player, running) = parent(&fault).await?;
    let pid = player.pid().await?;
    let forker = forker(&stage.service)?;
    stage.service.process().logged(&at, PATIENCE)?;
    match victim {
        Victim::Vmm => {
            kill(pid)?;
            failed(&forker)?;
            expect("exit", player.exit.terminated().await?.outcome, Outcome::Crashed)?;
            ensure!(matches!(running.run.await, Err(ClientError::Lost(_))), "run");
            nothing_left(&stage.service, &[]).await
        }
        Victim::Service => {
            stage.service.process().kill();
            failed(&forker)?;
            keeps_no_more_snapshots(&player).await?;
            goes_on(&player, running).await
        }
        _ => {
            forker.kill();
            // What was under way for nobody holds up nobody for longer than it takes.
            let snapshot = player.lifecycle.control().snapshot().await?;
            is_whole(&stage, &player, &snapshot).await?;
            drop(snapshot);
            nothing_left(&stage.service, &[pid]).await?;
            goes_on(&player, running).await
        }
    }
}

/// A guest whose service has gone says that there is nobody to keep a snapshot.
async fn keeps_no_more_snapshots(player: &Player) -> Story {
    let (code, detail) = refused(player.lifecycle.control().snapshot().await)?;
    expect(&detail, code, GuestError::NotSupported)?;
    says(&detail, "service")
}

async fn holder_killed(fault: &str, at: &str) -> Story {
    let service = Service::start(&format!("scripted,{fault}"), &[])?;
    let (holder, _kernel) = guestctl_run(&service, Channel::Direct, "parent")?;
    let exit = service.connect().await?.find("parent").await?.exit;
    let forker = forker(&service)?;
    service.process().logged(at, PATIENCE)?;
    holder.kill();
    expect("how it ended", exit.terminated().await?.outcome, Outcome::Forced)?;
    // The snapshot was under way before the lease ended: it is whole or there is none.
    let child = wait::found("the fork to run or to fail", PATIENCE, || {
        let runs = forker.stdout().text().contains("child");
        if runs || forker.ended().is_some() { Ok(runs) } else { Err("neither") }
    })?;
    if child {
        let control = service.connect().await?.find("child").await?.control;
        expect("the fork", control.observer().state().await?.phase, Phase::Running)?;
        forker.kill();
    } else {
        failed(&forker)?;
    }
    nothing_left(&service, &[]).await
}

async fn killed_while_going_on(step: &str, logged: &str, victim: Victim) -> Story {
    let hold = if victim == Victim::Vmm { "hold" } else { "slow" };
    let (stage, player, running) = parent(&format!("{hold}-unit={step}")).await?;
    let pid = player.pid().await?;
    let forker = forker(&stage.service)?;
    let word = if victim == Victim::Vmm { "held" } else { "slow" };
    stage.service.process().logged(&format!("injected unit: {word} at {logged}"), PATIENCE)?;
    let child = child_of(&player).await?;
    end_of_the_fork(&stage, &forker, child, victim).await?;
    if victim != Victim::Service {
        nothing_left(&stage.service, &[pid]).await?;
    }
    goes_on(&player, running).await
}

/// The process of the fork.
async fn child_of(player: &Player) -> anyhow::Result<u32> {
    let guests = player.host.list().await?;
    Ok(guests.iter().find(|guest| guest.id == "child-1").context("no child is listed")?.pid)
}

/// Kills somebody, and with that ends the fork: its client fails unless it was killed itself, its VMM is gone.
async fn end_of_the_fork(stage: &Stage, forker: &Process, child: u32, victim: Victim) -> Story {
    match victim {
        Victim::Vmm => kill(child)?,
        Victim::Service => stage.service.process().kill(),
        Victim::Client | Victim::Holder => forker.kill(),
    }
    if matches!(victim, Victim::Vmm | Victim::Service) {
        failed(forker)?;
    }
    gone(child).await
}

/// guestd's own socket stands still: the VMM has sealed the snapshot, and nobody has taken it.
async fn handing_over(stage: &Stage, player: &Player, pid: u32) -> anyhow::Result<Call<Snapshot>> {
    stage.service.process().signal(Signal::STOP);
    let control = player.lifecycle.control();
    let observer = control.observer();
    let call = control.snapshot();
    frozen(&observer).await?;
    // The guest's mapping of the memfd is left, and the one that was put aside is gone.
    let sealed = || async { census::mappings(pid, "guest-memory").is_ok_and(|count| count == 1) };
    wait::until_async("the mapping that was put aside to go", PATIENCE, sealed).await?;
    Ok(call)
}

/// Waits until the guest has gone on after its units were saved.
async fn frozen(observer: &Observer) -> Story {
    let look = || async {
        let passes = observer.timeline().await.map_err(|error| error.to_string())?;
        let names: Vec<String> = passes.iter().map(|pass| pass.operation.clone()).collect();
        let saved = names.iter().rposition(|name| name == "save").ok_or("nothing was saved")?;
        let start = passes[saved..].iter().find(|pass| pass.operation == "start");
        let all = start.is_some_and(|start| start.units.iter().all(|unit| unit.ended_us.is_some()));
        if all { Ok(()) } else { Err(format!("{names:?}")) }
    };
    Ok(wait::found_async("the guest to go on", PATIENCE, look).await?)
}

async fn a_vmm_is_killed_while_it_hands_over() -> Story {
    let (stage, player, running) = parent_on(Stage::set(Kind::Scripted, Channel::Direct, "")?).await?;
    let pid = player.pid().await?;
    let call = handing_over(&stage, &player, pid).await?;
    kill(pid)?;
    ensure!(matches!(running.run.await, Err(ClientError::Lost(_))), "run");
    ensure!(call.await.is_err(), "a snapshot of a VMM that was killed before it was kept");
    stage.service.process().signal(Signal::CONT);
    nothing_left(&stage.service, &[]).await
}

async fn a_service_is_killed_that_is_handed_over_to() -> Story {
    let (stage, player, running) = parent_on(Stage::set(Kind::Scripted, Channel::Direct, "")?).await?;
    let pid = player.pid().await?;
    let call = handing_over(&stage, &player, pid).await?;
    stage.service.process().kill();
    let (code, detail) = refused(call.await)?;
    expect(&detail, code, GuestError::NotSupported)?;
    keeps_no_more_snapshots(&player).await?;
    goes_on(&player, running).await
}

async fn a_client_goes_while_its_snapshot_is_handed_over() -> Story {
    let (stage, player, running) = parent_on(Stage::set(Kind::Scripted, Channel::Direct, "")?).await?;
    let pid = player.pid().await?;
    let call = handing_over(&stage, &player, pid).await?;
    drop((call, running, player));
    stage.service.process().signal(Signal::CONT);
    nothing_left(&stage.service, &[]).await
}

/// A script in place of guest-vmm, which starts guest-vmm unless a file is there, and then as soon as it is gone.
struct HeldStart {
    _folder: TempDir,
    script: PathBuf,
}

impl HeldStart {
    fn new() -> anyhow::Result<Self> {
        let folder = TempDir::new()?;
        let script = folder.path().join("guest-vmm");
        let vmm = program("guest-vmm")?;
        let text = format!(
            "#!/bin/sh\nwhile test -e \"$0.hold\"; do sleep 0.05; done\nexec '{}' \"$@\"\n",
            vmm.display()
        );
        std::fs::write(&script, text)?;
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
        Ok(Self { _folder: folder, script })
    }

    fn file(&self) -> PathBuf {
        Path::new(&self.script).with_file_name("guest-vmm.hold")
    }

    fn hold(&self) -> Story {
        Ok(std::fs::write(self.file(), "")?)
    }

    fn let_go(&self) -> Story {
        Ok(std::fs::remove_file(self.file())?)
    }
}

/// The VMM has been started and handed the snapshot, and has not read anything yet.
async fn killed_at_attach(victim: Victim) -> Story {
    let held = HeldStart::new()?;
    let service = Service::start("scripted", &["--vmm", held.script.to_str().context("a plain name")?])?;
    let stage = Stage { kind: Kind::Scripted, channel: Channel::Direct, service };
    let (stage, player, running) = parent_on(stage).await?;
    let pid = player.pid().await?;
    held.hold()?;
    let forker = forker(&stage.service)?;
    let look = || async {
        let vmms = census::children(stage.service.pid()).map_err(|error| error.to_string())?;
        vmms.iter().copied().find(|&vmm| vmm != pid).ok_or_else(|| format!("{vmms:?}"))
    };
    let child = wait::found_async("a VMM for the fork", PATIENCE, look).await?;
    match victim {
        Victim::Vmm => kill(child)?,
        Victim::Service => stage.service.process().kill(),
        Victim::Client | Victim::Holder => forker.kill(),
    }
    held.let_go()?;
    if matches!(victim, Victim::Vmm | Victim::Service) {
        failed(&forker)?;
    }
    gone(child).await?;
    if victim != Victim::Service {
        nothing_left(&stage.service, &[pid]).await?;
    }
    goes_on(&player, running).await
}

/// Kills a VMM after some time.
async fn kill_at(moment: u32, pid: u32) -> Story {
    tokio::time::sleep(ALL_MOMENTS / scaled(MOMENTS) * moment).await;
    kill(pid)
}

/// A guest goes on from a snapshot and ends by itself.
async fn is_whole(stage: &Stage, player: &Player, snapshot: &Snapshot) -> Story {
    let child = stage.launch_from(snapshot, &player.host, "").await?;
    let running = child.run_config(&no_grants()).await?;
    child.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn killed_at_any_moment_of_taking() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let mut taken = 0;
    for moment in 0..scaled(MOMENTS) {
        let player = stage.launch("").await?;
        let running = player.play(Act::PowerOff).await?;
        let pid = player.pid().await?;
        let call = player.lifecycle.control().snapshot();
        let (call, killed) = tokio::join!(call, kill_at(moment, pid));
        killed?;
        // Whoever was answered has all of it, although its guest is gone.
        if let Ok(snapshot) = call {
            is_whole(&stage, &player, &snapshot).await.with_context(|| format!("moment {moment}"))?;
            taken += 1;
        }
        ensure!(matches!(running.run.await, Err(ClientError::Lost(_))), "run");
        drop(player);
        nothing_left(&stage.service, &[]).await.with_context(|| format!("moment {moment}"))?;
    }
    println!("{taken} of {} snapshots were taken before the kill", scaled(MOMENTS));
    Ok(())
}

async fn killed_at_any_moment_of_going_on() -> Story {
    let (stage, player, running) = parent_on(Stage::set(Kind::Scripted, Channel::Direct, "")?).await?;
    let snapshot = player.lifecycle.control().snapshot().await?;
    let parent = player.pid().await?;
    for moment in 0..scaled(MOMENTS) {
        let child = stage.launch_from(&snapshot, &player.host, "").await?;
        let pid = child.pid().await?;
        let grants = no_grants();
        let life = child.run_config(&grants);
        let (life, killed) = tokio::join!(life, kill_at(moment, pid));
        killed?;
        expect("outcome", child.exit.terminated().await?.outcome, Outcome::Crashed)?;
        drop((life, child));
        gone(pid).await?;
    }
    is_whole(&stage, &player, &snapshot).await?;
    drop(snapshot);
    nothing_left(&stage.service, &[parent]).await?;
    goes_on(&player, running).await
}
