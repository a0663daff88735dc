//! The memory device (VIRTIO 1.3, 5.15): memory that is plugged into the guest and unplugged while it runs, block by block.
//!
//! [`Mem`] is what its registers show, [`MemWorker`] answers the driver's requests, and a [`MemHandle`] is the host's end: it says how
//! much is wanted, and the driver goes there as far as it can. Unplugged blocks are the host's: their pages are given back.
//!
//! Limits: one region, of one NUMA node; a guest that touches blocks that are not plugged finds zeros, and memory that is bounded
//! by the region.

mod blocks;
mod worker;

pub use worker::MemWorker;

use super::{DeviceType, Interrupt, VirtioDevice, VirtioSpec, read_config};
use crate::saved::invalid;
use blocks::Blocks;
use guest_saved_state::devices::mem::MemState;
use inspect::{Inspect, Request};
use save_restore::{RestoreError, SaveError};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const QUEUE_SIZE: u16 = 128;

/// The most blocks of a region.
pub const MAX_BLOCKS: u64 = 1 << 20;

/// A region and its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    region: Range<u64>,
    block_bytes: u64,
}

/// What no memory device can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Blocks whose size is no power of two, or smaller than a page.
    #[error("blocks of {0} bytes: a power of two from 4096 on is needed")]
    BlockBytes(u64),
    /// A region that is empty, or not of whole blocks, or does not begin at one.
    #[error("a region of {bytes} bytes at {start:#x} is not of whole blocks of {block_bytes} bytes")]
    Region {
        /// Where it begins: a guest physical address.
        start: u64,
        /// Its size in bytes.
        bytes: u64,
        /// The size of a block in bytes.
        block_bytes: u64,
    },
    /// More blocks than [`MAX_BLOCKS`].
    #[error("{0} blocks are more than {MAX_BLOCKS}")]
    TooMany(u64),
}

impl Geometry {
    /// A region of guest physical addresses, in blocks of so many bytes.
    ///
    /// # Errors
    /// What is not as a memory device can have it.
    pub fn new(region: Range<u64>, block_bytes: u64) -> Result<Self, GeometryError> {
        let (start, bytes) = (region.start, region.end.saturating_sub(region.start));
        if !block_bytes.is_power_of_two() || block_bytes < 4096 {
            return Err(GeometryError::BlockBytes(block_bytes));
        }
        if bytes == 0 || !bytes.is_multiple_of(block_bytes) || !start.is_multiple_of(block_bytes) {
            return Err(GeometryError::Region { start, bytes, block_bytes });
        }
        let blocks = bytes / block_bytes;
        if blocks > MAX_BLOCKS {
            return Err(GeometryError::TooMany(blocks));
        }
        Ok(Self { region, block_bytes })
    }

    /// The region.
    pub fn region(&self) -> Range<u64> {
        self.region.clone()
    }

    /// The size of the region in bytes.
    pub fn region_bytes(&self) -> u64 {
        self.region.end - self.region.start
    }

    /// The size of a block in bytes.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    fn blocks(&self) -> usize {
        usize::try_from(self.region_bytes() / self.block_bytes).expect("bounded")
    }

    /// Whether so many bytes can be plugged.
    ///
    /// # Errors
    /// A size that the region cannot have.
    pub fn check_size(&self, bytes: u64) -> Result<(), SizeError> {
        let (block_bytes, region_bytes) = (self.block_bytes, self.region_bytes());
        if bytes > region_bytes {
            return Err(SizeError::TooLarge { bytes, region_bytes });
        }
        if bytes.is_multiple_of(block_bytes) {
            Ok(())
        } else {
            Err(SizeError::NotWhole { bytes, block_bytes })
        }
    }

    /// So many blocks from an address on, if they are the region's.
    fn blocks_at(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset =
            address.checked_sub(self.region.start).filter(|at| at.is_multiple_of(self.block_bytes))?;
        let first = usize::try_from(offset / self.block_bytes).ok()?;
        let end = first.checked_add(count.into())?;
        (count > 0 && end <= self.blocks()).then_some(first..end)
    }

    /// The guest physical addresses of blocks.
    fn addresses(&self, blocks: &Range<usize>) -> Range<u64> {
        let [start, end] =
            [blocks.start, blocks.end].map(|block| self.region.start + block as u64 * self.block_bytes);
        start..end
    }
}

/// What changes.
#[derive(Debug)]
struct State {
    requested_bytes: u64,
    blocks: Blocks,
}

/// What the registers, the worker and the host share.
#[derive(Debug)]
struct Shared {
    geometry: Geometry,
    state: Mutex<State>,
    interrupt: Arc<Interrupt>,
}

/// A memory device.
#[derive(Debug)]
pub struct Mem {
    shared: Arc<Shared>,
}

/// The host's end of a memory device. Clones are of the same one.
#[derive(Debug, Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

/// A size that cannot be asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It is not of whole blocks.
    #[error("{bytes} bytes are not whole blocks of {block_bytes} bytes")]
    NotWhole {
        /// What was asked for.
        bytes: u64,
        /// The size of a block in bytes.
        block_bytes: u64,
    },
    /// It is more than the region has.
    #[error("{bytes} bytes are more than the region's {region_bytes}")]
    TooLarge {
        /// What was asked for.
        bytes: u64,
        /// The size of the region in bytes.
        region_bytes: u64,
    },
}

impl Mem {
    /// A memory device without plugged memory, as a unit of this name, and its host's end. The region is memory of the machine's
    /// that nothing else tells the guest of.
    pub fn spec(name: impl Into<String>, geometry: Geometry) -> (VirtioSpec, MemHandle) {
        let interrupt = Arc::new(Interrupt::default());
        let state = State { requested_bytes: 0, blocks: Blocks::new(&geometry) };
        let shared = Arc::new(Shared { geometry, state: Mutex::new(state), interrupt: interrupt.clone() });
        let worker = MemWorker::new(shared.clone());
        (VirtioSpec::new(name, Self { shared: shared.clone() }, worker, interrupt), MemHandle { shared })
    }
}

impl MemHandle {
    /// The region and its blocks.
    pub fn geometry(&self) -> &Geometry {
        &self.shared.geometry
    }

    /// How many bytes are plugged.
    pub fn plugged_bytes(&self) -> u64 {
        self.shared.plugged_bytes(&self.shared.state())
    }

    /// How many bytes the host wants plugged.
    pub fn requested_bytes(&self) -> u64 {
        self.shared.state().requested_bytes
    }

    /// Asks the guest for so many plugged bytes, more or fewer than there are. It takes its time, and may never get there.
    ///
    /// # Errors
    /// A size that the region cannot have.
    pub fn request(&self, bytes: u64) -> Result<(), SizeError> {
        self.shared.request(bytes)
    }
}

impl Shared {
    /// A panic of another thread leaves the state whole: it is only set.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn plugged_bytes(&self, state: &State) -> u64 {
        state.blocks.plugged() as u64 * self.geometry.block_bytes
    }

    fn request(&self, bytes: u64) -> Result<(), SizeError> {
        self.geometry.check_size(bytes)?;
        self.state().requested_bytes = bytes;
        self.interrupt.config_changed();
        Ok(())
    }

    /// struct virtio_mem_config (5.15.4): all of the region can be used.
    fn config(&self) -> Vec<u8> {
        let state = self.state();
        let node = 0;
        let region_bytes = self.geometry.region_bytes();
        let fields = [
            self.geometry.block_bytes,
            node,
            self.geometry.region.start,
            region_bytes,
            region_bytes,
            self.plugged_bytes(&state),
            state.requested_bytes,
        ];
        fields.iter().flat_map(|field| field.to_le_bytes()).collect()
    }
}

impl VirtioDevice for Mem {
    type Worker = MemWorker;
    type SavedState = MemState;

    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.shared.config(), offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    /// Memory that is plugged stays so over the life of a driver (5.15.5.2).
    fn reset(&mut self) {}

    fn machine_was_reset(&mut self) {
        self.shared.state().blocks.clear();
    }

    fn save(&mut self, _: &mut MemWorker) -> Result<MemState, SaveError> {
        let Shared { geometry, state: _, interrupt: _ } = &*self.shared;
        let state = self.shared.state();
        let State { requested_bytes, blocks } = &*state;
        Ok(MemState {
            block_bytes: geometry.block_bytes,
            region_bytes: geometry.region_bytes(),
            requested_bytes: *requested_bytes,
            plugged: blocks.bits().to_vec(),
        })
    }

    fn restore(&mut self, _: &mut MemWorker, state: MemState) -> Result<(), RestoreError> {
        let MemState { block_bytes, region_bytes, requested_bytes, plugged } = state;
        let geometry = &self.shared.geometry;
        if block_bytes != geometry.block_bytes {
            return Err(invalid("block_bytes", block_bytes));
        }
        if region_bytes != geometry.region_bytes() {
            return Err(invalid("region_bytes", region_bytes));
        }
        geometry.check_size(requested_bytes).map_err(|_| invalid("requested_bytes", requested_bytes))?;
        let blocks = Blocks::from_bits(geometry, &plugged);
        let length = format_args!("{} bytes long, or has bits beyond the blocks", plugged.len()).to_string();
        let blocks = blocks.ok_or_else(|| RestoreError::invalid("plugged", length))?;
        *self.shared.state() = State { requested_bytes, blocks };
        Ok(())
    }
}

/// Shows its sizes; the one that is asked for can be written.
impl Inspect for Mem {
    fn inspect(&self, request: Request<'_>) {
        let shared = &self.shared;
        let plugged_bytes = shared.plugged_bytes(&shared.state());
        request
            .respond()
            .hex("region", shared.geometry.region.start)
            .field_with("region_bytes", || shared.geometry.region_bytes())
            .field("block_bytes", &shared.geometry.block_bytes)
            .field("plugged_bytes", &plugged_bytes)
            .writable(
                "requested_bytes",
                || shared.state().requested_bytes,
                |bytes| shared.request(bytes).map(|()| bytes).map_err(|error| error.to_string()),
            );
    }
}

#[cfg(test)]
mod tests;
