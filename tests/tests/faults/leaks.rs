//! Round after round: what the service and a VMM hold afterwards is what they held before.

use anyhow::{Context, ensure};
use guest_client::Host;
use guest_schema::{CpuidMask, GuestConfig, GuestError, Outcome};
use guest_tests::requirements::{Requirement, scaled, trial};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Channel, Kind, Player, Stage, Story, expect, play, refusal, refused, says};
use guest_tests::{census, wait};
use libtest_mimic::Trial;

/// How many lives there are before anything is counted: allocators and pools fill.
const WARM_UP: u32 = 24;
const LIVES: u32 = 200;
const CREATES: u32 = 100;

/// How much the service's memory may grow over all rounds, in bytes.
const GROWTH: u64 = 2 << 20;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("two_hundred_lives_leave_nothing", &[], || play(lives_leave_nothing())),
        trial("creates_within_a_lease_leave_nothing::scripted", &[], || {
            play(creates_leave_nothing(Kind::Scripted))
        }),
        trial("creates_within_a_lease_leave_nothing::builtin", &[Requirement::Kvm], || {
            play(creates_leave_nothing(Kind::BuiltIn))
        }),
        trial("runs_that_cannot_start_leave_nothing::scripted", &[], || {
            play(failed_starts_leave_nothing(Kind::Scripted))
        }),
        trial("runs_that_cannot_start_leave_nothing::kvm", &[Requirement::Kvm], || {
            play(failed_starts_leave_nothing(Kind::BuiltIn))
        }),
    ]
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holding {
    threads: usize,
    files: usize,
    bytes: u64,
}

impl Holding {
    fn of(pid: u32) -> std::io::Result<Self> {
        let (threads, files) = (census::threads(pid)?, census::open_files(pid)?);
        Ok(Self { threads, files, bytes: census::resident_bytes(pid)? })
    }
}

/// Waits until a process holds no more than before, but for some memory.
async fn back_to(what: &str, pid: u32, before: Holding) -> Story {
    let look = || async {
        let now = Holding::of(pid).map_err(|error| error.to_string())?;
        let less = now.threads <= before.threads && now.files <= before.files;
        if less && now.bytes <= before.bytes + GROWTH {
            Ok(now)
        } else {
            Err(format!("{now:?} after {before:?}"))
        }
    };
    let now = wait::found_async(&format!("{what} to hold what it held"), PATIENCE, look).await?;
    let grown = now.bytes.cast_signed() - before.bytes.cast_signed();
    println!("{what}: {before:?}, then {now:?}; {} KiB more", grown / 1024);
    Ok(())
}

async fn lives_leave_nothing() -> Story {
    let mut stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let watching = stage.service.connect().await?;
    let pid = stage.service.pid();
    live(&mut stage, &watching, WARM_UP).await?;
    nobody_left(&watching, pid).await?;
    let before = Holding::of(pid)?;
    live(&mut stage, &watching, scaled(LIVES)).await?;
    nobody_left(&watching, pid).await?;
    back_to("guestd", pid, before).await?;
    ensure!(!stage.service.log().contains("panicked"), "{}", stage.service.log());
    Ok(())
}

/// The service knows of no guest, and has no process left.
async fn nobody_left(host: &Host, pid: u32) -> Story {
    let look = || async {
        let guests = host.list().await.map_err(|error| error.to_string())?;
        let processes = census::children(pid).map_err(|error| error.to_string())?;
        if guests.is_empty() && processes.is_empty() {
            Ok(())
        } else {
            Err(format!("{guests:?}, {processes:?}"))
        }
    };
    Ok(wait::found_async("all guests to be gone", PATIENCE, look).await?)
}

/// Lives of every kind, in turns, direct and proxied.
async fn live(stage: &mut Stage, watching: &Host, rounds: u32) -> Story {
    for round in 0..rounds {
        stage.channel = if round % 2 == 0 { Channel::Direct } else { Channel::Proxied };
        let player = stage.launch("").await?;
        let found = watching.find(&player.id).await?;
        match round / 2 % 5 {
            0 => power_off(&player).await?,
            1 => stop(&player).await?,
            2 => fail_to_create(&player).await?,
            3 => crash(&player).await?,
            _ => be_killed(&player).await?,
        }
        drop(player);
        found.exit.terminated().await.with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

async fn power_off(player: &Player) -> Story {
    let running = player.play(Act::PowerOff).await?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn stop(player: &Player) -> Story {
    let running = player.play(Act::Spin).await?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn fail_to_create(player: &Player) -> Story {
    let created = player.lifecycle.create(&player.config_of(b"no kernel at all")?).await;
    expect("create", refusal(created)?, GuestError::KernelLoadFailure)
}

async fn crash(player: &Player) -> Story {
    let running = player.play(Act::Crash).await?;
    player.cue(&running, Act::Crash).await?;
    expect("run", refusal(running.run.await)?, GuestError::VcpuRuntimeFailure)
}

async fn be_killed(player: &Player) -> Story {
    let running = player.play(Act::Spin).await?;
    let pid = rustix::process::Pid::from_raw(player.pid().await?.cast_signed()).context("a process")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    expect("run fails", running.run.await.is_err(), true)?;
    expect("exit", player.exit.terminated().await?.outcome, Outcome::Crashed)
}

async fn creates_leave_nothing(kind: Kind) -> Story {
    let stage = Stage::set(kind, Channel::Direct, "")?;
    let player = stage.launch("").await?;
    let pid = player.pid().await?;
    create_over_and_over(&player, WARM_UP).await?;
    let before = Holding::of(pid)?;
    create_over_and_over(&player, scaled(CREATES)).await?;
    back_to(&format!("guest-vmm with {} guests", kind.name()), pid, before).await
}

async fn create_over_and_over(player: &Player, rounds: u32) -> Story {
    for round in 0..rounds {
        match round % 4 {
            0 => stop(player).await?,
            1 => power_off(player).await?,
            2 => fail_to_create(player).await?,
            _ => player.lifecycle.create(&player.config(Act::Spin)?).await?,
        }
    }
    Ok(player.lifecycle.stop().await?)
}

async fn failed_starts_leave_nothing(kind: Kind) -> Story {
    let faults = if kind == Kind::Scripted { ",fail-start=0" } else { "" };
    let stage = Stage::set(kind, Channel::Direct, faults)?;
    let player = stage.launch("").await?;
    let pid = player.pid().await?;
    fail_to_start(&player, kind, WARM_UP).await?;
    let before = Holding::of(pid)?;
    fail_to_start(&player, kind, scaled(CREATES)).await?;
    back_to(&format!("guest-vmm with VPs that cannot start, {}", kind.name()), pid, before).await?;
    if kind == Kind::BuiltIn {
        power_off(&player).await?;
    }
    Ok(())
}

/// Creates guests of eight VPs whose first cannot be started. Each but the first shows that a create may follow.
async fn fail_to_start(player: &Player, kind: Kind, rounds: u32) -> Story {
    let pid = player.pid().await?;
    for _ in 0..rounds {
        let config = if kind == Kind::Scripted { player.config(Act::Spin)? } else { unstartable(player)? };
        player.lifecycle.create(&GuestConfig { cpus: 8, ..config }).await?;
        let vps = census::thread_affinities(pid)?.into_keys().filter(|name| name.starts_with("vp-")).count();
        expect("the threads of VPs", vps, 8)?;
        let (code, detail) = refused(player.lifecycle.run().await)?;
        expect(&detail, code, GuestError::VcpuStartFailure)?;
        says(&detail, "VP 0")?;
        let ended = || async {
            census::thread_affinities(pid).is_ok_and(|all| !all.keys().any(|name| name.starts_with("vp-")))
        };
        wait::until_async("the threads of VPs to end", PATIENCE, ended).await?;
        expect("run again", refusal(player.lifecycle.run().await)?, GuestError::NotCreated)?;
    }
    Ok(())
}

/// A guest that KVM does not let start: a kernel without a PVH note begins in long mode, which needs page tables, and these lie
/// where a CPU without physical address bits has no memory.
fn unstartable(player: &Player) -> anyhow::Result<GuestConfig> {
    const PROGRAM_HEADERS: usize = 64;
    const PROGRAM_HEADER_BYTES: usize = 56;
    const PT_NOTE: [u8; 4] = [4, 0, 0, 0];
    let mut kernel = Kind::BuiltIn.image(Act::Spin);
    let mut headers = kernel[PROGRAM_HEADERS..].chunks_exact_mut(PROGRAM_HEADER_BYTES);
    let note = headers.find(|header| header[..4] == PT_NOTE).context("a note")?;
    note[..4].fill(0);
    let physical_address_bits = CpuidMask { leaf: 0x8000_0008, eax: 0xff, ..CpuidMask::default() };
    Ok(GuestConfig { cpuid_mask: vec![physical_address_bits], ..player.config_of(&kernel)? })
}
