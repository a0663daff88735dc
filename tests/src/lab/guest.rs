//! A Linux guest in the lab, booted by a `guestctl run` there, or forked.

use std::ops::Deref;
use std::time::Duration;

use super::background::{LabProcess, LabProcessError};
use super::toolset::Toolset;
use super::{Lab, LabError};

/// A guest. As a [`LabProcess`] it is the guestctl that runs or forks it: what guestctl reads and writes is the guest's serial port, and
/// its standard error is guestctl's own.
#[derive(Debug)]
pub struct LabGuest<'lab>(LabProcess<'lab>);

impl<'lab> LabGuest<'lab> {
    /// Starts `guestctl run` in the lab with the lab's guest kernel and initramfs. `name` is that of the guest, and used as for
    /// [`Lab::spawn`]. `cmdline` is added to the guest's command line, `arguments` to guestctl's; both are read by the lab's shell.
    ///
    /// # Errors
    /// As [`Lab::spawn`].
    pub fn start(lab: &'lab Lab, name: &str, cmdline: &str, arguments: &str) -> Result<Self, LabError> {
        LabGuest::start_with(&[], lab, name, cmdline, arguments)
    }

    /// As [`LabGuest::start`], with `tools` in the guest's `/bin`.
    ///
    /// # Errors
    /// As [`Lab::spawn`].
    pub fn start_with(
        tools: &[Toolset],
        lab: &'lab Lab,
        name: &str,
        cmdline: &str,
        arguments: &str,
    ) -> Result<Self, LabError> {
        let tools: Vec<&str> = tools.iter().map(|set| set.name()).collect();
        let run = format!(
            "initramfs=$(guest-initramfs {}) || exit\n\
             exec guestctl run --name {name} --kernel /guest/kernel --initrd $initramfs --cmdline \
             \"console=ttyS0 quiet noxsave GUEST_SHELL=plain {cmdline}\" {arguments}",
            tools.join(" ")
        );
        lab.spawn(name, &run).map(LabGuest)
    }

    /// Starts a `guestctl fork` in the lab that has the fork's serial port; the fork is called `name`, which is used as for
    /// [`Lab::spawn`]. `arguments` name the service and the parent, and grant the disks.
    ///
    /// # Errors
    /// As [`Lab::spawn`].
    pub fn fork(lab: &'lab Lab, name: &str, arguments: &str) -> Result<Self, LabError> {
        lab.spawn(name, &format!("exec guestctl fork --attach --name {name} {arguments}")).map(LabGuest)
    }

    /// Starts a `guestctl run` in the lab that has the serial port of a guest that goes on from a snapshot's file; it is called `name`,
    /// which is used as for [`Lab::spawn`]. `arguments` name the file, and grant the disks.
    ///
    /// # Errors
    /// As [`Lab::spawn`].
    pub fn restored(lab: &'lab Lab, name: &str, arguments: &str) -> Result<Self, LabError> {
        lab.spawn(name, &format!("exec guestctl run --name {name} {arguments}")).map(LabGuest)
    }

    /// Asks the guest's shell: sends a command, waits for its end, and returns what it has written.
    ///
    /// # Errors
    /// As [`LabProcess::until`].
    pub fn ask(&self, command: &str, limit: Duration) -> Result<String, LabProcessError> {
        let before = self.here("cat out")?.len();
        // Neither mark stands as such in the command, should something echo it.
        self.send(&format!("echo BEGIN''-ANSWER; {command}; echo END''-ANSWER"))?;
        let seen = format!("tail -c +{} out | grep -q '^END-ANSWER'", before.saturating_sub(1));
        self.until(&seen, &format!("answer of {command:?}"), limit)?;
        let out = self.here("cat out")?.replace('\r', "");
        let answer = out.rsplit_once("BEGIN-ANSWER\n").map_or("", |(_, answer)| answer);
        Ok(answer.split_once("END-ANSWER").map_or(answer, |(answer, _)| answer).to_owned())
    }

    /// Kills the guest's guest-vmm (`SIGKILL`) once there is one. Only for a guest that was started without `--socket`: its
    /// guest-vmm is a child of its guestctl.
    ///
    /// # Errors
    /// As [`LabProcess::until`].
    pub fn kill_vmm(&self, limit: Duration) -> Result<(), LabProcessError> {
        let kill = "(for vmm in $(pidof guest-vmm); do \
                    grep -q \"^PPid:[[:space:]]$(cat pid)$\" /proc/$vmm/status && kill -KILL $vmm && exit; done; exit 1)";
        self.until(kill, "guest-vmm to kill", limit)
    }
}

impl<'lab> Deref for LabGuest<'lab> {
    type Target = LabProcess<'lab>;

    fn deref(&self) -> &LabProcess<'lab> {
        &self.0
    }
}
