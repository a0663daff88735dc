//! Runs the programs that the lab is made with.

use std::path::Path;
use std::process::{Command, Output};

use super::error::LabError;

/// A program that the lab is made with, and what to do when it is missing or fails.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tool {
    pub(super) program: &'static str,
    pub(super) package: &'static str,
    pub(super) advice: &'static str,
}

impl Tool {
    /// Runs the tool in `folder` and returns what it wrote to its standard output.
    pub(super) fn run(&self, folder: &Path, arguments: &[&str]) -> Result<Vec<u8>, LabError> {
        let output = self.output(folder, arguments)?;
        match output.status.success() {
            true => Ok(output.stdout),
            false => Err(self.failed(arguments, &output)),
        }
    }

    /// Runs the tool in `folder`, whatever its exit status.
    pub(super) fn output(&self, folder: &Path, arguments: &[&str]) -> Result<Output, LabError> {
        // Its messages are read, so they must not be translated.
        let run = Command::new(self.program).args(arguments).current_dir(folder).env("LC_ALL", "C").output();
        run.map_err(|source| self.missing(source))
    }

    pub(super) fn missing(&self, source: std::io::Error) -> LabError {
        LabError::Missing { program: self.program, package: self.package, source }
    }

    pub(super) fn failed(&self, arguments: &[&str], output: &Output) -> LabError {
        let written = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
        LabError::Failed {
            command: [&[self.program], arguments].concat().join(" "),
            status: output.status,
            advice: self.advice,
            output: String::from_utf8_lossy(&written).trim_end().to_owned(),
        }
    }
}
