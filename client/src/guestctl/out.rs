//! The standard output, which belongs to the guest's bytes and the command's answers alone.

use crate::ending::Outcome;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

/// The process's standard output.
pub struct Out(File);

impl Out {
    /// Takes it away from everything else in this process: the RPC library prints errors of its own on it, which now go to the
    /// standard error.
    pub fn take() -> io::Result<Self> {
        let out = io::stdout().as_fd().try_clone_to_owned()?;
        rustix::stdio::dup2_stdout(io::stderr())?;
        Ok(Self(out.into()))
    }

    /// Writes all of it.
    pub fn write(&self, bytes: &[u8]) -> Outcome {
        Ok((&self.0).write_all(bytes)?)
    }

    /// Whether somebody looks at it.
    pub fn is_terminal(&self) -> bool {
        self.0.is_terminal()
    }

    /// Another handle to it, for a thread.
    pub fn another(&self) -> io::Result<File> {
        self.0.try_clone()
    }
}
