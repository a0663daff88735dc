//! Snapshots of guests, and guests that go on from them: what each has, what none sees of another, and who outlives whom.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::ensure;
use guest_client::{Host, Phase, Snapshot};
use guest_schema::{BlockConfig, BlockMode, DevicesConfig, GuestConfig, GuestError, Outcome};
use guest_tests::driver::{Buffer, ScriptedDriver};
use guest_tests::process::{Process, Stdin};
use guest_tests::service::{PATIENCE, program};
use guest_tests::stage::{Act, Player, Running, Stage, Story, expect, refusal, refused, says, sealed_file};
use guest_tests::{census, wait};
use processor::scripted::Script;
use rustix::process::{Pid, Signal};

const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
/// Memory that no script uses.
const PLACE: u64 = 4 << 20;
const SECTOR: u32 = 512;

/// A guest that goes on from a snapshot, and its VMM.
struct Fork {
    player: Player,
    running: Running,
}

/// Grants for a guest without disks and networks.
fn no_grants() -> GuestConfig {
    GuestConfig::new(None, 0)
}

fn disk_granted(disk: BlockConfig) -> GuestConfig {
    GuestConfig { devices: DevicesConfig { block: vec![disk], ..DevicesConfig::default() }, ..no_grants() }
}

/// Takes a snapshot of a player's guest.
async fn snapshot(player: &Player) -> anyhow::Result<Snapshot> {
    Ok(player.lifecycle.control().snapshot().await?)
}

async fn fork(stage: &Stage, host: &Host, snapshot: &Snapshot, id: &str) -> anyhow::Result<Fork> {
    let player = stage.launch_from(snapshot, host, id).await?;
    let running = player.run_config(&no_grants()).await?;
    Ok(Fork { player, running })
}

/// Gives a guest its cue to power off, and waits until it has ended cleanly.
async fn ends(player: &Player, running: Running) -> Story {
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    expect(&format!("outcome of {}", player.id), running.guest.terminated().await?.outcome, Outcome::Clean)
}

impl Fork {
    /// The same, of a fork, which has not been booted.
    async fn ends(self) -> Story {
        let console = self.running.console.clone();
        ends(&self.player, self.running).await?;
        expect("it has booted", console.whole().await?.contains("READY"), false)
    }
}

async fn phase(player: &Player) -> anyhow::Result<Phase> {
    Ok(player.lifecycle.control().observer().state().await?.phase)
}

pub async fn a_fork_goes_on_where_its_parent_was(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let running = parent.play(Act::PowerOff).await?;
    let snapshot = snapshot(&parent).await?;
    expect("the parent", phase(&parent).await?, Phase::Running)?;
    let fork = fork(&stage, &parent.host, &snapshot, "fork").await?;
    expect("the fork", phase(&fork.player).await?, Phase::Running)?;
    expect("its id", &fork.player.id[..], "fork")?;
    fork.ends().await?;
    expect("the parent after its fork's end", phase(&parent).await?, Phase::Running)?;
    ends(&parent, running).await
}

pub async fn a_snapshot_tells_what_it_has(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let _running = parent.play(Act::Spin).await?;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_micros());
    let before = now()?;
    let info = snapshot(&parent).await?.info().await?;
    let taken = u128::from(info.taken_at_us);
    ensure!((before..=now()?).contains(&taken), "taken at {taken} µs, after {before} µs");
    expect("memory and VPs", (info.memory_bytes, info.vps), (16 << 20, 1))?;
    expect("parent", &info.parent[..], "parent")?;
    expect("disks and networks", (info.disks.len(), info.networks), (0, 0))?;
    for unit in ["vps", "partition", "memory"] {
        ensure!(info.units.iter().any(|saved| saved == unit), "{unit} is not in {:?}", info.units);
    }
    Ok(())
}

pub async fn a_paused_guest_stays_paused_and_its_fork_runs(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let running = parent.play(Act::PowerOff).await?;
    parent.lifecycle.control().pause().await?;
    let snapshot = snapshot(&parent).await?;
    expect("the parent", phase(&parent).await?, Phase::Paused)?;
    let fork = fork(&stage, &parent.host, &snapshot, "fork").await?;
    fork.ends().await?;
    expect("the parent after its fork's end", phase(&parent).await?, Phase::Paused)?;
    parent.lifecycle.control().resume().await?;
    ends(&parent, running).await
}

pub async fn a_fork_lives_on_after_its_parent(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let running = parent.play(Act::Spin).await?;
    let snapshot = snapshot(&parent).await?;
    let first = fork(&stage, &parent.host, &snapshot, "first").await?;
    let Player { lifecycle, exit, host, .. } = parent;
    drop((lifecycle, running));
    expect("the parent", exit.terminated().await?.outcome, Outcome::Forced)?;
    expect("the first fork", phase(&first.player).await?, Phase::Running)?;
    // Another, after the guest that it is of.
    let second = fork(&stage, &host, &snapshot, "second").await?;
    drop(snapshot);
    expect("the second fork", phase(&second.player).await?, Phase::Running)
}

pub async fn a_snapshot_outlives_a_vmm_that_is_killed(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let _running = parent.play(Act::PowerOff).await?;
    let snapshot = snapshot(&parent).await?;
    let pid = Pid::from_raw(parent.pid().await?.cast_signed()).expect("no process is 0");
    rustix::process::kill_process(pid, Signal::KILL)?;
    expect("the parent", parent.exit.terminated().await?.outcome, Outcome::Crashed)?;
    fork(&stage, &parent.host, &snapshot, "fork").await?.ends().await
}

pub async fn ten_forks_go_on_at_once(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let running = parent.play(Act::PowerOff).await?;
    let snapshot = snapshot(&parent).await?;
    let mut forks = Vec::new();
    for number in 0..10 {
        forks.push(fork(&stage, &parent.host, &snapshot, &format!("fork-{number}")).await?);
    }
    let list = parent.host.list().await?;
    let running_now = list.iter().filter(|guest| guest.phase == Phase::Running).count();
    expect("guests that run", running_now, 11)?;
    for fork in forks {
        fork.ends().await?;
    }
    ends(&parent, running).await
}

pub async fn a_fork_of_a_fork_goes_on(stage: Stage) -> Story {
    let parent = stage.launch("0").await?;
    let running = parent.play(Act::PowerOff).await?;
    let mut youngest = Fork { player: parent, running };
    for generation in 1..=4 {
        let snapshot = snapshot(&youngest.player).await?;
        let next = fork(&stage, &youngest.player.host, &snapshot, &generation.to_string()).await?;
        expect("parent", snapshot.info().await?.parent, youngest.player.id.clone())?;
        // Its parent and the snapshot end here.
        youngest = next;
    }
    youngest.ends().await
}

pub async fn a_forks_lease_begins_at_its_snapshot_again(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let running = parent.play(Act::PowerOff).await?;
    let snapshot = snapshot(&parent).await?;
    let fork = stage.launch_from(&snapshot, &parent.host, "fork").await?;
    drop(snapshot);
    ends(&parent, running).await?;
    for _ in 0..3 {
        let running = fork.run_config(&no_grants()).await?;
        ends(&fork, running).await?;
    }
    Ok(())
}

pub async fn a_guest_that_does_not_run_makes_no_snapshot(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let taken = parent.lifecycle.control().snapshot().await;
    expect("before create", refusal(taken)?, GuestError::NotCreated)?;
    parent.lifecycle.create(&parent.config(Act::PowerOff)?).await?;
    expect("before run", refusal(parent.lifecycle.control().snapshot().await)?, GuestError::NotRunning)?;
    let running = parent.play(Act::PowerOff).await?;
    let control = parent.lifecycle.control();
    control.opened().await?;
    ends(&parent, running).await?;
    expect("after the end", refusal(control.snapshot().await)?, GuestError::NotRunning)
}

pub async fn a_fork_brings_no_kernel(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let _running = parent.play(Act::PowerOff).await?;
    let snapshot = snapshot(&parent).await?;
    let fork = stage.launch_from(&snapshot, &parent.host, "fork").await?;
    let kernel = fork.lifecycle.file(sealed_file(b"any kernel")?);
    let (code, detail) = refused(fork.lifecycle.create(&GuestConfig::new(Some(kernel), 0)).await)?;
    expect("code", code, GuestError::BadConfig)?;
    says(&detail, "kernel")?;
    let running = fork.run_config(&no_grants()).await?;
    Fork { player: fork, running }.ends().await
}

/// A guest that tells what is in its memory at a place on each of two cues, and then writes there; the third one is to power off.
pub(super) fn writes_to_memory(place: u64) -> Vec<u8> {
    let mut script = Script::new();
    script.write(place, b"original").out(SERIAL, b"READY\n");
    for told in [&b"overdone"[..], b"finished"] {
        script.serial_input(SERIAL, 0x80).read_quad(place, SERIAL).write(place, told).out(SERIAL, b" TOLD\n");
    }
    script.serial_input(SERIAL, 0x80).out(SLEEP_CONTROL, &[0x34]).spin();
    script.to_elf()
}

pub async fn nobody_sees_what_another_writes(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let running = parent.play_config(&parent.config_of(&writes_to_memory(PLACE))?).await?;
    let snapshot = snapshot(&parent).await?;
    let first = fork(&stage, &parent.host, &snapshot, "first").await?;
    let second = fork(&stage, &parent.host, &snapshot, "second").await?;
    // Each finds what was there at the snapshot, whoever has written since; then its own.
    for words in ["original TOLD", "overdone TOLD"] {
        for running in [&first.running, &running, &second.running] {
            running.input.write(b"!").await?;
            running.console.saw(words).await?;
        }
    }
    let third = fork(&stage, &parent.host, &snapshot, "third").await?;
    third.running.input.write(b"!").await?;
    Ok(third.running.console.saw("original TOLD").await?)
}

fn sector(contents: &[u8; 8]) -> anyhow::Result<File> {
    let file = tempfile::tempfile()?;
    file.set_len(SECTOR.into())?;
    file.write_all_at(contents, 0)?;
    Ok(file)
}

/// A guest that drives its disk, and on each cue reads and tells the first bytes there and the request's status.
fn reads_its_disk() -> Vec<u8> {
    let mut script = Script::new();
    let mut driver = ScriptedDriver::set_up(&mut script, 1);
    script.out(SERIAL, b"READY\n");
    for _ in 0..2 {
        script.serial_input(SERIAL, 0x80);
        // VIRTIO_BLK_T_IN at sector 0 (5.2.6).
        let request = [Buffer::Out(&[0; 16]), Buffer::In(SECTOR), Buffer::In(1)];
        let places = driver.send(&mut script, 0, &request);
        script.hlt().read_quad(places[1], SERIAL).read_long(places[2], SERIAL).out(SERIAL, b"TOLD\n");
    }
    script.spin();
    script.to_elf()
}

/// A guest with a disk that has told what is on it.
async fn with_a_disk(stage: &Stage) -> anyhow::Result<(Player, Running)> {
    let parent = stage.launch("parent").await?;
    let image = parent.lifecycle.file(sector(b"parent's")?);
    let disk = BlockConfig { id: "root".into(), ..BlockConfig::raw(image, BlockMode::ReadWrite) };
    let devices = DevicesConfig { block: vec![disk], ..DevicesConfig::default() };
    let config = GuestConfig { devices, ..parent.config_of(&reads_its_disk())? };
    let running = parent.play_config(&config).await?;
    running.input.write(b"!").await?;
    running.console.saw("parent's\0\0\0\0TOLD").await?;
    Ok((parent, running))
}

pub async fn a_fork_reads_the_disk_that_it_is_granted(stage: Stage) -> Story {
    let (parent, running) = with_a_disk(&stage).await?;
    let snapshot = snapshot(&parent).await?;
    expect("disks", snapshot.info().await?.disks, vec!["root".to_owned()])?;
    for (mode, contents) in [(BlockMode::VolatileWrite, b"volatile"), (BlockMode::ReadWrite, b"writable")] {
        let fork = stage.launch_from(&snapshot, &parent.host, "").await?;
        let image = fork.lifecycle.file(sector(contents)?);
        let forked = fork.run_config(&disk_granted(BlockConfig::raw(image, mode))).await?;
        forked.input.write(b"!").await?;
        forked.console.saw(&format!("{}\0\0\0\0TOLD", String::from_utf8_lossy(contents))).await?;
    }
    running.input.write(b"!").await?;
    Ok(running.console.saw_times("parent's\0\0\0\0TOLD", 2).await?)
}

pub async fn a_fork_without_its_disks_is_refused(stage: Stage) -> Story {
    let (parent, _running) = with_a_disk(&stage).await?;
    let snapshot = snapshot(&parent).await?;
    let fork = stage.launch_from(&snapshot, &parent.host, "fork").await?;
    let disk =
        || anyhow::Ok(BlockConfig::raw(fork.lifecycle.file(sector(b"granted!")?), BlockMode::ReadWrite));
    let two = DevicesConfig { block: vec![disk()?, disk()?], ..DevicesConfig::default() };
    for config in [no_grants(), GuestConfig { devices: two, ..no_grants() }] {
        // Told beforehand as well.
        for refusal in [snapshot.can_restore(&config).await, fork.lifecycle.create(&config).await] {
            let (code, detail) = refused(refusal)?;
            expect("code", code, GuestError::BadConfig)?;
            says(&detail, &format!("block: the snapshot has 1 disks, and {}", config.devices.block.len()))?;
        }
    }
    let granted = disk_granted(disk()?);
    snapshot.can_restore(&granted).await?;
    Ok(fork.lifecycle.create(&granted).await?)
}

pub async fn snapshots_leave_nothing_in_the_service(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let running = parent.play(Act::PowerOff).await?;
    drop(snapshot(&parent).await?);
    let open = || census::open_files(stage.service.pid());
    let freed = async |most: usize| {
        let freed = || async { open().is_ok_and(|now| now <= most) };
        wait::until_async("the snapshots to be freed", PATIENCE, freed).await
    };
    // What is open once another is freed, whose files are closed then.
    let before = {
        let held = snapshot(&parent).await?;
        let with_it = open()?;
        drop(held);
        freed(with_it - 3).await?;
        open()?
    };
    for _ in 0..10 {
        let taken = snapshot(&parent).await?;
        fork(&stage, &parent.host, &taken, "").await?.ends().await?;
    }
    freed(before).await?;
    ends(&parent, running).await
}

pub async fn guestctl_forks_a_guest(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let running = parent.play(Act::PowerOff).await?;
    let mut command = Command::new("env");
    command.arg("--default-signal=INT").arg(program("guestctl")?).arg("--socket").arg(stage.service.socket());
    command.args(["fork", "parent", "--count", "3", "--name", "fork"]);
    let guestctl = Process::spawn(command, Stdin::Empty)?;
    // Whoever reads it blocks no thread of the guest's: the service is another process.
    for id in ["fork-1\n", "fork-2\n", "fork-3\n"] {
        guestctl.stdout().contains(id, PATIENCE)?;
    }
    expect("guests", parent.host.list().await?.len(), 4)?;
    parent.host.find("fork-2").await?.control.stop().await?;
    guestctl.logged("fork-2 has ended: forced", PATIENCE)?;
    guestctl.signal(Signal::INT);
    expect("status", guestctl.wait(PATIENCE)?.code(), Some(130))?;
    let alone = || async { parent.host.list().await.is_ok_and(|guests| guests.len() == 1) };
    wait::until_async("the forks to be gone", PATIENCE, alone).await?;
    ends(&parent, running).await
}
