//! A guest's side of a virtio device: a driver over real guest memory, for tests, fuzzing and benchmarks.
//!
//! [`FakeDriver`] does what a correct driver does, and lets its user do what no correct driver does: write any descriptor, any index,
//! any register. It blocks the calling thread, never for longer than [`PATIENCE`], and panics when it has waited that long.
//!
//! The device is built as a machine builds it, with an I/O thread of its own, in memory of [`RAM_BYTES`].

mod edges;
mod ram;
mod ring;

pub use ram::{FakeRam, RAM_BYTES};
pub use ring::{Ring, Segment, Used, descriptor};

use super::{EventFd, IoThread, MmioPlace, VirtioHost, VirtioSpec};
use crate::Device;
use edges::Edges;
use save_restore::{RestoreError, SavedStateBlob};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::ByteValued;

/// How long anything is waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A buffer of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffer<'a> {
    /// Bytes for the device.
    Out(&'a [u8]),
    /// Room for so many bytes of the device's.
    In(u32),
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// How many bytes the device says that it has written.
    pub written: u32,
    /// What is in the writable buffers, all of them.
    pub data: Vec<u8>,
}

/// A driver and its device.
pub struct FakeDriver {
    device: Arc<Mutex<dyn Device>>,
    ram: Arc<FakeRam>,
    edges: Arc<Edges>,
    doorbells: Vec<Arc<EventFd>>,
    rings: Vec<Ring>,
    // Ends last: a worker may be on it.
    _io: IoThread,
}

impl FakeDriver {
    /// A device whose unit is stopped and whose driver has not looked at it yet.
    pub fn stopped(spec: VirtioSpec) -> Self {
        let io = IoThread::start().expect("a thread");
        let ram = Arc::new(FakeRam::new());
        let edges = Arc::new(Edges::default());
        let doorbell = |_| Arc::new(EventFd::new().expect("an eventfd"));
        let doorbells: Vec<_> = (0..spec.queue_count()).map(doorbell).collect();
        let host = VirtioHost { ram: ram.clone(), io: io.handle() };
        let place = MmioPlace { line: Box::new(edges.clone()), doorbells: doorbells.clone() };
        let device = spec.build(host, place);
        Self { device, ram, edges, doorbells, rings: Vec::new(), _io: io }
    }

    /// A device whose unit runs.
    pub fn started(spec: VirtioSpec) -> Self {
        let driver = Self::stopped(spec);
        driver.start();
        driver
    }

    /// A device whose unit runs and whose driver has set it up with these features, as far as the device has them.
    pub fn ready(spec: VirtioSpec, features: u64) -> Self {
        let mut driver = Self::started(spec);
        driver.initialize(features);
        driver
    }

    /// The device, as a machine has it.
    pub fn device(&self) -> MutexGuard<'_, dyn Device + 'static> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many queues the device has.
    pub fn queue_count(&self) -> usize {
        self.doorbells.len()
    }

    /// The guest's memory.
    pub fn ram(&self) -> &FakeRam {
        &self.ram
    }

    /// Starts the state unit.
    pub fn start(&self) {
        self.device().start();
    }

    /// Stops the state unit, and waits until it has.
    pub fn stop(&self) {
        let stopping = self.device().stop();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let stopped = runtime.block_on(async { tokio::time::timeout(PATIENCE, stopping).await });
        stopped.expect("the device stops in time");
    }

    /// Saves the stopped device.
    pub fn save(&self) -> SavedStateBlob {
        self.device().save_blob().expect("a stopped device can be saved")
    }

    /// Restores the stopped device; memory, and what this driver knows of its queues, are as they were in `from`.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn restore(&mut self, from: &Self, state: SavedStateBlob) -> Result<(), RestoreError> {
        self.device().restore_blob(state)?;
        self.ram.copy_from(&from.ram);
        self.rings = from.rings.clone();
        Ok(())
    }

    /// Reads a register.
    pub fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.device().read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&self, register: u32, value: u32) {
        assert!(self.device().write(register.into(), &value.to_le_bytes()).is_continue());
    }

    /// Reads a value of the configuration.
    pub fn config<T: ByteValued + Default>(&self, offset: u32) -> T {
        let mut value = T::default();
        let bytes = value.as_mut_slice();
        for (at, byte) in (u64::from(VIRTIO_MMIO_CONFIG + offset)..).zip(bytes) {
            self.device().read(at, std::slice::from_mut(byte));
        }
        value
    }

    /// Writes a value of the configuration with one access.
    pub fn write_config<T: ByteValued>(&self, offset: u32, value: T) {
        let at = (VIRTIO_MMIO_CONFIG + offset).into();
        assert!(self.device().write(at, value.as_slice()).is_continue());
    }

    /// The device status.
    pub fn status(&self) -> u32 {
        self.read(VIRTIO_MMIO_STATUS)
    }

    /// Whether the device says that it needs a reset.
    pub fn needs_reset(&self) -> bool {
        self.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    /// The features that the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Sets the device up (VIRTIO 1.3, 3.1.1) with all its queues at their full size, and with the features that both have.
    pub fn initialize(&mut self, features: u64) {
        let features = self.negotiate(features);
        self.set_up_queues(features);
        self.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
    }

    /// The first part of it, up to the features, which it returns.
    pub fn negotiate(&self, features: u64) -> u64 {
        self.reset();
        self.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
        let features = self.offered() & (features | 1 << VIRTIO_F_VERSION_1);
        for (select, bits) in [(0, features), (1, features >> 32)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            let half = u32::try_from(bits & u64::from(u32::MAX)).expect("masked");
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.add_status(VIRTIO_CONFIG_S_FEATURES_OK);
        assert_ne!(self.status() & VIRTIO_CONFIG_S_FEATURES_OK, 0, "the device takes what it offers");
        features
    }

    /// Makes all queues ready, at their full size.
    pub fn set_up_queues(&mut self, features: u64) {
        self.ram.forget_allocations();
        self.rings.clear();
        let event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        for index in 0..self.doorbells.len() {
            self.write(VIRTIO_MMIO_QUEUE_SEL, u32::try_from(index).expect("few queues"));
            let size = u16::try_from(self.read(VIRTIO_MMIO_QUEUE_NUM_MAX)).expect("16 bits");
            let ring = Ring::new(&self.ram, size, event_idx);
            self.write(VIRTIO_MMIO_QUEUE_NUM, size.into());
            let areas = [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, ring.descriptors),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, ring.available),
                (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, ring.used),
            ];
            for (low, high, address) in areas {
                self.write(low, u32::try_from(address).expect("small memory"));
                self.write(high, 0);
            }
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
            self.rings.push(ring);
        }
    }

    /// Resets the device and waits until it is reset.
    pub fn reset(&self) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.wait("a reset", || (self.status() == 0).then_some(()));
    }

    /// Sets bits of the status.
    pub fn add_status(&self, bits: u32) {
        self.write(VIRTIO_MMIO_STATUS, self.status() | bits);
    }

    /// Reads the causes of interrupts, and acknowledges them.
    pub fn acknowledge(&self) -> u32 {
        let causes = self.read(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(VIRTIO_MMIO_INTERRUPT_ACK, causes);
        causes
    }

    /// How many edges the device has made.
    pub fn edges(&self) -> u64 {
        self.edges.count()
    }

    /// A queue's ring in memory, for who writes what no driver writes.
    pub fn ring(&mut self, queue: usize) -> &mut Ring {
        &mut self.rings[queue]
    }

    /// Makes a chain of segments of memory available, and returns its first descriptor. The device is not told.
    pub fn add(&mut self, queue: usize, segments: &[Segment]) -> u16 {
        self.rings[queue].add(&self.ram, segments)
    }

    /// Rings a queue's doorbell, unless the device does not want to be told.
    pub fn notify(&mut self, queue: usize) {
        if self.rings[queue].wants_notification(&self.ram) {
            self.ring_doorbell(queue);
        }
    }

    /// Rings a queue's doorbell.
    pub fn ring_doorbell(&self, queue: usize) {
        self.doorbells[queue].signal();
    }

    /// Sends a request, and returns its first descriptor.
    pub fn send(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> u16 {
        let segments: Vec<_> = buffers.iter().map(|buffer| self.ram.place(*buffer)).collect();
        let head = self.add(queue, &segments);
        self.notify(queue);
        head
    }

    /// The next request that the device has answered, if it has any more.
    pub fn poll(&mut self, queue: usize) -> Option<Used> {
        self.rings[queue].poll(&self.ram)
    }

    /// The next request that the device answers.
    pub fn wait_used(&mut self, queue: usize) -> Used {
        let (ring, ram) = (&mut self.rings[queue], &self.ram);
        self.edges.wait("an answer", || ring.poll_or_arm(ram))
    }

    /// What is in the writable segments of an answered request; the driver's memory of them is free again.
    pub fn take(&mut self, used: &Used) -> Reply {
        let data = self.ram.take(&used.segments);
        Reply { written: used.written, data }
    }

    /// Sends a request and waits for its answer. There must be no other on the queue.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> Reply {
        let head = self.send(queue, buffers);
        let used = self.wait_used(queue);
        assert_eq!(used.head, head, "the one request is answered");
        self.take(&used)
    }

    /// Waits until `look` finds something; it is asked again after each edge and every few milliseconds.
    pub fn wait<T>(&self, what: &str, look: impl FnMut() -> Option<T>) -> T {
        self.edges.wait(what, look)
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_needs_reset(&self) {
        self.wait("the need for a reset", || self.needs_reset().then_some(()));
    }
}
