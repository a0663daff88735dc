//! Where a story of a guest's life is played: on a scripted processor or on KVM, over a guest's own channel or through the service.

use std::fmt::Debug;
use std::fs::File;
use std::io::Write;

use anyhow::{Context, anyhow};
use guest_client::{ByteStream, ClientError, Guest, GuestExit, Host, Launched, Lifecycle, Snapshot};
use guest_schema::{GuestConfig, GuestError};
use processor::scripted::Script;
use rustix::fs::{MemfdFlags, SealFlags};

use crate::console::Console;
use crate::service::{PATIENCE, Service, ServiceError};
use crate::{census, wait};

/// What a story comes to.
pub type Story = anyhow::Result<()>;

/// Plays a story on a runtime of its own, on this thread.
pub fn play(story: impl Future<Output = Story>) -> Story {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, story)
}

/// Plays a story on a stage; a failure is told with the end of the service's log.
pub fn play_on<F: Future<Output = Story>>(stage: Stage, story: impl FnOnce(Stage) -> F) -> Story {
    let log = stage.service.process().stderr().clone();
    play(story(stage)).map_err(|error| anyhow!("{error:#}\nthe service's log:\n{}", log.tail(LOG_LINES)))
}

/// How many lines of a log are shown with a failure.
const LOG_LINES: usize = 40;

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A script, on a processor that needs no hypervisor.
    Scripted,
    /// The built-in guest, on KVM.
    BuiltIn,
}

/// How the client holds the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// On a channel of its own.
    Direct,
    /// Through the service.
    Proxied,
}

/// What the guest does on its cue, after it has written `READY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Powers itself off.
    PowerOff,
    /// Resets itself.
    Reset,
    /// Does what no VP survives.
    Crash,
    /// Has its VP fault for a reason of a hypervisor's; scripts only.
    Fault(&'static str),
    /// Has its VP end in a triple fault.
    TripleFault,
    /// Hibernates itself (ACPI S4); scripts only.
    Hibernate,
    /// Writes [`DEBUG_EXIT`] to its debug-exit port.
    DebugExit,
    /// Runs without an end.
    Spin,
    /// Halts, with no interrupt to come.
    Halt,
}

/// What a guest leaves that ends itself by its debug-exit port.
pub const DEBUG_EXIT: u32 = 0x1234;

/// The port of the serial port's data, and the registers that a script powers off and resets by.
const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
const KEYBOARD_COMMAND: u16 = 0x64;
const DEBUG_EXIT_PORT: u16 = 0xf4;

impl Kind {
    /// Its name in test names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scripted => "scripted",
            Self::BuiltIn => "builtin",
        }
    }

    /// What its guests run on.
    pub fn hypervisor(self) -> &'static str {
        match self {
            Self::Scripted => "scripted",
            Self::BuiltIn => "kvm",
        }
    }

    /// A guest that waits for its cue.
    pub fn image(self, act: Act) -> Vec<u8> {
        if self == Self::BuiltIn {
            return builtin_guest::IMAGE.to_vec();
        }
        let mut script = Script::new();
        script.out(SERIAL, b"READY\n").serial_input(SERIAL, 0x80);
        match act {
            Act::PowerOff => script.out(SLEEP_CONTROL, &[0x34]),
            Act::Reset => script.out(KEYBOARD_COMMAND, &[0xfe]),
            Act::Crash => script.fault(),
            Act::Fault(reason) => script.fault_named(reason),
            Act::TripleFault => script.triple_fault(),
            Act::Hibernate => script.out(SLEEP_CONTROL, &[0x30]),
            Act::DebugExit => script.out_long(DEBUG_EXIT_PORT, DEBUG_EXIT),
            Act::Spin => script.out(SERIAL, b"spinning\n").spin(),
            Act::Halt => script.out(SERIAL, b"halting\n").hlt(),
        };
        script.spin();
        script.to_elf()
    }

    /// The input that is the cue.
    pub fn cue(self, act: Act) -> &'static [u8] {
        match (self, act) {
            (Self::Scripted, _) => b"!",
            (Self::BuiltIn, Act::PowerOff) => b"poweroff\n",
            (Self::BuiltIn, Act::Reset) => b"reset\n",
            (Self::BuiltIn, Act::Crash | Act::TripleFault) => b"crash\n",
            (Self::BuiltIn, Act::Fault(_) | Act::Hibernate) => panic!("played on scripts only: {act:?}"),
            (Self::BuiltIn, Act::DebugExit) => b"debug-exit 4660\n",
            (Self::BuiltIn, Act::Spin) => b"spin\n",
            (Self::BuiltIn, Act::Halt) => b"halt\n",
        }
    }
}

/// A stage with a service on it.
pub struct Stage {
    /// What runs its guests.
    pub kind: Kind,
    /// How they are held.
    pub channel: Channel,
    /// The service.
    pub service: Service,
}

impl Stage {
    /// Sets the stage up. `faults` are injected into scripted guests, as `guestd --hypervisor scripted,…` takes them.
    pub fn set(kind: Kind, channel: Channel, faults: &str) -> Result<Self, ServiceError> {
        let service = Service::start(&format!("{}{faults}", kind.hypervisor()), &[])?;
        Ok(Self { kind, channel, service })
    }

    /// Launches a VMM. No guest is created yet.
    pub async fn launch(&self, id: &str) -> anyhow::Result<Player> {
        let host = self.service.connect().await?;
        let launched = match self.channel {
            Channel::Direct => host.launch(id)?,
            Channel::Proxied => host.launch_proxied(id),
        };
        self.player(launched, host).await
    }

    /// Launches a VMM whose guest goes on from a snapshot that was taken over a connection. No guest is created yet.
    pub async fn launch_from(&self, snapshot: &Snapshot, host: &Host, id: &str) -> anyhow::Result<Player> {
        let launched = match self.channel {
            Channel::Direct => snapshot.launch(id)?,
            Channel::Proxied => snapshot.launch_proxied(id)?,
        };
        self.player(launched, host.clone()).await
    }

    async fn player(&self, Launched { lifecycle, exit, id }: Launched, host: Host) -> anyhow::Result<Player> {
        Ok(Player { kind: self.kind, id: id.await?, lifecycle, exit, host })
    }
}

/// A client with the lease of one guest.
pub struct Player {
    kind: Kind,
    /// The guest's id.
    pub id: String,
    /// The lease.
    pub lifecycle: Lifecycle,
    /// How it ended, from the service.
    pub exit: GuestExit,
    /// The connection to the service.
    pub host: Host,
}

/// A guest that runs, and its serial port.
pub struct Running {
    /// The guest.
    pub guest: Guest,
    /// What it writes.
    pub console: Console,
    /// What it reads.
    pub input: ByteStream,
    /// The answer of run.
    pub run: guest_client::Call<()>,
}

impl Player {
    /// A config that boots the guest of this stage.
    pub fn config(&self, act: Act) -> anyhow::Result<GuestConfig> {
        Ok(self.config_of(&self.kind.image(act))?)
    }

    /// A config with this kernel.
    pub fn config_of(&self, kernel: &[u8]) -> std::io::Result<GuestConfig> {
        Ok(GuestConfig::new(Some(self.lifecycle.file(sealed_file(kernel)?)), 16 << 20))
    }

    /// Creates the guest, binds to it, opens its serial port and runs it, all in one flight; then waits for its first words.
    pub async fn play(&self, act: Act) -> anyhow::Result<Running> {
        self.play_config(&self.config(act)?).await
    }

    /// The same with any config.
    pub async fn play_config(&self, config: &GuestConfig) -> anyhow::Result<Running> {
        let running = self.run_config(config).await?;
        running.console.saw("READY").await?;
        Ok(running)
    }

    /// The same without waiting for any words.
    pub async fn run_config(&self, config: &GuestConfig) -> anyhow::Result<Running> {
        let created = self.lifecycle.create(config);
        let guest = self.lifecycle.bind();
        let console = Console::default();
        let input = guest.serial(console.writer());
        let run = self.lifecycle.run();
        created.await?;
        Ok(Running { guest, console, input, run })
    }

    /// The process of its VMM.
    pub async fn pid(&self) -> anyhow::Result<u32> {
        let guests = self.host.list().await?;
        let own = guests.iter().find(|guest| guest.id == self.id).context("the guest is not listed")?;
        Ok(own.pid)
    }

    /// Gives a guest its cue.
    pub async fn cue(&self, running: &Running, act: Act) -> Story {
        Ok(running.input.write(self.kind.cue(act)).await?)
    }
}

/// A memfd with this contents, sealed.
pub fn sealed_file(contents: &[u8]) -> std::io::Result<File> {
    let mut file =
        File::from(rustix::fs::memfd_create("image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(contents)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

/// The code that a call was refused with.
///
/// # Errors
/// When it was not refused, or failed in another way.
pub fn refusal<T>(answer: Result<T, ClientError>) -> anyhow::Result<GuestError> {
    Ok(refused(answer)?.0)
}

/// The code and the words that a call was refused with, causes included.
///
/// # Errors
/// When it was not refused, or failed in another way.
pub fn refused<T>(answer: Result<T, ClientError>) -> anyhow::Result<(GuestError, String)> {
    match answer {
        Err(ClientError::Refused(failure)) => Ok((failure.code, failure.chain())),
        Err(other) => Err(other.into()),
        Ok(_) => Err(anyhow!("the call was not refused")),
    }
}

/// A check of a story.
///
/// # Errors
/// What was found instead.
#[expect(clippy::needless_pass_by_value, reason = "values are made where they are checked")]
pub fn expect<T: PartialEq + Debug>(what: &str, found: T, expected: T) -> Story {
    if found == expected {
        return Ok(());
    }
    Err(anyhow!("{what}: {found:?} where {expected:?} was expected"))
}

/// A check that a text says something.
///
/// # Errors
/// The text.
pub fn says(text: &str, words: &str) -> Story {
    if text.contains(words) {
        return Ok(());
    }
    Err(anyhow!("{text:?} does not say {words:?}"))
}

/// Waits until a process has ended.
///
/// # Errors
/// When it still runs after [`PATIENCE`].
pub async fn gone(pid: u32) -> Story {
    let ended = || async { !census::runs(pid) };
    Ok(wait::until_async(&format!("process {pid} to end"), PATIENCE, ended).await?)
}
