//! Virtual processors: starting and stopping them, an exit, a kick, and their state, each beside the same done with bare ioctls.
//!
//! Parts: `program` the guests' few bytes of code, `bare` VPs on bare threads, `state` the sum of the ioctls of a VP's state,
//! `guest` VPs as guestd runs them, on a [`machine::bus::Bus`], `whole` a machine whose units move together.
//!
//! Both sides have the same guests: real mode, the same memory, local APICs in the kernel and the IOAPIC outside. In every
//! round each figure follows its floor, so that whatever else the machine does meanwhile hits both alike. A round is played once
//! before the first and not counted. What is asked of VPs at rest is asked once every other thread of this process sleeps.
//!
//! Limits: one machine's own /dev/kvm; no figure fails the run. A host that interprets a guest's kernel code has slow exits,
//! and what is added to them weighs less there.

pub(super) mod bare;
mod guest;
pub(super) mod program;
mod state;
mod whole;

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context, ensure};
use kvm::KvmHypervisor;
use kvm_ioctls::VcpuFd;
use serde::Serialize;

use super::figure::{self, Definition, Samples};
use crate::service::PATIENCE;
use crate::wait;
use bare::BareVps;
use guest::GuestVps;
use program::Program;
use state::{StateIoctls, Times};
use whole::WholeGuest;

const FLOOR_START: &str = "floor-start";
const START: &str = "start";
const RESUME: &str = "resume";
const FLOOR_STOP: &str = "floor-stop";
const STOP: &str = "stop";
const PAUSE: &str = "pause";
const FLOOR_EXIT: &str = "floor-exit";
const EXIT: &str = "exit";
const FLOOR_KICK_SPIN: &str = "floor-kick-spin";
const KICK_SPIN: &str = "kick-spin";
const FLOOR_KICK_HALT: &str = "floor-kick-halt";
const KICK_HALT: &str = "kick-halt";
const FLOOR_SAVE: &str = "floor-save";
const SAVE: &str = "save";
const FLOOR_RESTORE: &str = "floor-restore";
const RESTORE: &str = "restore";

/// What is measured of every count of VPs, in this order.
pub const OF_MANY: [Definition; 6] = [
    Definition::time(FLOOR_START, "bare threads: a message to each, and its answer before KVM_RUN", None),
    Definition::time(START, "start of all VPs", Some(FLOOR_START)),
    Definition::time(RESUME, "start of a whole machine: VPs, devices, time", Some(FLOOR_START)),
    Definition::time(FLOOR_STOP, "bare threads: a signal to each in HLT, and its answer after KVM_RUN", None),
    Definition::time(STOP, "stop of all VPs, in HLT", Some(FLOOR_STOP)),
    Definition::time(PAUSE, "pause of a whole machine: VPs, devices, time", Some(FLOOR_STOP)),
];

/// What is measured of one VP, in this order.
pub const OF_ONE: [Definition; 10] = [
    Definition::time(FLOOR_EXIT, "a write to a port in a bare loop around KVM_RUN", None),
    Definition::beside(EXIT, "a write to a port, up to a device on the bus and back", FLOOR_EXIT, 1.15),
    Definition::time(FLOOR_KICK_SPIN, "signal → out of KVM_RUN, from a busy guest", None),
    Definition::beside(
        KICK_SPIN,
        "request → its work begins on the VP's thread, out of a busy guest",
        FLOOR_KICK_SPIN,
        1.2,
    ),
    Definition::time(FLOOR_KICK_HALT, "signal → out of KVM_RUN, from HLT", None),
    Definition::beside(
        KICK_HALT,
        "request → its work begins on the VP's thread, out of HLT",
        FLOOR_KICK_HALT,
        1.2,
    ),
    Definition::time(FLOOR_SAVE, "the ioctls that read a VP's state", None),
    Definition::beside(SAVE, "reading a VP's state", FLOOR_SAVE, 1.3),
    Definition::time(FLOOR_RESTORE, "the ioctls that set a VP's state, all its MSRs", None),
    Definition::beside(RESTORE, "setting a VP's state, 6 MSRs of which have changed", FLOOR_RESTORE, 1.3),
];

/// How many exits make a sample.
const EXITS: u32 = 200;

/// What was measured of one figure with so many VPs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// How many VPs the guest has.
    pub vps: u32,
    /// The figure, compared with another of as many VPs.
    #[serde(flatten)]
    pub figure: figure::Row,
}

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// How many VPs the guests have that are started and stopped.
    pub counts: Vec<u32>,
    /// How often everything is measured.
    pub rounds: u32,
}

/// Measures [`OF_MANY`] for every count, and [`OF_ONE`].
///
/// # Errors
/// When the host has no KVM or fewer VPs, or a VP does anything but what its program says.
pub fn measure(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let hypervisor = KvmHypervisor::open()?;
    let mut rows = Vec::new();
    for &vps in &plan.counts {
        let samples = runtime.block_on(measure_many(&hypervisor, vps, plan.rounds))?;
        rows.extend(samples.rows(&OF_MANY).into_iter().map(|figure| Row { vps, figure }));
    }
    let samples = runtime.block_on(measure_one(&hypervisor, plan.rounds))?;
    rows.extend(samples.rows(&OF_ONE).into_iter().map(|figure| Row { vps: 1, figure }));
    Ok(rows)
}

async fn measure_many(hypervisor: &KvmHypervisor, vps: u32, rounds: u32) -> anyhow::Result<Samples> {
    let bare = BareVps::new(vps, Program::Halt)?;
    let guest = GuestVps::new(hypervisor, vps, Program::Halt).await?;
    let mut whole = WholeGuest::boot(hypervisor, vps).await?;
    let mut samples = Samples::default();
    for round in 0..=rounds {
        let mut this_round = Samples::default();
        let counted = if round == 0 { &mut this_round } else { &mut samples };
        start_and_stop(&bare, &guest, &mut whole, counted).await?;
    }
    guest.end().await?;
    whole.end().await?;
    Ok(samples)
}

async fn start_and_stop(
    bare: &BareVps,
    guest: &GuestVps,
    whole: &mut WholeGuest,
    samples: &mut Samples,
) -> anyhow::Result<()> {
    let begin = Instant::now();
    bare.start()?;
    samples.time(FLOOR_START, begin.elapsed());
    at_rest()?;
    let begin = Instant::now();
    bare.stop()?;
    samples.time(FLOOR_STOP, begin.elapsed());
    at_rest()?;
    let begin = Instant::now();
    guest.start().await?;
    samples.time(START, begin.elapsed());
    at_rest()?;
    let begin = Instant::now();
    guest.stop().await?;
    samples.time(STOP, begin.elapsed());
    at_rest()?;
    let begin = Instant::now();
    whole.machine.start().await?;
    samples.time(RESUME, begin.elapsed());
    at_rest()?;
    let begin = Instant::now();
    whole.machine.pause().await?;
    samples.time(PAUSE, begin.elapsed());
    whole.check()?;
    at_rest()
}

/// Both sides of a figure.
struct Pair {
    bare: BareVps,
    guest: GuestVps,
}

impl Pair {
    async fn new(hypervisor: &KvmHypervisor, program: Program) -> anyhow::Result<Self> {
        Ok(Self { bare: BareVps::new(1, program)?, guest: GuestVps::new(hypervisor, 1, program).await? })
    }
}

async fn measure_one(hypervisor: &KvmHypervisor, rounds: u32) -> anyhow::Result<Samples> {
    let mut writing = Pair::new(hypervisor, Program::Write).await?;
    let spinning = Pair::new(hypervisor, Program::Spin).await?;
    let halting = Pair::new(hypervisor, Program::Halt).await?;
    let tsc = halting.guest.has_tsc().await?;
    let mut samples = Samples::default();
    for round in 0..=rounds {
        let mut this_round = Samples::default();
        let counted = if round == 0 { &mut this_round } else { &mut samples };
        exits(&mut writing, counted).await?;
        kick_spinning(&spinning, counted).await?;
        kick_halted(&halting, counted).await?;
        states(&halting, tsc, counted).await?;
    }
    for Pair { bare: _, guest } in [writing, spinning, halting] {
        guest.end().await?;
    }
    Ok(samples)
}

async fn exits(pair: &mut Pair, samples: &mut Samples) -> anyhow::Result<()> {
    at_rest()?;
    let (begun, ended) = pair.bare.run_exits(EXITS)?;
    samples.time(FLOOR_EXIT, (ended - begun) / EXITS);
    at_rest()?;
    let (begun, ended) = pair.guest.run_exits(EXITS).await?;
    samples.time(EXIT, (ended - begun) / EXITS);
    Ok(())
}

async fn kick_spinning(Pair { bare, guest }: &Pair, samples: &mut Samples) -> anyhow::Result<()> {
    at_rest()?;
    bare.start()?;
    program::counts(&bare.memory)?;
    let begin = Instant::now();
    samples.time(FLOOR_KICK_SPIN, bare.stop()? - begin);
    at_rest()?;
    guest.start().await?;
    program::counts(&guest.memory)?;
    let begin = Instant::now();
    samples.time(KICK_SPIN, guest.out().await? - begin);
    guest.stop().await
}

async fn kick_halted(Pair { bare, guest }: &Pair, samples: &mut Samples) -> anyhow::Result<()> {
    bare.start()?;
    at_rest()?;
    let begin = Instant::now();
    samples.time(FLOOR_KICK_HALT, bare.stop()? - begin);
    guest.start().await?;
    at_rest()?;
    let begin = Instant::now();
    samples.time(KICK_HALT, guest.out().await? - begin);
    guest.stop().await
}

async fn states(Pair { bare, guest }: &Pair, tsc: bool, samples: &mut Samples) -> anyhow::Result<()> {
    at_rest()?;
    let ioctls = move |vcpu: &mut VcpuFd| StateIoctls::prepare(vcpu, tsc)?.save_and_restore(vcpu);
    let Times { save, restore } = bare.call(ioctls)??;
    samples.time(FLOOR_SAVE, save);
    samples.time(FLOOR_RESTORE, restore);
    at_rest()?;
    let Times { save, restore } = guest.save_and_restore().await?;
    samples.time(SAVE, save);
    samples.time(RESTORE, restore);
    Ok(())
}

/// Waits until every other thread of this process sleeps: its VPs are stopped, or in HLT.
pub(super) fn at_rest() -> anyhow::Result<()> {
    let mut failure = None;
    let quiet = || match others_sleep() {
        Ok(sleep) => sleep,
        Err(error) => {
            failure = Some(error);
            true
        }
    };
    wait::until("all VPs at rest", PATIENCE, quiet)?;
    failure.map_or(Ok(()), Err)
}

fn others_sleep() -> anyhow::Result<bool> {
    let own = rustix::thread::gettid().to_string();
    for task in std::fs::read_dir("/proc/self/task").context("/proc/self/task")? {
        let task = task?;
        if task.file_name() == own.as_str() {
            continue;
        }
        // One that ends meanwhile does not run.
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
        if state.context("a thread has no state")? != 'S' {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Fails if a VP has halted that was to go on.
fn no_halts<T: std::fmt::Debug>(halts: &mut tokio::sync::mpsc::UnboundedReceiver<T>) -> anyhow::Result<()> {
    let halt = halts.try_recv().ok();
    ensure!(halt.is_none(), "a VP has halted by itself: {halt:?}");
    Ok(())
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let figures: Vec<_> = rows.iter().map(|row| row.figure.clone()).collect();
    let counts = rows.iter().map(|row| row.vps.to_string());
    let mut text = String::new();
    let counts = std::iter::once("vps".to_owned()).chain(counts);
    for (count, line) in counts.zip(figure::table(&figures).lines()) {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{count:>4} {line}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_busy_thread_does_not_sleep() {
        static BUSY: AtomicBool = AtomicBool::new(true);
        let thread = std::thread::spawn(|| {
            while BUSY.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let sleep = others_sleep();
        BUSY.store(false, Ordering::Relaxed);
        thread.join().unwrap();
        assert!(!sleep.unwrap());
    }

    #[test]
    fn every_figure_has_its_floor_beside_it() {
        for definitions in [&OF_MANY[..], &OF_ONE] {
            for figure in definitions.iter().filter(|figure| !figure.name.starts_with("floor-")) {
                let floor = figure.reference.unwrap();
                assert!(floor.starts_with("floor-") && definitions.iter().any(|other| other.name == floor));
            }
        }
    }
}
