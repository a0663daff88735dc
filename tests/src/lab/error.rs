//! What can go wrong with the lab; every message says what to do about it or shows the lab's console.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::process::ProcessError;

/// A lab that cannot be prepared, booted or used.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A program that the lab is made with is not installed.
    #[error("the lab needs the program {program}: install the Debian package {package}")]
    Missing {
        /// The program looked for.
        program: &'static str,
        /// The Debian package that holds it.
        package: &'static str,
        /// What starting it said.
        #[source]
        source: io::Error,
    },
    /// A program ran and failed.
    #[error("{command} failed ({status}); {advice}; it wrote:\n{output}")]
    Failed {
        /// The command as it was run.
        command: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// What usually helps.
        advice: &'static str,
        /// Both of its output streams.
        output: String,
    },
    /// A file or folder could not be read or written.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The lab keeps its kernel in a build folder, and there is none.
    #[error("no cargo target folder above {exe}: name a folder for the lab's kernel in GUESTD_LAB_DIR")]
    NoFolder {
        /// The running executable.
        exe: PathBuf,
    },
    /// The kernel's package does not hold what was expected.
    #[error("no {what} in {folder}: remove that folder, and it is downloaded anew")]
    Kernel {
        /// What is not there.
        what: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// The emulator did not start.
    #[error("the lab's emulator does not start")]
    Emulator(#[source] ProcessError),
    /// The lab started and did not come up.
    #[error("the lab is not up after {waited:?}: {reason}; its console:\n{console}")]
    NotUp {
        /// How long was waited.
        waited: Duration,
        /// Lateness, or the end of the emulator.
        reason: String,
        /// The last lines of its console.
        console: String,
    },
    /// A command that has to succeed did not.
    #[error("exit status {status} in the lab of: {command}\nit wrote:\n{output}")]
    Status {
        /// The command as it was given.
        command: String,
        /// Its exit status.
        status: i32,
        /// What it wrote.
        output: String,
    },
    /// A command longer than the line to the lab takes at once.
    #[error("a command of {length} bytes is too long for the lab, at most {limit} are taken")]
    TooLong {
        /// The command's length in bytes.
        length: usize,
        /// The greatest length in bytes.
        limit: usize,
    },
    /// The command did not end in time and was killed; the lab goes on.
    #[error(
        "still running after {deadline:?} in the lab: {command}\nit wrote:\n{output}\nthe lab's console:\n{console}"
    )]
    Late {
        /// The command as it was given.
        command: String,
        /// Its deadline.
        deadline: Duration,
        /// What it wrote until it was killed.
        output: String,
        /// The last lines of the lab's console.
        console: String,
    },
    /// The lab itself does not answer, or not sensibly; every later command fails the same way.
    #[error("the lab is lost at: {command}\n{reason}; its console:\n{console}")]
    Lost {
        /// The command that lost it.
        command: String,
        /// How it shows.
        reason: String,
        /// The last lines of its console.
        console: String,
    },
}

impl LabError {
    pub(super) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LabError {
        move |source| LabError::File { action, path: path.to_owned(), source }
    }
}
