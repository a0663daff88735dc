//! Frames from the driver: from a queue's buffers to the back end (5.1.6.2).
//!
//! What the back end does not take now waits in the queue. Frames that cannot be, and all while the link is down, are dropped: on a
//! wire they would be lost too.

use super::header::{HEADER_BYTES, Header};
use super::lane::Lane;
use super::port::{Descriptor, Frame, Outgoing, PortError, Sent, slices};
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
    lane: Lane<'a>,
}

/// What became of a turn.
enum Turn {
    Frames,
    NoFrame,
    Blocked,
}

impl<'a> Transmitting<'a> {
    pub(super) fn new(
        queue: &'a mut VirtQueue,
        descriptor: &'a Descriptor,
        outgoing: &'a mut Outgoing,
        lane: Lane<'a>,
    ) -> Self {
        Self { queue, descriptor, outgoing, lane }
    }

    /// Transmits until it is dropped, or the driver does what it may not. May be cancelled at any time.
    pub(super) async fn run(mut self) -> Result<Infallible, DeviceFault> {
        loop {
            match self.turn()? {
                Turn::Frames => tokio::task::yield_now().await,
                Turn::NoFrame => self.queue.rung().await?,
                Turn::Blocked => self.wait_for_room().await?,
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
        let mut chains = Vec::with_capacity(BATCH);
        while chains.len() < BATCH
            && let Some(chain) = self.queue.try_next()?
        {
            chains.push(chain);
        }
        if chains.is_empty() {
            return Ok(Turn::NoFrame);
        }
        let frames = chains.iter().map(|chain| self.frame(chain)).collect::<Result<Vec<_>, _>>()?;
        let Sent { count, stopped, .. } = self.send(&frames);
        while chains.len() > count {
            self.queue.put_back(chains.pop().expect("more than none"));
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

    /// Sends what can be sent, and counts.
    fn send(&mut self, frames: &[Option<Frame<'a>>]) -> Sent {
        let counters = &self.lane.shared.transmitted;
        let Some(descriptor) = self.descriptor.get().filter(|_| self.lane.shared.link.is_up()) else {
            counters.drop(frames.len());
            return Sent { count: frames.len(), dropped: frames.len(), stopped: None };
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
        let mut reader =
            chain.readable.reader(memory).map_err(|error| DeviceFault::Driver(error.to_string()))?;
        if reader.read_exact(&mut header.0).is_err() {
            return Ok(None);
        }
        let mut body = slices(&chain.readable, memory)?;
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
