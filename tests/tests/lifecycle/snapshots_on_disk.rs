//! Snapshots as files: what is in them, who writes them and how, and what is left when somebody dies meanwhile.

use std::fs::File;
use std::future::pending;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, ensure};
use guest_client::snapshot_file::{PAGE, Part, SnapshotFile};
use guest_client::{
    ClientError, OutputClosed, Phase, SaveError, SavedSnapshot, SerialChunk, SerialOutput, Snapshot,
};
use guest_schema::{GuestConfig, GuestError, MemoryConfig, Outcome};
use guest_tests::process::{Process, Stdin};
use guest_tests::service::{PATIENCE, program};
use guest_tests::stage::{Act, Player, Running, Stage, Story, expect, refused, says};
use guest_tests::{census, wait};
use processor::scripted::Script;
use rustix::process::{Pid, Signal};
use tempfile::TempDir;
use tokio::task::spawn_local;

const SERIAL: u16 = 0x3f8;
/// Memory that no script uses.
const PLACE: u64 = 4 << 20;
const OTHER: u64 = 5 << 20;

fn on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A guest that has written to its memory, and on a cue writes to another page.
async fn with_memory(stage: &Stage) -> anyhow::Result<(Player, Running)> {
    let mut script = Script::new();
    script.write(PLACE, b"original").out(SERIAL, b"READY\n");
    script.serial_input(SERIAL, 0x80).write(OTHER, b"overdone").out(SERIAL, b"TOLD\n").spin();
    let player = stage.launch("web").await?;
    let running = player.play_config(&player.config_of(&script.to_elf())?).await?;
    Ok((player, running))
}

async fn snapshot(player: &Player) -> anyhow::Result<Snapshot> {
    Ok(player.lifecycle.control().snapshot().await?)
}

fn open(path: &Path) -> anyhow::Result<SnapshotFile> {
    let file = SnapshotFile::open(File::open(path)?)?;
    file.verify_memory(|_, _| {})?;
    Ok(file)
}

fn eight_bytes(file: &SnapshotFile, at: u64) -> anyhow::Result<[u8; 8]> {
    let mut bytes = [0; 8];
    file.file().read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

/// Everything in a folder, hidden or not.
fn names(folder: &TempDir) -> anyhow::Result<Vec<String>> {
    let entries = std::fs::read_dir(folder)?;
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

async fn phase(player: &Player) -> anyhow::Result<Phase> {
    Ok(player.lifecycle.control().observer().state().await?.phase)
}

pub async fn a_snapshot_is_saved_while_its_guest_runs_on(stage: Stage) -> Story {
    let (player, running) = with_memory(&stage).await?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("one");
    let saved = snapshot(&player).await?.save(&path, None, on).await?;
    expect("the guest", phase(&player).await?, Phase::Running)?;
    running.input.write(b"!").await?;
    running.console.saw("TOLD").await?;
    let file = open(&path)?;
    expect("memory", eight_bytes(&file, PLACE)?, *b"original")?;
    expect("memory from afterwards", eight_bytes(&file, OTHER)?, [0; 8])?;
    let manifest = file.manifest();
    expect("guest and VPs", (&manifest.parent[..], manifest.vps), ("web", 1))?;
    expect("size", (saved.bytes, saved.info.memory_bytes), (file.file_bytes(), 16 << 20))?;
    expect("data", saved.memory.data_bytes, manifest.data_bytes)?;
    ensure!(manifest.data_bytes < 2 << 20, "{} bytes of memory were kept", manifest.data_bytes);
    expect("names", names(&folder)?, vec!["one".to_owned()])
}

/// The bytes that an export writes to a channel.
async fn exported(snapshot: &Snapshot) -> anyhow::Result<Vec<u8>> {
    let (output, mut chunks) = tokio::sync::mpsc::channel::<SerialChunk>(4);
    let done = snapshot.export(output);
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.recv().await {
        expect("lost", chunk.lost, 0)?;
        bytes.extend(chunk.bytes);
    }
    done.await?;
    Ok(bytes)
}

pub async fn an_export_has_the_bytes_of_the_file_that_is_saved(stage: Stage) -> Story {
    let (player, running) = with_memory(&stage).await?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("one");
    // One that is all there is, and one of a layer over it.
    for _ in 0..2 {
        let snapshot = snapshot(&player).await?;
        snapshot.save(&path, None, on).await?;
        ensure!(exported(&snapshot).await? == std::fs::read(&path)?, "the export differs from the file");
        running.input.write(b"!").await?;
        running.console.saw("TOLD").await?;
    }
    expect("memory from afterwards", eight_bytes(&open(&path)?, OTHER)?, *b"overdone")
}

pub async fn a_layer_is_saved_against_a_file(stage: Stage) -> Story {
    let (player, running) = with_memory(&stage).await?;
    let folder = tempfile::tempdir()?;
    let (base, path) = (folder.path().join("base"), folder.path().join("layer"));
    snapshot(&player).await?.save(&base, None, on).await?;
    running.input.write(b"!").await?;
    running.console.saw("TOLD").await?;
    let later = snapshot(&player).await?;
    let saved = later.save(&path, Some(open(&base)?), on).await?;
    let (file, base_file) = (open(&path)?, open(&base)?);
    expect("base", file.base_checksum(), Some(base_file.memory_checksum()))?;
    let pages = file.layer_pages().context("it is no layer")?;
    ensure!(pages.iter().any(|range| range.contains(&OTHER)), "what was written is not in {pages:?}");
    ensure!(!pages.iter().any(|range| range.contains(&PLACE)), "what was not is in {pages:?}");
    ensure!(saved.memory.data_bytes < 64 * PAGE, "{} bytes differ", saved.memory.data_bytes);
    expect("memory", eight_bytes(&file, OTHER)?, *b"overdone")?;
    let refused = later.save(&base, Some(open(&base)?), on).await;
    ensure!(matches!(refused, Err(SaveError::IsBase)), "a layer took its base's place: {refused:?}");
    let refused = later.save(folder.path().join("third"), Some(open(&path)?), on).await;
    says(&refused.expect_err("a layer on a layer").to_string(), "it is a layer itself")?;
    expect("names", names(&folder)?, vec!["base".to_owned(), "layer".to_owned()])
}

/// An output that takes so many calls, and then never answers or fails.
struct Stubborn {
    calls: std::cell::Cell<u32>,
    fails: bool,
}

impl SerialOutput for Stubborn {
    async fn write(&self, _: &[u8], _: u64) -> Result<(), OutputClosed> {
        match self.calls.get().checked_sub(1) {
            Some(left) => self.calls.set(left),
            None if self.fails => return Err(OutputClosed),
            None => pending().await,
        }
        Ok(())
    }
}

pub async fn an_output_that_fails_ends_its_export(stage: Stage) -> Story {
    let (player, _running) = with_memory(&stage).await?;
    let snapshot = snapshot(&player).await?;
    // Somewhere in the middle, and with the last call, of which there are as many as 128 KiB in the file.
    for calls in [3, 128] {
        let output = Stubborn { calls: calls.into(), fails: true };
        let (code, detail) = refused(snapshot.export(output).await)?;
        expect("code", code, GuestError::FailedServiceConnect)?;
        says(&detail, "nobody reads this output any more")?;
    }
    expect("the guest", phase(&player).await?, Phase::Running)
}

pub async fn an_export_that_nobody_takes_holds_up_nobody(stage: Stage) -> Story {
    let (player, running) = with_memory(&stage).await?;
    let snapshot = snapshot(&player).await?;
    let before = census::threads(stage.service.pid())?;
    // They wait for each other, and for their outputs: none of them on a thread.
    let stuck: Vec<_> =
        (0..40).map(|_| spawn_local(snapshot.export(Stubborn { calls: 5.into(), fails: false }))).collect();
    let another = stage.service.connect().await?;
    for _ in 0..20 {
        another.list().await?;
    }
    let found = another.snapshot(snapshot.token()).await?;
    ensure!(exported(&found).await?.len() > 16 << 20, "another client's export is too short");
    running.input.write(b"!").await?;
    running.console.saw("TOLD").await?;
    ensure!(stuck.iter().all(|export| !export.is_finished()), "an export ended by itself");
    let threads = census::threads(stage.service.pid())?;
    ensure!(threads < before + 40, "{threads} threads after {before}: they wait for outputs");
    stuck.iter().for_each(tokio::task::JoinHandle::abort);
    Ok(())
}

pub async fn a_snapshot_from_its_guests_channel_alone_hands_over_no_files(stage: Stage) -> Story {
    let (player, _running) = with_memory(&stage).await?;
    let Player { lifecycle, exit, host, .. } = player;
    drop((exit, host));
    let snapshot = lifecycle.control().snapshot().await?;
    match snapshot.files().await {
        Err(ClientError::Local { reason, .. }) => says(&reason, "find it by its token")?,
        other => anyhow::bail!("its files: {:?}", other.map(|source| source.files)),
    }
    ensure!(exported(&snapshot).await?.len() > 16 << 20, "it is exported all the same");
    let found = stage.service.connect().await?.snapshot(snapshot.token()).await?;
    expect("files", found.files().await?.files.len(), 3)
}

/// Begins to save a snapshot, which stands still from the first bytes on until something comes through the channel.
async fn held_save(
    snapshot: Snapshot,
    path: &Path,
) -> (mpsc::Sender<()>, tokio::task::JoinHandle<Result<SavedSnapshot, SaveError>>) {
    let (go, held) = mpsc::channel();
    let (begun, begins) = tokio::sync::oneshot::channel();
    let (path, mut begun) = (path.to_owned(), Some(begun));
    let saving = spawn_local(async move {
        snapshot
            .save(path, None, move |_, _| {
                if let Some(begun) = begun.take() {
                    let _ = begun.send(());
                    let _ = held.recv_timeout(PATIENCE);
                }
                ControlFlow::Continue(())
            })
            .await
    });
    begins.await.expect("it begins");
    (go, saving)
}

pub async fn a_save_comes_to_its_end_without_guest_and_service(stage: Stage) -> Story {
    let (player, _running) = with_memory(&stage).await?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("one");
    let (go, saving) = held_save(snapshot(&player).await?, &path).await;
    expect("names meanwhile", names(&folder)?, Vec::new())?;
    let pid = Pid::from_raw(player.pid().await?.cast_signed()).expect("no process is 0");
    rustix::process::kill_process(pid, Signal::KILL)?;
    expect("the guest", player.exit.terminated().await?.outcome, Outcome::Crashed)?;
    stage.service.process().kill();
    stage.service.process().wait(PATIENCE)?;
    go.send(())?;
    saving.await??;
    expect("memory", eight_bytes(&open(&path)?, PLACE)?, *b"original")
}

/// A guestctl that saves the guest `web`, run by a shell that does `first`.
fn guestctl_save(stage: &Stage, path: &Path, first: &str) -> anyhow::Result<Process> {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{first}exec env --default-signal=INT \"$@\""), "sh"]);
    command.arg(program("guestctl")?).arg("--socket").arg(stage.service.socket());
    command.args(["snapshot", "save", "web", "--json"]).arg(path);
    Ok(Process::spawn(command, Stdin::Empty)?)
}

/// A guest whose snapshot takes a while to write: its kernel is long.
async fn with_much(stage: &Stage) -> anyhow::Result<(Player, Running)> {
    let player = stage.launch("web").await?;
    let mut kernel = stage.kind.image(Act::PowerOff);
    kernel.resize(kernel.len() + (48 << 20), 0x5a);
    let config = GuestConfig { memory: MemoryConfig::of_bytes(128 << 20), ..player.config_of(&kernel)? };
    let running = player.play_config(&config).await?;
    Ok((player, running))
}

pub async fn a_guestctl_that_is_killed_leaves_the_old_file_or_the_new(stage: Stage) -> Story {
    let (player, _running) = with_much(&stage).await?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("web.snapshot");
    guestctl_save(&stage, folder.path(), "")?.wait(PATIENCE)?;
    let (mut old, mut ended) = (open(&path)?.manifest().taken_at_us, 0);
    for (word, signal) in [
        ("taken", Signal::KILL),
        ("progress", Signal::KILL),
        ("progress", Signal::INT),
        ("saved", Signal::KILL),
    ] {
        let guestctl = guestctl_save(&stage, folder.path(), "")?;
        guestctl.stdout().contains(word, PATIENCE)?;
        guestctl.signal(signal);
        let status = guestctl.wait(PATIENCE)?;
        let now = open(&path)?.manifest().taken_at_us;
        ensure!(now == old || status.success() || signal == Signal::KILL, "{status}, and a new file");
        ended += u32::from(now == old);
        old = now;
        expect("names", names(&folder)?, vec!["web.snapshot".to_owned()])?;
    }
    ensure!(ended > 0, "none was killed before its end");
    expect("the guest", phase(&player).await?, Phase::Running)
}

pub async fn a_disk_that_is_full_leaves_what_was_there(stage: Stage) -> Story {
    let (player, _running) = with_memory(&stage).await?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("web.snapshot");
    // No file may be longer than this, and whoever tries is told so.
    let full = "trap '' XFSZ; ulimit -f 8192; ";
    for there in [false, true] {
        if there {
            guestctl_save(&stage, &path, "")?.wait(PATIENCE)?;
        }
        let before = names(&folder)?;
        let guestctl = guestctl_save(&stage, &path, full)?;
        expect("status", guestctl.wait(PATIENCE)?.code(), Some(1))?;
        guestctl.logged("it cannot be written: File too large", PATIENCE)?;
        expect("names", names(&folder)?, before)?;
    }
    expect("memory", eight_bytes(&open(&path)?, PLACE)?, *b"original")?;
    expect("the guest", phase(&player).await?, Phase::Running)
}

pub async fn saving_leaves_nothing_in_the_service(stage: Stage) -> Story {
    let (player, _running) = with_memory(&stage).await?;
    let folder = tempfile::tempdir()?;
    let open_files = || census::open_files(stage.service.pid());
    let once = async || -> Story {
        let snapshot = snapshot(&player).await?;
        snapshot.save(folder.path().join("one"), None, on).await?;
        exported(&snapshot).await?;
        drop(
            tokio::time::timeout(Duration::ZERO, snapshot.export(Stubborn { calls: 9.into(), fails: false }))
                .await,
        );
        Ok(())
    };
    once().await?;
    let settled = async |most: usize| {
        let settled = || async { open_files().is_ok_and(|now| now <= most) };
        wait::until_async("the snapshots to be freed", PATIENCE, settled).await
    };
    let held = snapshot(&player).await?;
    let with_it = open_files()?;
    drop(held);
    settled(with_it - 3).await?;
    let before = open_files()?;
    for _ in 0..5 {
        once().await?;
    }
    Ok(settled(before).await?)
}

pub async fn guestctl_saves_a_guest_and_shows_it(stage: Stage) -> Story {
    let (_player, _running) = with_memory(&stage).await?;
    let folder = tempfile::tempdir()?;
    let guestctl = |arguments: &[&str]| -> anyhow::Result<(Option<i32>, String)> {
        let mut command = Command::new(program("guestctl")?);
        command.arg("--socket").arg(stage.service.socket()).arg("snapshot").args(arguments);
        command.current_dir(&folder);
        let guestctl = Process::spawn(command, Stdin::Empty)?;
        let status = guestctl.wait(PATIENCE)?;
        let said = guestctl.stdout().to_end(PATIENCE)?;
        Ok((status.code(), String::from_utf8(said)? + &guestctl.last_words()))
    };
    let (status, said) = guestctl(&["save", "we", "."])?;
    expect("status", status, Some(0))?;
    says(&said, "web is in ./web.snapshot, with ")?;
    let (_, shown) = guestctl(&["show", "web.snapshot", "--verify", "--state", "memory"])?;
    for words in
        ["guest       web\n", ", verified\n", "machine.memory.MemoryState", "\nmemory\n  bytes: 16777216\n"]
    {
        says(&shown, words)?;
    }
    let (_, json) = guestctl(&["show", "web.snapshot", "--json"])?;
    let json: serde_json::Value = serde_json::from_str(json.lines().next().unwrap_or_default())?;
    expect("memory", json["memory_bytes"].as_u64(), Some(16 << 20))?;
    let kernel = open(&folder.path().join("web.snapshot"))?.part(Part::Kernel).context("no kernel")?;
    expect("kernel", json["parts"][2]["at"].as_u64(), Some(kernel.start))?;
    std::fs::write(folder.path().join("letter"), "dear reader")?;
    let (status, said) = guestctl(&["save", "web", "letter"])?;
    expect("status", status, Some(1))?;
    says(&said, "letter: it is there already, and no snapshot's file")?;
    expect("letter", std::fs::read_to_string(folder.path().join("letter"))?, "dear reader".to_owned())?;
    let (status, said) = guestctl(&["show", "letter"])?;
    expect("status", status, Some(1))?;
    says(&said, "letter: it is no snapshot's file, or its end is missing")
}
