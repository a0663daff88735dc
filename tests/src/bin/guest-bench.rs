//! `guest-bench`: the benchmark.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use guest_tests::bench::{self, figure};

/// Measures guestd with the built-in guest (128 MiB, 1 VP) beside the bare system calls, on this machine's /dev/kvm.
///
/// guestd and guest-vmm are those beside this program: `cargo build --release --bins` comes first.
#[derive(Debug, Parser)]
#[command(name = "guest-bench", version)]
struct Arguments {
    /// Write the figures to this file too: an array of objects
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Measure debug builds, whose figures say nothing
    #[arg(long)]
    allow_debug: bool,
    /// Be the client that is killed
    #[arg(long, hide = true, value_name = "SOCKET")]
    hold: Option<PathBuf>,
    /// Only the figures whose names begin so, and those they are compared with
    #[arg(value_name = "FIGURE")]
    figures: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    match &arguments.hold {
        Some(socket) => local.block_on(&runtime, bench::hold(socket)),
        None => local.block_on(&runtime, measure(&arguments)),
    }
}

async fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    bench::check(arguments.allow_debug)?;
    let rows = bench::measure(&arguments.figures, arguments.rounds).await?;
    println!("{} rounds, 128 MiB, 1 VP", arguments.rounds);
    print!("{}", figure::table(&rows));
    if let Some(path) = &arguments.json {
        let file = std::fs::File::create(path).with_context(|| path.display().to_string())?;
        serde_json::to_writer_pretty(file, &rows).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
