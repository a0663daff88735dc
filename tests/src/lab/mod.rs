//! The lab: a machine with a mainline `/dev/kvm` in software, in which unmodified Linux boots as a guest.
//!
//! QEMU's software CPU emulates AMD's SVM and runs Debian's own cloud kernel. Its initramfs holds busybox, the binaries under
//! test with their shared libraries, and in `/guest` the `kernel` and the `initramfs` of a Linux guest, which boots the same kernel or
//! another one of Debian's. That guest prints a line `GUEST-UP nproc=… memory_kib=… uptime=…` on its first serial line, runs `GUEST_RUN` of its kernel's command
//! line if there is one, and is then a shell there, with `GUEST_SHELL=plain` one without echo and prompt.
//!
//! The lab's host has the tools of every [`Toolset`] in its `/bin`, and `passt` and `ip`; a guest has those it is started with. The
//! shell takes a program that busybox has too for busybox's: the full one of iproute2 is `/bin/ip`.
//!
//! Parts: [`Lab`], [`LabProcess`] for a command in its background, [`LabGuest`] for a guest in it, [`Toolset`] and [`TapQueues`] for what they
//! are given, [`LabPool`] for the tests of one binary, [`DebianKernel`] and [`LabKernel`], [`LabError`]; inside, the kernels' download, the
//! initramfs with its cpio format, scripts and tools, and the emulator's command line.
//!
//! Limits: correctness and ratios within one run, no absolute times. One command at a time; commands start what is to run
//! in parallel with [`Lab::spawn`]. The built-in guest, which uses ports in ring 3, cannot go on from a snapshot here (see the emulator).

mod background;
mod backing;
mod cpio;
mod emulator;
mod error;
mod guest;
mod initramfs;
mod kernel;
mod pool;
mod stand_in;
mod tool;
mod toolset;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::process::{self, Process, ProcessError, Stdin};

pub use background::{LabProcess, LabProcessEnd, LabProcessError};
pub use backing::TapQueues;
pub use error::LabError;
pub use guest::LabGuest;
pub use kernel::{DebianKernel, LabKernel};
pub use pool::LabPool;
pub use toolset::Toolset;

use emulator::{QEMU, Serve};

/// Twenty times what it takes on two idle cores, for machines that do something else as well.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// About one boot in two hundred was seen to hang on a loaded machine, nobody knows why; the next one comes up.
const BOOT_ATTEMPTS: u32 = 3;
/// How much later than a command's deadline its answer may come: the lab kills the command itself, and its output has to
/// pass the serial line.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Far below what the lab's kernel keeps for a serial line that nobody reads.
const LONGEST_COMMAND: usize = 32 * 1024;
/// For commands that are done at once.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
const CONSOLE_LINES: usize = 40;

/// A running lab. Dropping it, or the end of this process in whatever way, ends it.
#[derive(Debug)]
pub struct Lab {
    guests: DebianKernel,
    qemu: Process,
    line: Mutex<Line>,
}

/// The way in for commands.
#[derive(Debug)]
struct Line {
    input: ChildStdin,
    lost: bool,
}

/// What a command in the lab did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabOutput {
    /// The exit status of the command; 128 and the signal's number if a signal ended it.
    pub status: i32,
    /// Standard output and standard error as they came, every byte of them; what is not UTF-8 is replaced.
    pub output: String,
}

impl Lab {
    /// Makes everything ready that a boot needs from outside: downloads the kernel if it is not there.
    ///
    /// # Errors
    /// [`LabError::Missing`] names the Debian package to install, [`LabError::Failed`] what else helps.
    pub fn prepare() -> Result<LabKernel, LabError> {
        let kernel = LabKernel::obtain(DebianKernel::Cloud)?;
        QEMU.run(Path::new("/"), &["--version"])?;
        toolset::find_tools()?;
        Ok(kernel)
    }

    /// Downloads a kernel for guests if it is not there, as [`Lab::boot`] does.
    ///
    /// # Errors
    /// As [`Lab::prepare`].
    pub fn prepare_guests(guests: DebianKernel) -> Result<LabKernel, LabError> {
        LabKernel::obtain(guests)
    }

    /// Boots a lab whose guests have the kernel `guests` and in which `binaries` are in the `PATH` under their file names, and waits
    /// until it takes commands: some seconds. Prepares first. A boot that hangs is reported on standard error and tried again,
    /// twice at most.
    ///
    /// # Errors
    /// As [`Lab::prepare`]; [`LabError::NotUp`] with its console when it does not come up.
    pub fn boot(guests: DebianKernel, binaries: &[PathBuf]) -> Result<Lab, LabError> {
        let kernel = Lab::prepare()?;
        let initramfs = write_initramfs(&kernel, guests, binaries)?;
        let mut attempt = 1;
        loop {
            match Lab::start(&kernel, guests, &initramfs) {
                Err(error @ LabError::NotUp { .. }) if attempt < BOOT_ATTEMPTS => {
                    // Whoever reads the tests' output should see it though the tests go on.
                    eprintln!("attempt {attempt} of {BOOT_ATTEMPTS}: {error}");
                    attempt += 1;
                }
                done => return done,
            }
        }
    }

    fn start(kernel: &LabKernel, guests: DebianKernel, initramfs: &File) -> Result<Lab, LabError> {
        let command = emulator::command(kernel, &path_of(initramfs), Serve::Commands);
        let mut qemu = Process::spawn(command, Stdin::Piped).map_err(LabError::Emulator)?;
        let input = qemu.stdin().expect("it was piped above");
        let lab = Lab { guests, qemu, line: Mutex::new(Line { input, lost: false }) };
        lab.wait_until_up()?;
        Ok(lab)
    }

    fn wait_until_up(&self) -> Result<(), LabError> {
        let start = Instant::now();
        let up = self.qemu.stdout().take(BOOT_LIMIT, |bytes| {
            let end = find(bytes, b"LAB-UP\n")?;
            bytes.drain(..end);
            Some(())
        });
        up.map_err(|error| LabError::NotUp {
            waited: start.elapsed(),
            reason: error.to_string(),
            console: self.console_tail(),
        })
    }

    /// Runs `command` in the lab's shell, in `/root` with an empty standard input, and waits for its end. Calls from several
    /// threads run one after the other; the deadline counts from when the command starts. What the command leaves running
    /// in the background goes on after it, but its later output is lost.
    ///
    /// # Errors
    /// [`LabError::Late`] when the command did not end by its deadline: then its process group has been killed, and
    /// the lab takes the next command. [`LabError::Lost`] when the lab itself fails: then all further calls do too.
    pub fn run(&self, command: &str, deadline: Duration) -> Result<LabOutput, LabError> {
        if command.len() > LONGEST_COMMAND {
            return Err(LabError::TooLong { length: command.len(), limit: LONGEST_COMMAND });
        }
        let mut line = self.lock();
        let answer = self.exchange(&mut line, command, deadline).map_err(|reason| {
            line.lost = true;
            LabError::Lost { command: command.to_owned(), reason, console: self.console_tail() }
        })?;
        match answer.status {
            Some(status) => Ok(LabOutput { status, output: answer.output }),
            None => Err(LabError::Late {
                command: command.to_owned(),
                deadline,
                output: answer.output,
                console: self.console_tail(),
            }),
        }
    }

    /// Runs a short command that has to succeed, and returns what it wrote.
    fn succeed(&self, command: &str) -> Result<String, LabError> {
        let LabOutput { status, output } = self.run(command, COMMAND_LIMIT)?;
        if status == 0 {
            return Ok(output);
        }
        Err(LabError::Status { command: command.to_owned(), status, output })
    }

    fn exchange(&self, line: &mut Line, command: &str, deadline: Duration) -> Result<Answer, String> {
        if line.lost {
            return Err("it was lost at an earlier command".to_owned());
        }
        let request = format!("{} {:.3}\n{command}", command.len(), deadline.as_secs_f64());
        line.input.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
        let answer = self.qemu.stdout().take(deadline + ANSWER_LIMIT, take_answer);
        answer.map_err(|error| error.to_string())?
    }

    /// Everything that the lab's kernel and its start wrote to their console so far.
    pub fn console(&self) -> String {
        self.qemu.stderr().text()
    }

    /// The process id of the emulator.
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    /// Runs an interactive shell in a lab at the terminal of this process, until the shell or the emulator (Ctrl-A x) ends.
    /// `guests` and `binaries` are as for [`Lab::boot`].
    ///
    /// # Errors
    /// As [`Lab::prepare`]; [`LabError::Emulator`] when the emulator does not start.
    pub fn terminal(guests: DebianKernel, binaries: &[PathBuf]) -> Result<ExitStatus, LabError> {
        let kernel = Lab::prepare()?;
        let initramfs = write_initramfs(&kernel, guests, binaries)?;
        let command = emulator::command(&kernel, &path_of(&initramfs), Serve::Terminal);
        let started = process::spawn(command).and_then(|mut qemu| qemu.wait());
        started.map_err(|source| {
            LabError::Emulator(ProcessError::Spawn { program: QEMU.program.to_owned(), source })
        })
    }

    fn console_tail(&self) -> String {
        self.qemu.stderr().tail(CONSOLE_LINES)
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        // Nothing panics between a request and its answer, so a poisoned line is in order.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The project's programs.
pub const PROJECT_PROGRAMS: [&str; 3] = ["guestd", "guest-vmm", "guestctl"];

/// Those of [`PROJECT_PROGRAMS`] that are built: beside the running executable, or in the folder above it, where cargo puts
/// them for tests.
pub fn project_binaries() -> Vec<PathBuf> {
    let exe = std::env::current_exe().unwrap_or_default();
    let folders: Vec<&Path> = exe.ancestors().skip(1).take(2).collect();
    let find = |name| folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
    PROJECT_PROGRAMS.into_iter().filter_map(find).collect()
}

/// The initramfs of the lab's guests that boot the lab's kernel, for a VMM outside of the lab.
///
/// # Errors
/// As [`Lab::prepare`].
pub fn guest_initramfs() -> Result<Vec<u8>, LabError> {
    initramfs::guest(&Lab::prepare()?)
}

/// A file without a name: nothing is left behind, however this process ends.
fn write_initramfs(kernel: &LabKernel, guests: DebianKernel, binaries: &[PathBuf]) -> Result<File, LabError> {
    let guests = Lab::prepare_guests(guests)?;
    let folder = kernel::cache_folder()?;
    let mut file = tempfile::tempfile_in(&folder).map_err(LabError::file("create a file in", &folder))?;
    let archive = initramfs::lab(kernel, &guests, binaries)?;
    file.write_all(&archive).map_err(LabError::file("write to", &folder))?;
    Ok(file)
}

/// Where the emulator finds a file that this process holds open.
fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

#[derive(Debug, PartialEq, Eq)]
struct Answer {
    /// Nothing if the command was late.
    status: Option<i32>,
    output: String,
}

/// Takes an answer, "STATUS LENGTH", a newline and LENGTH bytes, off `bytes` once all of it is there.
fn take_answer(bytes: &mut Vec<u8>) -> Option<Result<Answer, String>> {
    let start = find(bytes, b"\n")?;
    let head = String::from_utf8_lossy(&bytes[..start - 1]).into_owned();
    let Some((status, length)) = parse_head(&head) else {
        return Some(Err(format!("it answered {head:?}")));
    };
    let end = start.checked_add(length)?;
    let output = String::from_utf8_lossy(bytes.get(start..end)?).into_owned();
    bytes.drain(..end);
    Some(Ok(Answer { status, output }))
}

fn parse_head(head: &str) -> Option<(Option<i32>, usize)> {
    let (status, length) = head.split_once(' ')?;
    let status = if status == "late" { None } else { Some(status.parse().ok()?) };
    Some((status, length.parse().ok()?))
}

/// The end of the first `needle` in `bytes`.
fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    Some(bytes.windows(needle.len()).position(|window| window == needle)? + needle.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: Option<i32>, output: &str) -> Option<Result<Answer, String>> {
        Some(Ok(Answer { status, output: output.to_owned() }))
    }

    #[test]
    fn an_answer_is_taken_once_it_is_whole() {
        let mut bytes = b"7 4\na\r\n".to_vec();
        assert_eq!(take_answer(&mut bytes), None);
        bytes.extend_from_slice(b"\nlate 0\n");
        assert_eq!(take_answer(&mut bytes), answer(Some(7), "a\r\n\n"));
        assert_eq!(take_answer(&mut bytes), answer(None, ""));
        assert!(bytes.is_empty());
    }

    #[test]
    fn nonsense_is_not_an_answer() {
        let mut bytes = b"Kernel panic\n".to_vec();
        assert_eq!(take_answer(&mut bytes), Some(Err("it answered \"Kernel panic\"".to_owned())));
    }
}
