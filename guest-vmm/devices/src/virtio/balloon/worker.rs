//! What serves the balloon's queues.

use super::statistics::{self, StatisticsSource};
use super::{
    FEATURE_REPORTING, FEATURE_STATS_VQ, PAGE_BYTES, QUEUE_DEFLATE, QUEUE_INFLATE, QUEUE_REPORTING,
    QUEUE_STATISTICS, Shared,
};
use crate::virtio::{Chain, DeviceFault, GuestRam, QueueFault, QueueWorker, Session, VirtQueue};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Gives the guest's pages back to the host.
#[derive(Debug)]
pub struct BalloonWorker {
    shared: Arc<Shared>,
    statistics: StatisticsSource,
}

impl BalloonWorker {
    pub(super) fn new(shared: Arc<Shared>, statistics: StatisticsSource) -> Self {
        Self { shared, statistics }
    }
}

impl QueueWorker for BalloonWorker {
    async fn run(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        let (has_statistics, has_reporting) = (session.has(FEATURE_STATS_VQ), session.has(FEATURE_REPORTING));
        let Session { queues, stop, memory, ram, .. } = session;
        let pages = Pages { shared: &self.shared, memory, ram: &**ram };
        let wanted = [QUEUE_INFLATE, QUEUE_DEFLATE, QUEUE_STATISTICS, QUEUE_REPORTING];
        let [inflate, deflate, statistics, reporting] =
            queues.get_disjoint_mut(wanted).expect("the device has these queues");
        let inflate = inflate.as_mut().ok_or(QueueFault::NotReady(QUEUE_INFLATE))?;
        let deflate = deflate.as_mut().ok_or(QueueFault::NotReady(QUEUE_DEFLATE))?;
        let mut statistics = statistics.as_mut().filter(|_| has_statistics);
        let mut reporting = reporting.as_mut().filter(|_| has_reporting);
        // The buffer that the driver leaves with the device.
        let mut kept = None;
        let result = loop {
            let served = tokio::select! {
                biased;
                () = stop.requested() => break Ok(()),
                chain = inflate.next() => serve(inflate, chain, |chain| pages.inflate(chain)),
                chain = deflate.next() => serve(deflate, chain, |_| Ok(())),
                (queue, chain) = next(reporting.as_deref_mut()) => {
                    serve(queue, chain, |chain| pages.report(chain))
                }
                (_, chain) = next(statistics.as_deref_mut()), if kept.is_none() => {
                    keep(&mut kept, chain, &mut self.statistics, memory)
                }
                () = self.statistics.asked(), if kept.is_some() => give_back(statistics.as_deref_mut(), &mut kept),
            };
            if let Err(fault) = served {
                break Err(fault);
            }
        };
        // The driver finds its buffer where it was, and whoever waits learns that nothing comes.
        if let (Some(queue), Some(chain)) = (statistics, kept) {
            queue.put_back(chain);
        }
        self.statistics.give_up();
        result
    }

    fn reset(&mut self) {
        self.statistics.give_up();
    }
}

/// The next chain of a queue that there may be, with the queue.
async fn next(queue: Option<&mut VirtQueue>) -> (&mut VirtQueue, Result<Chain, QueueFault>) {
    match queue {
        Some(queue) => {
            let chain = queue.next().await;
            (queue, chain)
        }
        None => std::future::pending().await,
    }
}

/// Does what a chain asks for, and gives it back.
fn serve(
    queue: &mut VirtQueue,
    chain: Result<Chain, QueueFault>,
    work: impl FnOnce(&Chain) -> Result<(), DeviceFault>,
) -> Result<(), DeviceFault> {
    let chain = chain?;
    work(&chain)?;
    Ok(queue.answer(chain, 0)?)
}

/// Keeps the driver's buffer, which answers those who have asked for it.
fn keep(
    kept: &mut Option<Chain>,
    chain: Result<Chain, QueueFault>,
    source: &mut StatisticsSource,
    memory: &GuestMemoryMmap,
) -> Result<(), DeviceFault> {
    let chain = kept.insert(chain?);
    if source.is_asked() {
        source.answer(&statistics::read(chain, memory)?);
    }
    Ok(())
}

/// Gives the driver its buffer back, to be filled anew.
fn give_back(queue: Option<&mut VirtQueue>, kept: &mut Option<Chain>) -> Result<(), DeviceFault> {
    if let (Some(queue), Some(chain)) = (queue, kept.take()) {
        queue.answer(chain, 0)?;
    }
    Ok(())
}

/// The guest's pages.
struct Pages<'a> {
    shared: &'a Shared,
    memory: &'a GuestMemoryMmap,
    ram: &'a dyn GuestRam,
}

impl Pages<'_> {
    /// Gives back the pages whose numbers are in the chain, neighbours together.
    fn inflate(&self, chain: &Chain) -> Result<(), DeviceFault> {
        let mut reader = chain.readable.reader(self.memory)?;
        let mut run: Range<u64> = 0..0;
        while let Some(number) = reader.read_obj::<[u8; 4]>() {
            let number = u64::from(u32::from_le_bytes(number));
            if number != run.end {
                self.discard_pages(&run)?;
                run.start = number;
            }
            run.end = number + 1;
        }
        self.discard_pages(&run)
    }

    fn discard_pages(&self, pages: &Range<u64>) -> Result<(), DeviceFault> {
        self.discard(pages.start * PAGE_BYTES..pages.end * PAGE_BYTES)
    }

    /// Gives back the whole pages in the chain's buffers.
    fn report(&self, chain: &Chain) -> Result<(), DeviceFault> {
        chain.writable.ranges().try_for_each(|range| {
            let (start, end) =
                (range.start.next_multiple_of(PAGE_BYTES), range.end / PAGE_BYTES * PAGE_BYTES);
            self.discard(start..end.max(start))
        })
    }

    fn discard(&self, range: Range<u64>) -> Result<(), DeviceFault> {
        let bytes = range.end - range.start;
        if bytes == 0 {
            return Ok(());
        }
        let start = GuestAddress(range.start);
        if !usize::try_from(bytes).is_ok_and(|bytes| self.memory.check_range(start, bytes)) {
            return Err(DeviceFault::Driver(format!("no memory at {:#x}..{:#x}", range.start, range.end)));
        }
        self.ram.discard(start, bytes).map_err(DeviceFault::Host)?;
        self.shared.discarded.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}
