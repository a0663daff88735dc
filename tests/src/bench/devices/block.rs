//! Disks: a block device over a raw file, beside io_uring on that file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use devices::virtio::block::{Block, BlockOptions, ImageFile, OnError, UringDisk};
use devices::virtio::fake_driver::{FakeDriver, Segment};
use devices::virtio::rate_limit::RateLimits;

use super::bare::Bare;
use crate::bench::figure::{Definition, Samples};

/// How large the file is.
const FILE_BYTES: u64 = 128 << 20;
const PAGE: usize = 4096;
const STREAM: usize = 128 << 10;

/// The most of a bare operation's time that one through the device may take at depth 32: 0.8 of its throughput.
const BAR: f64 = 1.25;

/// What is measured: the floor, the device, and what they do.
struct Comparison {
    floor: &'static str,
    name: &'static str,
    what: &'static str,
    bar: Option<f64>,
    direct: bool,
    writes: bool,
    depth: usize,
    bytes: usize,
    /// How many make a sample.
    operations: usize,
}

const fn pages(floor: &'static str, name: &'static str, what: &'static str) -> Comparison {
    Comparison {
        floor,
        name,
        what,
        bar: Some(BAR),
        direct: true,
        writes: false,
        depth: 32,
        bytes: PAGE,
        operations: 2000,
    }
}

const COMPARISONS: [Comparison; 7] = [
    Comparison {
        depth: 1,
        bar: None,
        operations: 300,
        ..pages("bare-read-1", "read-1", "a random read of 4 KiB, one at a time, without the page cache")
    },
    pages("bare-read-32", "read-32", "the same, 32 at a time"),
    Comparison {
        writes: true,
        depth: 1,
        bar: None,
        operations: 300,
        ..pages("bare-write-1", "write-1", "a random write of 4 KiB, one at a time, without the page cache")
    },
    Comparison { writes: true, ..pages("bare-write-32", "write-32", "the same, 32 at a time") },
    Comparison {
        bytes: STREAM,
        operations: 200,
        ..pages("bare-stream-32", "stream-32", "a read of 128 KiB, 32 at a time, without the page cache")
    },
    Comparison {
        direct: false,
        operations: 10_000,
        ..pages("bare-cached-32", "cached-32", "a random read of 4 KiB out of the page cache, 32 at a time")
    },
    Comparison {
        direct: false,
        bytes: STREAM,
        operations: 1000,
        ..pages("bare-copied-32", "copied-32", "a read of 128 KiB out of the page cache, 32 at a time")
    },
];

pub fn definitions() -> Vec<Definition> {
    let both = |comparison: &Comparison| {
        let &Comparison { floor, name, what, bar, .. } = comparison;
        let beside =
            Definition { bar, ..Definition::time(name, "the same, by a driver of a disk", Some(floor)) };
        [Definition::time(floor, what, None), beside]
    };
    COMPARISONS.iter().flat_map(both).collect()
}

/// Where on a file so many operations are, so many of them at a time: always the same places.
pub struct Pattern {
    pub writes: bool,
    pub depth: usize,
    pub bytes: usize,
    pub operations: usize,
    begun: usize,
    random: u64,
}

impl Pattern {
    fn of(comparison: &Comparison) -> Self {
        let &Comparison { writes, depth, bytes, operations, .. } = comparison;
        Self { writes, depth, bytes, operations, begun: 0, random: 0x9e37_79b9_7f4a_7c15 }
    }

    /// The next operation's place, until there were as many as there are to be.
    pub fn next_offset(&mut self) -> Option<u64> {
        if self.begun == self.operations {
            return None;
        }
        self.begun += 1;
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let bytes = self.bytes as u64;
        Some(self.random % (FILE_BYTES / bytes) * bytes)
    }
}

/// One file, opened with and without the page cache.
pub struct Disks {
    /// `None` where the file system has no such thing.
    direct: Option<Sides>,
    cached: Sides,
}

struct Sides {
    bare: Bare,
    disk: Disk,
}

impl Disks {
    /// The file, in this folder. What a file system without direct I/O has no figures for is left out, and said on standard error.
    pub fn prepare(folder: &Path) -> anyhow::Result<Self> {
        let named = tempfile::NamedTempFile::new_in(folder)?;
        let piece = vec![0xa5; 1 << 20];
        for _ in 0..FILE_BYTES >> 20 {
            named.as_file().write_all(&piece)?;
        }
        named.as_file().sync_all()?;
        let open =
            |flags| OpenOptions::new().read(true).write(flags != 0).custom_flags(flags).open(named.path());
        let direct = match open(libc::O_DIRECT) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let folder = folder.display();
                eprintln!(
                    "left out: disks without the page cache, for the file system of {folder} has no direct I/O"
                );
                None
            }
            opened => Some(Sides::of(opened?)?),
        };
        Ok(Self { direct, cached: Sides::of(open(0)?)? })
    }

    pub fn round(&mut self, samples: &mut Samples) -> anyhow::Result<()> {
        for comparison in &COMPARISONS {
            let sides = if comparison.direct { self.direct.as_mut() } else { Some(&mut self.cached) };
            let Some(Sides { bare, disk }) = sides else { continue };
            let per_operation = |time: Duration| {
                time.as_secs_f64() * 1e6 / f64::from(u32::try_from(comparison.operations).unwrap_or(u32::MAX))
            };
            samples.add(comparison.floor, per_operation(bare.play(Pattern::of(comparison))?));
            samples.add(comparison.name, per_operation(disk.play(Pattern::of(comparison))?));
        }
        Ok(())
    }
}

impl Sides {
    fn of(file: File) -> anyhow::Result<Self> {
        let bare = Bare::new(&file, 32 * STREAM)?;
        Ok(Self { bare, disk: Disk::of(file)? })
    }
}

/// A disk with its driver.
struct Disk {
    driver: FakeDriver,
    /// Of each request that can be under way: its header, data and status.
    places: Vec<[u64; 3]>,
}

impl Disk {
    fn of(file: File) -> anyhow::Result<Self> {
        // Both open the same file: the one that writes would keep the other out, did they not lock by turns.
        let image = UringDisk::open(ImageFile::lock(file.into(), false)?)?;
        let options = BlockOptions {
            id: String::new(),
            read_only: false,
            queues: 1,
            rates: Arc::new(RateLimits::default()),
            on_error: OnError::new(|error| eprintln!("{error:?}")),
        };
        let (spec, _) = Block::spec("disk", image, options)?;
        let driver = FakeDriver::ready(spec, u64::MAX);
        let ram = driver.ram();
        // Aligned as the floor's buffers are, and those of guests.
        let data = || ram.allocate((STREAM + PAGE) as u64).next_multiple_of(PAGE as u64);
        let place = |_| [ram.allocate(16), data(), ram.allocate(1)];
        let places = (0..32).map(place).collect();
        Ok(Self { driver, places })
    }

    fn play(&mut self, mut pattern: Pattern) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        (0..pattern.depth).for_each(|slot| self.add(&mut pattern, slot));
        self.driver.notify(0);
        let mut done = 0;
        while done < pattern.operations {
            let mut used = Some(self.driver.wait_used(0));
            while let Some(request) = used {
                let [_, data, status] = [0, 1, 2].map(|at| request.segments[at].address);
                ensure!(self.driver.ram().read(status, 1) == [0], "a request failed");
                let slot = self.places.iter().position(|place| place[1] == data);
                self.add(&mut pattern, slot.context("a request of ours")?);
                done += 1;
                used = self.driver.poll(0);
            }
            self.driver.notify(0);
        }
        Ok(begin.elapsed())
    }

    fn add(&mut self, pattern: &mut Pattern, slot: usize) {
        let Some(offset) = pattern.next_offset() else { return };
        let [header, data, status] = self.places[slot];
        let kind = u64::from(pattern.writes);
        let bytes: Vec<u8> = [kind, offset / 512].iter().flat_map(|word| word.to_le_bytes()).collect();
        self.driver.ram().write(header, &bytes);
        let length = u32::try_from(pattern.bytes).expect("small");
        let segments = [
            Segment { address: header, length: 16, writable: false },
            Segment { address: data, length, writable: !pattern.writes },
            Segment { address: status, length: 1, writable: true },
        ];
        self.driver.add(0, &segments);
    }
}
