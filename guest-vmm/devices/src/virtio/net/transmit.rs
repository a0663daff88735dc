//! Frames from the driver: from a queue's buffers to the back end (5.1.6.2).
//!
//! What the back end does not take now, and what the rate limits hold back, waits in the queue. Frames that cannot be, and all while the link is down, are dropped: on a
//! wire they would be lost too.

use super::allowance::Allowance;
use super::header::{HEADER_BYTES, Header};
use super::lane::Lane;
use super::port::{Descriptor, Frame, Outgoing, PortError, Sent};
use super::vectored::MAX_PIECES;
use crate::virtio::{Chain, DeviceFault, VirtQueue};
use std::convert::Infallible;
use std::io::Read;
use vm_memory::VolatileSlice;

/// How many frames are taken at once.
const BATCH: usize = 64;

/// One queue's transmitting. It holds no chain while it waits.
pub(super) struct Transmitting<'a> {
    queue: &'a mut VirtQueue,
    descriptor: &'a Descriptor,
    outgoing: &'a mut Outgoing,
    allowance: Allowance<'a>,
    lane: Lane<'a>,
}

/// What became of a turn.
enum Turn {
    Frames,
    NoFrame,
    Blocked,
    /// The rate limits do not let the next frame, of so many bytes, pass now.
    Limited(usize),
}

/// Chains with the frames in them; `None` for one that the driver may not send.
struct Batch<'a> {
    chains: Vec<Chain>,
    frames: Vec<Option<Frame<'a>>>,
    /// The bytes of the frame behind them that the rate limits hold back.
    held: Option<usize>,
}

/// The bytes that a frame counts for.
fn cost(frame: Option<&Frame<'_>>) -> usize {
    frame.map_or(0, |frame| frame.bytes)
}

impl<'a> Transmitting<'a> {
    pub(super) fn new(
        queue: &'a mut VirtQueue,
        descriptor: &'a Descriptor,
        outgoing: &'a mut Outgoing,
        lane: Lane<'a>,
    ) -> Self {
        let allowance = Allowance::new(&lane.limiters.transmit);
        Self { queue, descriptor, outgoing, allowance, lane }
    }

    /// Transmits until it is dropped, or the driver does what it may not. May be cancelled at any time.
    pub(super) async fn run(mut self) -> Result<Infallible, DeviceFault> {
        loop {
            match self.turn()? {
                Turn::Frames => tokio::task::yield_now().await,
                Turn::NoFrame => self.queue.rung().await?,
                Turn::Blocked => self.wait_for_room().await?,
                Turn::Limited(bytes) => self.allowance.wait_for(bytes).await,
            }
        }
    }

    /// Waits until a blocked back end takes frames.
    async fn wait_for_room(&mut self) -> Result<(), DeviceFault> {
        let mut ready = self.descriptor.writable().await;
        if let Turn::Blocked = self.turn()? {
            ready.clear_ready();
        }
        Ok(())
    }

    /// Takes some frames and sends them.
    fn turn(&mut self) -> Result<Turn, DeviceFault> {
        let Batch { mut chains, frames, held } = self.take()?;
        let cut = self.outgoing.is_cut() && !self.lane.shared.link.is_gone();
        if chains.is_empty() && !cut {
            return Ok(held.map_or(Turn::NoFrame, Turn::Limited));
        }
        let Sent { count, stopped, .. } = self.send(&frames);
        for frame in frames[count..].iter().rev() {
            self.queue.put_back(chains.pop().expect("one for each frame"));
            self.allowance.give_back(cost(frame.as_ref()));
        }
        self.queue.complete_together(chains.into_iter().map(|chain| (chain, 0)))?;
        self.queue.signal()?;
        match stopped {
            Some(PortError::Gone(reason)) => self.lane.shared.link.lose(&reason),
            Some(PortError::Blocked | PortError::Frame) => return Ok(Turn::Blocked),
            None => {}
        }
        Ok(Turn::Frames)
    }

    /// Takes what may pass now.
    fn take(&mut self) -> Result<Batch<'a>, DeviceFault> {
        let (chains, frames) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
        let mut batch = Batch { chains, frames, held: None };
        while batch.chains.len() < BATCH
            && let Some(chain) = self.queue.try_next()?
        {
            let frame = self.frame(&chain)?;
            let bytes = cost(frame.as_ref());
            if !self.allowance.take(bytes) {
                self.queue.put_back(chain);
                batch.held = Some(bytes);
                break;
            }
            batch.chains.push(chain);
            batch.frames.push(frame);
        }
        Ok(batch)
    }

    /// Sends what can be sent, and counts.
    fn send(&mut self, frames: &[Option<Frame<'a>>]) -> Sent {
        let (counters, link) = (&self.lane.shared.transmitted, &self.lane.shared.link);
        let descriptor = self.descriptor.get().filter(|_| !link.is_gone());
        let Some(descriptor) = descriptor.filter(|_| link.is_up()) else {
            counters.drop(frames.len());
            // What was begun while the link was up is ended: the other end would be out of step.
            let stopped = descriptor.and_then(|descriptor| self.outgoing.send(descriptor, &[]).stopped);
            return Sent { count: frames.len(), dropped: frames.len(), stopped };
        };
        let sent = self.outgoing.send(descriptor, frames);
        let done = &frames[..sent.count];
        let malformed = done.iter().filter(|frame| frame.is_none()).count();
        let dropped = malformed + sent.dropped;
        counters.drop(dropped);
        counters.pass((sent.count - dropped) as u64, done.iter().flatten().map(|frame| frame.bytes).sum());
        sent
    }

    /// The frame in a chain; `None` if it is none that the driver may send.
    fn frame(&self, chain: &Chain) -> Result<Option<Frame<'a>>, DeviceFault> {
        let Lane { memory, features, .. } = self.lane;
        let mut header = Header::default();
        let mut reader = chain.readable.reader(memory)?;
        if reader.read_exact(&mut header.0).is_err() {
            return Ok(None);
        }
        let mut body = chain.readable.slices(memory)?;
        skip(&mut body, HEADER_BYTES);
        let bytes = body.iter().map(VolatileSlice::len).sum();
        let possible = header.is_valid(features, bytes) && body.len() < MAX_PIECES;
        Ok(possible.then_some(Frame { header, body, bytes }))
    }
}

/// Takes away the first bytes, of which there are as many.
fn skip(slices: &mut Vec<VolatileSlice<'_>>, mut bytes: usize) {
    let whole = slices.iter().take_while(|slice| {
        let skipped = bytes >= slice.len();
        bytes -= if skipped { slice.len() } else { 0 };
        skipped
    });
    let whole = whole.count();
    slices.drain(..whole);
    if let Some(first) = slices.first_mut()
        && let Ok(rest) = first.offset(bytes)
    {
        *first = rest;
    }
}
