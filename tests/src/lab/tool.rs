//! Runs the programs that the lab is made with.

use std::io;
use std::path::{Path, PathBuf};
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
        self.output_with(folder, arguments, &[])
    }

    /// [`Tool::output`], with further variables in the tool's environment.
    pub(super) fn output_with(
        &self,
        folder: &Path,
        arguments: &[&str],
        environment: &[(&str, &Path)],
    ) -> Result<Output, LabError> {
        let mut command = Command::new(self.program);
        // Its messages are read, so they must not be translated.
        command.args(arguments).current_dir(folder).envs(environment.iter().copied()).env("LC_ALL", "C");
        command.output().map_err(|source| self.missing(source))
    }

    /// Where the tool is. Administrators' programs are found too, which are not in every user's `PATH`.
    pub(super) fn find(&self) -> Result<PathBuf, LabError> {
        let search = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&search).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
        let found = folders.map(|folder| folder.join(self.program)).find(|path| path.is_file());
        found.ok_or_else(|| self.missing(io::ErrorKind::NotFound.into()))
    }

    pub(super) fn missing(&self, source: io::Error) -> LabError {
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
