//! Frames over a Unix stream socket, as QEMU and passt do it: before each one its length, 32 bits, big endian. No header, and so
//! no offloads.

use super::header::{MAX_FRAME, MIN_FRAME};
use super::port::{
    Descriptor, Frame, Incoming, Outgoing, Port, PortError, Sent, blocked, push_body, uninterrupted,
};
use super::vectored::{MAX_PIECES, Pieces};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use vm_memory::VolatileSlice;

/// How many bytes a frame's length takes.
const LENGTH: usize = 4;

/// Room for two frames of the greatest length.
const BUFFER: usize = 2 * (LENGTH + MAX_FRAME);

pub(super) fn port(socket: OwnedFd) -> io::Result<Port> {
    Ok(Port {
        descriptor: Descriptor::new(socket)?,
        incoming: Incoming::Stream(StreamIncoming::default()),
        outgoing: Outgoing::Stream(StreamOutgoing::default()),
    })
}

/// Bytes from the socket, and the frames in them.
#[derive(Debug)]
pub(super) struct StreamIncoming {
    buffer: Vec<u8>,
    /// What was read and is not consumed.
    start: usize,
    end: usize,
}

impl Default for StreamIncoming {
    fn default() -> Self {
        Self { buffer: vec![0; BUFFER], start: 0, end: 0 }
    }
}

impl StreamIncoming {
    /// Reads until a frame is there, or something of that length.
    pub(super) fn stage(&mut self, socket: BorrowedFd<'_>) -> Result<(), PortError> {
        loop {
            match self.length() {
                Some(length) if length > MAX_FRAME => {
                    let reason =
                        format!("it announced a frame of {length} bytes, at most {MAX_FRAME} can be");
                    return Err(PortError::Gone(reason));
                }
                Some(length) if self.end - self.start >= LENGTH + length => {
                    if length >= MIN_FRAME {
                        return Ok(());
                    }
                    self.consume();
                    return Err(PortError::Frame);
                }
                needed => self.read(socket, LENGTH + needed.unwrap_or(0))?,
            }
        }
    }

    /// Reads once. There is to be room for `needed` bytes from the start on.
    fn read(&mut self, socket: BorrowedFd<'_>, needed: usize) -> Result<(), PortError> {
        if self.start + needed > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = &mut self.buffer[self.end..];
        match uninterrupted(|| Ok(rustix::io::read(socket, &mut *room)?)) {
            Ok(0) => Err(PortError::Gone("it has closed the connection".into())),
            Ok(read) => {
                self.end += read;
                Ok(())
            }
            Err(error) => Err(blocked(&error).unwrap_or_else(|| PortError::Gone(error.to_string()))),
        }
    }

    /// The length of the next frame, once that was read.
    fn length(&self) -> Option<usize> {
        let length = self.buffer[self.start..self.end].first_chunk()?;
        Some(usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX))
    }

    pub(super) fn frame(&self) -> Option<&[u8]> {
        let frame = self.start + LENGTH;
        self.buffer[..self.end].get(frame..frame + self.length()?)
    }

    pub(super) fn consume(&mut self) {
        if let Some(frame) = self.frame() {
            self.start += LENGTH + frame.len();
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }
}

/// Frames to the socket.
#[derive(Debug, Default)]
pub(super) struct StreamOutgoing {
    /// The rest of a frame whose beginning the socket has taken.
    rest: Vec<u8>,
}

impl StreamOutgoing {
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>, frames: &[Option<Frame<'_>>]) -> Sent {
        let mut sent = Sent { count: 0, dropped: 0, stopped: None };
        sent.stopped = self.send_all(socket, frames, &mut sent.count).err();
        sent
    }

    /// Sends frames, and the rests of those that are cut; `count` grows by those that were begun.
    fn send_all(
        &mut self,
        socket: BorrowedFd<'_>,
        frames: &[Option<Frame<'_>>],
        count: &mut usize,
    ) -> Result<(), PortError> {
        loop {
            self.flush(socket)?;
            if *count == frames.len() {
                return Ok(());
            }
            *count += self.send_some(socket, &frames[*count..])?;
        }
    }

    /// Whether there is the rest of a frame to be sent.
    pub(super) fn is_cut(&self) -> bool {
        !self.rest.is_empty()
    }

    /// Sends the rest of what was begun.
    fn flush(&mut self, socket: BorrowedFd<'_>) -> Result<(), PortError> {
        while !self.rest.is_empty() {
            let mut pieces = Pieces::with_capacity(1);
            pieces.push_own(&mut self.rest);
            let taken = taken(uninterrupted(|| pieces.send(socket)))?;
            self.rest.drain(..taken);
        }
        Ok(())
    }

    /// Sends frames with one call, and keeps the rest of the one that is cut. How many have been sent with that.
    fn send_some(
        &mut self,
        socket: BorrowedFd<'_>,
        frames: &[Option<Frame<'_>>],
    ) -> Result<usize, PortError> {
        let mut lengths: Vec<_> = frames.iter().map(|frame| length_of(frame.as_ref())).collect();
        let mut pieces = Pieces::with_capacity(4 * frames.len());
        let mut count = 0;
        for (frame, length) in frames.iter().zip(&mut lengths) {
            if let Some(frame) = frame {
                // A chain of more pieces than that never comes here.
                if pieces.len() + 1 + frame.body.len() > MAX_PIECES {
                    break;
                }
                pieces.push_own(length);
                push_body(&mut pieces, &frame.body);
            }
            count += 1;
        }
        if pieces.len() == 0 {
            return Ok(count);
        }
        let mut taken = taken(uninterrupted(|| pieces.send(socket)))?;
        for (index, frame) in frames[..count].iter().enumerate() {
            let Some(frame) = frame else { continue };
            let whole = LENGTH + frame.bytes;
            if taken < whole {
                if taken > 0 {
                    self.keep_rest(frame, taken);
                }
                return Ok(index + usize::from(taken > 0));
            }
            taken -= whole;
        }
        Ok(count)
    }

    /// Keeps what is left of a frame of which the socket has taken this much.
    fn keep_rest(&mut self, frame: &Frame<'_>, taken: usize) {
        self.rest.extend(&length_of(Some(frame)));
        for slice in &frame.body {
            append(&mut self.rest, slice);
        }
        self.rest.drain(..taken);
    }
}

fn length_of(frame: Option<&Frame<'_>>) -> [u8; LENGTH] {
    let length = frame.map_or(0, |frame| frame.bytes);
    u32::try_from(length).expect("frames are short").to_be_bytes()
}

fn append(bytes: &mut Vec<u8>, slice: &VolatileSlice<'_>) {
    let start = bytes.len();
    bytes.resize(start + slice.len(), 0);
    slice.copy_to(&mut bytes[start..]);
}

fn taken(outcome: io::Result<usize>) -> Result<usize, PortError> {
    outcome.map_err(|error| blocked(&error).unwrap_or_else(|| PortError::Gone(error.to_string())))
}
