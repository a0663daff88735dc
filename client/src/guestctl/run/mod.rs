//! `guestctl run`: a guest from its launch to its last byte.
//!
//! Launch, create, bind, getSerial and run leave in one flight; then the command waits for whatever comes first: the guest's
//! end, a signal, the user leaving, a reader of the output that goes away. All but the first stop the guest by force, and a
//! second signal gives up waiting even for that.

mod files;
mod input;
mod output;
mod report;
mod terminal;
mod vsock;
mod window;

use crate::ending::{Outcome, Trouble};
use crate::options::{Attachment, Options, Run};
use crate::out::Out;
use crate::service;
use crate::signals::Signals;
use files::{Files, Source};
use guest_client::{
    Call, ClientError, DevicesConfig, Exit, FileSource, GuestConfig, GuestExit, Launched, Lifecycle,
    MemoryConfig,
};
use input::Input;
use output::Output;
use report::{Clock, Ended, Timings};
use std::time::Duration;
use tokio::task::JoinHandle;
use window::Window;

pub use files::{builtin_guest, in_memory};
pub use report::Report;
pub use vsock::{Bridge, VsockOption};

/// How long the service may take to tell how a guest ended whose channel was lost.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a user's leaving counts as: SIGINT.
const LEFT: i32 = 2;

/// Boots a guest and stays until it has ended.
pub async fn run(options: &Options, run: &Run, out: &Out) -> Outcome {
    if let Some(missing) = run.missing() {
        return Err(Trouble::Usage(missing));
    }
    let files = Files::open(run)?;
    let bridge = run.devices.vsock.as_ref().map(Bridge::open).transpose()?;
    let mut signals = Signals::watch()?;
    let launcher = service::running_or_private(options).await?;
    let clock = Clock::start();
    let host = &launcher.host;
    let launched = if run.proxied { host.launch_proxied(&run.name) } else { host.launch(&run.name)? };
    let seat = Seat { name: &run.name, attach: &run.attach, no_stdin: run.no_stdin };
    let config = |lifecycle: &Lifecycle| config(run, files, lifecycle);
    let report = Life::begin(clock, launched, config, bridge, &seat, out)?.live(&mut signals).await?;
    unless_interrupted(launcher.close(), &mut signals).await?;
    report.tell(run.json)
}

/// Lets a guest go on that was launched from a snapshot, and stays until it has ended. `bridge` is to its vsock device.
pub async fn go_on(
    launched: Launched,
    config: impl FnOnce(&Lifecycle) -> Outcome<GuestConfig>,
    bridge: Option<Bridge>,
    seat: &Seat<'_>,
    signals: &mut Signals,
    out: &Out,
) -> Outcome<Report> {
    Life::begin(Clock::start(), launched, config, bridge, seat, out)?.live(signals).await
}

/// What of a guest is here, and what it is called.
pub struct Seat<'a> {
    pub name: &'a str,
    pub attach: &'a Attachment,
    pub no_stdin: bool,
}

/// Does this, unless a signal comes first.
async fn unless_interrupted<T>(work: impl Future<Output = T>, signals: &mut Signals) -> Outcome<T> {
    tokio::select! {
        done = work => Ok(done),
        signal = signals.next() => Err(Trouble::Interrupted(signal)),
    }
}

/// A call's answer and when it came.
type Timed<T> = JoinHandle<(Duration, Result<T, ClientError>)>;

/// A guest whose whole life has been asked for.
struct Life {
    clock: Clock,
    name: String,
    lifecycle: Lifecycle,
    exit: GuestExit,
    launched: Timed<String>,
    created: Timed<()>,
    terminated: Call<Exit>,
    running: Call<()>,
    output: Output,
    input: Input,
    _bridge: Option<Bridge>,
    _window: Option<Window>,
}

impl Life {
    /// Sends create, bind, getSerial and run behind a launch.
    fn begin(
        clock: Clock,
        launched: Launched,
        config: impl FnOnce(&Lifecycle) -> Outcome<GuestConfig>,
        mut bridge: Option<Bridge>,
        seat: &Seat<'_>,
        out: &Out,
    ) -> Outcome<Self> {
        let Launched { lifecycle, exit, id } = launched;
        let mut output = Output::start(out, clock)?;
        let mut config = config(&lifecycle)?;
        config.devices.vsock = bridge.as_mut().map(Bridge::config);
        let created = timed(clock, lifecycle.create(&config));
        let guest = lifecycle.bind();
        if let Some(bridge) = &mut bridge {
            bridge.serve(guest.vsock());
        }
        let (stream, window) = match seat.attach {
            Attachment::Serial => (guest.serial(output.sink()), None),
            Attachment::Port(name) => (guest.console_port(name, output.sink()), None),
            Attachment::Console => (guest.console(output.sink()), Window::follow(&guest)?),
        };
        Ok(Self {
            clock,
            name: seat.name.to_owned(),
            exit,
            launched: timed(clock, id),
            created,
            terminated: guest.terminated(),
            running: lifecycle.run(),
            output,
            input: Input::start(stream, seat.no_stdin)?,
            _window: window,
            lifecycle,
            _bridge: bridge,
        })
    }

    /// Stays until the guest has ended and all its output was written.
    async fn live(mut self, signals: &mut Signals) -> Outcome<Report> {
        let (result, interruption) = self.run_to_its_end(signals).await?;
        let written = unless_interrupted(self.output.written(), signals).await?;
        // Gives the terminal back.
        drop(self.input);
        let (created_at, created) = self.created.await.map_err(|_| no_answer())?;
        let launched = self.launched.await.ok();
        let ended = how_it_ended(result, created, self.terminated, &self.exit);
        let ended = unless_interrupted(ended, signals).await?;
        let launched_at = launched.as_ref().map(|(at, _)| *at);
        Ok(Report {
            id: launched.and_then(|(_, id)| id.ok()).unwrap_or(self.name),
            ended,
            lost: written.lost,
            timings: Timings::new(launched_at, created_at, written.first_byte, self.clock.now()),
            interruption: interruption.or(written.error),
        })
    }

    /// The answer of run, and what made this side stop the guest, if anything did.
    async fn run_to_its_end(
        &mut self,
        signals: &mut Signals,
    ) -> Outcome<(Result<(), ClientError>, Option<Trouble>)> {
        let trouble = tokio::select! {
            result = &mut self.running => return Ok((result, None)),
            signal = signals.next() => Trouble::Interrupted(signal),
            () = self.input.left() => Trouble::Interrupted(LEFT),
            trouble = self.output.failed() => trouble,
        };
        // Held until the guest has ended, which is all that is wanted of it.
        let _stopped = self.lifecycle.stop();
        let result = unless_interrupted(&mut self.running, signals).await?;
        Ok((result, Some(trouble)))
    }
}

fn config(run: &Run, files: Files, lifecycle: &Lifecycle) -> Outcome<GuestConfig> {
    let devices = files.devices.config(lifecycle)?;
    match files.source {
        Source::Boot { kernel, initrd } => {
            let (kernel, ramdisk) = (lifecycle.file(kernel), initrd.map(|initrd| lifecycle.file(initrd)));
            Ok(GuestConfig { ramdisk, ..booted(run, kernel, devices) })
        }
        Source::Saved { file, base } => {
            let base = base.map(|base| lifecycle.file(base));
            Ok(GuestConfig { devices, ..GuestConfig::restored(lifecycle.file(file), base) })
        }
    }
}

fn booted(run: &Run, kernel: FileSource, devices: DevicesConfig) -> GuestConfig {
    GuestConfig {
        cmdline: run.cmdline.clone(),
        cpus: run.cpus,
        affinity: run.cpu_affinity.clone().unwrap_or_default(),
        cpuid_mask: run.cpuid_mask.clone(),
        memory: MemoryConfig {
            bytes: run.memory,
            huge_pages: run.huge_pages,
            prefault: run.prefault,
            lock: run.lock_memory,
        },
        on_reset: run.on_reset.into(),
        devices,
        catch_up_time: run.catch_up_time,
        debug_exit: run.debug_exit,
        ..GuestConfig::new(Some(kernel), run.memory)
    }
}

/// Notes when the answer comes, whoever waits for it later.
fn timed<T: 'static>(clock: Clock, call: Call<T>) -> Timed<T> {
    tokio::task::spawn_local(async move {
        let answer = call.await;
        (clock.now(), answer)
    })
}

/// Puts together what the lifecycle, the guest and the service know about the end.
async fn how_it_ended(
    run: Result<(), ClientError>,
    create: Result<(), ClientError>,
    terminated: Call<Exit>,
    exit: &GuestExit,
) -> Ended {
    if let Err(ClientError::Refused(failure)) = create {
        return Ended::Refused(failure);
    }
    let known = match &run {
        // The guest may have gone before it could tell; the service knows of crashes, too.
        Err(ClientError::Lost(_) | ClientError::Protocol(_)) => {
            tokio::time::timeout(LAST_WORDS, exit.terminated()).await.unwrap_or_else(|_| Err(no_words()))
        }
        _ => terminated.await,
    };
    match (known, run) {
        (Ok(exit), _) => Ended::Exit(exit),
        (Err(_), Ok(())) => Ended::Exit(Exit::clean("")),
        (Err(_), Err(ClientError::Refused(failure))) => Ended::Exit(Exit::crashed(&failure)),
        (Err(_), Err(error)) => Ended::Lost(error.to_string()),
    }
}

fn no_words() -> ClientError {
    ClientError::Lost("the service did not tell how the guest ended".into())
}

fn no_answer() -> Trouble {
    ClientError::Lost("the answer of create was lost".into()).into()
}
