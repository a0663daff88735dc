//! `guest-bench`: the benchmarks.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use guest_tests::bench::{self, devices, figure, memory, snapshot, units, vps};
use serde::Serialize;

/// Measures guestd beside the bare system calls and channels that it is made of, in the same run.
#[derive(Debug, Parser)]
#[command(name = "guest-bench", version)]
struct Arguments {
    /// Write the figures to this file too: an array of objects
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure debug builds, whose figures say nothing
    #[arg(long, global = true)]
    allow_debug: bool,
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Debug, Subcommand)]
enum Benchmark {
    /// A guest's life: launch, create, run, stop, calls and memory, with the built-in guest (128 MiB, 1 VP)
    ///
    /// It needs /dev/kvm. guestd and guest-vmm are those beside this program: `cargo build --release --bins` comes first.
    Life(Life),
    /// Transitions of state units, each with 64 bytes of saved state, in graphs of three shapes
    Units(Units),
    /// Virtual processors, in this process: start and stop, pause and resume, an exit, a kick, save and restore
    ///
    /// It needs /dev/kvm, and no other program.
    Vps(Vps),
    /// Devices, each driven by a fake driver in this process: disks, beside bare io_uring on the same file
    ///
    /// It needs no KVM and no other program.
    Devices(Devices),
    /// Guest memory (128 MiB and 1 GiB, all written), frozen and restored in this process, beside bare system calls
    ///
    /// It needs no KVM and no other program.
    Memory(Memory),
    /// Pauses and snapshots of guests that have written 128 MiB, 1 GiB and 4 GiB, their files, and guests that go on from them
    ///
    /// It needs /dev/kvm and 10 GiB of memory for the largest. guestd and guest-vmm are those beside this program: `cargo build
    /// --release --bins` comes first.
    Snapshot(Snapshot),
    /// Be the client that is killed
    #[command(hide = true)]
    Hold {
        /// The service's socket
        socket: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Life {
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only the figures whose names begin so, and those they are compared with
    #[arg(value_name = "FIGURE")]
    figures: Vec<String>,
}

#[derive(Debug, Args)]
struct Units {
    /// How often everything is measured [default: 200,000 requests' worth, 15 to 2,000 times]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// How many units each graph has
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [10, 1_000, 10_000])]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    counts: Vec<u32>,
}

#[derive(Debug, Args)]
struct Vps {
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How many VPs are started and stopped
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8, 64])]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=254))]
    counts: Vec<u32>,
}

#[derive(Debug, Args)]
struct Devices {
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Where files of 128 MiB may be [default: the folder for temporary files]
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Memory {
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

#[derive(Debug, Args)]
struct Snapshot {
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Leave out guests that write more than so many MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    most: usize,
    /// Where files of 2 GiB may be, which are written to disk [default: the folder for temporary files]
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let Arguments { json, allow_debug, benchmark } = Arguments::parse();
    if !allow_debug && !matches!(benchmark, Benchmark::Hold { .. }) {
        bench::check_build()?;
    }
    match benchmark {
        Benchmark::Life(life) => write(json.as_deref(), &measure_life(&life)?),
        Benchmark::Units(units) => write(json.as_deref(), &measure_units(units)?),
        Benchmark::Vps(vps) => write(json.as_deref(), &measure_vps(vps)?),
        Benchmark::Devices(devices) => write(json.as_deref(), &measure_devices(&devices)?),
        Benchmark::Memory(memory) => write(json.as_deref(), &measure_memory(&memory)?),
        Benchmark::Snapshot(snapshot) => write(json.as_deref(), &measure_snapshot(snapshot)?),
        Benchmark::Hold { socket } => block_on(bench::hold(&socket)),
    }
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, work)
}

fn measure_life(life: &Life) -> anyhow::Result<Vec<figure::Row>> {
    bench::check_kvm()?;
    let rows = block_on(bench::measure(&life.figures, life.rounds))?;
    println!("{} rounds, 128 MiB, 1 VP", life.rounds);
    print!("{}", figure::table(&rows));
    Ok(rows)
}

fn measure_units(Units { rounds, counts }: Units) -> anyhow::Result<Vec<units::Row>> {
    let counts = counts.into_iter().map(usize::try_from).collect::<Result<_, _>>()?;
    let rows = units::measure(&units::Plan { units: counts, rounds })?;
    print!("{}", units::table(&rows));
    Ok(rows)
}

fn measure_vps(Vps { rounds, counts }: Vps) -> anyhow::Result<Vec<vps::Row>> {
    bench::check_kvm()?;
    let rows = vps::measure(&vps::Plan { counts, rounds })?;
    println!("{rounds} rounds");
    print!("{}", vps::table(&rows));
    Ok(rows)
}

fn measure_devices(Devices { rounds, folder }: &Devices) -> anyhow::Result<Vec<figure::Row>> {
    let folder = folder.clone().unwrap_or_else(std::env::temp_dir);
    let rows = devices::measure(&folder, *rounds)?;
    println!("{rounds} rounds");
    print!("{}", figure::table(&rows));
    Ok(rows)
}

fn measure_memory(Memory { rounds }: &Memory) -> anyhow::Result<Vec<figure::Row>> {
    let rows = memory::measure(*rounds)?;
    println!("{rounds} rounds");
    print!("{}", figure::table(&rows));
    Ok(rows)
}

fn measure_snapshot(Snapshot { rounds, most, folder }: Snapshot) -> anyhow::Result<Vec<figure::Row>> {
    bench::check_kvm()?;
    let folder = folder.unwrap_or_else(std::env::temp_dir);
    let rows = block_on(snapshot::measure(&snapshot::Plan { most_mib: most, rounds, folder }))?;
    println!("{rounds} rounds");
    print!("{}", figure::table(&rows));
    Ok(rows)
}

fn write(path: Option<&Path>, rows: &impl Serialize) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let file = std::fs::File::create(path).with_context(|| path.display().to_string())?;
    serde_json::to_writer_pretty(file, rows).with_context(|| path.display().to_string())
}
