//! A command that goes on in the lab while others run there.
//!
//! Its files are in a folder of the lab's `/tmp`: `in` is a FIFO to its input, `out` and `err` are what it writes, `pid` is its
//! process id, which is its session's too, and `status` is its exit status once it has ended.

use std::time::{Duration, Instant};

use super::{COMMAND_LIMIT, Lab, LabError};

/// How long one look into the lab may take, which other users of the lab wait for.
const LOOK: u32 = 5;
const LOOKS_PER_SECOND: u32 = 5;

/// A command in the background that did not do what was waited for.
#[derive(Debug, thiserror::Error)]
pub enum LabProcessError {
    /// The lab failed.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The exit status cannot be read.
    #[error("the exit status of {name} is {status:?}")]
    Status {
        /// The command's name.
        name: String,
        /// What stands in place of a number.
        status: String,
    },
    /// What was waited for did not come in time, or the command has ended without it.
    #[error("no {wanted} after {waited:?} ({state}); its standard error:\n{err}\nit wrote:\n{out}")]
    NotSeen {
        /// What was waited for.
        wanted: String,
        /// How long.
        waited: Duration,
        /// The command's name, and whether it has ended.
        state: String,
        /// Its standard error.
        err: String,
        /// Its standard output.
        out: String,
    },
}

/// How a command in the background ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabProcessEnd {
    /// Its exit status; 128 and the signal's number if a signal ended it.
    pub status: i32,
    /// All that it wrote to its standard error.
    pub err: String,
    /// All that it wrote to its standard output.
    pub out: String,
}

/// A command in the background. Dropping it kills it with its session.
#[derive(Debug)]
pub struct LabProcess<'lab> {
    lab: &'lab Lab,
    name: String,
}

impl Lab {
    /// Starts `command` of the lab's shell in the background, in a new folder `/tmp/NAME`. `name` is not used by another one in
    /// this lab.
    ///
    /// # Errors
    /// As [`Lab::run`]; [`LabError::Status`] when the name is taken.
    pub fn spawn(&self, name: &str, command: &str) -> Result<LabProcess<'_>, LabError> {
        // Opened for both, the FIFO never ends, and a writer need not wait for a reader. The status is there whole or not at all.
        let start = format!(
            "mkdir /tmp/{name} && cd /tmp/{name} && mkfifo in && cat >run <<'END-OF-RUN' || exit\n\
             echo $$ >pid\n{command}\nEND-OF-RUN\n\
             (setsid sh run <>in >out 2>err; echo $? >ended; mv ended status) &"
        );
        self.succeed(&start)?;
        Ok(LabProcess { lab: self, name: name.to_owned() })
    }
}

impl LabProcess<'_> {
    /// Where its files are in the lab.
    pub fn folder(&self) -> String {
        format!("/tmp/{}", self.name)
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn send(&self, line: &str) -> Result<(), LabError> {
        // The mark's quotes keep the lab's shell from reading anything into the line.
        self.here(&format!("cat >in <<'END-OF-LINE'\n{line}\nEND-OF-LINE\n")).map(drop)
    }

    /// Runs another command of the lab's shell, in this one's folder, and returns what it wrote, whatever its status.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn here(&self, command: &str) -> Result<String, LabError> {
        Ok(self.lab.run(&format!("cd {}\n{command}", self.folder()), COMMAND_LIMIT)?.output)
    }

    /// Waits until it has written `text` to its standard output so many times, and returns all that it has written there.
    ///
    /// # Errors
    /// As [`LabProcess::until`].
    pub fn saw(&self, text: &str, times: usize, limit: Duration) -> Result<String, LabProcessError> {
        let seen = format!("[ $(grep -aoF -e '{text}' out | wc -l) -ge {times} ]");
        self.until(&seen, &format!("{text:?}, {times} times,"), limit)?;
        Ok(self.here("cat out")?)
    }

    /// Waits until `condition`, a command of the lab's shell in this one's folder, succeeds; in pieces, so that others may use
    /// the lab meanwhile. Errors call it `wanted`.
    ///
    /// # Errors
    /// [`LabProcessError::NotSeen`] after `limit`, or when this command has ended without it.
    pub fn until(&self, condition: &str, wanted: &str, limit: Duration) -> Result<(), LabProcessError> {
        let start = Instant::now();
        let pause = 1.0 / f64::from(LOOKS_PER_SECOND);
        // The end is looked at before the condition: what came last counts.
        let look = format!(
            "for i in $(seq {LOOK}); do ended=; [ -e status ] && ended=yes; if {condition}; then exit 0; fi; \
             [ $ended ] && exit 2; sleep {pause}; done; exit 1"
        );
        loop {
            let waited = start.elapsed();
            match self.lab.run(&format!("cd {}\n{look}", self.folder()), COMMAND_LIMIT)?.status {
                0 => return Ok(()),
                1 if waited < limit => {}
                status => return Err(self.not_seen(wanted, waited, status)?),
            }
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`LabProcessError::NotSeen`] after `limit`.
    pub fn end(&self, limit: Duration) -> Result<LabProcessEnd, LabProcessError> {
        self.until("[ -e status ]", "end", limit)?;
        let status = self.here("cat status")?;
        let number = status.trim().parse();
        let status = number.map_err(|_| LabProcessError::Status { name: self.name.clone(), status })?;
        Ok(LabProcessEnd { status, err: self.here("cat err")?, out: self.here("cat out")? })
    }

    /// Kills it and all of its session that are left (`SIGKILL`), unless it has ended.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn kill(&self) -> Result<(), LabError> {
        self.here("[ -e status ] || kill -KILL -$(cat pid)").map(drop)
    }

    fn not_seen(&self, wanted: &str, waited: Duration, status: i32) -> Result<LabProcessError, LabError> {
        Ok(LabProcessError::NotSeen {
            wanted: wanted.to_owned(),
            waited,
            state: format!("{} {}", self.name, if status == 2 { "has ended" } else { "goes on" }),
            err: self.here("cat err")?,
            out: self.here("cat out")?,
        })
    }
}

/// What is left running would slow down all that follows.
impl Drop for LabProcess<'_> {
    fn drop(&mut self) {
        // The lab may be lost, and the command with it.
        let _ = self.kill();
    }
}
