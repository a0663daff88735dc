//! `guestctl debug` with Debian's gdb.

use crate::kernel;
use anyhow::{Context, anyhow};
use guest_client::{Control, Debugger};
use guest_schema::{GuestConfig, GuestError, VpState};
use guest_tests::process::{Process, Stdin};
use guest_tests::service::{PATIENCE, program};
use guest_tests::stage::{Act, Player, Running, Stage, Story, expect, refusal, says};
use guest_tests::wait;
use rustix::process::Signal;
use std::process::Command;
use tempfile::TempDir;
use tokio::task::spawn_blocking;

const VPS: u32 = 3;

/// A guest whose first VP is in a loop of two instructions in ring 0, and whose others were not started.
async fn counting(player: &Player) -> anyhow::Result<Running> {
    let config = GuestConfig { cpus: VPS, ..player.config_of(&kernel::counting())? };
    player.play_config(&config).await
}

/// A `guestctl debug`, and where it waits.
struct DebugCommand {
    process: Process,
    place: String,
    _folder: Option<TempDir>,
}

impl DebugCommand {
    /// At a free port, or at a socket in a folder of its own.
    fn start(stage: &Stage, id: &str, tcp: bool) -> anyhow::Result<Self> {
        let folder = if tcp { None } else { Some(TempDir::with_prefix("guestd-gdb-")?) };
        let address = folder.as_ref().map_or("127.0.0.1:0".into(), |folder| folder.path().join("gdb.sock"));
        let mut command = Command::new(program("guestctl")?);
        command.arg("--socket").arg(stage.service.socket()).args(["debug", id, "--gdb"]).arg(address);
        let process = Process::spawn(command, Stdin::Empty)?;
        let line = process.stdout().contains("\n", PATIENCE).map_err(|_| anyhow!(process.last_words()))?;
        let place = line.trim().strip_prefix("waiting for gdb: target remote ").context(line.clone())?;
        Ok(Self { place: place.to_owned(), process, _folder: folder })
    }

    /// Starts a gdb that connects and carries out these commands.
    fn gdb(&self, commands: &[&str]) -> anyhow::Result<Process> {
        let mut command = Command::new("gdb");
        command.args(["-nx", "-batch", "-iex", "set auto-load off"]);
        let target = format!("target remote {}", self.place);
        let settings =
            ["set pagination off", "set confirm off", "set width 0", "set architecture i386:x86-64"];
        for text in settings.iter().copied().chain([&target[..]]).chain(commands.iter().copied()) {
            command.args(["-ex", text]);
        }
        Ok(Process::spawn(command, Stdin::Empty)?)
    }

    /// The same, and waits for its end and what it says.
    async fn run_gdb(&self, commands: &[&str]) -> anyhow::Result<String> {
        said(self.gdb(commands)?).await
    }
}

/// What a gdb has said, both ways, once it has ended.
async fn said(gdb: Process) -> anyhow::Result<String> {
    spawn_blocking(move || {
        gdb.wait(PATIENCE)?;
        let said = gdb.stdout().to_end(PATIENCE).map_err(|_| anyhow!(gdb.last_words()))?;
        Ok(format!("{}{}", String::from_utf8_lossy(&said), gdb.stderr().text()))
    })
    .await?
}

/// Waits until VP 0 is, or is not, what it is under a debugger that holds it.
async fn held(control: &Control, held: bool) -> Story {
    let observer = control.observer();
    let seen = || async {
        observer.state().await.is_ok_and(|state| (state.vps.first() == Some(&VpState::Debugged)) == held)
    };
    Ok(wait::until_async(&format!("held: {held}"), PATIENCE, seen).await?)
}

/// Waits until a gdb has carried out its `shell echo`, and then let the guest go on.
async fn went_on(gdb: &Process, echoed: &str, control: &Control) -> Story {
    gdb.stdout().contains(echoed, PATIENCE).map_err(|_| anyhow!(gdb.last_words()))?;
    held(control, false).await
}

pub async fn gdb_breaks_steps_and_looks_around(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = counting(&player).await?;
    let line = DebugCommand::start(&stage, &player.id, true)?;
    let commands = [
        "info threads",
        "set $here = $pc",
        "stepi",
        "printf \"moved %d\\n\", $pc != $here",
        "stepi",
        "printf \"back %d\\n\", $pc == $here",
        // A hardware breakpoint and a software one, hit again and again.
        "hbreak *$here",
        "continue",
        "continue",
        "info breakpoints",
        "delete",
        "break *$here",
        "continue",
        "printf \"at it %d\\n\", $pc == $here",
        "delete",
        "info registers rip cs cr0 efer fs_base",
        "set {long} 0x800000 = 0x1122334455667788",
        "x/2xw 0x800000",
        "x/xb 0x100000000",
        "set $rbp = 0xdddd",
        "info registers rbp",
        "thread 2",
        "info registers rip",
        "thread 1",
        "hbreak *1",
        "hbreak *2",
        "hbreak *3",
        "hbreak *4",
        "break *5",
        "continue",
        "delete",
        "stepi",
        "printf \"still there %d\\n\", 42",
        "detach",
    ];
    let said = line.run_gdb(&commands).await?;
    let expected = [
        "* 1    Thread 1.1",
        "  3    Thread 1.3",
        "moved 1",
        "back 1",
        "Breakpoint 1, 0x",
        "breakpoint already hit 2 times",
        "Breakpoint 2, 0x",
        "at it 1",
        "efer           0x0",
        "0x55667788\t0x11223344",
        "Cannot access memory at address 0x100000000",
        "rbp            0xdddd",
        "[Switching to thread 2 (Thread 1.2)]",
        "still there 42",
        "detached",
    ];
    for words in expected {
        says(&said, words)?;
    }
    // Four there are, and the fifth is refused by its number.
    says(&said, "Cannot insert breakpoint 7")?;

    // The guest goes on; the next gdb lets it come to its end.
    let set = format!("set $rbx = {}", kernel::END);
    says(&line.run_gdb(&[&set, "detach"]).await?, "detached")?;
    running.console.saw("over").await?;
    running.run.await?;
    let ended = spawn_blocking(move || line.process.wait(PATIENCE)).await??;
    expect("the guest's end ends the command", ended.code(), Some(0))
}

/// Its VPs wait in ring 0, in long mode: an interrupt brings the first one back to where it waits.
pub async fn gdb_sees_the_built_in_guest_through_its_page_tables(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let config = GuestConfig { cpus: VPS, ..player.config(Act::PowerOff)? };
    let running = player.play_config(&config).await?;
    running.input.write(b"vps\n").await?;
    running.console.saw(&format!("vps {VPS}")).await?;
    let control = player.lifecycle.control();
    let line = DebugCommand::start(&stage, &player.id, true)?;
    let gdb = line.gdb(&[
        "info threads",
        "set $idle = $pc",
        "hbreak *$idle",
        "shell echo waiting",
        "continue",
        "printf \"at it %d\\n\", $pc == $idle",
        "delete",
        "stepi",
        "printf \"moved %d\\n\", $pc - $idle",
        "info registers cr0 efer",
        "set {long} ($rsp - 512) = 0x1122334455667788",
        "x/2xw $rsp - 512",
        "x/xb 0xffff800000000000",
        "thread 3",
        "x/i $pc",
        "detach",
    ])?;
    went_on(&gdb, "waiting", &control).await?;
    running.input.write(b"echo it goes on\n").await?;
    let said = said(gdb).await?;
    let expected = [
        "  3    Thread 1.3",
        "Breakpoint 1, 0x",
        "at it 1",
        // cli
        "moved 1",
        "efer           0x500",
        "0x55667788\t0x11223344",
        "Cannot access memory at address 0xffff800000000000",
        "[Switching to thread 3 (Thread 1.3)]",
        "cli",
        "detached",
    ];
    for words in expected {
        says(&said, words)?;
    }
    running.console.saw("it goes on").await?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

pub async fn gdb_interrupts_and_hears_of_the_guests_end(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = counting(&player).await?;
    let control = player.lifecycle.control();
    let line = DebugCommand::start(&stage, &player.id, false)?;
    let gdb = line.gdb(&["shell echo first", "continue", "shell echo second", "continue", "echo over\\n"])?;
    went_on(&gdb, "first", &control).await?;
    gdb.signal(Signal::INT);
    went_on(&gdb, "second", &control).await?;
    control.stop().await?;
    let said = said(gdb).await?;
    says(&said, "received signal SIGINT")?;
    says(&said, "Program terminated with signal SIGKILL")?;
    says(&said, "over")?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

pub async fn one_gdb_comes_after_the_other(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let control = player.lifecycle.control();
    let line = DebugCommand::start(&stage, &player.id, false)?;
    // However one leaves, the guest goes on without its breakpoints.
    for leave in ["detach", "kill", "quit", "disconnect"] {
        let said = line.run_gdb(&["printf \"pc %#lx\\n\", $pc", "hbreak *$pc", leave]).await?;
        says(&said, "pc 0x")?;
        held(&control, false).await?;
    }
    let killed = line.gdb(&["hbreak *$pc", "shell echo here; sleep 60"])?;
    killed.stdout().contains("here", PATIENCE).map_err(|_| anyhow!(killed.last_words()))?;
    held(&control, true).await?;
    drop(killed);
    held(&control, false).await?;
    // While another debugger has the guest, gdb is turned away, and the next one is served again.
    let (halt, _halts) = tokio::sync::mpsc::channel(1);
    let other: Debugger = control.debugger(halt);
    other.opened().await?;
    line.run_gdb(&[]).await?;
    let log = line.process.stdout().contains("has a debugger already", PATIENCE);
    log.map_err(|_| anyhow!(line.process.last_words()))?;
    drop(other);
    says(&line.run_gdb(&["info threads", "detach"]).await?, "Thread 1.1")?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

pub async fn a_signal_ends_the_command_and_the_guest_goes_on(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let control = player.lifecycle.control();
    let line = DebugCommand::start(&stage, &player.id, false)?;
    let place = line.place.clone();
    let gdb = line.gdb(&["hbreak *$pc", "shell sleep 60"])?;
    held(&control, true).await?;
    // SIGINT may be ignored where tests run in the background, and the command then ignores it too.
    line.process.signal(Signal::TERM);
    let ended = line.process.wait(PATIENCE)?;
    expect("status", ended.code(), Some(143))?;
    expect("the socket is gone", std::fs::exists(&place)?, false)?;
    held(&control, false).await?;
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    drop(gdb);
    Ok(())
}
