//! guestctl: guests from the command line.
//!
//! A module per command or kind of commands (`run`, `fork`, `demo`, `guests`, `look`, `dump`, `snapshot`, `debug`), and
//! what they share: `options`, `service` (guestd, or a private one in this
//! process), `ending` (exit statuses), `out` (the standard output), `signals`.

mod cpus;
mod debug;
mod demo;
mod devices;
mod disk;
mod dump;
mod duration;
mod ending;
mod fork;
mod guests;
mod look;
mod options;
mod out;
mod pairs;
mod run;
mod service;
mod signals;
mod size;
mod snapshot;

use clap::{CommandFactory, Parser};
use ending::{Outcome, Trouble};
use options::{Command, Options};
use out::Out;
use snapshot::Snapshot;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let options = Options::parse();
    match perform(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(trouble) => {
            if let Some(text) = trouble.text() {
                eprintln!("guestctl: {text}");
            }
            ExitCode::from(trouble.status())
        }
    }
}

fn perform(options: &Options) -> Outcome {
    let out = Out::take()?;
    if let Some(filter) = &options.log {
        log_to_stderr(filter)?;
    }
    if let Command::Completions { shell } = options.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Options::command(), "guestctl", &mut script);
        return out.write(&script);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = tokio::task::LocalSet::new().block_on(&runtime, command(options, &out));
    // Reads of files that a VMM still wants are of no use any more.
    runtime.shutdown_background();
    done
}

async fn command(options: &Options, out: &Out) -> Outcome {
    match &options.command {
        Command::Run(run) => run::run(options, run, out).await,
        Command::Fork(fork) => fork::fork(&service::running(options).await?, fork, out).await,
        Command::Demo => demo::demo(options, out).await,
        Command::Ps { json } => guests::ps(&service::running(options).await?, *json, out).await,
        Command::Info { json } => guests::info(&service::running(options).await?, *json, out).await,
        Command::Wait { id } => guests::wait(&service::running(options).await?, id, out).await,
        Command::Stop(stop) => guests::stop(&service::running(options).await?, stop, out).await,
        Command::Pause { id } => guests::pause(&service::running(options).await?, id).await,
        Command::Resume { id } => guests::resume(&service::running(options).await?, id).await,
        Command::Reset { id } => guests::reset(&service::running(options).await?, id).await,
        Command::Nmi { id } => guests::nmi(&service::running(options).await?, id).await,
        Command::Dump(dump) => dump::dump(&service::running(options).await?, dump).await,
        Command::Snapshot(Snapshot::Save(save)) => {
            snapshot::save(&service::running(options).await?, save, out).await
        }
        Command::Snapshot(Snapshot::Show(show)) => snapshot::show(show, out),
        Command::Inspect(look) => look::inspect(&service::running(options).await?, look, out).await,
        Command::Update(change) => look::update(&service::running(options).await?, change, out).await,
        Command::Events { id, from, json } => {
            look::events(&service::running(options).await?, id, *from, *json, out).await
        }
        Command::Graph { id, format } => {
            look::graph(&service::running(options).await?, id, *format, out).await
        }
        Command::Timeline { id, trace } => {
            look::timeline(&service::running(options).await?, id, trace.as_deref(), out).await
        }
        Command::Debug { id, gdb } => debug::debug(&service::running(options).await?, id, gdb, out).await,
        Command::Completions { .. } => Ok(()),
    }
}

fn log_to_stderr(filter: &str) -> Outcome {
    let filter =
        EnvFilter::try_new(filter).map_err(|error| Trouble::Usage(format!("--log {filter}: {error}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .init();
    Ok(())
}
