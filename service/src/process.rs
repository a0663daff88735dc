//! The process of a VMM: its private channel, its log, its end. A lease is attached to it by [`crate::launch`], at once or later.

use crate::log::{Label, follow_log};
use crate::{ServiceConfig, ServiceError};
use capnp_rpc::rpc_twoparty_capnp::Side;
use guest_schema::vmm_capnp::vmm;
use guest_schema::{Failure, GuestError, GuestShape};
use guest_transport::{Connection, Descriptors, Limits};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::rc::Rc;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, spawn_local};

/// The guest-vmm that is started, and how.
pub(crate) struct Program {
    path: PathBuf,
    arguments: [String; 4],
}

impl Program {
    /// The one that the config names, which was looked for already, or the first that is found.
    pub fn of(config: &ServiceConfig) -> Result<Self, ServiceError> {
        let path = find(config.vmm.as_deref())?;
        let arguments = ["--hypervisor", &config.hypervisor, "--log", &config.vmm_log].map(str::to_owned);
        Ok(Self { path, arguments })
    }

    /// Starts a process. Whether it can be used shows only once it answers.
    ///
    /// # Errors
    /// `failedServiceConnect` if the system starts none.
    pub fn start(&self) -> Result<Rc<Process>, Failure> {
        let (ours, theirs) = UnixStream::pair().map_err(|error| self.failed("no socket pair", &error))?;
        let channel = Connection::client(ours, Limits::of_client());
        let channel = channel.map_err(|error| self.failed("no channel", &error))?;
        let child = self.spawn(theirs.into()).map_err(|error| self.failed("cannot be started", &error))?;
        Ok(Process::new(child, channel))
    }

    /// A failure to start one.
    pub fn failed(&self, what: &str, error: &std::io::Error) -> Failure {
        Failure::new(GuestError::FailedServiceConnect, format!("{}: {what}: {error}", self.path.display()))
    }

    /// Its channel is its standard input: no descriptor has to be placed by number.
    fn spawn(&self, channel: OwnedFd) -> std::io::Result<Child> {
        Command::new(&self.path)
            .args(&self.arguments)
            .stdin(Stdio::from(channel))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A terminal's Ctrl-C is for its client, who decides what becomes of the guest.
            .process_group(0)
            .spawn()
    }
}

fn find(named: Option<&Path>) -> Result<PathBuf, ServiceError> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let beside =
        std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned)).unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(beside.clone())
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join("guest-vmm"))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| ServiceError::NoVmm { beside: beside.display().to_string() })
}

/// How a process ended.
#[derive(Debug, Clone)]
pub(crate) struct End {
    /// Unknown if the system does not tell.
    pub status: Option<ExitStatus>,
    /// The end of its log.
    pub log: String,
}

/// A VMM's process and the private channel to it.
pub(crate) struct Process {
    pub pid: u32,
    pub vmm: vmm::Client,
    /// What travels on its channel.
    pub descriptors: Descriptors,
    label: Rc<Label>,
    /// Whether its number may be another's by now.
    reaped: Cell<bool>,
    end: watch::Sender<Option<End>>,
    /// Tells the task that waits for the process to kill it.
    kill: Notify,
}

impl Process {
    fn new(mut child: Child, mut connection: Connection) -> Rc<Self> {
        let pid = child.id().unwrap_or(0);
        let process = Rc::new(Self {
            pid,
            vmm: connection.bootstrap(Side::Server),
            descriptors: connection.descriptors(),
            label: Rc::new(Label::new(pid)),
            reaped: Cell::new(false),
            end: watch::Sender::new(None),
            kill: Notify::new(),
        });
        let log = spawn_local(follow_log(process.label.clone(), child.stderr.take()));
        spawn_local(process.clone().carry(connection));
        spawn_local(process.clone().reap(child, log));
        process
    }

    /// It is this guest's from now on; its log says so.
    pub fn belongs_to(&self, guest: &str) {
        self.label.name(guest);
    }

    /// Resolves once the VMM answers on its channel, or to false when it never will.
    pub async fn answers(&self) -> bool {
        // That there is no guest to observe yet is an answer.
        let answer = self.vmm.observer_request().send().promise;
        tokio::select! {
            biased;
            _ = self.ended() => false,
            answer = answer => answer.is_ok(),
        }
    }

    /// Has it make memory, partition and VPs for a guest of this shape ahead; resolves once they are there.
    ///
    /// # Errors
    /// What the VMM says, or why it does not: for logs.
    pub async fn prepare(&self, shape: &GuestShape) -> Result<(), String> {
        let mut request = self.vmm.prepare_request();
        shape.write(request.get().init_shape());
        let answer = request.send().promise.await.map_err(|error| error.to_string())?;
        let result = answer.get().and_then(|results| results.get_result()).and_then(Failure::read_result);
        result.map_err(|error| error.to_string())?.map_err(|failure| failure.chain())
    }

    /// Whether it has not ended yet, whoever knows of it. One that is killed at this moment may still run.
    pub fn runs(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let pid = Pid::from_raw(self.pid.cast_signed()).filter(|_| !self.reaped.get());
        pid.is_some_and(|pid| matches!(waitid(WaitId::Pid(pid), options), Ok(None)))
    }

    /// Resolves once it has ended.
    pub async fn ended(&self) -> End {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await.expect("the sender is held by self");
        end.clone().expect("waited for")
    }

    /// Has it killed, if it has not ended.
    pub fn kill(&self) {
        self.kill.notify_one();
    }

    async fn carry(self: Rc<Self>, connection: Connection) {
        let guest = || self.label.as_str();
        match connection.run().await {
            Ok(()) if self.label.is_named() => {
                tracing::debug!(guest = guest(), "the VMM closed its channel");
            }
            // No lease can be attached to it any more.
            Ok(()) => self.kill(),
            Err(error) => {
                tracing::warn!(guest = guest(), %error, "the VMM's channel ended");
                self.kill();
            }
        }
    }

    /// Waits for the end, and tells it. Only here is the process killed: before it is reaped, its number is its own.
    async fn reap(self: Rc<Self>, mut child: Child, log: JoinHandle<String>) {
        let status = tokio::select! {
            status = child.wait() => status,
            () = self.kill.notified() => match child.kill().await {
                Ok(()) => child.wait().await,
                Err(error) => Err(error),
            },
        };
        self.reaped.set(true);
        let (guest, log) = (self.label.as_str(), log.await.unwrap_or_default());
        match &status {
            Ok(status) => tracing::info!(guest, pid = self.pid, %status, "the VMM has ended"),
            Err(error) => tracing::error!(guest, %error, "the VMM's end is unknown"),
        }
        self.end.send_replace(Some(End { status: status.ok(), log }));
    }
}
