//! What a snapshot costs its guest, and what the calls do beside it that have a guest stand still: pause and resume; and what comes
//! of a snapshot.
//!
//! Guests of three sizes write all of it, are snapshotted, write some of it again and are
//! snapshotted again; another guest is paused and resumed. Parts: `files` are snapshots written to disk and read back, `launches` how
//! soon guests go on from them, `shares` the memory that all of that takes. In every round each figure follows its floor. A round is
//! played once before the first and not counted.
//!
//! Limits: one machine's own /dev/kvm; the largest size needs 10 GiB of the host's memory, `Plan::most_mib` leaves it out;
//! no figure fails the run.

mod files;
mod launches;
mod shares;

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::figure::{Definition, Row, Samples};
use super::fork::Parent;
use super::memory::bare::{BareMemory, PAGE};
use super::vps::at_rest;
use super::vps::bare::BareVps;
use super::vps::program::Program;
use super::warm::WarmService;
use launches::{ColdService, Launches};

/// What a guest writes between two snapshots.
const AGAIN_MIB: usize = 10;
/// The most that a pause may take, whatever else is allowed for it, in µs.
const PAUSE_BAR: f64 = 1000.0;
/// Pauses in a round.
const PAUSES: usize = 20;

const CALL: &str = "call";
const FLOOR_PAUSE: &str = "floor-pause";
const PAUSE: &str = "pause";
const FLOOR_RESUME: &str = "floor-resume";
const RESUME: &str = "resume";

const OF_CALLS: [Definition; 5] = [
    Definition::time(CALL, "a call that does nothing → answer", None),
    Definition::time(FLOOR_PAUSE, "bare signal → out of KVM_RUN in HLT, and that call", None),
    Definition::beside(PAUSE, "pause call → answer", FLOOR_PAUSE, 1.2),
    Definition::time(FLOOR_RESUME, "bare message → about to enter KVM_RUN, and that call", None),
    Definition::time(RESUME, "resume call → answer", Some(FLOOR_RESUME)),
];

/// What is measured of guests that write so much.
struct Size {
    mib: usize,
    figures: [Definition; 10],
}

macro_rules! size {
    ($mib:literal, $name:literal) => {
        Size {
            mib: $mib,
            figures: [
                Definition::time(
                    concat!("bare-freeze-", $name),
                    "bare mremap and private mmap, all pages written",
                    None,
                ),
                Definition::time(
                    concat!("stands-bare-", $name),
                    "1 ms, and what the bare freeze takes longer than that of 128 MiB",
                    None,
                ),
                Definition::time(
                    concat!("snapshot-", $name),
                    "snapshot call → answer, the same written by a guest",
                    None,
                ),
                Definition::beside(
                    concat!("stands-", $name),
                    "how long the guest stands still for it",
                    concat!("stands-bare-", $name),
                    1.0,
                ),
                Definition::time(
                    concat!("loop-", $name),
                    "a guest's write to each of its pages, before",
                    None,
                ),
                Definition::time(
                    concat!("loop-after-", $name),
                    "the same as soon as the snapshot is taken: each page is copied",
                    Some(concat!("loop-", $name)),
                ),
                Definition::time(
                    concat!("loop-later-", $name),
                    "the same once more",
                    Some(concat!("loop-", $name)),
                ),
                Definition::time(
                    concat!("again-bare-", $name),
                    "1 ms, and 1.2 × a bare scan and copy of 10 MiB written since",
                    None,
                ),
                Definition::time(
                    concat!("again-", $name),
                    "snapshot call → answer, 10 MiB written since a first one",
                    None,
                ),
                Definition::beside(
                    concat!("again-stands-", $name),
                    "how long the guest stands still for it",
                    concat!("again-bare-", $name),
                    1.0,
                ),
            ],
        }
    };
}

const SIZES: [Size; 3] = [size!(128, "128m"), size!(1024, "1g"), size!(4096, "4g")];

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Guests that write more than so many MiB are left out.
    pub most_mib: usize,
    /// How often everything is measured.
    pub rounds: u32,
    /// Where files may be, twice as large as what the largest of the guests that are exported has written: 1 GiB at the most.
    pub folder: PathBuf,
}

/// The figures of a plan.
pub fn definitions(most_mib: usize) -> Vec<Definition> {
    let of_sizes = SIZES.iter().filter(|size| size.mib <= most_mib).flat_map(|size| size.figures);
    let of_files = exports(most_mib).flat_map(|size| size.figures);
    let of_guests = launches::FIGURES.into_iter().chain(shares::FIGURES);
    OF_CALLS.into_iter().chain(of_sizes).chain(of_files).chain(of_guests).collect()
}

fn exports(most_mib: usize) -> impl Iterator<Item = &'static files::Exports> {
    files::SIZES.iter().filter(move |size| size.mib <= most_mib)
}

/// Measures all figures.
///
/// # Errors
/// When a program is not built, or anything that is measured fails.
pub async fn measure(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let bench = Bench::new(plan).await?;
    bench.round(&mut Samples::default()).await?;
    let mut samples = Samples::default();
    for _ in 0..plan.rounds {
        bench.round(&mut samples).await?;
    }
    Ok(samples.rows(&definitions(plan.most_mib)))
}

/// What everything is measured on.
struct Bench<'a> {
    plan: &'a Plan,
    warm: WarmService,
    cold: ColdService,
    launches: Launches,
    pagemap: File,
}

impl<'a> Bench<'a> {
    async fn new(plan: &'a Plan) -> anyhow::Result<Self> {
        let (warm, cold) = (WarmService::new().await?, ColdService::new().await?);
        let launches = Launches::new(&cold, &plan.folder).await?;
        Ok(Self { plan, warm, cold, launches, pagemap: File::open("/proc/self/pagemap")? })
    }

    async fn round(&self, samples: &mut Samples) -> anyhow::Result<()> {
        let Self { plan, warm, cold, .. } = self;
        calls(warm, samples).await?;
        let mut least = None;
        for size in SIZES.iter().filter(|size| size.mib <= plan.most_mib) {
            let frozen = size.bare(least, samples, &self.pagemap)?;
            least = least.or(Some(frozen));
            size.guest(warm, samples).await?;
            // The memory of its guest goes back to the host first.
            warm.ready(0).await?;
        }
        for size in exports(plan.most_mib) {
            size.round(warm, &plan.folder, samples).await?;
        }
        self.launches.round(warm, cold, samples).await?;
        shares::round(warm, cold, samples).await
    }
}

/// Pauses and resumes a guest that halts.
async fn calls(service: &WarmService, samples: &mut Samples) -> anyhow::Result<()> {
    let bare = BareVps::new(1, Program::Halt)?;
    let parent = Parent::boot(&service.host, 128 << 20).await?;
    let control = parent.launched.lifecycle.control();
    control.opened().await?;
    for _ in 0..PAUSES {
        let begin = Instant::now();
        parent.launched.lifecycle.bind().bound().await?;
        let call = begin.elapsed();
        samples.time(CALL, call);
        let begin = Instant::now();
        bare.start()?;
        samples.time(FLOOR_RESUME, begin.elapsed() + call);
        at_rest()?;
        let begin = Instant::now();
        samples.time(FLOOR_PAUSE, bare.stop()? - begin + call);
        at_rest()?;
        let begin = Instant::now();
        control.pause().await?;
        samples.time(PAUSE, begin.elapsed());
        let begin = Instant::now();
        control.resume().await?;
        samples.time(RESUME, begin.elapsed());
    }
    parent.launched.lifecycle.stop().await?;
    drop((control, parent));
    service.ready(0).await.map(drop)
}

impl Size {
    /// Gives the time of the bare freeze; `least` is that of the smallest size, if this is another.
    fn bare(
        &self,
        least: Option<Duration>,
        samples: &mut Samples,
        pagemap: &File,
    ) -> anyhow::Result<Duration> {
        let mut memory = BareMemory::touched(self.mib << 20)?;
        let frozen = memory.freeze()?;
        samples.time(self.figures[0].name, frozen);
        let longer = frozen.saturating_sub(least.unwrap_or(frozen));
        samples.add(self.figures[1].name, PAUSE_BAR + longer.as_secs_f64() * 1e6);
        memory.unmap_aside();
        memory.write(0..(AGAIN_MIB << 20) / PAGE);
        let copied = memory.copy_written(pagemap)?;
        samples.add(self.figures[7].name, PAUSE_BAR + 1.2 * copied.as_secs_f64() * 1e6);
        Ok(frozen)
    }

    async fn guest(&self, service: &WarmService, samples: &mut Samples) -> anyhow::Result<()> {
        let mut add = |figure: usize, value: f64| samples.add(self.figures[figure].name, value);
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        let mib = u32::try_from(self.mib).context("a size")?;
        let mut parent = Parent::that_wrote(&service.host, mib).await?;
        add(4, micros(parent.timed_touch(mib).await?));
        let (first, call, stands) = parent.snapshot().await?;
        add(2, micros(call));
        add(3, stands);
        add(5, micros(parent.timed_touch(mib).await?));
        add(6, micros(parent.timed_touch(mib).await?));
        drop((first, parent));
        service.ready(0).await?;
        // Another, of which no more than this is written since.
        let mut parent = Parent::that_wrote(&service.host, mib).await?;
        let (first, _, _) = parent.snapshot().await?;
        parent.touch(u32::try_from(AGAIN_MIB)?).await?;
        let (_, call, stands) = parent.snapshot().await?;
        add(8, micros(call));
        add(9, stands);
        drop(first);
        Ok(())
    }
}
