//! Guests that go on from snapshots' files: from what is on disk alone, in the machine or another, and what is refused of a file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, ensure};
use guest_client::snapshot_file::{
    Part, SnapshotEncoder, SnapshotFile, SnapshotSource, SnapshotState, SparseOutput, write,
};
use guest_client::{Rendering, Snapshot};
use guest_saved_state::processor::vp::VpSetState;
use guest_schema::{GuestConfig, GuestError, Outcome};
use guest_tests::process::{Process, Stdin};
use guest_tests::service::{PATIENCE, program};
use guest_tests::stage::{Act, Kind, Player, Running, Stage, Story, expect, refused, says, sealed_file};
use guest_tests::{census, wait};
use prost::Message;
use tempfile::TempDir;

/// Where a story keeps its files.
struct Disk {
    folder: TempDir,
}

impl Disk {
    fn new() -> std::io::Result<Self> {
        Ok(Self { folder: tempfile::tempdir()? })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Saves a snapshot of a player's guest.
    async fn save(&self, name: &str, player: &Player) -> anyhow::Result<PathBuf> {
        self.save_snapshot(name, &player.lifecycle.control().snapshot().await?, None).await
    }

    /// Saves a snapshot, or a layer of it over what another file has.
    async fn save_snapshot(
        &self,
        name: &str,
        snapshot: &Snapshot,
        base: Option<&Path>,
    ) -> anyhow::Result<PathBuf> {
        let base = base.map(opened).transpose()?;
        snapshot.save(self.path(name), base, |_, _| ControlFlow::Continue(())).await?;
        Ok(self.path(name))
    }

    /// Writes the file of a snapshot of the stage's guest, changed by `change`.
    async fn changed(
        &self,
        name: &str,
        source: &SnapshotSource,
        change: impl FnOnce(&mut SnapshotState),
    ) -> anyhow::Result<PathBuf> {
        let path = self.path(name);
        let (source, to) = (with_state(source, change)?, File::create(&path)?);
        let writing = tokio::task::spawn_blocking(move || {
            let mut encoder = SnapshotEncoder::whole(&source)?;
            write(&mut encoder, &mut SparseOutput::new(&to), |_, _| ControlFlow::Continue(()))
        });
        writing.await??;
        Ok(path)
    }
}

fn opened(path: &Path) -> anyhow::Result<SnapshotFile> {
    Ok(SnapshotFile::open(File::open(path)?)?)
}

fn with_state(
    source: &SnapshotSource,
    change: impl FnOnce(&mut SnapshotState),
) -> anyhow::Result<SnapshotSource> {
    use guest_schema::SnapshotFile::State;
    let file = source.files.get(&State).context("a snapshot without a state")?;
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len())?];
    file.read_exact_at(&mut bytes, 0)?;
    let mut state = SnapshotState::decode(&bytes[..])?;
    change(&mut state);
    let mut files: BTreeMap<_, _> = source.files.clone();
    files.insert(State, Arc::new(sealed_file(&state.encode_to_vec())?));
    Ok(SnapshotSource { files, info: source.info.clone() })
}

/// A config of a guest that goes on from a file, over this player's channel.
fn restored(player: &Player, file: &Path, base: Option<&Path>) -> anyhow::Result<GuestConfig> {
    let open = |path: &Path| anyhow::Ok(player.lifecycle.file(File::open(path)?));
    Ok(GuestConfig::restored(open(file)?, base.map(open).transpose()?))
}

/// Lets a guest go on from a file, in a VMM of its own.
async fn go_on(stage: &Stage, id: &str, file: &Path) -> anyhow::Result<(Player, Running)> {
    let player = stage.launch(id).await?;
    let running = player.run_config(&restored(&player, file, None)?).await?;
    Ok((player, running))
}

/// Ends a guest that was never booted here by its cue.
async fn ends(player: &Player, running: Running) -> Story {
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    expect(&format!("outcome of {}", player.id), running.guest.terminated().await?.outcome, Outcome::Clean)?;
    expect("it has booted", running.console.whole().await?.contains("READY"), false)
}

/// A file of a guest that waits for its cue, whose VMM is gone.
async fn saved(stage: &Stage, disk: &Disk, act: Act) -> anyhow::Result<PathBuf> {
    let parent = stage.launch("parent").await?;
    let running = parent.play(act).await?;
    let path = disk.save("parent.snapshot", &parent).await?;
    let Player { lifecycle, exit, .. } = parent;
    drop((lifecycle, running));
    expect("the parent", exit.terminated().await?.outcome, Outcome::Forced)?;
    Ok(path)
}

pub async fn a_guest_goes_on_from_a_file(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::PowerOff).await?;
    // Any number, at the same time.
    let (first, first_running) = go_on(&stage, "first", &path).await?;
    let (second, second_running) = go_on(&stage, "second", &path).await?;
    ends(&first, first_running).await?;
    ends(&second, second_running).await?;
    opened(&path)?.verify_memory(|_, _| ()).context("a guest has written to the file")
}

pub async fn a_guest_from_a_file_is_another_generation(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::PowerOff).await?;
    let mut seen = Vec::new();
    for id in ["first", "second"] {
        let (player, running) = go_on(&stage, id, &path).await?;
        let control = player.lifecycle.control();
        let id = control.inspect("units/generation-id/unit/id", 1, Rendering::Text).await?;
        ensure!(!id.trim().is_empty() && !seen.contains(&id), "{id:?} after {seen:?}");
        seen.push(id);
        ends(&player, running).await?;
    }
    Ok(())
}

pub async fn a_guest_from_a_file_boots_again_when_it_is_reset(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::Reset).await?;
    let (player, running) = go_on(&stage, "restored", &path).await?;
    player.cue(&running, Act::Reset).await?;
    running.console.saw("READY").await?;
    player.lifecycle.control().reset().await?;
    Ok(running.console.saw_times("READY", 2).await?)
}

pub async fn a_guest_from_a_file_is_paused_saved_and_forked(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::PowerOff).await?;
    let (player, running) = go_on(&stage, "restored", &path).await?;
    let control = player.lifecycle.control();
    control.pause().await?;
    let snapshot = control.snapshot().await?;
    control.resume().await?;
    // In memory, over what is on disk.
    let fork = stage.launch_from(&snapshot, &player.host, "fork").await?;
    let forked = fork.run_config(&GuestConfig::new(None, 0)).await?;
    let next = fork.lifecycle.control().snapshot().await?;
    ends(&fork, forked).await?;
    // And on disk once more.
    let again = disk.save_snapshot("again.snapshot", &next, None).await?;
    ends(&player, running).await?;
    drop((snapshot, next, player));
    std::fs::remove_file(&path)?;
    let (last, running) = go_on(&stage, "last", &again).await?;
    ends(&last, running).await
}

pub async fn a_lease_takes_a_file_a_kernel_and_a_file(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::PowerOff).await?;
    let player = stage.launch("all").await?;
    for _ in 0..2 {
        let running = player.run_config(&restored(&player, &path, None)?).await?;
        ends(&player, running).await?;
        let running = player.play(Act::PowerOff).await?;
        player.cue(&running, Act::PowerOff).await?;
        running.run.await?;
    }
    Ok(())
}

pub async fn a_layer_goes_on_with_its_base_alone(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let other = saved(&stage, &disk, Act::Spin).await?;
    let parent = stage.launch("origin").await?;
    let running = parent.play(Act::PowerOff).await?;
    let base = disk.save("base.snapshot", &parent).await?;
    let snapshot = parent.lifecycle.control().snapshot().await?;
    let layer = disk.save_snapshot("layer.snapshot", &snapshot, Some(&base)).await?;
    drop((parent, running, snapshot));
    let player = stage.launch("restored").await?;
    for (file, beside, words) in [
        (&layer, None, "source.saved.base: none was given"),
        (&layer, Some(&layer), "source.saved.base: it is a layer itself"),
        (&base, Some(&base), "source.saved.base: the file is no layer"),
        (&layer, Some(&other), "source.saved.base: it is not what the file is a layer of"),
    ] {
        let config = restored(&player, file, beside.map(PathBuf::as_path))?;
        let (code, detail) = refused(player.lifecycle.create(&config).await)?;
        expect(words, code, GuestError::BadConfig)?;
        says(&detail, words)?;
    }
    let running = player.run_config(&restored(&player, &layer, Some(&base))?).await?;
    ends(&player, running).await
}

pub async fn a_file_that_is_not_whole_is_refused(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::PowerOff).await?;
    let parts = opened(&path)?;
    let player = stage.launch("restored").await?;
    let create = async |name: &str, change: &dyn Fn(&File) -> std::io::Result<()>| {
        let copy = disk.path(name);
        std::fs::copy(&path, &copy)?;
        change(&File::options().write(true).open(&copy)?)?;
        let (code, detail) = refused(player.lifecycle.create(&restored(&player, &copy, None)?).await)?;
        expect(name, code, GuestError::SnapshotCorrupt)?;
        anyhow::Ok(detail)
    };
    for part in Part::ALL {
        let Some(range) = parts.part(part) else { continue };
        let name = part.name();
        let cut = create(&format!("{name} cut"), &|file| file.set_len(range.start + 1)).await?;
        says(&cut, "source.saved.file: it is no snapshot's file, or its end is missing")?;
        // Memory is not looked at before the guest looks at it.
        if part != Part::Memory {
            let mut byte = [0];
            File::open(&path)?.read_exact_at(&mut byte, range.start)?;
            let flip = |file: &File| file.write_all_at(&[!byte[0]], range.start);
            let flipped = create(&format!("{name} flipped"), &flip).await?;
            says(&flipped, &format!("source.saved.file: {name}: its checksum is"))?;
        }
    }
    says(&create("empty", &|file| file.set_len(0)).await?, "the last of its 0 bytes")?;
    let running = player.run_config(&restored(&player, &path, None)?).await?;
    ends(&player, running).await
}

/// Copies of a file that came over a channel are checked whole.
pub async fn a_file_whose_memory_is_damaged_on_its_way_is_refused(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::PowerOff).await?;
    let data = rustix::fs::seek(File::open(&path)?, rustix::fs::SeekFrom::Data(0))?;
    let file = File::options().read(true).write(true).open(&path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, data)?;
    file.write_all_at(&[!byte[0]], data)?;
    let player = stage.launch("restored").await?;
    let (code, detail) = refused(player.lifecycle.create(&restored(&player, &path, None)?).await)?;
    expect("code", code, GuestError::SnapshotCorrupt)?;
    says(&detail, "source.saved.file: memory: its checksum is")
}

pub async fn a_state_of_other_units_is_refused(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let parent = stage.launch("parent").await?;
    let _running = parent.play(Act::PowerOff).await?;
    let source = parent.lifecycle.control().snapshot().await?.files().await?;
    let player = stage.launch("restored").await?;
    let create = async |name: &str, change: &dyn Fn(&mut SnapshotState)| {
        let path = disk.changed(name, &source, change).await?;
        let (code, detail) = refused(player.lifecycle.create(&restored(&player, &path, None)?).await)?;
        expect(name, code, GuestError::SnapshotIncompatible)?;
        says(&detail, name)
    };
    create("serial", &|state| state.units.retain(|unit| unit.name != "serial")).await?;
    create("floppy", &|state| {
        let mut unit = state.units[0].clone();
        unit.name = "floppy".into();
        state.units.push(unit);
    })
    .await?;
    create("rtc", &|state| {
        let twice = state.units.iter().find(|unit| unit.name == "rtc").cloned();
        state.units.extend(twice);
    })
    .await?;
    create("its format is 2, and 1 is known here", &|state| state.format = 2).await?;
    create("ioapic", &|state| {
        let ioapic = state.units.iter_mut().find(|unit| unit.name == "ioapic").expect("it is on every board");
        ioapic.type_name = "devices.pic.PicState".into();
    })
    .await?;
    if stage.kind == Kind::BuiltIn {
        // SSE3 and all that follows it (Intel SDM volume 2, CPUID.1:ECX): no CPU has all of the bits.
        create("this host has no CPUID 0x1 ECX bits", &|state| with_cpuid(state, 1, |leaf| leaf.ecx = !0))
            .await?;
    }
    // None of them has left anything: the lease is as good as before.
    let path = disk.changed("whole", &source, |_| ()).await?;
    let running = player.run_config(&restored(&player, &path, None)?).await?;
    ends(&player, running).await
}

/// Protobuf skips fields that it does not know: one that a newer version has added is ignored, and the format's version is
/// raised for one that must not be.
pub async fn a_states_newer_field_is_ignored(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let parent = stage.launch("parent").await?;
    let _running = parent.play(Act::PowerOff).await?;
    let source = parent.lifecycle.control().snapshot().await?.files().await?;
    let newer = |state: &mut SnapshotState| {
        for unit in &mut state.units {
            // Field 1000, 0 as a number.
            unit.value.extend([0xc0, 0x3e, 0x00]);
        }
    };
    let path = disk.changed("newer", &source, newer).await?;
    let (player, running) = go_on(&stage, "restored", &path).await?;
    ends(&player, running).await
}

type Leaf = guest_saved_state::processor::vp::CpuidLeaf;

fn with_cpuid(state: &mut SnapshotState, function: u32, change: impl Fn(&mut Leaf)) {
    let unit = state.units.iter_mut().find(|unit| unit.name == "vps").expect("a machine has VPs");
    let mut vps = VpSetState::decode(&unit.value[..]).expect("it was encoded");
    let leaves = vps.vps.iter_mut().filter_map(|vp| vp.cpuid.as_mut()).flat_map(|cpuid| &mut cpuid.leaves);
    leaves.filter(|leaf| leaf.function == function).for_each(change);
    unit.value = vps.encode_to_vec();
}

pub async fn a_file_that_can_be_written_by_its_descriptor_is_refused(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::PowerOff).await?;
    let player = stage.launch("restored").await?;
    let file = player.lifecycle.file(File::options().read(true).write(true).open(&path)?);
    let folder = player.lifecycle.file(File::open(disk.folder.path())?);
    let (code, detail) = refused(player.lifecycle.create(&GuestConfig::restored(file, Some(folder))).await)?;
    expect("code", code, GuestError::BadConfig)?;
    says(
        &detail,
        "source.saved.file: descriptor 0 can be written to: it has to be opened for reading alone",
    )?;
    says(&detail, "; source.saved.base: descriptor 1 is no regular file")
}

pub async fn files_that_are_refused_leave_nothing(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::PowerOff).await?;
    let garbage = disk.path("garbage");
    let mut bytes = Vec::new();
    File::open("/proc/self/exe")?.take(1 << 20).read_to_end(&mut bytes)?;
    std::fs::write(&garbage, bytes)?;
    let player = stage.launch("restored").await?;
    let pid = player.pid().await?;
    let attempt = async || {
        let (code, _) = refused(player.lifecycle.create(&restored(&player, &garbage, None)?).await)?;
        expect("code", code, GuestError::SnapshotCorrupt)?;
        let config = restored(&player, &path, Some(&path))?;
        expect("code", refused(player.lifecycle.create(&config).await)?.0, GuestError::BadConfig)
    };
    attempt().await?;
    let before = census::open_files(pid)?;
    for _ in 0..5 {
        attempt().await?;
    }
    let closed = || async { census::open_files(pid).is_ok_and(|now| now <= before) };
    Ok(wait::until_async("the files to be closed", PATIENCE, closed).await?)
}

pub async fn guestctl_runs_a_guest_from_a_file(stage: Stage) -> Story {
    let disk = Disk::new()?;
    let path = saved(&stage, &disk, Act::PowerOff).await?;
    let guestctl = |arguments: &[&str]| {
        let mut command = Command::new(program("guestctl")?);
        command.arg("--socket").arg(stage.service.socket()).args(["run", "--snapshot"]).arg(&path);
        command.args(arguments);
        anyhow::Ok(Process::spawn(command, Stdin::Piped)?)
    };
    let mut run = guestctl(&["--name", "restored", "--json"])?;
    run.stdin().context("it was piped")?.write_all(stage.kind.cue(Act::PowerOff))?;
    expect("status", run.wait(PATIENCE)?.code(), Some(0))?;
    run.logged("\"outcome\":\"clean\"", PATIENCE)?;
    let based = guestctl(&["--snapshot-base", path.to_str().context("a name")?])?;
    based.logged("source.saved.base: the file is no layer", PATIENCE)?;
    expect("status", based.wait(PATIENCE)?.code(), Some(1))
}
