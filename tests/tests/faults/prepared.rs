//! VMMs that are kept ready have a guest's memory, partition and VPs made ahead: for guests like the last, at no cost for the others.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use guest_schema::{GuestConfig, MemoryConfig};
use guest_tests::requirements::{Requirement, trial};
use guest_tests::service::{PATIENCE, Service, program};
use guest_tests::stage::{Act, Channel, Kind, Player, Stage, Story, expect, gone, play, says};
use guest_tests::wait;
use libtest_mimic::Trial;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::warm::{WARM, live, ready, script, signal};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("guests_like_the_last_are_prepared_scripted", &[], || {
            play(guests_are_prepared(Kind::Scripted))
        }),
        trial("guests_like_the_last_are_prepared_on_kvm", &[Requirement::Kvm], || {
            play(guests_are_prepared(Kind::BuiltIn))
        }),
        trial("a_guest_unlike_the_last_is_made_anew", &[], || play(an_unlike_guest())),
        trial("a_second_guest_of_a_lease_is_made_anew", &[], || play(a_second_guest_of_a_lease())),
        trial("a_fork_finds_its_guest_prepared", &[Requirement::Kvm], || play(a_fork(Kind::BuiltIn))),
        trial("a_scripted_fork_finds_its_guest_prepared", &[], || play(a_fork(Kind::Scripted))),
        trial("a_prepared_vmm_that_is_killed_is_replaced", &[], || play(a_killed_one())),
        trial("guests_that_cannot_be_prepared_keep_none_from_being_launched", &[], || play(unpreparable())),
        trial("guests_that_take_memory_at_once_are_not_prepared", &[], || play(dear_guests())),
        trial("prepared_guests_take_no_memory", &[Requirement::Kvm], || {
            play(prepared_guests_take_no_memory())
        }),
    ]
}

/// What a VMM logs that has found its guest prepared, or another.
const FOUND: &str = "memory, partition and VPs were made ahead fits=true";
const UNLIKE: &str = "memory, partition and VPs were made ahead fits=false";

fn stage(kind: Kind) -> anyhow::Result<Stage> {
    let folder = TempDir::new()?;
    let config = folder.path().join("guestd.toml");
    std::fs::write(&config, "vmm-log = \"debug\"\n")?;
    // It is read by the time that the service listens.
    let arguments = ["--config", config.to_str().context("a plain name")?];
    let service = Service::start_warm(kind.hypervisor(), u32::try_from(WARM)?, &arguments)?;
    Ok(Stage { kind, channel: Channel::Direct, service })
}

/// Waits until all VMMs have a guest prepared, and there is no process but them and these guests'; gives the ready ones.
async fn prepared(service: &Service, guests: &[u32]) -> anyhow::Result<BTreeSet<u32>> {
    let host = service.connect().await?;
    let look = || async { host.info().await.is_ok_and(|info| info.prepared as usize == WARM) };
    wait::until_async("guests to be prepared", PATIENCE, look).await?;
    ready(service, guests).await
}

/// Has a guest run, so that the service knows what to prepare; gives its process, which is there until the player goes.
async fn first(stage: &Stage) -> anyhow::Result<(Player, u32)> {
    ready(&stage.service, &[]).await?;
    expect("prepared", stage.service.connect().await?.info().await?.prepared, 0)?;
    let player = stage.launch("first").await?;
    live(stage, &player).await?;
    let pid = player.pid().await?;
    Ok((player, pid))
}

/// What the VMM of a guest has logged so.
fn count(stage: &Stage, id: &str, words: &str) -> usize {
    let guest = format!("guest=\"{id}\"");
    stage.service.log().lines().filter(|line| line.contains(&guest) && line.contains(words)).count()
}

/// Waits until the VMM of a guest has logged so.
async fn logged(stage: &Stage, id: &str, words: &str) -> Story {
    let look = || async { count(stage, id, words) > 0 };
    wait::until_async(words, PATIENCE, look).await.with_context(|| stage.service.log())?;
    Ok(())
}

async fn guests_are_prepared(kind: Kind) -> Story {
    let stage = stage(kind)?;
    let (_first, mut pid) = first(&stage).await?;
    let mut pids = vec![pid];
    let mut players = Vec::new();
    for round in 0..3 {
        let idle = prepared(&stage.service, &pids).await?;
        let player = stage.launch(&format!("guest-{round}")).await?;
        pid = player.pid().await?;
        ensure!(idle.contains(&pid), "{pid} is none of {idle:?}");
        let running = player.play(Act::Reset).await?;
        logged(&stage, &player.id, FOUND).await?;
        says(&stage.service.log(), "warm=true prepared=true")?;
        drop(running);
        pids.push(pid);
        players.push(player);
    }
    expect("the first guest found one", count(&stage, "first", FOUND), 0)
}

async fn an_unlike_guest() -> Story {
    let stage = stage(Kind::Scripted)?;
    let (_first, pid) = first(&stage).await?;
    prepared(&stage.service, &[pid]).await?;
    let unlike = stage.launch("unlike").await?;
    let config = GuestConfig { cpus: 2, ..unlike.config(Act::PowerOff)? };
    let running = unlike.play_config(&config).await?;
    unlike.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    logged(&stage, "unlike", UNLIKE).await?;
    // Guests of either kind find theirs from now on: there is one of each.
    let pids = [pid, unlike.pid().await?];
    prepared(&stage.service, &pids).await?;
    let alike = stage.launch("alike").await?;
    alike.play_config(&GuestConfig { cpus: 2, ..alike.config(Act::Spin)? }).await?;
    logged(&stage, "alike", FOUND).await
}

async fn a_second_guest_of_a_lease() -> Story {
    let stage = stage(Kind::Scripted)?;
    let (_first, pid) = first(&stage).await?;
    prepared(&stage.service, &[pid]).await?;
    let player = stage.launch("guest").await?;
    live(&stage, &player).await?;
    let running = player.play(Act::PowerOff).await?;
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    logged(&stage, "guest", FOUND).await?;
    expect("guests that found one", count(&stage, "guest", FOUND), 1)
}

async fn a_fork(kind: Kind) -> Story {
    let stage = stage(kind)?;
    let (parent, pid) = first(&stage).await?;
    let running = parent.play(Act::PowerOff).await?;
    let snapshot = parent.lifecycle.control().snapshot().await?;
    prepared(&stage.service, &[pid]).await?;
    let fork = stage.launch_from(&snapshot, &parent.host, "fork").await?;
    let goes_on = fork.run_config(&GuestConfig::new(None, 0)).await?;
    fork.cue(&goes_on, Act::PowerOff).await?;
    goes_on.run.await?;
    logged(&stage, "fork", FOUND).await?;
    parent.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn a_killed_one() -> Story {
    let stage = stage(Kind::Scripted)?;
    let (_first, pid) = first(&stage).await?;
    let idle = prepared(&stage.service, &[pid]).await?;
    for &idle in &idle {
        signal(idle, Signal::KILL)?;
        gone(idle).await?;
    }
    let after = prepared(&stage.service, &[pid]).await?;
    ensure!(after.is_disjoint(&idle), "{after:?}");
    let player = stage.launch("guest").await?;
    live(&stage, &player).await?;
    logged(&stage, "guest", FOUND).await
}

async fn unpreparable() -> Story {
    let vmm = program("guest-vmm")?;
    let (folder, file) = script(&format!(
        "test -e \"$0.broken\" && set -- --hypervisor scripted,fail-bind=1 --log debug\nexec '{}' \"$@\"",
        vmm.display()
    ))?;
    let service = Service::start_warm("scripted", u32::try_from(WARM)?, &["--vmm", &file])?;
    let stage = Stage { kind: Kind::Scripted, channel: Channel::Direct, service };
    ready(&stage.service, &[]).await?;
    // From now on no VMM that is started can bind a second VP.
    std::fs::write(folder.path().join("guest-vmm.broken"), "")?;
    let first = stage.launch("first").await?;
    let config = GuestConfig { cpus: 2, ..first.config(Act::Spin)? };
    let _running = first.play_config(&config).await?;
    stage.service.process().logged("a VMM cannot prepare a guest", PATIENCE)?;
    let mut pids = vec![first.pid().await?];
    let mut players = Vec::new();
    for number in 0..WARM {
        ready(&stage.service, &pids).await?;
        let player = stage.launch(&format!("guest-{number}")).await?;
        live(&stage, &player).await?;
        pids.push(player.pid().await?);
        players.push(player);
    }
    Ok(())
}

async fn dear_guests() -> Story {
    let stage = stage(Kind::Scripted)?;
    ready(&stage.service, &[]).await?;
    let dear = stage.launch("dear").await?;
    let config = dear.config(Act::Spin)?;
    let memory = MemoryConfig { prefault: true, ..config.memory };
    let _running = dear.play_config(&GuestConfig { memory, ..config }).await?;
    let mut pids = vec![dear.pid().await?];
    // What is prepared after it is the next one's, not its.
    let player = stage.launch("ordinary").await?;
    live(&stage, &player).await?;
    pids.push(player.pid().await?);
    expect("guests that found one", count(&stage, "ordinary", UNLIKE), 0)?;
    prepared(&stage.service, &pids).await?;
    let alike = stage.launch("alike").await?;
    live(&stage, &alike).await?;
    logged(&stage, "alike", FOUND).await
}

/// What a process has of guests' memory, in KiB, or `None` if it has none mapped.
fn guest_memory(pid: u32) -> anyhow::Result<Option<u64>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut found, mut is_guest) = (None, false);
    for line in maps.lines() {
        if let Some(value) = line.strip_prefix("Rss:").filter(|_| is_guest) {
            found = Some(found.unwrap_or(0) + value.trim().trim_end_matches(" kB").parse::<u64>()?);
            is_guest = false;
        }
        is_guest |= line.contains("/memfd:guest-memory");
    }
    Ok(found)
}

async fn prepared_guests_take_no_memory() -> Story {
    let stage = stage(Kind::BuiltIn)?;
    ready(&stage.service, &[]).await?;
    let player = stage.launch("large").await?;
    let config = GuestConfig { memory: MemoryConfig::of_bytes(1 << 30), ..player.config(Act::Spin)? };
    let _running = player.play_config(&config).await?;
    for pid in prepared(&stage.service, &[player.pid().await?]).await? {
        expect("the guest memory of a prepared VMM, in KiB", guest_memory(pid)?, Some(0))?;
    }
    Ok(())
}
