//! What a block device's registers show, and what its host keeps of it.

use super::disk::{DiskImage, DiskSize, Operation};
use super::request::{ID_BYTES, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, SECTOR};
use super::worker::BlockWorker;
use crate::virtio::rate_limit::RateLimits;
use crate::virtio::{DeviceType, Interrupt, VirtioDevice, VirtioSpec, read_config};
use guest_saved_state::devices::block::BlockState;
use inspect::{Inspect, Request};
use save_restore::{RestoreError, SaveError};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

const QUEUE_SIZE: u16 = 256;
/// What a chain has beside its data.
const FRAME: u16 = 2;

/// The most queues of a block device. They share one thread.
pub const MAX_QUEUES: u16 = 16;

/// Where the driver says what cache it wants (5.2.4).
const WRITEBACK_OFFSET: u64 = 32;

/// What a block device is to be.
#[derive(Debug)]
pub struct BlockOptions {
    /// What the driver reads as the device's id: its first 20 bytes.
    pub id: String,
    /// Writes are refused.
    pub read_only: bool,
    /// How many queues: 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// How much it may do.
    pub rates: Arc<RateLimits>,
    /// Told of failures of the host's.
    pub on_error: OnError,
}

/// Is told of failures of the host's, on the I/O thread, at a bounded rate. Must not block.
pub struct OnError(Box<dyn Fn(BlockError) + Send + Sync>);

impl OnError {
    /// Calls this.
    pub fn new(call: impl Fn(BlockError) + Send + Sync + 'static) -> Self {
        Self(Box::new(call))
    }

    pub(super) fn call(&self, error: BlockError) {
        (self.0)(error);
    }
}

impl fmt::Debug for OnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnError")
    }
}

/// A request that the host has failed, and the guest was told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockError {
    /// The device's name.
    pub device: String,
    /// read, write, flush, discard, or write of zeros.
    pub what: &'static str,
    /// What the host says.
    pub error: String,
    /// How many more there were since the last one that was told.
    pub suppressed: u64,
}

/// Why a disk cannot have this capacity.
#[derive(Debug, thiserror::Error)]
pub enum CapacityError {
    /// Half sectors cannot be shown.
    #[error("{0} bytes are no whole sectors of 512")]
    HalfSector(u64),
    /// The image is smaller.
    #[error("{bytes} bytes are more than the {has} that the image has: enlarge that first")]
    Beyond {
        /// What was asked for.
        bytes: u64,
        /// What there is.
        has: u64,
    },
    /// The host does not tell how large the image is.
    #[error("the host does not tell how large the image is: {0}")]
    Host(#[from] io::Error),
}

/// How much was done, for who looks.
#[derive(Debug, Default)]
pub(super) struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    /// Discards and writes of zeros.
    trims: AtomicU64,
    pub errors: AtomicU64,
}

impl Counters {
    /// Counts an operation of so many bytes, and gives its name.
    pub fn count(&self, operation: &Operation, bytes: u64) -> &'static str {
        let add = |counter: &AtomicU64, count| {
            counter.fetch_add(count, Ordering::Relaxed);
        };
        match operation {
            Operation::Read { .. } => {
                add(&self.reads, 1);
                add(&self.read_bytes, bytes);
                "read"
            }
            Operation::Write { .. } => {
                add(&self.writes, 1);
                add(&self.written_bytes, bytes);
                "write"
            }
            Operation::Flush => {
                add(&self.flushes, 1);
                "flush"
            }
            Operation::Discard { .. } => {
                add(&self.trims, 1);
                "discard"
            }
            Operation::WriteZeroes { .. } => {
                add(&self.trims, 1);
                "write of zeros"
            }
        }
    }
}

/// What registers, worker and host share.
#[derive(Debug)]
pub(super) struct Shared {
    pub name: String,
    pub capacity_sectors: AtomicU64,
    /// What the driver has chosen.
    writeback: AtomicBool,
    pub rates: Arc<RateLimits>,
    pub counters: Counters,
    pub on_error: OnError,
    size: Arc<dyn DiskSize>,
    interrupt: Arc<Interrupt>,
}

impl Shared {
    pub fn is_writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    fn capacity_bytes(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Relaxed) * SECTOR
    }

    fn check_capacity(&self, bytes: u64) -> Result<u64, CapacityError> {
        if !bytes.is_multiple_of(SECTOR) {
            return Err(CapacityError::HalfSector(bytes));
        }
        match self.size.bytes()? {
            has if bytes <= has => Ok(bytes / SECTOR),
            has => Err(CapacityError::Beyond { bytes, has }),
        }
    }

    fn set_capacity(&self, bytes: u64) -> Result<u64, CapacityError> {
        let sectors = self.check_capacity(bytes)?;
        self.capacity_sectors.store(sectors, Ordering::Relaxed);
        self.interrupt.config_changed();
        Ok(bytes)
    }
}

/// The host's handle of a block device.
#[derive(Debug, Clone)]
pub struct BlockHandle(Arc<Shared>);

impl BlockHandle {
    /// How many bytes the guest sees.
    pub fn capacity_bytes(&self) -> u64 {
        self.0.capacity_bytes()
    }

    /// Shows the guest another capacity, at once and by an interrupt. Requests that were taken before end as they would have.
    ///
    /// # Errors
    /// See [`CapacityError`]; nothing changes then.
    pub fn set_capacity(&self, bytes: u64) -> Result<(), CapacityError> {
        self.0.set_capacity(bytes).map(drop)
    }
}

/// A block device.
#[derive(Debug)]
pub struct Block {
    shared: Arc<Shared>,
    read_only: bool,
    queues: u16,
    physical_block_bytes: u32,
}

impl Block {
    /// A block device as a unit of this name, and the host's handle of it.
    ///
    /// # Errors
    /// If the host does not tell how large the image is.
    pub fn spec(
        name: impl Into<String>,
        image: DiskImage,
        options: BlockOptions,
    ) -> io::Result<(VirtioSpec, BlockHandle)> {
        let DiskImage { disk, size, physical_block_bytes } = image;
        let BlockOptions { id, read_only, queues, rates, on_error } = options;
        let (name, interrupt) = (name.into(), Arc::new(Interrupt::default()));
        let shared = Arc::new(Shared {
            name: name.clone(),
            capacity_sectors: (size.bytes()? / SECTOR).into(),
            writeback: true.into(),
            rates,
            counters: Counters::default(),
            on_error,
            size,
            interrupt: interrupt.clone(),
        });
        let worker = BlockWorker::new(disk, shared.clone(), padded(&id), read_only);
        let queues = queues.clamp(1, MAX_QUEUES);
        let device = Self { shared: shared.clone(), read_only, queues, physical_block_bytes };
        Ok((VirtioSpec::new(name, device, worker, interrupt), BlockHandle(shared)))
    }

    /// `virtio_blk_config` (5.2.4), as far as there is something in it.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let exponent = (self.physical_block_bytes / 512).trailing_zeros();
        put(0, &self.shared.capacity_sectors.load(Ordering::Relaxed).to_le_bytes());
        put(12, &u32::from(QUEUE_SIZE - FRAME).to_le_bytes());
        put(20, &512u32.to_le_bytes());
        put(24, &[u8::try_from(exponent).expect("at most 31"), 0]);
        let block_sectors = u16::try_from(self.physical_block_bytes / 512).expect("at most 64 KiB");
        put(26, &block_sectors.to_le_bytes());
        put(32, &[self.shared.is_writeback().into()]);
        put(34, &self.queues.to_le_bytes());
        if !self.read_only {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &u32::from(block_sectors).to_le_bytes());
            put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        config
    }
}

/// Cut off at 20 bytes, or filled up with zeros (5.2.6, VIRTIO_BLK_T_GET_ID).
fn padded(id: &str) -> [u8; ID_BYTES] {
    let mut padded = [0; ID_BYTES];
    padded.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
    padded
}

impl VirtioDevice for Block {
    type Worker = BlockWorker;
    type SavedState = BlockState;

    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let bits = |features: &[u32]| features.iter().fold(0, |bits, feature| bits | 1u64 << feature);
        let always = bits(&[
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
        ]);
        let writes = match self.read_only {
            true => bits(&[VIRTIO_BLK_F_RO]),
            false => bits(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]),
        };
        always | writes | if self.queues > 1 { bits(&[VIRTIO_BLK_F_MQ]) } else { 0 }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK_OFFSET, [writeback]) = (offset, data) {
            self.shared.writeback.store(*writeback != 0, Ordering::Relaxed);
        }
    }

    fn reset(&mut self) {
        self.shared.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&mut self, worker: &mut BlockWorker) -> Result<BlockState, SaveError> {
        if let Some(reason) = worker.unsaveable() {
            return Err(SaveError::not_supported(reason));
        }
        Ok(BlockState {
            capacity_sectors: self.shared.capacity_sectors.load(Ordering::Relaxed),
            writeback: self.shared.is_writeback(),
        })
    }

    fn restore(&mut self, _: &mut BlockWorker, state: BlockState) -> Result<(), RestoreError> {
        let BlockState { capacity_sectors, writeback } = state;
        let refused = |problem: &dyn fmt::Display| {
            RestoreError::invalid("capacity_sectors", format_args!("{capacity_sectors} ({problem})"))
        };
        let bytes = capacity_sectors.checked_mul(SECTOR);
        let bytes = bytes.ok_or_else(|| refused(&"no disk has so many"))?;
        self.shared.check_capacity(bytes).map_err(|error| refused(&error))?;
        self.shared.capacity_sectors.store(capacity_sectors, Ordering::Relaxed);
        self.shared.writeback.store(writeback, Ordering::Relaxed);
        Ok(())
    }
}

/// Shows the disk and what was done with it. The capacity and the rates can be written.
impl Inspect for Block {
    fn inspect(&self, request: Request<'_>) {
        let shared = &*self.shared;
        request
            .respond()
            .writable("capacity_bytes", || shared.capacity_bytes(), |bytes| shared.set_capacity(bytes))
            .field("read_only", &self.read_only)
            .field("queues", &self.queues)
            .field("physical_block_bytes", &self.physical_block_bytes)
            .field_with("writeback", || shared.is_writeback())
            .field("limits", &shared.rates)
            .field("reads", &shared.counters.reads)
            .field("read_bytes", &shared.counters.read_bytes)
            .field("writes", &shared.counters.writes)
            .field("written_bytes", &shared.counters.written_bytes)
            .field("flushes", &shared.counters.flushes)
            .field("trims", &shared.counters.trims)
            .field("errors", &shared.counters.errors);
    }
}
