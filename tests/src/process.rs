//! Processes under test: they die with the tests, their output is collected, they can be killed at any moment.
//!
//! Parts: [`Process`], and [`spawn`] for a process whose streams are arranged by the caller.
//!
//! A child gets SIGKILL when the *thread* that started it ends, and a test's thread ends long before the tests do. So one
//! thread that lives as long as this process starts all of them.
//!
//! Limit: the signal reaches the child, not what the child started; that goes with the process group in [`Drop`], or has to
//! notice the loss by itself, which is what the project's own processes are tested for.
//!
//! UNSAFETY: asking for the death signal has to happen in the child between fork and exec, and the standard library's
//! hook for that is unsafe.
#![expect(unsafe_code, reason = "CommandExt::pre_exec")]

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

use crate::output::{Output, TakeError};
use crate::wait;

/// How long a killed process may take to be gone.
const REAP_LIMIT: Duration = Duration::from_secs(10);
const SHOWN_LINES: usize = 40;

/// What the child reads as its standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdin {
    /// Nothing: the end of file at once.
    Empty,
    /// A pipe, to be taken with [`Process::stdin`].
    Piped,
}

/// A process that could not be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program did not start.
    #[error("cannot start {program}")]
    Spawn {
        /// The program as it was given.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The process did not end in time; it still runs.
    #[error("{program} (pid {pid}) still runs after {limit:?}; it wrote:\n{output}")]
    Late {
        /// The program as it was given.
        program: String,
        /// Its process id.
        pid: u32,
        /// How long was waited.
        limit: Duration,
        /// The last lines it wrote.
        output: String,
    },
    /// The expected text was not written.
    #[error("{program} (pid {pid}) did not write {needle:?}; it wrote:\n{output}")]
    Silent {
        /// The program as it was given.
        program: String,
        /// Its process id.
        pid: u32,
        /// What was expected.
        needle: String,
        /// The last lines it wrote.
        output: String,
        /// Lateness or the end of the stream.
        #[source]
        source: TakeError,
    },
}

/// A running or ended process, leader of its own process group. Dropping it kills the group and reaps the process.
#[derive(Debug)]
pub struct Process {
    program: String,
    child: Child,
    stdout: Output,
    stderr: Output,
}

impl Process {
    /// Starts `command` in a process group of its own, with both output streams collected.
    ///
    /// # Errors
    /// [`ProcessError::Spawn`].
    pub fn spawn(mut command: Command, stdin: Stdin) -> Result<Process, ProcessError> {
        let program = command.get_program().to_string_lossy().into_owned();
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(match stdin {
            Stdin::Empty => Stdio::null(),
            Stdin::Piped => Stdio::piped(),
        });
        match spawn(command).and_then(|child| Process::watch(program.clone(), child)) {
            Ok(process) => Ok(process),
            Err(source) => Err(ProcessError::Spawn { program, source }),
        }
    }

    fn watch(program: String, mut child: Child) -> io::Result<Process> {
        let stdout = child.stdout.take().expect("stdout was piped above");
        let stderr = child.stderr.take().expect("stderr was piped above");
        Ok(Process { program, child, stdout: Output::collect(stdout)?, stderr: Output::collect(stderr)? })
    }

    /// The process id. It stays this process's own until the value is dropped: an ended process is reaped only then.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The writing end of the child's standard input, once, if it was [`Stdin::Piped`].
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// What it wrote to its standard output.
    pub fn stdout(&self) -> &Output {
        &self.stdout
    }

    /// What it wrote to its standard error.
    pub fn stderr(&self) -> &Output {
        &self.stderr
    }

    /// Waits until its standard error contains `needle`, and returns the text so far.
    ///
    /// # Errors
    /// [`ProcessError::Silent`], with what it wrote instead.
    pub fn logged(&self, needle: &str, limit: Duration) -> Result<String, ProcessError> {
        self.stderr.contains(needle, limit).map_err(|source| ProcessError::Silent {
            program: self.program.clone(),
            pid: self.pid(),
            needle: needle.to_owned(),
            output: self.last_words(),
            source,
        })
    }

    /// Sends `signal` to the process alone. A process that has ended already is no error.
    pub fn signal(&self, signal: Signal) {
        // The process is not reaped before drop, so the id cannot be another's and the call cannot fail.
        let _ = rustix::process::kill_process(self.id(), signal);
    }

    /// Sends SIGKILL to the process alone, not to its children.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Sends SIGKILL to the process and all of its group.
    pub fn kill_group(&self) {
        let _ = rustix::process::kill_process_group(self.id(), Signal::KILL);
    }

    /// How it ended, or nothing while it runs.
    pub fn ended(&self) -> Option<ExitStatus> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = rustix::process::waitid(WaitId::Pid(self.id()), options).ok()??;
        let code = status.exit_status().map(|code| (code & 0xff) << 8);
        code.or(status.terminating_signal()).map(ExitStatus::from_raw)
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// [`ProcessError::Late`] when it still runs after `limit`.
    pub fn wait(&self, limit: Duration) -> Result<ExitStatus, ProcessError> {
        wait::found("the end of a process", limit, || self.ended().ok_or("it runs")).map_err(|_| {
            let output = self.last_words();
            ProcessError::Late { program: self.program.clone(), pid: self.pid(), limit, output }
        })
    }

    /// The last lines of both output streams.
    pub fn last_words(&self) -> String {
        [self.stdout.tail(SHOWN_LINES), self.stderr.tail(SHOWN_LINES)].join("\n").trim().to_owned()
    }

    fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_group();
        let _ = wait::until("the end of a killed process", REAP_LIMIT, || {
            !matches!(self.child.try_wait(), Ok(None))
        });
    }
}

/// Starts `command` so that it gets SIGKILL when this process ends in any way.
///
/// # Errors
/// As [`Command::spawn`].
pub fn spawn(mut command: Command) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let die_with_parent = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // A parent that died before the line above sends no signal any more.
        match rustix::process::getppid() == Some(parent) {
            true => Ok(()),
            false => Err(io::ErrorKind::NotConnected.into()),
        }
    };
    // SAFETY: the closure makes two system calls, allocates nothing and takes no lock, so it may run after a fork of a
    // process with threads.
    unsafe { command.pre_exec(die_with_parent) };
    on_lasting_thread(command)
}

/// A command to start, and where its child is expected.
type Order = (Command, Sender<io::Result<Child>>);

fn on_lasting_thread(command: Command) -> io::Result<Child> {
    static ORDERS: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    let (reply, child) = channel();
    let orders = ORDERS.get_or_init(|| Mutex::new(lasting_thread()));
    let sent = orders.lock().unwrap_or_else(PoisonError::into_inner).send((command, reply));
    sent.map_err(io::Error::other)?;
    child.recv().map_err(io::Error::other)?
}

fn lasting_thread() -> Sender<Order> {
    let (orders, arriving) = channel::<Order>();
    std::thread::spawn(move || {
        for (mut command, reply) in arriving {
            // Whoever ordered waits for the reply, so it can be sent.
            let _ = reply.send(command.spawn());
        }
    });
    orders
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::census;

    const LONG: Duration = Duration::from_secs(20);

    fn shell(script: &str, stdin: Stdin) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::spawn(command, stdin).unwrap()
    }

    #[test]
    fn status_and_both_streams_are_kept() {
        let process = shell("echo out; echo err >&2; exit 7", Stdin::Empty);
        assert_eq!(process.wait(LONG).unwrap().code(), Some(7));
        assert_eq!(process.stdout().to_end(LONG).unwrap(), b"out\n");
        assert_eq!(process.stderr().to_end(LONG).unwrap(), b"err\n");
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let mut process = std::thread::spawn(|| shell("read line", Stdin::Piped)).join().unwrap();
        drop(process.stdin());
        assert_eq!(process.wait(LONG).unwrap().code(), Some(1), "read must see the end of file, not SIGKILL");
    }

    #[test]
    fn dropping_kills_the_whole_group() {
        let process = shell("sleep 1000 & echo $!; wait", Stdin::Empty);
        let line = process.stdout().contains("\n", LONG).unwrap();
        let grandchild: u32 = line.trim().parse().unwrap();
        assert!(census::runs(grandchild));
        drop(process);
        wait::until("the grandchild's end", LONG, || !census::runs(grandchild)).unwrap();
    }

    #[test]
    fn a_killed_process_says_so() {
        let process = shell("sleep 1000", Stdin::Empty);
        process.kill();
        assert_eq!(process.wait(LONG).unwrap().signal(), Some(9));
    }

    #[test]
    fn lateness_shows_what_was_written() {
        let process = shell("echo working >&2; sleep 1000", Stdin::Empty);
        process.logged("working", LONG).unwrap();
        let late = process.wait(Duration::from_millis(5)).unwrap_err();
        assert!(late.to_string().ends_with("it wrote:\nworking"), "{late}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Process::spawn(Command::new("no-such-program"), Stdin::Empty).unwrap_err();
        assert_eq!(error.to_string(), "cannot start no-such-program");
    }
}
