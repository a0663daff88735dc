//! `guest-lab`: the lab by hand.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use guest_tests::lab::{self, DebianKernel, Lab};

/// A machine with a mainline /dev/kvm in software, with this project's programs in it as far as they are built.
///
/// It has busybox, and for tests of devices fio, mkfs.ext4, e2fsck, iperf3, ethtool, socat, passt and /bin/ip. /guest has a kernel and
/// an initramfs for Linux guests; `guest-initramfs block net vsock`, with one or more of these names, makes one with tools in it
/// and prints its path: fio, mkfs.ext4 and e2fsck for block, iperf3 and ethtool for net, socat for vsock.
#[derive(Debug, Parser)]
#[command(name = "guest-lab", version)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make ready what the lab needs: find its programs, download its kernel and its guests'.
    Prepare,
    /// A shell in the lab; `exit` powers it off, Ctrl-A x leaves the emulator.
    Shell(More),
    /// Run one command in the lab's shell and exit with its status.
    Run {
        #[command(flatten)]
        more: More,
        /// Seconds after which the command is killed.
        #[arg(long, default_value_t = 600)]
        deadline: u32,
        /// The command; its words are joined by spaces and read by the lab's shell.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct More {
    /// A further program to take into the lab.
    #[arg(long = "binary", value_name = "FILE")]
    binaries: Vec<PathBuf>,
    /// The kernel of guests: Debian's for virtual machines, or the one for any machine.
    #[arg(long, value_name = "KERNEL", value_enum, default_value_t)]
    guests: DebianKernel,
}

impl More {
    fn all(&self) -> Vec<PathBuf> {
        let mut all = lab::project_binaries();
        all.extend_from_slice(&self.binaries);
        all
    }
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().action {
        Action::Prepare => prepare(),
        Action::Shell(more) => shell(&more),
        Action::Run { more, deadline, command } => run(&more, deadline, &command.join(" ")),
    }
}

fn prepare() -> anyhow::Result<ExitCode> {
    Lab::prepare()?;
    for kernel in DebianKernel::ALL {
        println!("{}", Lab::prepare_guests(kernel)?.image().display());
    }
    Ok(ExitCode::SUCCESS)
}

fn shell(more: &More) -> anyhow::Result<ExitCode> {
    let status = Lab::terminal(more.guests, &more.all())?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run(more: &More, deadline: u32, command: &str) -> anyhow::Result<ExitCode> {
    let lab = Lab::boot(more.guests, &more.all())?;
    let done = lab.run(command, Duration::from_secs(deadline.into()))?;
    print!("{}", done.output);
    let status = u8::try_from(done.status).with_context(|| format!("exit status {}", done.status))?;
    Ok(status.into())
}
