//! A client that is killed: how long its guest's VMM outlives it.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::Context;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use guest_client::{Host, Launched};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::figure::{Definition, Samples};
use super::{Group, Rounds, config, first_byte, floor, output};
use crate::service::PATIENCE;

const CLIENT_KILLED: &str = "client-killed";

pub(super) static GROUP: Group = Group {
    figures: &[Definition::time(
        CLIENT_KILLED,
        "kill -9 of the client of a running guest → its guest-vmm has ended",
        Some(floor::CLOSE),
    )],
    open: |setting| async { Ok(Box::new(Kills(setting.service.socket())) as Box<dyn Rounds>) }.boxed_local(),
};

struct Kills(PathBuf);

impl Kills {
    fn measure(&self, samples: &mut Samples) -> anyhow::Result<()> {
        let mut client = start_client(&self.0)?;
        let mut line = String::new();
        BufReader::new(client.stdout.take().expect("piped")).read_line(&mut line)?;
        let pid = line.trim().parse().ok().and_then(Pid::from_raw).context("the client has no guest")?;
        let vmm = pidfd_open(pid, PidfdFlags::empty())?;
        let begin = Instant::now();
        client.kill()?;
        wait_for_end(&vmm)?;
        samples.time(CLIENT_KILLED, begin.elapsed());
        client.wait()?;
        Ok(())
    }
}

impl Rounds for Kills {
    fn round<'a>(&'a mut self, samples: &'a mut Samples) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        async { self.measure(samples) }.boxed_local()
    }
}

fn start_client(socket: &Path) -> anyhow::Result<Child> {
    let mut client = Command::new(std::env::current_exe()?);
    client.arg("hold").arg(socket).stdin(Stdio::null()).stdout(Stdio::piped());
    Ok(crate::process::spawn(client)?)
}

fn wait_for_end(process: &OwnedFd) -> anyhow::Result<()> {
    let limit = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit))?;
    anyhow::ensure!(ended == 1, "guest-vmm still runs {PATIENCE:?} after its client was killed");
    Ok(())
}

/// The client that is killed: runs a guest, prints the number of its VMM's process, and holds the lease for ever.
///
/// # Errors
/// When there is no guest to hold.
pub async fn hold(socket: &Path) -> anyhow::Result<()> {
    let host = Host::connect(socket).await?;
    let Launched { lifecycle, exit: _exit, id } = host.launch("")?;
    let (output, mut bytes) = output();
    let created = lifecycle.create(&config(&lifecycle)?);
    let _input = lifecycle.bind().serial(output);
    let run = lifecycle.run();
    created.await?;
    first_byte(&mut bytes).await?;
    let id = id.await?;
    let guests = host.list().await?;
    let guest = guests.iter().find(|guest| guest.id == id).context("the guest is not listed")?;
    println!("{}", guest.pid);
    std::io::stdout().flush()?;
    Ok(run.await?)
}
