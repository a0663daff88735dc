//! guest-vmm: the process of one guest. Launched by guestd, which hands over its private channel as standard input.

use anyhow::Context;
use clap::Parser;
use guest_vmm::{LogFilter, Platform};
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

/// The VMM of one guest. It is launched by guestd and of no use by hand: standard input is guestd's private channel.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// What guests run on: `kvm`, or `scripted` for tests
    #[arg(long, default_value = "kvm", value_name = "NAME")]
    hypervisor: Platform,
    /// What to log on standard error
    #[arg(long, default_value = "info", value_name = "FILTER")]
    log: String,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &Options) -> anyhow::Result<()> {
    let log = LogFilter::start(&options.log).with_context(|| format!("--log {}", options.log))?;
    let channel = channel().context("guest-vmm is launched by guestd, not by hand")?;
    Ok(guest_vmm::serve_service(channel, options.hypervisor, log)?)
}

/// guestd's private channel.
fn channel() -> anyhow::Result<UnixStream> {
    let stdin = std::io::stdin();
    anyhow::ensure!(!stdin.is_terminal(), "standard input is a terminal");
    let channel = UnixStream::from(stdin.as_fd().try_clone_to_owned()?);
    channel.peer_addr().context("standard input is not its channel")?;
    Ok(channel)
}
