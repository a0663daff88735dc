//! Guest memory, frozen and restored in this process, beside the bare system calls of the same.
//!
//! Every page of the memory is written before its first freeze. Then 1,000 pages that lie apart are written, and it is frozen again.
//! In every round each figure follows its floor. A round is played once before the first and not counted.
//!
//! Limits: no hypervisor, so what it pays for a mapping that changes is not in these figures; no figure fails the run.

pub(super) mod bare;

use std::fs::File;
use std::time::{Duration, Instant};

use machine::memory::{FrozenMemory, GuestMemory, MemoryOptions};
use vm_memory::{Bytes, GuestAddress};

use super::figure::{Definition, Row, Samples};
use bare::{BareMemory, PAGE};

/// How many pages are written between two freezes.
const WRITTEN: usize = 1000;
/// What a freeze may take, of the bare one.
const BAR: f64 = 1.2;

/// What is measured of memory of one size.
struct Size {
    mib: usize,
    figures: [Definition; 14],
}

/// The figures of one size, whose names end with it.
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
                Definition::beside(
                    concat!("freeze-", $name),
                    "a first freeze of the same",
                    concat!("bare-freeze-", $name),
                    BAR,
                ),
                Definition::time(
                    concat!("seal-", $name),
                    "what is left of it for after the guest has gone on",
                    None,
                ),
                Definition::time(
                    concat!("bare-write-", $name),
                    "then a write to each of 1,000 pages, bare",
                    None,
                ),
                Definition::time(
                    concat!("write-", $name),
                    "the same after a freeze",
                    Some(concat!("bare-write-", $name)),
                ),
                Definition::time(
                    concat!("rewrite-", $name),
                    "the same once more",
                    Some(concat!("bare-write-", $name)),
                ),
                Definition::time(
                    concat!("bare-layer-", $name),
                    "bare scan of the page map and copy of these pages",
                    None,
                ),
                Definition::beside(
                    concat!("layer-", $name),
                    "a second freeze of the same",
                    concat!("bare-layer-", $name),
                    BAR,
                ),
                Definition::time(concat!("bare-map-", $name), "bare private mmap of a base", None),
                Definition::time(
                    concat!("restore-", $name),
                    "memory of a base",
                    Some(concat!("bare-map-", $name)),
                ),
                Definition::time(
                    concat!("remap-", $name),
                    "a base into memory that is there",
                    Some(concat!("bare-map-", $name)),
                ),
                Definition::time(
                    concat!("restore2-", $name),
                    "memory of a base and a layer",
                    Some(concat!("bare-map-", $name)),
                ),
                Definition::time(concat!("read-", $name), "a read of each of its 1,000 pages", None),
                Definition::time(concat!("zero-", $name), "fresh memory in its place, as for a reset", None),
            ],
        }
    };
}

const SIZES: [Size; 2] = [size!(128, "128m"), size!(1024, "1g")];

/// All figures there are.
pub fn definitions() -> Vec<Definition> {
    SIZES.iter().flat_map(|size| size.figures).collect()
}

/// Measures all figures.
///
/// # Errors
/// When the host has too little memory: 2 GiB at the most at a time.
pub fn measure(rounds: u32) -> anyhow::Result<Vec<Row>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let round = |samples: &mut Samples| SIZES.iter().try_for_each(|size| size.round(samples, &pagemap));
    round(&mut Samples::default())?;
    let mut samples = Samples::default();
    for _ in 0..rounds {
        round(&mut samples)?;
    }
    Ok(samples.rows(&definitions()))
}

impl Size {
    fn round(&self, samples: &mut Samples, pagemap: &File) -> anyhow::Result<()> {
        let bare = self.bare(pagemap)?;
        let times = bare.into_iter().chain(self.memory()?);
        times.for_each(|(figure, time)| samples.time(self.figures[figure].name, time));
        Ok(())
    }

    fn bytes(&self) -> usize {
        self.mib << 20
    }

    /// The pages that are written between two freezes.
    fn pages(&self) -> impl Iterator<Item = usize> {
        let apart = self.bytes() / PAGE / WRITTEN;
        (0..WRITTEN).map(move |page| page * apart)
    }

    fn bare(&self, pagemap: &File) -> anyhow::Result<Vec<(usize, Duration)>> {
        let mut memory = BareMemory::touched(self.bytes())?;
        let freeze = memory.freeze()?;
        memory.unmap_aside();
        let (written, ()) = timed(|| memory.write(self.pages()));
        let layer = memory.copy_written(pagemap)?;
        Ok(vec![(0, freeze), (3, written), (6, layer), (8, memory.restore()?)])
    }

    fn memory(&self) -> anyhow::Result<Vec<(usize, Duration)>> {
        let memory = GuestMemory::new(self.bytes() as u64, MemoryOptions::default())?;
        let write = |memory: &GuestMemory, page: usize| {
            memory.view().write_obj(1u8, GuestAddress((page * PAGE) as u64)).expect("a page of memory");
        };
        (0..self.bytes() / PAGE).for_each(|page| write(&memory, page));
        let (freeze, frozen) = timed(|| memory.freeze());
        let (seal, first) = timed(|| frozen?.seal());
        let [written, again] =
            [(); 2].map(|()| timed(|| self.pages().for_each(|page| write(&memory, page))).0);
        let (layer, frozen) = timed(|| memory.freeze());
        let second = frozen?.seal()?;
        let mut times = vec![(1, freeze), (2, seal), (4, written), (5, again), (7, layer)];
        times.extend(self.restored(&first?, &second)?);
        Ok(times)
    }

    fn restored(
        &self,
        first: &FrozenMemory,
        second: &FrozenMemory,
    ) -> anyhow::Result<Vec<(usize, Duration)>> {
        let options = MemoryOptions::default();
        let restore = |frozen: &FrozenMemory| {
            timed(|| GuestMemory::restore(&frozen.image, frozen.bytes, options, None))
        };
        let (base, memory) = restore(first);
        drop(memory?);
        let warm = GuestMemory::new(first.bytes, options)?;
        let (remap, done) = timed(|| warm.remap(&first.image));
        done?;
        let (layered, memory) = restore(second);
        let memory = memory?;
        let (read, ()) = timed(|| self.pages().for_each(|page| read(&memory, page)));
        let (zero, done) = timed(|| memory.zero());
        done?;
        Ok(vec![(9, base), (10, remap), (11, layered), (12, read), (13, zero)])
    }
}

fn read(memory: &GuestMemory, page: usize) {
    let at = GuestAddress((page * PAGE) as u64);
    std::hint::black_box(memory.view().read_obj::<u8>(at).expect("a page of memory"));
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let begin = Instant::now();
    let done = work();
    (begin.elapsed(), done)
}
