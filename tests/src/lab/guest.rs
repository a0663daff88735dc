//! A Linux guest in the lab, booted by a `guestctl run` there.
//!
//! Its files are in a folder of the lab's `/tmp`: `in` is a FIFO to guestctl's input, `out` and `err` are what guestctl writes,
//! `status` is its exit status once it has ended.

use std::time::{Duration, Instant};

use super::{Lab, LabError};

/// How long one look into the lab may take, which other users of the lab wait for.
const LOOK: u32 = 5;
const LOOKS_PER_SECOND: u32 = 5;
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// A guest that did not do what was waited for.
#[derive(Debug, thiserror::Error)]
pub enum LabGuestError {
    /// The lab failed.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// guestctl's exit status cannot be read.
    #[error("the exit status of guestctl is {0:?}")]
    Status(String),
    /// What was waited for did not come in time, or the guest has ended without it.
    #[error(
        "no {wanted} after {waited:?} ({ended}); guestctl's standard error:\n{err}\nthe guest wrote:\n{out}"
    )]
    NotSeen {
        /// What was waited for.
        wanted: String,
        /// How long.
        waited: Duration,
        /// Whether guestctl has ended.
        ended: &'static str,
        /// Its standard error.
        err: String,
        /// The guest's serial output.
        out: String,
    },
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabGuestEnd {
    /// guestctl's exit status.
    pub status: i32,
    /// What guestctl wrote to its standard error.
    pub err: String,
    /// All of the guest's serial output.
    pub out: String,
}

/// A guest, and the guestctl that runs it.
#[derive(Debug)]
pub struct LabGuest<'lab> {
    lab: &'lab Lab,
    folder: String,
}

impl<'lab> LabGuest<'lab> {
    /// Starts `guestctl run` in the lab with the lab's guest kernel and initramfs. `name` is not used by another guest of this
    /// lab. `cmdline` is added to the guest's command line, `arguments` to guestctl's; both are read by the lab's shell.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn start(lab: &'lab Lab, name: &str, cmdline: &str, arguments: &str) -> Result<Self, LabError> {
        let guest = LabGuest { lab, folder: format!("/tmp/{name}") };
        let run = format!(
            "exec guestctl run --name {name} --kernel /guest/kernel --initrd /guest/initramfs --cmdline \
             \"console=ttyS0 quiet noxsave GUEST_SHELL=plain {cmdline}\" {arguments}"
        );
        // Opened for both, the FIFO never ends, and a writer need not wait for guestctl. The status is there whole or not at all.
        let command = format!(
            "mkdir {0}; cd {0}; mkfifo in; cat >run <<'END-OF-RUN'\necho $$ >pid\n{run}\nEND-OF-RUN\n\
             (sh run <>in >out 2>err; echo $? >ended; mv ended status) &",
            guest.folder
        );
        lab.run(&command, COMMAND_LIMIT)?;
        Ok(guest)
    }

    /// Writes a line to the guest's serial port.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn send(&self, line: &str) -> Result<(), LabError> {
        // The mark's quotes keep the lab's shell from reading anything into the line.
        self.here(&format!("cat >in <<'END-OF-LINE'\n{line}\nEND-OF-LINE\n")).map(drop)
    }

    /// Runs a command of the lab's shell in the guest's folder, and returns what it wrote.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn here(&self, command: &str) -> Result<String, LabError> {
        Ok(self.lab.run(&format!("cd {}\n{command}", self.folder), COMMAND_LIMIT)?.output)
    }

    /// Waits until the guest has written `text` so many times, and returns all that it has written.
    ///
    /// # Errors
    /// [`LabGuestError::NotSeen`] after `limit`, or when the guest has ended without it.
    pub fn saw(&self, text: &str, times: usize, limit: Duration) -> Result<String, LabGuestError> {
        let seen = format!("[ $(grep -aoF -e '{text}' out | wc -l) -ge {times} ]");
        self.wait(&seen, &format!("{text:?}, {times} times,"), limit)?;
        Ok(self.here("cat out")?)
    }

    /// Asks the guest's shell: sends a command, waits for its end, and returns what it has written.
    ///
    /// # Errors
    /// As [`LabGuest::saw`].
    pub fn ask(&self, command: &str, limit: Duration) -> Result<String, LabGuestError> {
        let before = self.here("cat out")?.len();
        // Neither mark stands as such in the command, should something echo it.
        self.send(&format!("echo BEGIN''-ANSWER; {command}; echo END''-ANSWER"))?;
        let seen = format!("tail -c +{} out | grep -q '^END-ANSWER'", before.saturating_sub(1));
        self.wait(&seen, &format!("answer of {command:?}"), limit)?;
        let out = self.here("cat out")?.replace('\r', "");
        let answer = out.rsplit_once("BEGIN-ANSWER\n").map_or("", |(_, answer)| answer);
        Ok(answer.split_once("END-ANSWER").map_or(answer, |(answer, _)| answer).to_owned())
    }

    /// Waits for the end of guestctl.
    ///
    /// # Errors
    /// [`LabGuestError::NotSeen`] after `limit`.
    pub fn end(&self, limit: Duration) -> Result<LabGuestEnd, LabGuestError> {
        self.wait("[ -e status ]", "end of guestctl", limit)?;
        let status = self.here("cat status")?;
        let status = status.trim().parse().map_err(|_| LabGuestError::Status(status))?;
        Ok(LabGuestEnd { status, err: self.here("cat err")?, out: self.here("cat out")? })
    }

    /// Waits until a condition of the lab's shell holds, in pieces, so that others may use the lab meanwhile.
    fn wait(&self, condition: &str, wanted: &str, limit: Duration) -> Result<(), LabGuestError> {
        let start = Instant::now();
        let pause = 1.0 / f64::from(LOOKS_PER_SECOND);
        // The end is looked at before the condition: what came last counts.
        let look = format!(
            "for i in $(seq {LOOK}); do ended=; [ -e status ] && ended=yes; if {condition}; then exit 0; fi; \
             [ $ended ] && exit 2; sleep {pause}; done; exit 1"
        );
        loop {
            let waited = start.elapsed();
            match self.lab.run(&format!("cd {}\n{look}", self.folder), COMMAND_LIMIT)?.status {
                0 => return Ok(()),
                1 if waited < limit => {}
                status => return Err(self.not_seen(wanted, waited, status)?),
            }
        }
    }

    fn not_seen(&self, wanted: &str, waited: Duration, status: i32) -> Result<LabGuestError, LabError> {
        Ok(LabGuestError::NotSeen {
            wanted: wanted.to_owned(),
            waited,
            ended: if status == 2 { "guestctl has ended" } else { "guestctl goes on" },
            err: self.here("cat err")?,
            out: self.here("cat out")?,
        })
    }
}

/// A guest that is left running would slow down all that follows.
impl Drop for LabGuest<'_> {
    fn drop(&mut self) {
        // The lab may be lost, and the guest with it.
        let _ = self.here("[ -e status ] || kill -KILL $(cat pid)");
    }
}
