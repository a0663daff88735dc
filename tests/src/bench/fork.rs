//! Snapshots of a guest that has written its memory, and a guest that goes on from one in a VMM that was ready.
//!
//! The parent is another one in each round: its first snapshot moves its memory aside, the second copies what was written since.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use guest_client::{
    ByteStream, Call, GuestConfig, Host, Launched, Lifecycle, MemoryConfig, Observer, SerialChunk, Snapshot,
};
use tokio::sync::mpsc;

use super::figure::{Definition, Samples};
use super::life::Pss;
use super::warm::WarmService;
use super::{Group, MEMORY_BYTES, Rounds, config, first_byte, floor, output};

const SNAPSHOT: &str = "snapshot";
const PAUSE: &str = "snapshot-pause";
const AGAIN: &str = "snapshot-again-pause";
const FORK: &str = "fork";
const MEMORY: &str = "fork-memory";

/// The most that a pause may take while memory is only moved aside, in µs.
const PAUSE_BAR: f64 = 1000.0;
/// What a fork may take, of the in-process floor.
const FORK_BAR: f64 = 0.5;

pub(super) static GROUP: Group = Group {
    figures: &[
        Definition::time(SNAPSHOT, "snapshot call → answer, 100 MiB written", None),
        Definition {
            bar: Some(PAUSE_BAR),
            ..Definition::time(PAUSE, "how long the guest is paused for it", None)
        },
        Definition::time(AGAIN, "the same for the next snapshot, 10 MiB written again", None),
        Definition::beside(
            FORK,
            "launch from a snapshot with a VMM ready, all in one flight → first byte",
            floor::IN_PROCESS,
            FORK_BAR,
        ),
        Definition::memory(MEMORY, "Pss of that VMM with what is not its parent's"),
    ],
    open: |_| async { Ok(Box::new(Forks(WarmService::new().await?)) as Box<dyn Rounds>) }.boxed_local(),
};

struct Forks(WarmService);

/// A guest that answers what it is told.
pub(super) struct Parent {
    pub launched: Launched,
    input: ByteStream,
    output: mpsc::UnboundedReceiver<SerialChunk>,
    observer: Observer,
}

impl Parent {
    /// With so much memory.
    pub async fn boot(host: &Host, memory_bytes: u64) -> anyhow::Result<Self> {
        let (sink, mut output) = output();
        let launched = host.launch("")?;
        let memory = MemoryConfig::of_bytes(memory_bytes);
        let config = GuestConfig { memory, ..config(&launched.lifecycle)? };
        let created = launched.lifecycle.create(&config);
        let guest = launched.lifecycle.bind();
        let (input, observer) = (guest.serial(sink), guest.observer());
        let _run = launched.lifecycle.run();
        line(&mut output).await?;
        created.await?;
        Ok(Self { launched, input, output, observer })
    }

    /// With 64 MiB more than what it has written.
    pub async fn that_wrote(host: &Host, mebibytes: u32) -> anyhow::Result<Self> {
        let mut parent = Self::boot(host, u64::from(mebibytes + 64) << 20).await?;
        parent.touch(mebibytes).await?;
        Ok(parent)
    }

    /// Has it write to so much memory.
    pub async fn touch(&mut self, mebibytes: u32) -> anyhow::Result<()> {
        self.input.write(format!("touch {mebibytes}\n").as_bytes()).await?;
        line(&mut self.output).await
    }

    /// The same, and how long that took.
    pub async fn timed_touch(&mut self, mebibytes: u32) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        self.touch(mebibytes).await?;
        Ok(begin.elapsed())
    }

    /// A snapshot, how long that took, and for how long the guest was paused.
    pub async fn snapshot(&self) -> anyhow::Result<(Snapshot, Duration, f64)> {
        let begin = Instant::now();
        let snapshot = self.launched.lifecycle.control().snapshot().await?;
        Ok((snapshot, begin.elapsed(), self.last_pause().await?))
    }

    /// From the beginning of the last stop of the units to the end of the start after it, in µs.
    async fn last_pause(&self) -> anyhow::Result<f64> {
        let passes = self.observer.timeline().await?;
        let last = |operation| {
            let pass = passes.iter().rev().find(|pass| pass.operation == operation);
            pass.with_context(|| format!("no {operation} of the units"))
        };
        let (stop, start) = (last("stop")?, last("start")?);
        let lasted = start.units.iter().filter_map(|unit| unit.ended_us).max().unwrap_or(0);
        let end = start.began_at_us + lasted;
        Ok(Duration::from_micros(end - stop.began_at_us).as_secs_f64() * 1e6)
    }
}

/// A guest that has gone on from a snapshot, and has answered.
pub(super) struct Child {
    lifecycle: Lifecycle,
    /// Held for as long as it runs, as whoever looks at its console does.
    _input: ByteStream,
    _output: mpsc::UnboundedReceiver<SerialChunk>,
    _run: Call<()>,
    id: String,
    /// How long that took: from its launch, all in one flight, to the first byte of its answer.
    pub answered: Duration,
}

impl Child {
    /// A fork.
    pub async fn fork(snapshot: &Snapshot) -> anyhow::Result<Self> {
        let begin = Instant::now();
        Self::told("echo on", begin, snapshot.launch("")?, |_| Ok(GuestConfig::new(None, 0))).await
    }

    /// One that goes on from a file and is told something.
    pub async fn restored(host: &Host, file: &Path, told: &str) -> anyhow::Result<Self> {
        let begin = Instant::now();
        let config =
            |lifecycle: &Lifecycle| Ok(GuestConfig::restored(lifecycle.file(File::open(file)?), None));
        Self::told(told, begin, host.launch("")?, config).await
    }

    async fn told(
        line: &str,
        begin: Instant,
        Launched { lifecycle, exit: _, id }: Launched,
        config: impl FnOnce(&Lifecycle) -> anyhow::Result<GuestConfig>,
    ) -> anyhow::Result<Self> {
        let (sink, mut output) = output();
        let created = lifecycle.create(&config(&lifecycle)?);
        let input = lifecycle.bind().serial(sink);
        let run = lifecycle.run();
        let line = format!("{line}\n");
        let written = input.write(line.as_bytes());
        let (written, first) = futures::join!(written, first_byte(&mut output));
        let answered = begin.elapsed();
        // Why there was no guest is what its creation tells.
        created.await?;
        written?;
        first?;
        Ok(Self { lifecycle, _input: input, _output: output, _run: run, id: id.await?, answered })
    }

    /// Stops it and lets go of its VMM.
    pub async fn end(self) -> anyhow::Result<()> {
        Ok(self.lifecycle.stop().await?)
    }

    /// Its process.
    pub async fn pid(&self, host: &Host) -> anyhow::Result<u32> {
        let guests = host.list().await?;
        Ok(guests.iter().find(|guest| guest.id == self.id).context("the guest runs")?.pid)
    }
}

/// Waits for the end of a line.
async fn line(output: &mut mpsc::UnboundedReceiver<SerialChunk>) -> anyhow::Result<()> {
    loop {
        let chunk = output.recv().await.context("the guest is gone")?;
        if chunk.bytes.ends_with(b"\n") {
            return Ok(());
        }
    }
}

impl Forks {
    async fn measure(&self, samples: &mut Samples) -> anyhow::Result<()> {
        let mut parent = Parent::boot(&self.0.host, MEMORY_BYTES).await?;
        parent.touch(100).await?;
        self.0.ready(1).await?;
        let (snapshot, call, pause) = parent.snapshot().await?;
        samples.time(SNAPSHOT, call);
        samples.add(PAUSE, pause);
        self.0.ready(1).await?;
        self.fork(&snapshot, samples).await?;
        self.0.ready(1).await?;
        parent.touch(10).await?;
        let (_, _, pause) = parent.snapshot().await?;
        samples.add(AGAIN, pause);
        parent.launched.lifecycle.stop().await?;
        // Their memory goes back to the host before the next group begins.
        drop((parent, snapshot));
        self.0.ready(0).await.map(drop)
    }

    async fn fork(&self, snapshot: &Snapshot, samples: &mut Samples) -> anyhow::Result<()> {
        let fork = Child::fork(snapshot).await?;
        samples.time(FORK, fork.answered);
        samples.add(MEMORY, Pss::of(fork.pid(&self.0.host).await?)?.total_kib);
        fork.end().await
    }
}

impl Rounds for Forks {
    fn round<'a>(&'a mut self, samples: &'a mut Samples) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        self.measure(samples).boxed_local()
    }
}
