//! VMMs that are kept ready: launches take them, they are replaced, and none outlives the service.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, ensure};
use guest_client::Host;
use guest_schema::Outcome;
use guest_tests::requirements::{Requirement, trial};
use guest_tests::service::{PATIENCE, Service, program};
use guest_tests::stage::{Act, Channel, Kind, Player, Stage, Story, expect, gone, play, says};
use guest_tests::{census, wait};
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How many the services of these stories keep ready.
pub const WARM: usize = 2;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("launches_take_ready_vmms_and_others_follow", &[], || play(launches_take_ready_vmms())),
        trial("a_ready_vmm_has_opened_kvm", &[Requirement::Kvm], || play(a_ready_vmm_has_opened_kvm())),
        trial("launches_in_a_row_start_what_is_not_ready", &[], || play(launches_in_a_row())),
        trial("a_ready_vmm_that_is_killed_is_replaced", &[], || play(a_killed_one_is_replaced())),
        trial("all_ready_vmms_killed_fail_no_launch", &[], || play(all_killed_fail_no_launch())),
        trial("a_vmm_that_ends_in_the_pool_is_a_crash_of_launches", &[], || play(a_vmm_that_cannot_start())),
        trial("vmms_are_kept_ready_once_they_can_be_started", &[], || play(vmms_that_can_be_started_later())),
        trial("ready_vmms_are_no_guests", &[], || play(ready_vmms_are_no_guests())),
        trial("sigterm_leaves_no_ready_vmm", &[], || play(a_signal_leaves_none(Signal::TERM))),
        trial("sigint_leaves_no_ready_vmm", &[], || play(a_signal_leaves_none(Signal::INT))),
        trial("a_killed_service_leaves_no_ready_vmm", &[], || play(a_killed_service_leaves_none())),
        trial("a_stopped_ready_vmm_does_not_hold_up_the_end", &[], || play(a_stopped_one_is_killed())),
        trial("a_service_told_to_keeps_none_ready", &[], || play(none_are_kept())),
    ]
}

fn stage(kind: Kind) -> anyhow::Result<Stage> {
    let service = Service::start_warm(kind.hypervisor(), u32::try_from(WARM)?, &[])?;
    Ok(Stage { kind, channel: Channel::Direct, service })
}

/// Waits until the service has all VMMs ready, and no process but them and these guests'; gives the ready ones.
pub async fn ready(service: &Service, guests: &[u32]) -> anyhow::Result<BTreeSet<u32>> {
    let host = service.connect().await?;
    let look = || async {
        let warm = host.info().await.map_err(|error| error.to_string())?.warm;
        let mut processes: BTreeSet<u32> =
            census::children(service.pid()).map_err(|error| error.to_string())?.into_iter().collect();
        let known = guests.iter().all(|guest| processes.remove(guest));
        if known && warm as usize == WARM && processes.len() == WARM {
            Ok(processes)
        } else {
            Err(format!("{warm} are ready, of {processes:?}"))
        }
    };
    Ok(wait::found_async("VMMs to be ready", PATIENCE, look).await?)
}

pub fn signal(pid: u32, signal: Signal) -> Story {
    Ok(kill_process(Pid::from_raw(pid.cast_signed()).context("a process")?, signal)?)
}

/// A guest that runs, powers itself off and is told of as any other.
pub async fn live(stage: &Stage, player: &Player) -> Story {
    let running = player.play(Act::PowerOff).await?;
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    expect("outcome", player.exit.terminated().await?.outcome, Outcome::Clean)?;
    says(&stage.service.log(), &format!("guest=\"{}\"", player.id))
}

async fn launches_take_ready_vmms() -> Story {
    let mut stage = stage(Kind::Scripted)?;
    let mut idle = ready(&stage.service, &[]).await?;
    let (mut players, mut pids) = (Vec::new(), Vec::new());
    for (number, channel) in [Channel::Direct, Channel::Proxied, Channel::Direct].into_iter().enumerate() {
        stage.channel = channel;
        let player = stage.launch(&format!("guest-{number}")).await?;
        let pid = player.pid().await?;
        ensure!(idle.contains(&pid), "{pid} is none of {idle:?}");
        live(&stage, &player).await?;
        players.push(player);
        pids.push(pid);
        idle = ready(&stage.service, &pids).await?;
        ensure!(!idle.contains(&pid), "{pid} is ready again");
    }
    // A VMM serves one lease: its process ends with it.
    drop(players);
    for pid in pids {
        gone(pid).await?;
    }
    expect("the ready ones", ready(&stage.service, &[]).await?, idle)
}

async fn a_ready_vmm_has_opened_kvm() -> Story {
    let stage = stage(Kind::BuiltIn)?;
    let idle = ready(&stage.service, &[]).await?;
    let open = || async { idle.iter().all(|&pid| census::holds(pid, "/dev/kvm").is_ok_and(|open| open)) };
    wait::until_async("/dev/kvm to be open", PATIENCE, open).await?;
    let player = stage.launch("guest").await?;
    ensure!(idle.contains(&player.pid().await?), "{} is none of {idle:?}", player.pid().await?);
    live(&stage, &player).await
}

async fn launches_in_a_row() -> Story {
    let stage = stage(Kind::Scripted)?;
    let idle = ready(&stage.service, &[]).await?;
    let host = stage.service.connect().await?;
    // All at once: there is no time to start one between them.
    let launched = (0..WARM + 3).map(|_| host.launch("")).collect::<Result<Vec<_>, _>>()?;
    let mut pids = Vec::new();
    for launched in &launched {
        launched.lifecycle.stop().await?;
    }
    for guest in host.list().await? {
        pids.push(guest.pid);
    }
    expect("guests", pids.len(), WARM + 3)?;
    expect("guests in ready VMMs", pids.iter().filter(|pid| idle.contains(pid)).count(), WARM)?;
    ready(&stage.service, &pids).await?;
    Ok(())
}

async fn a_killed_one_is_replaced() -> Story {
    let stage = stage(Kind::Scripted)?;
    for round in 0..4 {
        let idle = ready(&stage.service, &[]).await?;
        let killed = *idle.first().context("a ready one")?;
        signal(killed, Signal::KILL)?;
        gone(killed).await?;
        // Whether or not the service has noticed.
        let player = stage.launch(&format!("guest-{round}")).await?;
        ensure!(player.pid().await? != killed, "a dead VMM was taken");
        live(&stage, &player).await?;
        let pid = player.pid().await?;
        let after = ready(&stage.service, &[pid]).await?;
        ensure!(!after.contains(&killed), "{after:?}");
        drop(player);
        gone(pid).await?;
    }
    says(&stage.service.log(), "a VMM has ended before a guest was launched in it")
}

async fn all_killed_fail_no_launch() -> Story {
    let stage = stage(Kind::Scripted)?;
    let idle = ready(&stage.service, &[]).await?;
    let host = stage.service.connect().await?;
    host.info().await?;
    // The service learns of the ends and of the launch at once.
    stage.service.process().signal(Signal::STOP);
    for &pid in &idle {
        signal(pid, Signal::KILL)?;
    }
    for &pid in &idle {
        gone(pid).await?;
    }
    let launched = host.launch("guest")?;
    // Whatever can be sent without an answer is sent by then.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    stage.service.process().signal(Signal::CONT);
    launched.lifecycle.stop().await?;
    let guests: Vec<u32> = host.list().await?.iter().map(|guest| guest.pid).collect();
    let after = ready(&stage.service, &guests).await?;
    ensure!(after.is_disjoint(&idle), "{after:?}");
    Ok(())
}

/// A script in place of guest-vmm.
pub fn script(contents: &str) -> anyhow::Result<(TempDir, String)> {
    let folder = TempDir::new()?;
    let file = folder.path().join("guest-vmm");
    std::fs::write(&file, format!("#!/bin/sh\n{contents}\n"))?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
    let name = file.to_str().context("a plain name")?.to_owned();
    Ok((folder, name))
}

async fn a_vmm_that_cannot_start() -> Story {
    let (folder, file) = script("echo started >> \"$0.starts\"\necho these were its last words >&2\nexit 7")?;
    let begin = std::time::Instant::now();
    let service = Service::start_warm("scripted", u32::try_from(WARM)?, &["--vmm", &file])?;
    service.process().logged("a VMM has ended before a guest was launched in it", PATIENCE)?;
    let host = service.connect().await?;
    for _ in 0..3 {
        let exit = host.launch_proxied("").exit.terminated().await?;
        expect("outcome", exit.outcome, Outcome::Crashed)?;
        says(&exit.detail, "status 7")?;
        says(&exit.log, "these were its last words")?;
    }
    expect("ready", host.info().await?.warm, 0)?;
    // Each pause is twice the one before, so that the time bounds their number: one after 20 ms, two after 60 and so on.
    let starts =
        || std::fs::read_to_string(folder.path().join("guest-vmm.starts")).map(|all| all.lines().count());
    wait::until("the sixth attempt", PATIENCE, || starts().is_ok_and(|starts| starts >= 3 + 6))?;
    let attempts = starts()? - 3;
    let pauses = (begin.elapsed().as_millis() / 20 + 1).ilog2() as usize;
    ensure!(attempts <= 1 + pauses, "{attempts} attempts within {:?}", begin.elapsed());
    expect("status", service.terminate()?.code(), Some(0))
}

async fn vmms_that_can_be_started_later() -> Story {
    let vmm = program("guest-vmm")?;
    let (folder, file) =
        script(&format!("test -e \"$0.allowed\" || exit 1\nexec '{}' \"$@\"", vmm.display()))?;
    let service = Service::start_warm("scripted", u32::try_from(WARM)?, &["--vmm", &file])?;
    service.process().logged("a VMM has ended before a guest was launched in it", PATIENCE)?;
    std::fs::write(folder.path().join("guest-vmm.allowed"), "")?;
    ready(&service, &[]).await?;
    Ok(())
}

async fn ready_vmms_are_no_guests() -> Story {
    let service = Service::start_warm("scripted", u32::try_from(WARM)?, &[])?;
    ready(&service, &[]).await?;
    let host: Host = service.connect().await?;
    expect("guests", host.list().await?.len(), 0)?;
    expect("guests that are counted", host.info().await?.guests, 0)?;
    // Nobody finds one: the empty id begins the ids of all guests.
    ensure!(host.find("").await.is_err(), "a guest was found");
    Ok(())
}

/// The service has ended with status 0, and these have been reaped.
fn ended_well(service: &Service, pids: &BTreeSet<u32>) -> Story {
    expect("status", service.process().wait(PATIENCE)?.code(), Some(0))?;
    let left: Vec<&u32> = pids.iter().filter(|pid| census::runs(**pid)).collect();
    ensure!(left.is_empty(), "{left:?} still run");
    ensure!(!service.log().contains("panicked"), "{}", service.log());
    Ok(())
}

async fn a_signal_leaves_none(signal: Signal) -> Story {
    let stage = stage(Kind::Scripted)?;
    ready(&stage.service, &[]).await?;
    let player = stage.launch("guest").await?;
    let pid = player.pid().await?;
    let mut pids = ready(&stage.service, &[pid]).await?;
    pids.insert(pid);
    stage.service.process().signal(signal);
    ended_well(&stage.service, &pids)
}

async fn a_killed_service_leaves_none() -> Story {
    let stage = stage(Kind::Scripted)?;
    let idle = ready(&stage.service, &[]).await?;
    stage.service.process().kill();
    for pid in idle {
        gone(pid).await?;
    }
    Ok(())
}

async fn a_stopped_one_is_killed() -> Story {
    let stage = stage(Kind::Scripted)?;
    let idle = ready(&stage.service, &[]).await?;
    for &pid in &idle {
        signal(pid, Signal::STOP)?;
    }
    stage.service.process().signal(Signal::TERM);
    ended_well(&stage.service, &idle)
}

async fn none_are_kept() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let player = stage.launch("guest").await?;
    live(&stage, &player).await?;
    expect("processes", census::children(stage.service.pid())?, vec![player.pid().await?])?;
    expect("ready", player.host.info().await?.warm, 0)
}
