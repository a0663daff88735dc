//! guestd: the service.

use anyhow::Context;
use clap::Parser;
use guest_service::{Service, ServiceConfig, listen};
use rustix::process::{Resource, Rlimit};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Launches guests and hands out capabilities to their lives, over Cap'n Proto on a Unix socket.
///
/// SIGTERM or SIGINT stops all leased guests by force and frees all snapshots; guestd then ends with status 0.
#[derive(Parser)]
#[command(version, after_help = "Example:\n  guestd --socket /run/user/1000/guestd.sock --log info")]
struct Options {
    /// The Unix socket to listen on (mode 0600; a stale one is replaced)
    #[arg(long, env = "GUESTD_SOCKET", value_name = "PATH")]
    socket: PathBuf,
    /// A TOML file: vmm, hypervisor, warm, max-guests, max-snapshots, max-connections, vmm-log
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What to log, for instance `info` or `guest_service=debug`
    #[arg(long, env = "GUESTD_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
    /// The guest-vmm to launch (default: beside this executable, then in PATH)
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Where guests run: `kvm`, or `scripted` for tests without a hypervisor
    #[arg(long, value_name = "NAME")]
    hypervisor: Option<String>,
    /// How many VMMs are kept ready for guests to come, 0 to 64 [default: 2]
    #[arg(long, value_name = "N")]
    warm: Option<usize>,
}

fn main() -> ExitCode {
    match serve(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guestd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: Options) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&options.log).with_context(|| format!("--log {}", options.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .init();
    allow_descriptors();
    let mut config = match &options.config {
        Some(path) => ServiceConfig::read(path)?,
        None => ServiceConfig::default(),
    };
    config.vmm = options.vmm.or(config.vmm);
    config.hypervisor = options.hypervisor.unwrap_or(config.hypervisor);
    config.warm = options.warm.unwrap_or(config.warm);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, accept(&options.socket, config))
}

/// Each guest takes some descriptors here: as many are used as the hard limit allows.
fn allow_descriptors() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let most = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, most) {
        tracing::warn!(%error, "the limit of open descriptors stays as it is");
    }
}

async fn accept(socket: &std::path::Path, config: ServiceConfig) -> anyhow::Result<()> {
    let service = Service::new(config)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listening = listen(socket)?;
    tracing::info!(socket = %socket.display(), "listening");
    loop {
        tokio::select! {
            accepted = listening.accept() => match accepted {
                Ok((stream, uid)) => {
                    let service = service.clone();
                    tokio::task::spawn_local(async move {
                        if let Err(error) = service.serve(stream, uid).await {
                            tracing::warn!(uid, %error, "a client's connection ended");
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely: those who are connected go on, and others may try again.
                    tracing::error!(%error, "cannot accept");
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                }
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    drop(listening);
    tracing::info!("stopping all guests");
    service.shutdown().await;
    Ok(())
}
