//! A private guestd, in a folder of its own, that dies with the tests.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use guest_client::{ConnectError, Host};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::process::{Process, ProcessError, Stdin};

/// How long anything that a test waits for may take, however slow the machine: a test that runs into it has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Why there is no service.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The programs of the workspace are not built.
    #[error("{0}: not built; `cargo build --workspace --bins` builds it")]
    NotBuilt(PathBuf),
    /// There is no folder for the socket.
    #[error("no temporary folder")]
    Folder(#[source] std::io::Error),
    /// guestd did not start.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// A program of the workspace, built beside the running executable.
pub fn program(name: &str) -> Result<PathBuf, ServiceError> {
    let exe = std::env::current_exe().map_err(ServiceError::Folder)?;
    let folder = exe.parent().unwrap_or(Path::new("/"));
    // Cargo puts the executables of tests one folder below the programs.
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let path = folder.join(name);
    if path.is_file() { Ok(path) } else { Err(ServiceError::NotBuilt(path)) }
}

/// A running guestd.
pub struct Service {
    process: Process,
    folder: TempDir,
}

impl Service {
    /// Starts guestd on a socket in a new folder and waits until it listens. `hypervisor` is what its guests run on, as
    /// `guestd --hypervisor` takes it; `arguments` follow. No VMM is kept ready: every process is a guest's.
    pub fn start(hypervisor: &str, arguments: &[&str]) -> Result<Self, ServiceError> {
        Self::start_logging("debug", hypervisor, arguments)
    }

    /// The same with another log filter than `debug`: one that shows `info` of guestd itself.
    pub fn start_logging(log: &str, hypervisor: &str, arguments: &[&str]) -> Result<Self, ServiceError> {
        Self::start_all(log, hypervisor, 0, arguments)
    }

    /// The same with so many VMMs that are kept ready.
    pub fn start_warm(hypervisor: &str, warm: u32, arguments: &[&str]) -> Result<Self, ServiceError> {
        Self::start_all("debug", hypervisor, warm, arguments)
    }

    /// All of it.
    pub fn start_all(
        log: &str,
        hypervisor: &str,
        warm: u32,
        arguments: &[&str],
    ) -> Result<Self, ServiceError> {
        let folder = TempDir::with_prefix("guestd-test-").map_err(ServiceError::Folder)?;
        let mut command = Command::new(program("guestd")?);
        command.arg("--socket").arg(folder.path().join("guestd.sock"));
        command.args(["--hypervisor", hypervisor, "--log", log, "--warm", &warm.to_string()]);
        command.args(arguments);
        let process = Process::spawn(command, Stdin::Empty)?;
        process.logged("listening", PATIENCE)?;
        Ok(Self { process, folder })
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("guestd.sock")
    }

    /// A connection to it.
    pub async fn connect(&self) -> Result<Host, ConnectError> {
        Host::connect(self.socket()).await
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its process, to be waited for or killed.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Asks it to end, and waits until it has.
    pub fn terminate(&self) -> Result<ExitStatus, ProcessError> {
        self.process.signal(Signal::TERM);
        self.process.wait(PATIENCE)
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.process.stderr().text()
    }
}
