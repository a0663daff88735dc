//! `guestctl demo`: every call of a guest's lifecycle, good and refused, with its time and its answer.

mod paper;
mod serial;

use crate::ending::{Outcome, Trouble};
use crate::options::Options;
use crate::out::Out;
use crate::run::{builtin_guest, in_memory};
use crate::service::{self, Launcher};
use guest_client::{
    Control, Exit, FileSource, Guest, GuestConfig, GuestError, GuestState, Launched, Lifecycle, MemoryConfig,
};
use paper::{Expected, Paper, in_words};
use serial::Serial;
use std::time::Instant;

/// The guest's memory, bytes.
const MEMORY: u64 = 64 << 20;

const WELCOME: &str = "\
guestd runs virtual machine guests. A client holds a capability to a guest's life: it creates the guest, binds to it, runs it \
and stops it, with calls of one protocol (Cap'n Proto over a Unix socket). This tour makes each of those calls with a small \
built-in guest. Each line is one call, the time until its answer came, and the answer: ok, or the refusal that is right there.";

const NOTHING: &str = "\
launch starts a VMM process for one guest and hands over its lifecycle. The lifecycle is a lease: when its holder goes away, \
even by kill -9, the guest ends. Nothing has been created yet, so there is nothing to bind to or to run.";

const REFUSED: &str = "\
A refusal says everything that is wrong, each fault with its field and value. A create that failed leaves no guest, and what \
is called next says why.";

const FLIGHT: &str = "\
All of these are sent at once, before any answer has come: create builds the machine, bind gives the capability to use its \
devices, run lets its processor go. The times run from that moment; run answers when the guest has ended.";

const RUNNING: &str = "\
While it runs, what would disturb it is refused, and its first run goes on. Its operator may hold it, let it go on and reset it.";

const STOPPED: &str = "\
stop halts the guest by force. The pending run answers with that reason, and so does everyone who waits for the guest's end. \
Then the lifecycle is empty again.";

const CRASH: &str = "\
The same lifecycle can have another guest. This one is told to crash: its processor takes a triple fault. run answers with the \
reason and the registers; nothing else on this host notices.";

const CLEAN: &str = "A guest that switches itself off ends well.";

/// Makes the tour. Fails if any call answered other than it ought to.
pub async fn demo(options: &Options, out: &Out) -> Outcome {
    let started = Instant::now();
    let launcher = service::running_or_private(options).await?;
    let mut paper = Paper::new(out);
    paper.explain(WELCOME)?;
    paper.explain(&format!("It is served by {}.", launcher.describe()))?;
    let done = tour(&launcher, &mut paper).await;
    launcher.close().await;
    done?;
    let (calls, surprises) = paper.counts();
    paper.heading(&format!("{calls} calls in {}", in_words(started.elapsed())))?;
    match surprises {
        0 => paper
            .explain("Next: guestctl run boots the same guest with its serial line here; type help in it."),
        _ => Err(Trouble::Failed(format!("{surprises} of {calls} calls did not answer what they ought to"))),
    }
}

async fn tour(launcher: &Launcher, paper: &mut Paper<'_>) -> Outcome {
    paper.heading("1  A lifecycle with nothing in it")?;
    paper.explain(NOTHING)?;
    let sent = Instant::now();
    let Launched { lifecycle, exit, id } = launcher.host.launch("")?;
    let id = paper.call("launch", sent, Expected::Ok, id, |id| format!("ok: the guest's id is {id}")).await?;
    if id.is_none() {
        return Err(Trouble::Failed("without a lifecycle there is no tour".into()));
    }
    nothing_created(&lifecycle, paper).await?;
    refused_configs(&lifecycle, paper).await?;
    life(&lifecycle, paper).await?;
    crash(&lifecycle, paper).await?;
    clean_end(&lifecycle, paper).await?;
    let sent = Instant::now();
    let ended = exit.terminated();
    paper.call("exit.whenTerminated, from the service", sent, Expected::Ok, ended, show_exit).await.map(drop)
}

async fn nothing_created(lifecycle: &Lifecycle, paper: &mut Paper<'_>) -> Outcome {
    let not_created = Expected::Refused(GuestError::NotCreated);
    let sent = Instant::now();
    paper.call("run", sent, not_created, lifecycle.run(), ok).await?;
    let sent = Instant::now();
    paper.call("bind", sent, not_created, lifecycle.bind().bound(), ok).await?;
    let sent = Instant::now();
    paper.call("control", sent, not_created, lifecycle.control().opened(), ok).await?;
    let sent = Instant::now();
    let stopped = lifecycle.stop();
    paper
        .call("stop", sent, Expected::Ok, stopped, |()| "ok: there was nothing to stop".into())
        .await
        .map(drop)
}

async fn refused_configs(lifecycle: &Lifecycle, paper: &mut Paper<'_>) -> Outcome {
    paper.heading("2  Configs that cannot be")?;
    paper.explain(REFUSED)?;
    let nothing = GuestConfig { cpus: 0, memory: MemoryConfig::of_bytes(4096), ..config(None) };
    let sent = Instant::now();
    let created = lifecycle.create(&nothing);
    let what = "create: no kernel, 0 VPs, 4 KiB of memory";
    paper.call(what, sent, Expected::Refused(GuestError::BadConfig), created, ok).await?;
    let text = in_memory(
        "no kernel",
        b"This is no kernel, but a text of some length that somebody passed by mistake.\n",
    )?;
    let sent = Instant::now();
    let created = lifecycle.create(&config(Some(lifecycle.file(text))));
    let what = "create: a kernel that is a text";
    paper.call(what, sent, Expected::Refused(GuestError::KernelLoadFailure), created, ok).await?;
    let sent = Instant::now();
    paper.call("run", sent, Expected::Refused(GuestError::NotCreated), lifecycle.run(), ok).await.map(drop)
}

async fn life(lifecycle: &Lifecycle, paper: &mut Paper<'_>) -> Outcome {
    paper.heading("3  A life")?;
    paper.explain(FLIGHT)?;
    let sent = Instant::now();
    let created = lifecycle.create(&config(Some(kernel(lifecycle)?)));
    let guest = lifecycle.bind();
    let other = lifecycle.bind();
    let mut serial = Serial::open(&guest);
    let running = lifecycle.run();
    paper.call("create: 1 VP, 64 MiB, the built-in guest", sent, Expected::Ok, created, ok).await?;
    paper.call("bind", sent, Expected::Ok, guest.bound(), ok).await?;
    paper.call("bind again: as many as like", sent, Expected::Ok, other.bound(), ok).await?;
    paper.call("guest.getSerial", sent, Expected::Ok, serial.input().opened(), ok).await?;
    let ready = serial.line("READY");
    paper.call("run: the guest's first line", sent, Expected::Ok, ready, said).await?;
    while_running(lifecycle, &guest, &mut serial, paper).await?;

    paper.explain(STOPPED)?;
    let told = guest.terminated();
    let stop = Instant::now();
    paper.call("stop", stop, Expected::Ok, lifecycle.stop(), ok).await?;
    let forced = Expected::Refused(GuestError::ControllerForcedHalt);
    paper.call("run, pending since the start of 3", sent, forced, running, ok).await?;
    paper.call("guest.whenTerminated", stop, Expected::Ok, told, show_exit).await?;
    let again = Instant::now();
    paper.call("run", again, Expected::Refused(GuestError::NotCreated), lifecycle.run(), ok).await.map(drop)
}

async fn while_running(
    lifecycle: &Lifecycle,
    guest: &Guest,
    serial: &mut Serial,
    paper: &mut Paper<'_>,
) -> Outcome {
    say(serial, "echo hello from the guest", "hello", paper).await?;
    paper.explain(RUNNING)?;
    let already = Expected::Refused(GuestError::AlreadyRunning);
    let again = config(Some(kernel(lifecycle)?));
    let sent = Instant::now();
    paper.call("create while it runs", sent, already, lifecycle.create(&again), ok).await?;
    let sent = Instant::now();
    paper.call("run a second time", sent, already, lifecycle.run(), ok).await?;

    operate(&lifecycle.control(), guest, serial, paper).await
}

async fn operate(control: &Control, guest: &Guest, serial: &mut Serial, paper: &mut Paper<'_>) -> Outcome {
    let sent = Instant::now();
    paper
        .call(
            "control.resume, though not paused",
            sent,
            Expected::Refused(GuestError::NotRunning),
            control.resume(),
            ok,
        )
        .await?;
    let sent = Instant::now();
    paper.call("control.pause", sent, Expected::Ok, control.pause(), ok).await?;
    let sent = Instant::now();
    paper.call("observer.state", sent, Expected::Ok, guest.observer().state(), show_state).await?;
    let sent = Instant::now();
    paper.call("control.resume", sent, Expected::Ok, control.resume(), ok).await?;
    say(serial, "echo still here", "still here", paper).await?;
    let sent = Instant::now();
    paper.call("control.reset", sent, Expected::Ok, control.reset(), ok).await?;
    let ready = serial.line("READY").await?;
    paper.note("the guest wrote", &ready)?;
    let sent = Instant::now();
    paper.call("observer.state", sent, Expected::Ok, guest.observer().state(), show_state).await.map(drop)
}

async fn crash(lifecycle: &Lifecycle, paper: &mut Paper<'_>) -> Outcome {
    paper.heading("4  A crash")?;
    paper.explain(CRASH)?;
    let (sent, running, told) = start(lifecycle, "crash", paper).await?;
    let crashed = Expected::Refused(GuestError::VcpuRuntimeFailure);
    paper.call("run", sent, crashed, running, ok).await?;
    paper.call("guest.whenTerminated", sent, Expected::Ok, told, show_how).await.map(drop)
}

async fn clean_end(lifecycle: &Lifecycle, paper: &mut Paper<'_>) -> Outcome {
    paper.heading("5  A clean end")?;
    paper.explain(CLEAN)?;
    let (sent, running, told) = start(lifecycle, "poweroff", paper).await?;
    paper.call("run", sent, Expected::Ok, running, ok).await?;
    paper.call("guest.whenTerminated", sent, Expected::Ok, told, show_exit).await.map(drop)
}

/// Boots another guest in one flight and types this command.
async fn start(
    lifecycle: &Lifecycle,
    command: &str,
    paper: &mut Paper<'_>,
) -> Outcome<(Instant, guest_client::Call<()>, guest_client::Call<Exit>)> {
    let sent = Instant::now();
    let created = lifecycle.create(&config(Some(kernel(lifecycle)?)));
    let guest = lifecycle.bind();
    let mut serial = Serial::open(&guest);
    let told = guest.terminated();
    let running = lifecycle.run();
    paper.call("create, bind, getSerial, run", sent, Expected::Ok, created, ok).await?;
    serial.line("READY").await?;
    paper.note("typed on its serial line", command)?;
    serial.input().write(format!("{command}\n").as_bytes()).await?;
    Ok((sent, running, told))
}

async fn say(serial: &mut Serial, command: &str, answer: &str, paper: &mut Paper<'_>) -> Outcome {
    let sent = Instant::now();
    let spoken = async {
        serial.input().write(format!("{command}\n").as_bytes()).await?;
        serial.line(answer).await
    };
    paper.call(&format!("serial.write {command:?}"), sent, Expected::Ok, spoken, said).await.map(drop)
}

fn kernel(lifecycle: &Lifecycle) -> Outcome<FileSource> {
    Ok(lifecycle.file(builtin_guest()?))
}

fn config(kernel: Option<FileSource>) -> GuestConfig {
    GuestConfig::new(kernel, MEMORY)
}

fn ok(_: &()) -> String {
    "ok".into()
}

fn said(line: &String) -> String {
    format!("ok: {line}")
}

fn show_how(exit: &Exit) -> String {
    format!("ok: {}", exit.outcome.name())
}

fn show_exit(exit: &Exit) -> String {
    let detail = if exit.detail.is_empty() { String::new() } else { format!(", {}", exit.detail) };
    format!("{}{detail}", show_how(exit))
}

fn show_state(state: &GuestState) -> String {
    let vps: Vec<_> = state.vps.iter().map(|vp| vp.name()).collect();
    let units: Vec<_> = state.units.iter().map(|unit| &unit.name[..]).collect();
    format!(
        "ok: {}, VPs {}, resets {}, up {}, units {}",
        state.phase.name(),
        vps.join(" "),
        state.resets,
        in_words(std::time::Duration::from_micros(state.uptime_us)),
        units.join(" ")
    )
}
