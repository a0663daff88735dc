//! Frames to the driver: from the back end into a queue's buffers (5.1.6.4).
//!
//! Frames that have no buffers wait in the back end. A frame without room in all the buffers that there can be is dropped, and so is
//! one that is longer than the MTU that the driver was told. How long a frame is shows only once it is received, so it is paid for
//! before the next one: the rate limits hold on the average.

use super::allowance::Allowance;
use super::header::MAX_FRAME;
use super::lane::Lane;
use super::port::{Descriptor, Incoming, PortError};
use super::room::Room;
use crate::virtio::{DeviceFault, VirtQueue};
use std::convert::Infallible;
use std::os::fd::BorrowedFd;

/// How many frames are received before others have their turn.
const BURST: usize = 64;

/// One queue's receiving.
pub(super) struct Receiving<'a> {
    descriptor: &'a Descriptor,
    incoming: &'a mut Incoming,
    room: Room<'a>,
    allowance: Allowance<'a>,
    /// The bytes of a frame that is not paid for yet.
    owed: Option<usize>,
    lane: Lane<'a>,
}

/// What became of a turn.
enum Turn {
    /// A frame was received, or dropped.
    Frame,
    NoFrame,
    NoBuffers,
    /// The rate limits let no more pass now.
    Limited,
    Gone(String),
}

impl<'a> Receiving<'a> {
    pub(super) fn new(
        queue: &'a mut VirtQueue,
        descriptor: &'a Descriptor,
        incoming: &'a mut Incoming,
        lane: Lane<'a>,
    ) -> Self {
        let allowance = Allowance::new(&lane.limiters.receive);
        Self { descriptor, incoming, room: Room::new(queue, lane), allowance, owed: None, lane }
    }

    /// Receives until it is dropped, or the driver does what it may not. May be cancelled at any time.
    pub(super) async fn run(mut self) -> Result<Infallible, DeviceFault> {
        while !self.lane.shared.link.is_gone() {
            let mut ready = self.descriptor.readable().await;
            match self.burst()? {
                Turn::Frame => {
                    drop(ready);
                    tokio::task::yield_now().await;
                }
                Turn::NoFrame => ready.clear_ready(),
                Turn::NoBuffers => {
                    drop(ready);
                    self.room.queue.rung().await?;
                }
                Turn::Limited => {
                    drop(ready);
                    self.allowance.wait_for(self.owed.unwrap_or(0)).await;
                }
                Turn::Gone(reason) => self.lane.shared.link.lose(&reason),
            }
        }
        std::future::pending().await
    }

    fn burst(&mut self) -> Result<Turn, DeviceFault> {
        let mut turn = Turn::Frame;
        for _ in 0..BURST {
            turn = self.turn()?;
            if !matches!(turn, Turn::Frame) {
                break;
            }
        }
        self.room.queue.signal()?;
        Ok(turn)
    }

    fn turn(&mut self) -> Result<Turn, DeviceFault> {
        if self.owed.is_some_and(|bytes| !self.allowance.take(bytes)) {
            return Ok(Turn::Limited);
        }
        self.owed = None;
        let Some(descriptor) = self.descriptor.get() else {
            return Ok(Turn::Gone("it cannot be waited for".into()));
        };
        if self.incoming.reads_directly() {
            self.room.gather(MAX_FRAME)?;
        }
        let outcome = if !self.lane.shared.link.is_up() {
            self.discard(descriptor)
        } else if self.incoming.reads_directly() && self.room.is_ready() {
            self.read_directly(descriptor)?
        } else {
            self.read_and_copy(descriptor)?
        };
        Ok(match outcome {
            Ok(turn) => turn,
            Err(PortError::Blocked) => Turn::NoFrame,
            Err(PortError::Gone(reason)) => Turn::Gone(reason),
            Err(PortError::Frame) => {
                self.lane.shared.received.drop(1);
                Turn::Frame
            }
        })
    }

    /// The link is down: what is on the wire is lost.
    fn discard(&mut self, descriptor: BorrowedFd<'_>) -> Result<Turn, PortError> {
        self.incoming.stage(descriptor)?;
        self.incoming.consume();
        Err(PortError::Frame)
    }

    /// Reads a frame into the driver's buffers, which have room for any, or are all that it will get.
    fn read_directly(&mut self, descriptor: BorrowedFd<'_>) -> Result<Result<Turn, PortError>, DeviceFault> {
        match self.incoming.read_into(descriptor, &self.room.slices()) {
            Ok(direct) if direct.bytes > self.lane.max_frame() && !direct.header.is_segmented() => {
                Ok(Err(PortError::Frame))
            }
            Ok(direct) => {
                self.room.deliver(direct.header, direct.bytes, &[])?;
                self.owed = Some(direct.bytes);
                Ok(Ok(Turn::Frame))
            }
            Err(error) => Ok(Err(error)),
        }
    }

    /// Reads a frame into the back end's own memory, and from there as soon as there is room.
    fn read_and_copy(&mut self, descriptor: BorrowedFd<'_>) -> Result<Result<Turn, PortError>, DeviceFault> {
        if let Err(error) = self.incoming.stage(descriptor) {
            return Ok(Err(error));
        }
        let Some((header, frame)) = self.incoming.frame() else { return Ok(Err(PortError::Blocked)) };
        self.room.gather(frame.len())?;
        let fits = self.room.fits(frame.len());
        if !fits && !self.room.is_complete() {
            return Ok(Ok(Turn::NoBuffers));
        }
        let taken = fits && (frame.len() <= self.lane.max_frame() || header.is_segmented());
        if taken {
            self.room.deliver(header, frame.len(), frame)?;
            self.owed = Some(frame.len());
        }
        self.incoming.consume();
        Ok(if taken { Ok(Turn::Frame) } else { Err(PortError::Frame) })
    }
}
