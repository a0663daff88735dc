//! What a driver hands to a device: a chain of buffers, checked before the device sees it.

use super::queue::QueueFault;
use std::io::{self, Read, Write};
use std::ops::Range;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryResult, VolatileSlice,
};

/// A chain of buffers that belongs to the device until it is given back with [`complete`](super::VirtQueue::complete).
///
/// Every byte of it is in the guest's memory. The guest can change the bytes at any time, so a value is read once and then checked.
#[derive(Debug)]
#[must_use = "the driver waits for it"]
pub struct Chain {
    pub(super) head: u16,
    /// What the driver has written for the device.
    pub readable: Buffers,
    /// Where the device may write for the driver.
    pub writable: Buffers,
}

impl Chain {
    /// Reads the chain's descriptors.
    pub(super) fn collect(
        descriptors: DescriptorChain<&GuestMemoryMmap>,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, QueueFault> {
        let head = descriptors.head_index();
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let mut last: Option<Descriptor> = None;
        for descriptor in descriptors {
            check(&descriptor, memory)?;
            let part = Part { address: descriptor.addr(), length: descriptor.len() };
            match (descriptor.is_write_only(), writable.parts.is_empty()) {
                (true, _) => writable.parts.push(part),
                (false, true) => readable.parts.push(part),
                (false, false) => return Err(QueueFault::ReadableAfterWritable { head }),
            }
            last = Some(descriptor);
        }
        match last {
            // The iteration ends early, without a word, at a loop, an index or a table that cannot be, and past 4 GiB.
            None => Err(QueueFault::BrokenChain { head }),
            Some(last) if last.has_next() => Err(QueueFault::BrokenChain { head }),
            Some(_) => Ok(Self { head, readable, writable }),
        }
    }
}

fn check(descriptor: &Descriptor, memory: &GuestMemoryMmap) -> Result<(), QueueFault> {
    let (address, length) = (descriptor.addr(), descriptor.len());
    if length == 0 {
        return Err(QueueFault::EmptyBuffer { address: address.0 });
    }
    let is_memory = usize::try_from(length).is_ok_and(|length| memory.check_range(address, length));
    if is_memory { Ok(()) } else { Err(QueueFault::NoMemory { address: address.0, length }) }
}

/// A buffer, at most 4 GiB long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    address: GuestAddress,
    length: u32,
}

/// Some of a chain's buffers, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffers {
    parts: Vec<Part>,
}

impl Buffers {
    /// How many bytes they hold together: less than 4 GiB, as the specification bounds a chain.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| u64::from(part.length)).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Where they are: ranges of guest physical addresses.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.parts.iter().map(|part| part.address.0..part.address.0 + u64::from(part.length))
    }

    /// Takes away the first `bytes`, or all if there are fewer.
    pub fn split_front(&mut self, bytes: u64) -> Self {
        let (mut front, mut rest) = (Vec::new(), bytes);
        while let Some(part) = self.parts.first_mut().filter(|_| rest > 0) {
            let taken = u32::try_from(rest).map_or(part.length, |rest| rest.min(part.length));
            front.push(Part { address: part.address, length: taken });
            rest -= u64::from(taken);
            if taken == part.length {
                self.parts.remove(0);
            } else {
                (part.address.0, part.length) = (part.address.0 + u64::from(taken), part.length - taken);
            }
        }
        Self { parts: front }
    }

    /// Takes away the last `bytes`, or all if there are fewer.
    pub fn split_back(&mut self, bytes: u64) -> Self {
        let front = self.split_front(self.bytes().saturating_sub(bytes));
        std::mem::replace(self, front)
    }

    /// The buffers as memory of this process, for a call that takes addresses.
    ///
    /// # Errors
    /// If `memory` is not the memory that they were checked against.
    pub fn slices<'m>(&self, memory: &'m GuestMemoryMmap) -> GuestMemoryResult<Vec<VolatileSlice<'m>>> {
        let mut slices = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let length = usize::try_from(part.length).expect("a buffer fits into memory");
            for slice in memory.get_slices(part.address, length) {
                slices.push(slice?);
            }
        }
        Ok(slices)
    }

    /// Reads them from the start.
    pub fn reader<'m>(&self, memory: &'m GuestMemoryMmap) -> GuestMemoryResult<BufferReader<'m>> {
        Ok(BufferReader(Cursor::new(self.slices(memory)?)))
    }

    /// Writes them from the start.
    pub fn writer<'m>(&self, memory: &'m GuestMemoryMmap) -> GuestMemoryResult<BufferWriter<'m>> {
        Ok(BufferWriter(Cursor::new(self.slices(memory)?)))
    }
}

/// A position in slices of memory.
#[derive(Debug)]
struct Cursor<'m> {
    slices: std::vec::IntoIter<VolatileSlice<'m>>,
    current: Option<VolatileSlice<'m>>,
    done: u64,
}

impl<'m> Cursor<'m> {
    fn new(slices: Vec<VolatileSlice<'m>>) -> Self {
        let mut slices = slices.into_iter();
        let current = slices.next();
        Self { slices, current, done: 0 }
    }

    /// Copies piece after piece, `copy` saying how many bytes of the slice it has used, until it uses none.
    fn advance(&mut self, mut copy: impl FnMut(&VolatileSlice<'m>) -> usize) -> usize {
        let mut total = 0;
        while let Some(slice) = self.current {
            let count = copy(&slice);
            if count == 0 {
                break;
            }
            total += count;
            self.current = match slice.offset(count) {
                Ok(rest) if !rest.is_empty() => Some(rest),
                _ => self.slices.next(),
            };
        }
        self.done += total as u64;
        total
    }

    fn remaining(&self) -> u64 {
        let rest: usize = self.slices.as_slice().iter().map(VolatileSlice::len).sum();
        (rest + self.current.map_or(0, |slice| slice.len())) as u64
    }
}

/// Reads a chain's buffers.
#[derive(Debug)]
pub struct BufferReader<'m>(Cursor<'m>);

impl BufferReader<'_> {
    /// How many bytes are left.
    pub fn remaining(&self) -> u64 {
        self.0.remaining()
    }

    /// Reads a value; `None` if fewer bytes are left than it has.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut value = T::default();
        self.read_exact(value.as_mut_slice()).ok()?;
        Some(value)
    }
}

impl Read for BufferReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut at = 0;
        Ok(self.0.advance(|slice| {
            let count = slice.copy_to(&mut buffer[at..]);
            at += count;
            count
        }))
    }
}

/// Writes a chain's buffers.
#[derive(Debug)]
pub struct BufferWriter<'m>(Cursor<'m>);

impl BufferWriter<'_> {
    /// How many bytes there is room for.
    pub fn remaining(&self) -> u64 {
        self.0.remaining()
    }

    /// How many bytes were written: what [`complete`](super::VirtQueue::complete) has to be told.
    pub fn written(&self) -> u32 {
        u32::try_from(self.0.done).expect("a chain is shorter than 4 GiB")
    }

    /// Leaves the next `bytes` as they are, or all that follow if there are fewer. They count as written.
    pub fn skip(&mut self, bytes: u64) {
        let mut rest = bytes;
        self.0.advance(|slice| {
            let count = usize::try_from(rest).map_or(slice.len(), |rest| rest.min(slice.len()));
            rest -= count as u64;
            count
        });
    }

    /// Writes a value, or nothing and `None` if there is no room for it.
    pub fn write_obj<T: ByteValued>(&mut self, value: T) -> Option<()> {
        let bytes = value.as_slice();
        if self.remaining() < bytes.len() as u64 {
            return None;
        }
        self.write_all(bytes).ok()
    }
}

impl Write for BufferWriter<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let mut at = 0;
        Ok(self.0.advance(|slice| {
            let count = slice.len().min(buffer.len() - at);
            slice.copy_from(&buffer[at..at + count]);
            at += count;
            count
        }))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
