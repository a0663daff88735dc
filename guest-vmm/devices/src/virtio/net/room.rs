//! The buffers that a driver has made available for frames (5.1.6.3).

use super::header::{HEADER_BYTES, Header, MAX_FRAME, accepted};
use super::lane::Lane;
use super::vectored::MAX_PIECES;
use crate::virtio::{Chain, DeviceFault, VirtQueue};
use std::collections::VecDeque;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::VolatileSlice;

/// A buffer that the driver has made available.
struct Held<'a> {
    chain: Chain,
    slices: Vec<VolatileSlice<'a>>,
    bytes: usize,
}

/// Buffers that were taken from a queue, for frames to come. They go back to where the driver made them available when it is dropped.
pub(super) struct Room<'a> {
    pub queue: &'a mut VirtQueue,
    lane: Lane<'a>,
    held: VecDeque<Held<'a>>,
    bytes: usize,
    pieces: usize,
}

impl<'a> Room<'a> {
    pub(super) fn new(queue: &'a mut VirtQueue, lane: Lane<'a>) -> Self {
        Self { queue, lane, held: VecDeque::new(), bytes: 0, pieces: 0 }
    }

    /// Takes buffers, as far as there are any, until a frame of so many bytes and its header have room.
    pub(super) fn gather(&mut self, frame: usize) -> Result<(), DeviceFault> {
        while !self.fits(frame)
            && !self.is_complete()
            && let Some(chain) = self.queue.try_next()?
        {
            self.hold(chain)?;
        }
        Ok(())
    }

    /// Whether a frame of so many bytes and its header have room.
    pub(super) fn fits(&self, frame: usize) -> bool {
        self.bytes >= HEADER_BYTES + frame
    }

    /// Whether a frame gets no more buffers than there are now.
    pub(super) fn is_complete(&self) -> bool {
        let merged = accepted(self.lane.features, VIRTIO_NET_F_MRG_RXBUF);
        let most = if merged { self.queue.size().into() } else { 1 };
        self.held.len() >= most
    }

    /// Whether the next frame, whatever its length, can be read to here with one call.
    pub(super) fn is_ready(&self) -> bool {
        (self.fits(MAX_FRAME) || self.is_complete()) && self.pieces + 2 <= MAX_PIECES
    }

    /// The memory for a frame behind its header.
    pub(super) fn slices(&self) -> Vec<VolatileSlice<'a>> {
        let mut slices = Vec::with_capacity(self.pieces);
        let mut skip = HEADER_BYTES;
        for slice in self.held.iter().flat_map(|held| &held.slices) {
            let skipped = skip.min(slice.len());
            skip -= skipped;
            slices.extend(slice.offset(skipped).ok().filter(|rest| !rest.is_empty()));
        }
        slices
    }

    fn hold(&mut self, chain: Chain) -> Result<(), DeviceFault> {
        let slices = chain.writable.slices(self.lane.memory)?;
        let bytes = slices.iter().map(VolatileSlice::len).sum();
        let readable = chain.readable.bytes();
        self.bytes += bytes;
        self.pieces += slices.len();
        self.held.push_back(Held { chain, slices, bytes });
        if readable > 0 || bytes < HEADER_BYTES {
            let problem =
                format!("a buffer for frames has {bytes} writable bytes and {readable} readable ones");
            return Err(DeviceFault::Driver(problem));
        }
        Ok(())
    }

    /// Gives a frame of so many bytes to the driver, for which there is room. Its first bytes are written now, the others are there
    /// already.
    pub(super) fn deliver(&mut self, header: Header, frame: usize, first: &[u8]) -> Result<(), DeviceFault> {
        let parts = self.parts(HEADER_BYTES + frame);
        let buffers = u16::try_from(parts.len()).expect("no more than a queue has");
        let header = header.for_driver(self.lane.features, buffers);
        write(self.held.iter().flat_map(|held| &held.slices), &[&header, first]);
        for held in self.held.iter().take(parts.len()) {
            self.bytes -= held.bytes;
            self.pieces -= held.slices.len();
        }
        let used = self.held.drain(..parts.len()).zip(parts);
        self.queue.complete_together(used.map(|(held, used)| (held.chain, used)))?;
        self.lane.shared.received.pass(1, frame);
        Ok(())
    }

    /// How much of each buffer so many bytes take, from the first one on.
    fn parts(&self, mut bytes: usize) -> Vec<u32> {
        let mut parts = Vec::new();
        for held in &self.held {
            let used = held.bytes.min(bytes);
            parts.push(u32::try_from(used).expect("a frame is short"));
            bytes -= used;
            if bytes == 0 {
                break;
            }
        }
        parts
    }
}

/// Writes texts one after the other into slices.
fn write<'s, 'm: 's>(slices: impl Iterator<Item = &'s VolatileSlice<'m>>, texts: &[&[u8]]) {
    let mut slices = slices.copied();
    let mut current = slices.next();
    for text in texts {
        let mut rest = *text;
        while let Some(slice) = current.filter(|_| !rest.is_empty()) {
            let count = rest.len().min(slice.len());
            slice.copy_from(&rest[..count]);
            rest = &rest[count..];
            let left = slice.offset(count).ok().filter(|left| !left.is_empty());
            current = left.or_else(|| slices.next());
        }
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        while let Some(held) = self.held.pop_back() {
            self.queue.put_back(held.chain);
        }
    }
}
