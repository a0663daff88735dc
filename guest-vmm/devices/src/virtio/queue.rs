//! A queue as a worker serves it.

use super::chain::Chain;
use super::event::EventFd;
use super::interrupt::Interrupt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use tokio::io::unix::AsyncFd;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// How many chains a queue hands out before its worker lets others run: a driver that never pauses holds up nobody.
const BUDGET: u32 = 64;

/// The device area (VIRTIO 1.3, 2.7.8): flags, the index, the elements. And where the driver area's elements begin (2.7.6), which has its
/// index in the same place.
const AREA_INDEX: u64 = 2;
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
const AVAILABLE_HEADER: u64 = 4;
const AVAILABLE_ELEMENT: u64 = 2;

/// What a driver has done to a queue that cannot be gone on from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueFault {
    /// The queue's parts are not where memory is.
    #[error(
        "queue {index} is not in memory: descriptors at {descriptors:#x}, driver area at {driver:#x}, device area at {device:#x}, size {size}"
    )]
    Misplaced {
        /// The queue.
        index: usize,
        /// Where the descriptors are said to be.
        descriptors: u64,
        /// Where the driver's area is said to be.
        driver: u64,
        /// Where the device's area is said to be.
        device: u64,
        /// The number of descriptors.
        size: u16,
    },
    /// A queue that the device needs was not made ready.
    #[error("queue {0} was not made ready")]
    NotReady(usize),
    /// More chains were made available than there are descriptors, or are out.
    #[error("queue {index}: the available index jumps: more than its {size} chains")]
    IndexJump {
        /// The queue.
        index: usize,
        /// The number of descriptors.
        size: u16,
    },
    /// A chain loops, refers to a descriptor or an indirect table that cannot be, or is longer than 4 GiB.
    #[error("the chain at descriptor {head} loops or breaks off")]
    BrokenChain {
        /// Its first descriptor.
        head: u16,
    },
    /// A chain has a readable buffer behind a writable one (VIRTIO 1.3, 2.7.4.2).
    #[error("the chain at descriptor {head} has readable buffers after writable ones")]
    ReadableAfterWritable {
        /// Its first descriptor.
        head: u16,
    },
    /// A buffer without bytes.
    #[error("the buffer at {address:#x} is empty")]
    EmptyBuffer {
        /// Where it is.
        address: u64,
    },
    /// A buffer that is not in memory.
    #[error("the buffer of {length} bytes at {address:#x} is not in memory")]
    NoMemory {
        /// Where it is.
        address: u64,
        /// How long it is, in bytes.
        length: u32,
    },
    /// Something of the queue itself that is not in memory, or an address that wraps.
    #[error("queue {index}: {problem}")]
    Ring {
        /// The queue.
        index: usize,
        /// What the queue library says.
        problem: String,
    },
}

/// A split virtqueue (VIRTIO 1.3, 2.7) and its doorbell.
#[derive(Debug)]
pub struct VirtQueue {
    index: usize,
    queue: Queue,
    memory: GuestMemoryMmap,
    bell: AsyncFd<Arc<EventFd>>,
    interrupt: Arc<Interrupt>,
    /// How many chains the device has.
    out: u16,
    budget: u32,
    /// Up to which used index the driver was told, or did not want to be.
    signalled: u16,
}

impl VirtQueue {
    /// The queue that `state` describes. To be called on the I/O thread.
    pub(super) fn new(
        index: usize,
        state: QueueState,
        memory: GuestMemoryMmap,
        bell: Arc<EventFd>,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, super::DeviceFault> {
        let misplaced = || QueueFault::Misplaced {
            index,
            descriptors: state.desc_table,
            driver: state.avail_ring,
            device: state.used_ring,
            size: state.size,
        };
        let queue = Queue::try_from(state).ok().filter(|queue| queue.is_valid(&memory));
        let queue = queue.ok_or_else(misplaced)?;
        let bell = bell.watch().map_err(super::DeviceFault::Host)?;
        let signalled = queue.next_used();
        Ok(Self { index, queue, memory, bell, interrupt, out: 0, budget: BUDGET, signalled })
    }

    /// The number of its descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// How many chains the device has not given back.
    pub fn outstanding(&self) -> u16 {
        self.out
    }

    /// The next chain, if there is one now.
    ///
    /// # Errors
    /// What the driver has done wrong. The queue is not to be used any more then, but to give chains back.
    pub fn try_next(&mut self) -> Result<Option<Chain>, QueueFault> {
        let (index, size) = (self.index, self.queue.size());
        let jump = QueueFault::IndexJump { index, size };
        let mut available = self.queue.iter(&self.memory).map_err(|error| match error {
            Error::InvalidAvailRingIndex => jump.clone(),
            error => ring_fault(index, &error),
        })?;
        let Some(descriptors) = available.next() else { return Ok(None) };
        // Every chain has a descriptor of its own at least, so more than there are descriptors cannot be out.
        if self.out == size {
            return Err(jump);
        }
        let chain = Chain::collect(descriptors, &self.memory)?;
        self.out += 1;
        Ok(Some(chain))
    }

    /// The next chain; waits for the driver to make one available. May be cancelled at any time.
    ///
    /// # Errors
    /// As [`try_next`](Self::try_next).
    pub async fn next(&mut self) -> Result<Chain, QueueFault> {
        loop {
            match self.budget.checked_sub(1) {
                Some(rest) => self.budget = rest,
                None => {
                    self.budget = BUDGET;
                    tokio::task::yield_now().await;
                }
            }
            if let Some(chain) = self.try_next()? {
                return Ok(chain);
            }
            self.rung().await?;
        }
    }

    /// Waits until the driver has made a chain available, or may have. May be cancelled at any time.
    ///
    /// # Errors
    /// As [`try_next`](Self::try_next).
    pub async fn rung(&mut self) -> Result<(), QueueFault> {
        let index = self.index;
        if self.queue.enable_notification(&self.memory).map_err(|error| ring_fault(index, &error))? {
            return Ok(());
        }
        self.budget = BUDGET;
        // The runtime is there for as long as its tasks.
        let Ok(mut bell) = self.bell.readable().await else { return std::future::pending().await };
        bell.get_inner().take();
        bell.clear_ready();
        Ok(())
    }

    /// Gives a chain back, of whose writable buffers the first `written` bytes were written. The driver is told by
    /// [`signal`](Self::signal).
    ///
    /// # Errors
    /// If the queue is no longer where it was.
    #[expect(clippy::needless_pass_by_value, reason = "a chain is given back once")]
    pub fn complete(&mut self, chain: Chain, written: u32) -> Result<(), QueueFault> {
        self.out -= 1;
        let index = self.index;
        self.queue.add_used(&self.memory, chain.head, written).map_err(|error| ring_fault(index, &error))
    }

    /// Gives several chains back as one, each with how many bytes of its writable buffers were written: the driver sees all of
    /// them or none (VIRTIO 1.3, 2.7.8: the index moves once).
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn complete_together(
        &mut self,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), QueueFault> {
        let mut next = self.queue.next_used();
        for (chain, written) in chains {
            let slot = u64::from(next % self.queue.size());
            let element = (u64::from(chain.head) | u64::from(written) << 32).to_le();
            let at = GuestAddress(self.queue.used_ring() + USED_HEADER + USED_ELEMENT * slot);
            self.memory.write_obj(element, at).map_err(|error| self.memory_fault(error))?;
            (self.out, next) = (self.out - 1, next.wrapping_add(1));
        }
        let index = GuestAddress(self.queue.used_ring() + AREA_INDEX);
        let stored = self.memory.store(next.to_le(), index, Ordering::Release);
        stored.map_err(|error| self.memory_fault(error))?;
        self.queue.set_next_used(next);
        Ok(())
    }

    fn memory_fault(&self, error: GuestMemoryError) -> QueueFault {
        ring_fault(self.index, &Error::GuestMemory(error))
    }

    /// Gives a chain back as [`complete`](Self::complete) does, and tells the driver of it.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn answer(&mut self, chain: Chain, written: u32) -> Result<(), QueueFault> {
        self.complete(chain, written)?;
        self.signal()
    }

    /// Takes back the last chain that was handed out and is not given back yet: it will be the next again. Several go back in the
    /// reverse of the order in which they were handed out.
    pub fn put_back(&mut self, chain: Chain) {
        drop(chain);
        self.out -= 1;
        self.queue.go_to_previous_position();
    }

    /// Tells the driver of what was given back, unless it does not want to know.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn signal(&mut self) -> Result<(), QueueFault> {
        let index = self.index;
        if self.wants_signal().map_err(|error| ring_fault(index, &error))? {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// VIRTIO 1.3, 2.7.7.1.
    fn wants_signal(&mut self) -> Result<bool, Error> {
        // What was given back is to be seen before the driver's wishes are looked at.
        fence(Ordering::SeqCst);
        let area = GuestAddress(self.queue.avail_ring());
        let (old, new) = (self.signalled, self.queue.next_used());
        self.signalled = new;
        if self.queue.event_idx_enabled() {
            let event = area.0 + AVAILABLE_HEADER + AVAILABLE_ELEMENT * u64::from(self.queue.size());
            let event = self.load(GuestAddress(event))?;
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        Ok(new != old && u32::from(self.load(area)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    fn load(&self, address: GuestAddress) -> Result<u16, Error> {
        let value = self.memory.load::<u16>(address, Ordering::Relaxed);
        Ok(u16::from_le(value.map_err(Error::GuestMemory)?))
    }

    /// Its doorbell, for another process that serves it.
    pub(super) fn bell(&self) -> Arc<EventFd> {
        self.bell.get_ref().clone()
    }

    /// The used and the available index as they are in memory: another process may serve the queue.
    ///
    /// # Errors
    /// If the queue is no longer where it was.
    pub(super) fn indices(&self) -> Result<(u16, u16), QueueFault> {
        let index = |area: u64| {
            let index = self.load(GuestAddress(area + AREA_INDEX));
            index.map_err(|error| ring_fault(self.index, &error))
        };
        Ok((index(self.queue.used_ring())?, index(self.queue.avail_ring())?))
    }

    /// Goes on from where another process has left it: chains were taken up to the available index `next`, and given back up to `used`.
    pub(super) fn resume(&mut self, next: u16, used: u16) {
        self.queue.set_next_avail(next);
        self.queue.set_next_used(used);
        self.signalled = used;
    }

    /// Where it stands, for whoever serves it next.
    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }
}

fn ring_fault(index: usize, error: &Error) -> QueueFault {
    QueueFault::Ring { index, problem: error.to_string() }
}
