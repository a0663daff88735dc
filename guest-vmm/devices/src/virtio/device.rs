//! What a virtio device is to its transport.

use super::interrupt::Interrupt;
use super::queue::{QueueFault, VirtQueue};
use super::ram::GuestRam;
use super::{IoHandle, MmioPlace, VirtioMmio};
use crate::Device;
use inspect::InspectMut;
use save_restore::{RestoreError, SaveError, SavedStateRoot};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use virtio_bindings::virtio_ids;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

/// What a device is (VIRTIO 1.3, chapter 5), by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the specification's names")]
pub enum DeviceType {
    Net = virtio_ids::VIRTIO_ID_NET,
    Block = virtio_ids::VIRTIO_ID_BLOCK,
    Console = virtio_ids::VIRTIO_ID_CONSOLE,
    Rng = virtio_ids::VIRTIO_ID_RNG,
    Balloon = virtio_ids::VIRTIO_ID_BALLOON,
    Vsock = virtio_ids::VIRTIO_ID_VSOCK,
    Mem = virtio_ids::VIRTIO_ID_MEM,
}

/// Why a worker cannot go on. The device then needs a reset by its driver, and everything else goes on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFault {
    /// The driver has broken a queue's rules.
    #[error(transparent)]
    Queue(#[from] QueueFault),
    /// The driver has broken the device's rules. The text says which, with the value.
    #[error("{0}")]
    Driver(String),
    /// The host failed in a way that no request can be answered with.
    #[error("the host failed")]
    Host(#[source] io::Error),
}

/// What was checked when its chain was taken is not there any more: as if the driver had never given it.
impl From<GuestMemoryError> for DeviceFault {
    fn from(error: GuestMemoryError) -> Self {
        Self::Driver(error.to_string())
    }
}

/// What a device's registers show, and what it keeps beside its queues. Called under the transport's lock: must not block.
///
/// It shows itself in the inspection tree; what the guest has put there is to be marked as sensitive.
pub trait VirtioDevice: InspectMut + Send + 'static {
    /// What serves the queues.
    type Worker: QueueWorker;
    /// The state of device and worker, without queues, features and status, which the transport keeps.
    type SavedState: SavedStateRoot;

    /// What it is.
    fn device_type(&self) -> DeviceType;

    /// The device's own feature bits (0 to 23, 50 to 127). The same for the device's whole life. The transport adds
    /// VERSION_1, INDIRECT_DESC and EVENT_IDX.
    fn features(&self) -> u64;

    /// Which of INDIRECT_DESC and EVENT_IDX the transport must not add, since somebody else serves the queues who cannot do it. The same
    /// for the device's whole life. Most devices have no such thing.
    fn lacks(&self) -> u64 {
        0
    }

    /// Whether another process has the guest's memory: somebody else who serves the queues. The same for the device's whole life.
    fn shares_memory(&self) -> bool {
        false
    }

    /// The most descriptors of each queue: powers of two up to 32768. The same for the device's whole life.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads the configuration (`virtio_*_config`), little endian. Past its end there are zeros: [`read_config`].
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration. What the driver cannot write is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver begins anew. The worker is at rest, and reset beside.
    fn reset(&mut self);

    /// The whole machine begins anew, its memory being all zero: what outlives a driver's [`reset`](Self::reset), which comes first, and
    /// no machine's, is forgotten. Most devices have no such thing.
    fn machine_was_reset(&mut self) {}

    /// The state, the worker being at rest.
    ///
    /// # Errors
    /// If the backend cannot be saved; it says why.
    fn save(&mut self, worker: &mut Self::Worker) -> Result<Self::SavedState, SaveError>;

    /// Replaces the state, the worker being at rest. Looks at every field before anything changes.
    ///
    /// # Errors
    /// The field that the device cannot have, with its value.
    fn restore(&mut self, worker: &mut Self::Worker, state: Self::SavedState) -> Result<(), RestoreError>;
}

/// What serves a device's queues, on the I/O thread.
pub trait QueueWorker: Send + 'static {
    /// Serves the queues until it is asked to stop ([`Session::stop`]). It returns once all that it has begun is finished: each
    /// chain that it took was given back ([`VirtQueue::complete`]), or put back where the driver made it available
    /// ([`VirtQueue::put_back`]). The next call goes on from there, with the same queues or, after [`reset`](Self::reset), with others.
    ///
    /// # Errors
    /// What it cannot go on from. Chains that are out are lost to the driver, which has to reset the device; nothing writes to
    /// them any more.
    fn run(&mut self, session: &mut Session) -> impl Future<Output = Result<(), DeviceFault>>;

    /// The driver begins anew: what it had set up is forgotten, what the host has stays. Called at rest.
    fn reset(&mut self);
}

/// What a worker works with, from its start to its stop.
pub struct Session {
    /// The features that the driver has accepted.
    pub features: u64,
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// The same, for who gives some of it back to the host.
    pub ram: Arc<dyn GuestRam>,
    /// The queues by their index; `None` for those that the driver has not made ready.
    pub queues: Vec<Option<VirtQueue>>,
    /// Says when to stop.
    pub stop: Stop,
    /// For changes of the configuration.
    pub interrupt: Arc<Interrupt>,
}

impl Session {
    /// Whether the driver has accepted the feature with this bit.
    pub fn has(&self, feature: u32) -> bool {
        self.features >> feature & 1 == 1
    }

    /// Queues that the device cannot do without, each index named once.
    ///
    /// # Errors
    /// The first that the driver has not made ready.
    pub fn queues<const N: usize>(
        queues: &mut [Option<VirtQueue>],
        indices: [usize; N],
    ) -> Result<[&mut VirtQueue; N], DeviceFault> {
        for index in indices {
            if queues.get(index).is_none_or(Option::is_none) {
                return Err(QueueFault::NotReady(index).into());
            }
        }
        let queues = queues.get_disjoint_mut(indices).expect("indices named once, and there");
        Ok(queues.map(|queue| queue.as_mut().expect("looked at above")))
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("features", &self.features).finish_non_exhaustive()
    }
}

/// The request to stop. Clones wait for the same one.
#[derive(Debug, Clone)]
pub struct Stop(pub(super) watch::Receiver<()>);

impl Stop {
    /// Resolves when the worker is to stop, from then on at once. May be cancelled at any time.
    pub async fn requested(&mut self) {
        // The other end sends nothing, and goes away to ask.
        while self.0.changed().await.is_ok() {}
    }

    /// Whether the worker is to stop.
    pub fn is_requested(&self) -> bool {
        self.0.has_changed().is_err()
    }
}

/// Reads from a configuration of these bytes, past whose end there are zeros.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let bytes = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    let count = bytes.len().min(data.len());
    data[..count].copy_from_slice(&bytes[..count]);
    data[count..].fill(0);
}

/// What a machine has for a virtio device.
#[derive(Clone)]
pub struct VirtioHost {
    /// The guest's memory.
    pub ram: Arc<dyn GuestRam>,
    /// Where its worker runs.
    pub io: IoHandle,
}

type Build = dyn FnOnce(VirtioHost, MmioPlace) -> Arc<Mutex<dyn Device>> + Send;

/// A virtio device on its way into a machine.
pub struct VirtioSpec {
    /// The name of its state unit: unique in the machine.
    pub name: String,
    queue_count: usize,
    shares_memory: bool,
    build: Box<Build>,
}

impl fmt::Debug for VirtioSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioSpec").field("name", &self.name).finish_non_exhaustive()
    }
}

impl VirtioSpec {
    /// A device with its worker. `interrupt` is the one that both use, if they do.
    pub fn new<D: VirtioDevice>(
        name: impl Into<String>,
        device: D,
        worker: D::Worker,
        interrupt: Arc<Interrupt>,
    ) -> Self {
        let (queue_count, shares_memory) = (device.queue_sizes().len(), device.shares_memory());
        let name = name.into();
        let log_name = name.clone();
        let build = move |host, place| -> Arc<Mutex<dyn Device>> {
            Arc::new(Mutex::new(VirtioMmio::new(log_name, device, worker, interrupt, host, place)))
        };
        Self { name, queue_count, shares_memory, build: Box::new(build) }
    }

    /// How many queues it has, and so doorbells.
    pub fn queue_count(&self) -> usize {
        self.queue_count
    }

    /// Whether memory has to be shared ([`GuestRam::share`]) before the guest runs.
    pub fn shares_memory(&self) -> bool {
        self.shares_memory
    }

    /// The device, at a place of a machine, stopped.
    pub fn build(self, host: VirtioHost, place: MmioPlace) -> Arc<Mutex<dyn Device>> {
        (self.build)(host, place)
    }
}
