//! Snapshots as files: written, beside a write and fsync of the same bytes into a plain file, and read back, beside bare reads of that.
//!
//! The bytes are the pages of the guest's memory that are not all zeros. Both files are in one folder and new in each round; what
//! reads them finds them in the page cache, as they were written just before.

use std::fs::File;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use guest_client::Snapshot;
use guest_client::snapshot_file::SnapshotFile;
use guest_schema::SnapshotFile::Memory;
use tempfile::TempDir;

use crate::bench::figure::{Definition, Samples};
use crate::bench::fork::{Child, Parent};
use crate::bench::memory::bare::{BareMemory, PAGE};
use crate::bench::warm::WarmService;

/// How much is read at a time.
const BLOCK: usize = 1 << 20;
/// What an export may take, of the write and fsync of the same bytes.
const EXPORT_BAR: f64 = 1.2;

/// What is measured of guests that have written so much.
pub(super) struct Exports {
    pub mib: usize,
    pub figures: [Definition; 9],
}

macro_rules! exports {
    ($mib:literal, $name:literal) => {
        Exports {
            mib: $mib,
            figures: [
                Definition::time(
                    concat!("bare-export-", $name),
                    "bare write and fsync of the memory's non-zero pages into a plain file",
                    None,
                ),
                Definition::beside(
                    concat!("export-", $name),
                    "saving a snapshot of them, fsync included",
                    concat!("bare-export-", $name),
                    EXPORT_BAR,
                ),
                Definition::rate(concat!("export-rate-", $name), "the bandwidth of that"),
                Definition::time(concat!("bare-read-", $name), "bare read of the plain file", None),
                Definition::time(
                    concat!("check-", $name),
                    "opening the snapshot's file, and a check of its memory against its checksum",
                    Some(concat!("bare-read-", $name)),
                ),
                Definition::rate(concat!("check-rate-", $name), "the bandwidth of that"),
                Definition::time(
                    concat!("bare-import-", $name),
                    "bare private mmap of the plain file, and a write to each of its pages",
                    None,
                ),
                Definition::time(
                    concat!("import-", $name),
                    "launch from the snapshot's file with a VMM ready → the guest has written to as many",
                    Some(concat!("bare-import-", $name)),
                ),
                Definition::rate(concat!("import-rate-", $name), "the bandwidth of that"),
            ],
        }
    };
}

pub(super) const SIZES: [Exports; 2] = [exports!(128, "128m"), exports!(1024, "1g")];

impl Exports {
    /// Writes its files into a folder of its own below this one.
    pub async fn round(
        &self,
        service: &WarmService,
        folder: &Path,
        samples: &mut Samples,
    ) -> anyhow::Result<()> {
        let folder = TempDir::with_prefix_in("guestd-bench-", folder)?;
        let (plain, saved) = (folder.path().join("plain"), folder.path().join("saved"));
        service.ready(0).await?;
        let parent = Parent::that_wrote(&service.host, u32::try_from(self.mib)?).await?;
        let (snapshot, _, _) = parent.snapshot().await?;
        parent.launched.lifecycle.stop().await?;
        drop(parent);
        let pages = written(&snapshot).await?;
        ensure!(pages.len() >= self.mib << 20, "the guest has written {} bytes only", pages.len());
        samples.time(self.figures[0].name, write_plain(&plain, &pages)?);
        let begin = Instant::now();
        let kept = snapshot.save(&saved, None, |_, _| ControlFlow::Continue(())).await?;
        let export = begin.elapsed();
        ensure!(kept.memory.data_bytes == pages.len() as u64, "{kept:?} of {} bytes", pages.len());
        self.add_with_rate(1, export, pages.len(), samples);
        drop(snapshot);
        self.read_back(&plain, &saved, pages.len(), samples)?;
        self.import(service, &plain, &saved, samples).await
    }

    fn read_back(
        &self,
        plain: &Path,
        saved: &Path,
        bytes: usize,
        samples: &mut Samples,
    ) -> anyhow::Result<()> {
        samples.time(self.figures[3].name, read_plain(plain)?);
        let begin = Instant::now();
        SnapshotFile::open(File::open(saved)?)?.verify_memory(|_, _| {})?;
        self.add_with_rate(4, begin.elapsed(), bytes, samples);
        Ok(())
    }

    async fn import(
        &self,
        service: &WarmService,
        plain: &Path,
        saved: &Path,
        samples: &mut Samples,
    ) -> anyhow::Result<()> {
        service.ready(0).await?;
        let bytes = self.mib << 20;
        let begin = Instant::now();
        let bare = BareMemory::private(File::open(plain)?, bytes)?;
        bare.write(0..bytes / PAGE);
        samples.time(self.figures[6].name, begin.elapsed());
        drop(bare);
        let child = Child::restored(&service.host, saved, &format!("touch {}", self.mib)).await?;
        self.add_with_rate(7, child.answered, bytes, samples);
        child.end().await?;
        service.ready(0).await.map(drop)
    }

    /// Adds a time, and to the figure after it the bandwidth.
    fn add_with_rate(&self, figure: usize, time: Duration, bytes: usize, samples: &mut Samples) {
        samples.time(self.figures[figure].name, time);
        #[expect(clippy::cast_precision_loss, reason = "far less than 2^52 bytes")]
        let mib = bytes as f64 / f64::from(1 << 20);
        samples.add(self.figures[figure + 1].name, mib / time.as_secs_f64());
    }
}

/// The pages of a snapshot's memory that are not all zeros.
async fn written(snapshot: &Snapshot) -> anyhow::Result<Vec<u8>> {
    let source = snapshot.files().await?;
    let memory = source.files.get(&Memory).context("a snapshot without memory")?;
    let mut block = vec![0; BLOCK];
    let mut pages = Vec::new();
    for at in (0..source.info.memory_bytes).step_by(BLOCK) {
        memory.read_exact_at(&mut block, at)?;
        let written = block.chunks(PAGE).filter(|page| **page != [0; PAGE]);
        written.for_each(|page| pages.extend_from_slice(page));
    }
    Ok(pages)
}

fn write_plain(path: &Path, bytes: &[u8]) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(begin.elapsed())
}

fn read_plain(path: &Path) -> anyhow::Result<Duration> {
    let mut block = vec![0; BLOCK];
    let begin = Instant::now();
    let mut file = File::open(path)?;
    while file.read(&mut block)? > 0 {
        std::hint::black_box(&block);
    }
    Ok(begin.elapsed())
}
