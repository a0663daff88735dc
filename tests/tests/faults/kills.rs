//! kill -9 of each of the three processes, and what the other two make of it.

use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use guest_client::{ClientError, GuestInfo};
use guest_schema::{GuestError, Outcome, Phase};
use guest_tests::process::{Process, Stdin};
use guest_tests::requirements::trial;
use guest_tests::service::{PATIENCE, Service, program};
use guest_tests::stage::{Act, Channel, Kind, Player, Running, Stage, Story, expect, gone, play, says};
use guest_tests::wait;
use libtest_mimic::Trial;
use tempfile::NamedTempFile;

pub fn trials() -> Vec<Trial> {
    let killed_client = |channel| move || play(a_killed_client_takes_its_guest_along(channel));
    let killed_vmm = |channel| move || play(a_killed_vmm_is_told_to_all_who_wait(channel));
    vec![
        trial("a_killed_client_takes_its_guest_along::direct", &[], killed_client(Channel::Direct)),
        trial("a_killed_client_takes_its_guest_along::proxied", &[], killed_client(Channel::Proxied)),
        trial("a_killed_vmm_is_told_to_all_who_wait::direct", &[], killed_vmm(Channel::Direct)),
        trial("a_killed_vmm_is_told_to_all_who_wait::proxied", &[], killed_vmm(Channel::Proxied)),
        trial("a_guest_outlives_a_killed_service", &[], || play(a_guest_outlives_a_killed_service())),
        trial("an_orphaned_guest_ends_with_its_lease", &[], || play(an_orphaned_guest_ends_with_its_lease())),
        trial("a_proxied_guest_ends_with_its_service", &[], || play(a_proxied_guest_ends_with_its_service())),
    ]
}

/// A `guestctl run` of a guest that runs until it is ended.
pub(super) fn guestctl_run(
    service: &Service,
    channel: Channel,
    id: &str,
) -> anyhow::Result<(Process, NamedTempFile)> {
    let kernel = NamedTempFile::new()?;
    std::fs::write(kernel.path(), Kind::Scripted.image(Act::Spin))?;
    let mut command = Command::new(program("guestctl")?);
    command.arg("--socket").arg(service.socket()).args(["run", "--name", id, "--no-stdin", "--kernel"]);
    command.arg(kernel.path());
    if channel == Channel::Proxied {
        command.arg("--proxied");
    }
    let client = Process::spawn(command, Stdin::Empty)?;
    client.stdout().contains("READY", PATIENCE)?;
    Ok((client, kernel))
}

async fn listed(service: &Service) -> anyhow::Result<Vec<GuestInfo>> {
    Ok(service.connect().await?.list().await?)
}

/// Waits until the service knows of these guests and no others.
async fn only(service: &Service, ids: &[&str]) -> anyhow::Result<Vec<GuestInfo>> {
    let host = service.connect().await?;
    let look = || async {
        let guests = host.list().await.map_err(|error| error.to_string())?;
        let found: Vec<&str> = guests.iter().map(|guest| &guest.id[..]).collect();
        if found == ids { Ok(guests) } else { Err(format!("{found:?}")) }
    };
    Ok(wait::found_async(&format!("the service to know {ids:?}"), PATIENCE, look).await?)
}

async fn a_killed_client_takes_its_guest_along(channel: Channel) -> Story {
    let service = Service::start("scripted", &[])?;
    let (doomed, _kernel) = guestctl_run(&service, channel, "doomed")?;
    let (_other, _kernel) = guestctl_run(&service, channel, "other")?;
    let pid = only(&service, &["doomed", "other"]).await?[0].pid;
    let told = service.connect().await?.find("doomed").await?.exit;
    doomed.kill();
    gone(pid).await?;
    expect("how it ended", told.terminated().await?.outcome, Outcome::Forced)?;
    let left = only(&service, &["other"]).await?;
    expect("the other guest", left[0].phase, Phase::Running)
}

async fn a_killed_vmm_is_told_to_all_who_wait(channel: Channel) -> Story {
    let stage = Stage::set(Kind::Scripted, channel, "")?;
    let player = stage.launch("doomed").await?;
    let running = player.play(Act::Spin).await?;
    let held = player.exit.clone();
    let waiters = [held.terminated(), held.terminated(), player.host.find("doomed").await?.exit.terminated()];
    kill(player.pid().await?)?;
    let run = running.run.await;
    anyhow::ensure!(matches!(run, Err(ClientError::Lost(_))), "run: {run:?}");
    for waiter in waiters {
        let exit = waiter.await?;
        expect("exit", (exit.outcome, exit.code), (Outcome::Crashed, Some(GuestError::InternalError)))?;
        says(&exit.detail, "signal 9")?;
        says(&exit.log, "attached")?;
    }
    only(&stage.service, &[]).await?;
    a_whole_life(&stage, "doomed").await
}

/// The service goes on: a guest with the same id can be launched, run and ended.
async fn a_whole_life(stage: &Stage, id: &str) -> Story {
    let player = stage.launch(id).await?;
    let running = player.play(Act::PowerOff).await?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

fn kill(pid: u32) -> Story {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).context("a process")?;
    Ok(rustix::process::kill_process(pid, rustix::process::Signal::KILL)?)
}

/// A guest on a channel of its own, whose service is killed.
async fn orphan(stage: &Stage) -> anyhow::Result<(Player, Running, u32)> {
    let player = stage.launch("orphan").await?;
    let running = player.play(Act::PowerOff).await?;
    let pid = player.pid().await?;
    stage.service.process().kill();
    stage.service.process().wait(PATIENCE)?;
    Ok((player, running, pid))
}

async fn a_guest_outlives_a_killed_service() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let (player, running, pid) = orphan(&stage).await?;
    let exit = player.exit.terminated().await;
    anyhow::ensure!(matches!(exit, Err(ClientError::Lost(_))), "the service's word: {exit:?}");
    expect("phase", running.guest.observer().state().await?.phase, Phase::Running)?;
    // It still reads its serial port, and acts on it.
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    // The lease is good for further guests, and for stopping them.
    let next = player.play(Act::Spin).await?;
    player.lifecycle.stop().await?;
    expect("the next run", next.guest.terminated().await?.outcome, Outcome::Forced)?;
    drop(player);
    gone(pid).await
}

async fn an_orphaned_guest_ends_with_its_lease() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let (player, running, pid) = orphan(&stage).await?;
    drop((player, running));
    gone(pid).await
}

async fn a_proxied_guest_ends_with_its_service() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Proxied, "")?;
    let (_player, running, pid) = orphan(&stage).await?;
    gone(pid).await?;
    let run = tokio::time::timeout(Duration::from_secs(10), running.run).await?;
    anyhow::ensure!(matches!(run, Err(ClientError::Lost(_))), "run: {run:?}");
    expect("guests", listed(&stage.service).await.is_err(), true)
}
