//! What serves a block device's queues.
//!
//! In a burst: chains are taken while there are any, the host is told of all of them in one call, and the driver of all that have
//! ended. Nothing is waited for while there is something to do.

use super::device::{BlockError, Shared};
use super::disk::{Disk, Ended};
use super::request::{Asked, ID_BYTES, Limits, Refused, Request};
use crate::virtio::rate_limit::RateLimiter;
use crate::virtio::{Buffers, Chain, DeviceFault, LogLimit, QueueFault, QueueWorker, Session, VirtQueue};
use futures::future::select_all;
use slab::Slab;
use std::future::poll_fn;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK};
use vm_memory::GuestMemoryMmap;

/// How many chains of a queue are begun before the host is told of them.
const BURST: usize = 64;
/// How many bursts follow one another before other devices have their turn.
const TURN: u32 = 4;

/// What serves a block device's queues.
#[derive(Debug)]
pub struct BlockWorker {
    disk: Box<dyn Disk>,
    shared: Arc<Shared>,
    limiter: RateLimiter,
    id: [u8; ID_BYTES],
    read_only: bool,
    /// What is under way; the index is the disk's tag.
    jobs: Slab<Job>,
    /// The request that its rate limit holds back, and its queue. Nothing is taken from any queue meanwhile.
    held: Option<(usize, Request)>,
    ended: Vec<Ended>,
    log: LogLimit,
}

/// A request that the disk has.
#[derive(Debug)]
struct Job {
    queue: usize,
    chain: Chain,
    status: Buffers,
    writes: u32,
    what: &'static str,
}

type Queues = [Option<VirtQueue>];

impl QueueWorker for BlockWorker {
    async fn run(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        self.disk.start(&session.ram).map_err(DeviceFault::Host)?;
        let served = self.serve(session).await;
        if served.is_err() {
            self.held = None;
            self.drain().await;
        }
        self.disk.stop();
        served
    }

    fn reset(&mut self) {}
}

impl BlockWorker {
    pub(super) fn new(disk: Box<dyn Disk>, shared: Arc<Shared>, id: [u8; ID_BYTES], read_only: bool) -> Self {
        Self {
            disk,
            limiter: RateLimiter::new(shared.rates.clone()),
            shared,
            id,
            read_only,
            jobs: Slab::new(),
            held: None,
            ended: Vec::new(),
            log: LogLimit::default(),
        }
    }

    /// See [`Disk::unsaveable`].
    pub(super) fn unsaveable(&self) -> Option<&'static str> {
        self.disk.unsaveable()
    }

    async fn serve(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        let (wce, flush) = (session.has(VIRTIO_BLK_F_CONFIG_WCE), session.has(VIRTIO_BLK_F_FLUSH));
        let Session { queues, stop, memory, .. } = session;
        let mut bursts = 0;
        loop {
            let stopping = stop.is_requested();
            let mut busy = false;
            if stopping {
                self.put_back(queues);
            } else {
                // Without either feature the driver knows of no cache (5.2.5.1, writeback; 5.2.6.2).
                let write_through = if wce { !self.shared.is_writeback() } else { !flush };
                busy = self.take(queues, memory, write_through)?;
            }
            self.disk.submit().map_err(DeviceFault::Host)?;
            busy |= self.finish(queues, memory)?;
            if stopping && self.jobs.is_empty() {
                return Ok(());
            }
            if busy {
                bursts += 1;
                if bursts % TURN == 0 {
                    tokio::task::yield_now().await;
                }
                continue;
            }
            let (under_way, held) = (!self.jobs.is_empty(), self.held.is_some());
            let cost = self.held.as_ref().map_or(0, |(_, request)| request.bytes);
            tokio::select! {
                biased;
                () = stop.requested(), if !stopping => {}
                ended = ended(&mut *self.disk), if under_way => ended.map_err(DeviceFault::Host)?,
                () = self.limiter.admit(cost), if held && !stopping => {
                    if let Some((queue, request)) = self.held.take() {
                        self.begin(queue, request, queues, memory)?;
                    }
                }
                rung = rung(queues), if !held && !stopping => rung?,
            }
        }
    }

    /// Begins what the driver has made available, up to a burst of each queue; whether there was anything.
    fn take(
        &mut self,
        queues: &mut Queues,
        memory: &GuestMemoryMmap,
        write_through: bool,
    ) -> Result<bool, DeviceFault> {
        let mut any = false;
        for index in 0..queues.len() {
            for _ in 0..BURST {
                if self.held.is_some() {
                    return Ok(any);
                }
                let Some(queue) = &mut queues[index] else { break };
                let Some(chain) = queue.try_next()? else { break };
                let sectors = self.shared.capacity_sectors.load(Ordering::Relaxed);
                let limits = Limits { sectors, read_only: self.read_only, write_through };
                let request = Request::read(chain, limits, memory)?;
                if self.limiter.try_admit(request.bytes).is_err() {
                    self.held = Some((index, request));
                    break;
                }
                any = true;
                self.begin(index, request, queues, memory)?;
            }
        }
        Ok(any)
    }

    /// What was held back is the last of its queue that was taken.
    fn put_back(&mut self, queues: &mut Queues) {
        if let Some((index, request)) = self.held.take()
            && let Some(queue) = &mut queues[index]
        {
            queue.put_back(request.chain);
        }
    }

    fn begin(
        &mut self,
        queue: usize,
        request: Request,
        queues: &mut Queues,
        memory: &GuestMemoryMmap,
    ) -> Result<(), DeviceFault> {
        let Request { chain, asked, status, writes, bytes } = request;
        let mut job = Job { queue, chain, status, writes, what: "" };
        let result = match asked {
            Asked::Of(operation) => {
                job.what = self.shared.counters.count(&operation, bytes);
                let tag = self.jobs.insert(job);
                self.disk.begin(tag, operation);
                return Ok(());
            }
            Asked::Id(buffers) => self.write_id(&buffers, memory),
            Asked::Refused(refused) => Err(refused),
        };
        job.end(queues, memory, result)?;
        signal(queues, queue)
    }

    fn write_id(&self, buffers: &Buffers, memory: &GuestMemoryMmap) -> Result<(), Refused> {
        let mut writer = buffers.writer(memory).map_err(|_| Refused::IoError)?;
        let room = usize::try_from(writer.remaining()).map_or(ID_BYTES, |room| room.min(ID_BYTES));
        writer.write_all(&self.id[..room]).map_err(|_| Refused::IoError)
    }

    /// Gives back what has ended; whether there was anything.
    fn finish(&mut self, queues: &mut Queues, memory: &GuestMemoryMmap) -> Result<bool, DeviceFault> {
        let mut ended = std::mem::take(&mut self.ended);
        self.disk.take_ended(&mut ended);
        let any = !ended.is_empty();
        let mut touched = 0u64;
        for Ended { tag, result } in ended.drain(..) {
            let Some(job) = self.jobs.try_remove(tag) else { continue };
            touched |= 1 << job.queue;
            if let Err(error) = &result {
                self.complain(job.what, error);
            }
            job.end(queues, memory, result.map_err(|_| Refused::IoError))?;
        }
        self.ended = ended;
        for index in (0..queues.len()).filter(|index| touched >> index & 1 == 1) {
            signal(queues, index)?;
        }
        Ok(any)
    }

    /// Tells the log and the host of a failure, not of every one.
    fn complain(&mut self, what: &'static str, error: &io::Error) {
        self.shared.counters.errors.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.log.admit() {
            let name = &self.shared.name;
            tracing::warn!(device = %name, suppressed, %error, "a {what} failed");
            let error = error.to_string();
            self.shared.on_error.call(BlockError { device: name.clone(), what, error, suppressed });
        }
    }

    /// Waits until the disk has ended everything, whose outcome nobody is told of.
    async fn drain(&mut self) {
        let mut over = Vec::new();
        while !self.jobs.is_empty() {
            if let Err(error) = self.disk.submit() {
                tracing::error!(%error, "a disk does not end what it has begun");
                break;
            }
            self.disk.take_ended(&mut over);
            for Ended { tag, .. } in over.drain(..) {
                self.jobs.try_remove(tag);
            }
            if !self.jobs.is_empty() && ended(&mut *self.disk).await.is_err() {
                break;
            }
        }
        self.jobs.clear();
    }
}

impl Job {
    /// Tells the driver how it ended; to be signalled.
    fn end(
        self,
        queues: &mut Queues,
        memory: &GuestMemoryMmap,
        result: Result<(), Refused>,
    ) -> Result<(), DeviceFault> {
        let Self { queue, chain, status, writes, what: _ } = self;
        let Some(queue) = &mut queues[queue] else { return Ok(()) };
        let (code, written) = match result {
            Ok(()) => (VIRTIO_BLK_S_OK, writes + 1),
            Err(refused) => (refused as u32, 1),
        };
        let code = u8::try_from(code).expect("a code of 8 bits");
        let not_there = |error| DeviceFault::Driver(format!("a request's status: {error}"));
        status.writer(memory).map_err(not_there)?.write_all(&[code]).map_err(DeviceFault::Host)?;
        Ok(queue.complete(chain, written)?)
    }
}

fn signal(queues: &mut Queues, index: usize) -> Result<(), DeviceFault> {
    match &mut queues[index] {
        Some(queue) => Ok(queue.signal()?),
        None => Ok(()),
    }
}

async fn ended(disk: &mut dyn Disk) -> io::Result<()> {
    poll_fn(|context| disk.poll_ended(context)).await
}

/// Waits until the driver has made something available on any queue, or may have.
async fn rung(queues: &mut Queues) -> Result<(), QueueFault> {
    let mut ready = queues.iter_mut().flatten();
    match (ready.next(), ready.next()) {
        (None, _) => std::future::pending().await,
        (Some(only), None) => only.rung().await,
        (Some(_), Some(_)) => {
            let bells = queues.iter_mut().flatten().map(|queue| Box::pin(queue.rung()));
            select_all(bells).await.0
        }
    }
}
