//! The command fork: guests that go on from where another one is.
//!
//! All of them are launched, created and run in one flight; then the command stays until the last has ended. It holds their leases: a
//! signal ends them, and a second one gives up waiting for that. What becomes of one is nothing to the others.

use crate::devices::GrantOptions;
use crate::ending::{self, FAILED, Outcome, Trouble};
use crate::guests;
use crate::options::Attachment;
use crate::out::Out;
use crate::run::{Bridge, Seat, go_on};
use crate::signals::Signals;
use clap::Args;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use guest_client::{Call, ClientError, Exit, GuestConfig, Host, Launched, Lifecycle, Snapshot, SnapshotInfo};
use serde_json::json;
use tokio::sync::watch;

const FORK: &str = "\
The guest pauses for a moment, and runs on. Its forks begin with its memory and what its processors and devices were doing, each with \
an id of its own, which is printed once it runs; how one has ended goes to the standard error. What one writes to its memory, no other \
sees. Each is given its disks and networks anew: an image that the guest itself writes cannot be one of them.

The forks are this command's: it stays until the last has ended, and Ctrl-C ends them. It fails if one of them fails, as run does.

--json prints one object a line: id and event, which is running or ended, then with outcome, code and detail as run --json has them.

Examples:
  guestctl fork web
  guestctl fork web --attach                                    (its terminal is here; Ctrl-] q leaves)
  guestctl fork web --count 10 --name worker                    (worker-1 to worker-10)
  guestctl fork web --count 3 --disk path=copy.img,volatile=on --net passt
  guestctl fork web --vsock path=web-2.sock                     (run --help says what is sent there)";

/// `guestctl fork`.
#[derive(Debug, Args)]
#[command(after_help = FORK)]
pub struct Fork {
    /// The guest's id, or a unique beginning of it
    pub id: String,
    /// How many guests
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub count: u32,
    /// Their ids: PREFIX-1, PREFIX-2 and so on, or PREFIX of one with --attach [default: the service chooses them]
    #[arg(long, value_name = "PREFIX")]
    pub name: Option<String>,
    /// Have the one fork's serial line here, as `run` has, or with a value what `run --attach` takes
    #[arg(
        long,
        value_name = "WHAT",
        num_args = 0..=1,
        default_missing_value = "serial",
        value_parser = Attachment::parse,
        conflicts_with_all = ["count"]
    )]
    pub attach: Option<Attachment>,
    /// Print what becomes of them as JSON
    #[arg(long)]
    pub json: bool,
    /// Speak to them through the service, as a client does that cannot pass descriptors
    #[arg(long)]
    pub proxied: bool,
    #[command(flatten)]
    pub grants: GrantOptions,
}

impl Fork {
    /// The ids to launch under, empty for one that the service chooses.
    pub fn ids(&self) -> impl Iterator<Item = String> {
        let id = |number| self.name.as_ref().map_or_else(String::new, |name| format!("{name}-{number}"));
        (1..=self.count).map(id)
    }

    fn launch(&self, snapshot: &Snapshot, id: &str) -> Outcome<Launched> {
        Ok(if self.proxied { snapshot.launch_proxied(id)? } else { snapshot.launch(id)? })
    }

    /// What its vsock device is reached by.
    fn bridge(&self) -> Outcome<Option<Bridge>> {
        self.grants.vsock.as_ref().map(Bridge::open).transpose()
    }

    /// What a fork is granted.
    fn config(&self, lifecycle: &Lifecycle) -> Outcome<GuestConfig> {
        let devices = self.grants.open()?.config(lifecycle)?;
        Ok(GuestConfig { devices, ..GuestConfig::new(None, 0) })
    }
}

/// Launches guests from a snapshot of this one, and stays until they have ended.
pub async fn fork(host: &Host, options: &Fork, out: &Out) -> Outcome {
    let mut signals = Signals::watch()?;
    let snapshot = tokio::select! {
        taken = take(host, options) => taken?,
        signal = signals.next() => return Err(Trouble::Interrupted(signal)),
    };
    if let Some(attach) = &options.attach {
        return attached(&snapshot, options, attach, &mut signals, out).await;
    }
    let (stop, stopping) = watch::channel(false);
    let lives = options.ids().map(|id| Life::begin(&snapshot, options, &id));
    let lives = lives.collect::<Outcome<Vec<_>>>()?;
    let mut lives: FuturesUnordered<_> =
        lives.into_iter().map(|life| life.live(Tell { out, json: options.json }, stopping.clone())).collect();
    // The guests have what they need of it, and it holds as much memory as they do not share any more.
    drop(snapshot);
    let (mut worst, mut interrupted) = (Ok(()), None);
    loop {
        tokio::select! {
            ended = lives.next() => match ended {
                Some(ended) => worst = worst.and(ended?),
                None => return interrupted.map_or(worst, |signal| Err(Trouble::Interrupted(signal))),
            },
            signal = signals.next() => {
                if interrupted.replace(signal).is_some() {
                    return Err(Trouble::Interrupted(signal));
                }
                stop.send_replace(true);
            }
        }
    }
}

/// One guest that goes on with its terminal here.
async fn attached(
    snapshot: &Snapshot,
    options: &Fork,
    attach: &Attachment,
    signals: &mut Signals,
    out: &Out,
) -> Outcome {
    let name = options.name.as_deref().unwrap_or_default();
    let bridge = options.bridge()?;
    let launched = options.launch(snapshot, name)?;
    let seat = Seat { name, attach, no_stdin: false };
    let report = go_on(launched, |lifecycle| options.config(lifecycle), bridge, &seat, signals, out).await?;
    report.tell(options.json)
}

/// A snapshot of the guest, whose devices are all granted.
async fn take(host: &Host, options: &Fork) -> Outcome<Snapshot> {
    let found = host.find(&options.id).await?;
    let snapshot = found.control.snapshot().await?;
    match unmet(options, &found.id, &snapshot.info().await?) {
        Some(problem) => Err(Trouble::Usage(problem)),
        None => Ok(snapshot),
    }
}

/// What of the snapshot's devices is not granted as it has to be.
fn unmet(options: &Fork, id: &str, info: &SnapshotInfo) -> Option<String> {
    let (disks, networks) = (options.grants.disk.len(), options.grants.net.len());
    let has = |what: &str, count: usize, option: &str| {
        Some(format!("{id} has {count} {what}: it takes as many {option}, in the same order"))
    };
    if disks != info.disks.len() {
        let named =
            if info.disks.is_empty() { String::new() } else { format!(" ({})", info.disks.join(", ")) };
        return has(&format!("disks{named}"), info.disks.len(), "--disk");
    }
    if networks != info.networks as usize {
        return has("network devices", info.networks as usize, "--net");
    }
    if options.count > 1 && options.grants.vsock.is_some() {
        return Some(format!(
            "--vsock: {} guests cannot have one socket: fork them one by one",
            options.count
        ));
    }
    let written = options.grants.disk.iter().find(|disk| options.count > 1 && disk.is_written());
    written.map(|disk| {
        let (path, count) = (disk.path().display(), options.count);
        format!("--disk path={path}: {count} guests cannot write one image: give volatile=on or readonly=on")
    })
}

/// A guest whose life has been asked for.
struct Life {
    name: String,
    launched: Launched,
    created: Call<()>,
    _running: Call<()>,
    _bridge: Option<Bridge>,
}

impl Life {
    /// Sends launch, create and run.
    fn begin(snapshot: &Snapshot, options: &Fork, id: &str) -> Outcome<Self> {
        let mut bridge = options.bridge()?;
        let launched = options.launch(snapshot, id)?;
        let mut config = options.config(&launched.lifecycle)?;
        config.devices.vsock = bridge.as_mut().map(Bridge::config);
        let created = launched.lifecycle.create(&config);
        if let Some(bridge) = &mut bridge {
            bridge.serve(launched.lifecycle.bind().vsock());
        }
        let running = launched.lifecycle.run();
        Ok(Self { name: id.to_owned(), launched, created, _running: running, _bridge: bridge })
    }

    /// Until it has ended: how, and what there is to say about it is said. Fails if nobody reads that.
    async fn live(mut self, tell: Tell<'_>, stopping: watch::Receiver<bool>) -> Outcome<Outcome> {
        let ended = match self.start().await {
            Ok(()) => {
                tell.runs(&self.name)?;
                self.end(stopping).await
            }
            Err(error) => Err(error),
        };
        match ended {
            Ok(exit) => tell.ended(&self.name, &exit).map(|()| ending::of_guest(&exit)),
            Err(error) => {
                let who = if self.name.is_empty() { "a fork" } else { &self.name };
                eprintln!("guestctl: {who}: {}", Trouble::from(error).text().unwrap_or_default());
                Ok(Err(Trouble::Told(FAILED)))
            }
        }
    }

    async fn start(&mut self) -> Result<(), ClientError> {
        self.name = (&mut self.launched.id).await?;
        (&mut self.created).await
    }

    async fn end(&self, mut stopping: watch::Receiver<bool>) -> Result<Exit, ClientError> {
        let mut ended = self.launched.exit.terminated();
        tokio::select! {
            exit = &mut ended => exit,
            _ = stopping.wait_for(|stop| *stop) => {
                // Held until the guest has ended, which is all that is wanted of it.
                let _stopped = self.launched.lifecycle.stop();
                ended.await
            }
        }
    }
}

/// Who tells what becomes of the guests.
struct Tell<'a> {
    out: &'a Out,
    json: bool,
}

impl Tell<'_> {
    fn runs(&self, id: &str) -> Outcome {
        let line =
            if self.json { json!({ "id": id, "event": "running" }).to_string() } else { id.to_owned() };
        self.out.write(format!("{line}\n").as_bytes())
    }

    fn ended(&self, id: &str, exit: &Exit) -> Outcome {
        if !self.json {
            eprint!("guestctl: {}", guests::end(id, exit));
            return Ok(());
        }
        let (outcome, code) = (exit.outcome.name(), exit.code.map(|code| code.name()));
        let detail = (!exit.detail.is_empty()).then_some(&exit.detail);
        let event = json!({ "id": id, "event": "ended", "outcome": outcome, "code": code, "detail": detail });
        self.out.write(format!("{event}\n").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use crate::options::{Command, Options};
    use clap::Parser;

    #[test]
    fn forks_have_ids_of_their_own() {
        let ids = |arguments: &[&str]| {
            let words = ["guestctl", "fork", "web"].into_iter().chain(arguments.iter().copied());
            match Options::try_parse_from(words)?.command {
                Command::Fork(fork) => Ok(fork.ids().collect::<Vec<_>>()),
                other => panic!("not fork: {other:?}"),
            }
        };
        assert_eq!(ids(&[]).expect("valid"), [""]);
        assert_eq!(ids(&["--count", "2"]).expect("valid"), ["", ""]);
        assert_eq!(ids(&["--count=3", "--name=a"]).expect("valid"), ["a-1", "a-2", "a-3"]);
        for count in ["0", "257", "many"] {
            let error: clap::Error = ids(&["--count", count]).expect_err("refused");
            assert!(error.to_string().contains(count), "{error}");
        }
    }
}
