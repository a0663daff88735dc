//! The MMIO transport (VIRTIO 1.3, 4.2), version 2: a device's registers in a window of guest physical addresses.
//!
//! The driver's and the machine's wishes meet here. The worker serves the queues while both want it: the driver has set DRIVER_OK
//! and the state unit runs. Whoever ceases to want it asks the worker to stop, and its queues come back some time later; until then
//! the state unit's stop is not answered. A driver's reset is waited for by the VP that has written it: Linux asks no further, and
//! uses the buffers for something else.
//!
//! Limits: a queue that is ready is moved by nothing but a reset; no queue reset of its own; no shared memory.

use super::device::{DeviceFault, QueueWorker, Session, Stop, VirtioDevice, VirtioHost};
use super::event::EventFd;
use super::interrupt::{EdgeLine, Interrupt};
use super::log::LogLimit;
use super::queue::VirtQueue;
use crate::device::Stopping;
use crate::{Device, IoDevice};
use inspect::{InspectMut, Request};
use processor::PowerRequest;
use std::error::Error;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::Duration;
use tokio::sync::watch;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW,
    VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueState;

/// How many bytes of guest physical address space the registers and the configuration take.
pub const WINDOW_BYTES: u64 = 0x1000;
/// Where in it the number of a queue is written to ring its doorbell; 32 bits.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Says nothing: drivers look at the device's type. "GSTD".
const VENDOR: u32 = 0x4454_5347;
/// What there is of shared memory: regions of length -1 do not exist.
const NO_SHARED_MEMORY: u32 = u32::MAX;

pub(super) const STATUS_DEFINED: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_NEEDS_RESET
    | VIRTIO_CONFIG_S_FAILED;

/// What the transport itself can do.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// How long a driver's reset is waited for. One that takes longer goes on, and the driver reads that it is not done (2.1.1).
const RESET: Duration = Duration::from_secs(5);

/// Where a device stands in a machine.
pub struct MmioPlace {
    /// Where its interrupts go.
    pub line: Box<dyn EdgeLine>,
    /// The doorbell of each queue, in order; rung by the hypervisor itself where it can.
    pub doorbells: Vec<Arc<EventFd>>,
}

impl fmt::Debug for MmioPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioPlace").field("doorbells", &self.doorbells.len()).finish_non_exhaustive()
    }
}

/// A queue as the driver has set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    fn state(&self, event_idx: bool) -> QueueState {
        QueueState {
            max_size: self.max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.driver,
            used_ring: self.device,
        }
    }
}

/// The registers that only the driver changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueRegisters>,
}

impl Registers {
    fn new(sizes: &[u16]) -> Self {
        Self {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: sizes.iter().copied().map(QueueRegisters::new).collect(),
        }
    }

    fn has(&self, status: u32) -> bool {
        self.status & status != 0
    }

    fn accepted(&self, feature: u32) -> bool {
        self.driver_features >> feature & 1 == 1
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// The selected queue, while it may be set up: not once it is ready.
    fn open_queue(&mut self) -> Option<&mut QueueRegisters> {
        let queue = self.queues.get_mut(usize::try_from(self.queue_select).ok()?)?;
        Some(queue).filter(|queue| !queue.ready)
    }
}

/// Where the worker is.
pub(super) enum WorkerPlace<W> {
    Idle(W),
    Running(Running<W>),
    /// It panicked.
    Lost,
}

/// A worker on the I/O thread.
pub(super) struct Running<W> {
    /// Dropped to ask it to stop.
    _stop: Option<watch::Sender<()>>,
    returned: Receiver<Returned<W>>,
    /// The other end goes away once the worker has been returned, or is lost.
    ended: watch::Receiver<()>,
}

struct Returned<W> {
    worker: W,
    /// Where each ready queue stands.
    queues: Vec<Option<QueueState>>,
    result: Result<(), DeviceFault>,
}

/// A virtio device with its registers.
pub struct VirtioMmio<D: VirtioDevice> {
    name: String,
    pub(super) device: D,
    pub(super) worker: WorkerPlace<D::Worker>,
    pub(super) registers: Registers,
    pub(super) interrupt: Arc<Interrupt>,
    doorbells: Vec<Arc<EventFd>>,
    host: VirtioHost,
    /// The state unit runs.
    running: bool,
    /// The driver has asked for a reset that is done once the worker is back.
    resetting: bool,
    log: LogLimit,
}

impl<D: VirtioDevice> fmt::Debug for VirtioMmio<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("VirtioMmio");
        shown.field("name", &self.name).field("registers", &self.registers).finish_non_exhaustive()
    }
}

impl<D: VirtioDevice> VirtioMmio<D> {
    /// The device, stopped. `interrupt` is what the device and its worker use.
    pub(super) fn new(
        name: String,
        device: D,
        worker: D::Worker,
        interrupt: Arc<Interrupt>,
        host: VirtioHost,
        place: MmioPlace,
    ) -> Self {
        let registers = Registers::new(&device.queue_sizes());
        let MmioPlace { line, doorbells } = place;
        interrupt.connect(line);
        Self {
            name,
            device,
            worker: WorkerPlace::Idle(worker),
            registers,
            interrupt,
            doorbells,
            host,
            running: false,
            resetting: false,
            log: LogLimit::default(),
        }
    }

    pub(super) fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES & !self.device.lacks()
    }

    /// The status as the driver reads it.
    pub(super) fn status(&self) -> u32 {
        let needs_reset = self.interrupt.needs_reset() || matches!(self.worker, WorkerPlace::Lost);
        self.registers.status | if needs_reset { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
    }

    /// Takes the worker back, if it has ended.
    pub(super) fn collect(&mut self) {
        let WorkerPlace::Running(running) = &self.worker else { return };
        match running.returned.try_recv() {
            Ok(returned) => self.take_back(Some(returned)),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => self.take_back(None),
        }
    }

    /// Waits for the worker, which was asked to stop.
    fn await_worker(&mut self, within: Duration) {
        let WorkerPlace::Running(running) = &self.worker else { return };
        match running.returned.recv_timeout(within) {
            Ok(returned) => self.take_back(Some(returned)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.take_back(None),
        }
    }

    /// Takes the worker back, or notes that it is lost.
    fn take_back(&mut self, returned: Option<Returned<D::Worker>>) {
        match returned {
            None => {
                tracing::error!(device = self.name, "the worker of a device panicked");
                self.worker = WorkerPlace::Lost;
                self.interrupt.set_needs_reset();
            }
            Some(Returned { worker, queues, result }) => {
                self.worker = WorkerPlace::Idle(worker);
                self.take_queues(&queues);
                if let Err(fault) = result {
                    self.complain(&fault);
                }
            }
        }
        if self.resetting {
            self.finish_reset();
        }
        self.update();
    }

    fn take_queues(&mut self, states: &[Option<QueueState>]) {
        for (queue, state) in self.registers.queues.iter_mut().zip(states) {
            if let Some(state) = state {
                (queue.next_available, queue.next_used) = (state.next_avail, state.next_used);
            }
        }
    }

    fn complain(&mut self, fault: &DeviceFault) {
        if let Some(suppressed) = self.log.admit() {
            let device = &self.name;
            tracing::warn!(device, suppressed, error = fault as &dyn Error, "a device needs a reset");
        }
    }

    /// Starts or stops the worker, as the driver and the machine want it.
    fn update(&mut self) {
        let driven =
            self.registers.has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.registers.has(VIRTIO_CONFIG_S_FAILED);
        let wanted = self.running && driven && !self.resetting && !self.interrupt.needs_reset();
        match std::mem::replace(&mut self.worker, WorkerPlace::Lost) {
            WorkerPlace::Idle(worker) if wanted => self.worker = WorkerPlace::Running(self.send(worker)),
            WorkerPlace::Running(running) if !wanted => {
                self.worker = WorkerPlace::Running(Running { _stop: None, ..running });
            }
            as_it_is => self.worker = as_it_is,
        }
    }

    /// Sends the worker to the I/O thread.
    fn send(&self, worker: D::Worker) -> Running<D::Worker> {
        let (stop, stop_requested) = watch::channel(());
        let (give_back, returned) = sync_channel(1);
        let (ending, ended) = watch::channel(());
        let event_idx = self.registers.accepted(VIRTIO_RING_F_EVENT_IDX);
        let queues = self.registers.queues.iter().zip(&self.doorbells);
        let queues = queues.map(|(queue, bell)| queue.ready.then(|| (queue.state(event_idx), bell.clone())));
        let errand = Errand {
            worker,
            queues: queues.collect(),
            features: self.registers.driver_features,
            host: self.host.clone(),
            interrupt: self.interrupt.clone(),
            stop: Stop(stop_requested),
        };
        self.host.io.spawn(move || async move {
            // Gone last, also if the worker panics.
            let _ending = ending;
            let returned = errand.run().await;
            drop(give_back.send(returned));
        });
        Running { _stop: Some(stop), returned, ended }
    }

    /// Everything is as the driver first found it, but for the configuration.
    fn finish_reset(&mut self) {
        self.resetting = false;
        self.registers = Registers::new(&self.device.queue_sizes());
        self.interrupt.reset();
        self.device.reset();
        if let WorkerPlace::Idle(worker) = &mut self.worker {
            worker.reset();
        }
    }

    fn write_status(&mut self, value: u32) {
        if self.resetting {
            return;
        }
        if value == 0 {
            self.resetting = true;
            self.update();
            match self.worker {
                WorkerPlace::Running(_) => self.await_worker(RESET),
                WorkerPlace::Idle(_) | WorkerPlace::Lost => self.finish_reset(),
            }
            return;
        }
        // Drivers clear no bit (2.1.1), and the device's own is not theirs.
        let mut status = self.registers.status | value & STATUS_DEFINED & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_are_valid() {
            status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            status &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.registers.status = status;
        self.update();
    }

    fn features_are_valid(&self) -> bool {
        let unknown = self.registers.driver_features & !self.offered_features();
        unknown == 0 && self.registers.accepted(VIRTIO_F_VERSION_1)
    }

    fn read_register(&self, offset: u32) -> u32 {
        let registers = &self.registers;
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_type() as u32,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered_features(), registers.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => registers.selected().map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => registers.selected().is_some_and(|queue| queue.ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.ring(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue(offset, value),
        }
    }

    /// Features are settled by FEATURES_OK.
    fn write_features(&mut self, value: u32) {
        let Registers { status, driver_features_select, driver_features, .. } = &mut self.registers;
        if *status & VIRTIO_CONFIG_S_FEATURES_OK == 0 && *driver_features_select < 2 {
            set_half(driver_features, *driver_features_select, value);
        }
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        // Queues are set up before DRIVER_OK (3.1.1), and never while a worker might have them.
        let open = !self.registers.has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.resetting;
        let Some(queue) = self.registers.open_queue().filter(|_| open) else { return };
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => {
                let size = u16::try_from(value)
                    .ok()
                    .filter(|size| size.is_power_of_two() && *size <= queue.max_size);
                queue.size = size.unwrap_or(queue.size);
            }
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value & 1 == 1,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.driver, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.driver, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.device, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.device, 1, value),
            _ => {}
        }
    }

    /// Rings a queue's doorbell, where the hypervisor does not do that itself.
    fn ring(&self, queue: u32) {
        if let Some(bell) = usize::try_from(queue).ok().and_then(|queue| self.doorbells.get(queue)) {
            bell.signal();
        }
    }

    fn driver_state(&self) -> &'static str {
        match self.registers.status {
            _ if self.resetting => "resetting",
            _ if self.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0 => "needs reset",
            status if status & VIRTIO_CONFIG_S_FAILED != 0 => "failed",
            status if status & VIRTIO_CONFIG_S_DRIVER_OK != 0 => "ready",
            0 => "none",
            _ => "probing",
        }
    }
}

fn half(value: u64, select: u32) -> u32 {
    let half = value.checked_shr(select.saturating_mul(32)).unwrap_or(0) & u64::from(u32::MAX);
    u32::try_from(half).expect("masked")
}

fn set_half(value: &mut u64, select: u32, bits: u32) {
    let shift = select * 32;
    *value = *value & !(u64::from(u32::MAX) << shift) | u64::from(bits) << shift;
}

/// A worker and what it is sent out with.
struct Errand<W> {
    worker: W,
    queues: Vec<Option<(QueueState, Arc<EventFd>)>>,
    features: u64,
    host: VirtioHost,
    interrupt: Arc<Interrupt>,
    stop: Stop,
}

impl<W: QueueWorker> Errand<W> {
    async fn run(self) -> Returned<W> {
        let Self { mut worker, queues, features, host, interrupt, stop } = self;
        let memory = host.ram.view().clone();
        let build = |(index, queue): (usize, Option<(QueueState, Arc<EventFd>)>)| {
            queue
                .map(|(state, bell)| VirtQueue::new(index, state, memory.clone(), bell, interrupt.clone()))
                .transpose()
        };
        let queues: Result<Vec<_>, _> = queues.into_iter().enumerate().map(build).collect();
        let queues = match queues {
            Ok(queues) => queues,
            Err(fault) => {
                interrupt.set_needs_reset();
                return Returned { worker, queues: Vec::new(), result: Err(fault) };
            }
        };
        let mut session = Session { features, memory, ram: host.ram, queues, stop, interrupt };
        let result = worker.run(&mut session).await;
        if result.is_err() {
            session.interrupt.set_needs_reset();
        }
        let states = session.queues.iter().map(|queue| queue.as_ref().map(VirtQueue::state));
        Returned { worker, queues: states.collect(), result }
    }
}

impl<D: VirtioDevice> IoDevice for VirtioMmio<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.collect();
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            return self.device.read_config(offset, data);
        }
        data.fill(0xff);
        // Registers are read whole (4.2.2.2).
        if let (Ok(offset), Ok(word)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        self.collect();
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.device.write_config(offset, data);
        } else if let (Ok(offset), Ok(word)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
        ControlFlow::Continue(())
    }

    /// The unit is stopped, and so the worker is at rest.
    fn reset(&mut self) {
        self.collect();
        self.finish_reset();
        self.device.machine_was_reset();
    }
}

impl<D: VirtioDevice> Device for VirtioMmio<D> {
    fn start(&mut self) {
        self.collect();
        self.running = true;
        self.update();
    }

    fn stop(&mut self) -> Stopping {
        self.collect();
        self.running = false;
        self.update();
        match &self.worker {
            WorkerPlace::Running(Running { ended, .. }) => {
                let mut ended = ended.clone();
                Box::pin(async move { while ended.changed().await.is_ok() {} })
            }
            WorkerPlace::Idle(_) | WorkerPlace::Lost => crate::device::stopped(),
        }
    }

    fn post_restore(&mut self) {}
}

/// Shows what the driver has made of it, the queues, and below `device` what the device itself shows.
impl<D: VirtioDevice> InspectMut for VirtioMmio<D> {
    fn inspect_mut(&mut self, request: Request<'_>) {
        self.collect();
        let mut response = request.respond();
        response
            .field_with("type", || format!("{:?}", self.device.device_type()).to_lowercase())
            .field("driver", self.driver_state())
            .hex("offered_features", self.offered_features());
        response.sensitive(|response| {
            response.hex("status", self.status());
            response.hex("accepted_features", self.registers.driver_features);
            response.child("queues", |request| inspect_queues(&self.registers.queues, request));
        });
        response.child("device", |request| self.device.inspect_mut(request));
    }
}

fn inspect_queues(queues: &[QueueRegisters], request: Request<'_>) {
    let mut response = request.respond();
    for (index, queue) in queues.iter().enumerate() {
        response.child(&index.to_string(), |request| {
            request
                .respond()
                .field("size", &queue.size)
                .field("ready", &queue.ready)
                .hex("descriptor_area", queue.descriptors)
                .hex("driver_area", queue.driver)
                .hex("device_area", queue.device);
        });
    }
}
