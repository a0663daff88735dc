//! The transport and the queues, by what drivers see of them.

use super::fake_driver::{Buffer, FakeDriver, RAM_BYTES, descriptor};
use super::{
    DeviceFault, DeviceType, Interrupt, QueueWorker, Rng, Session, VirtioDevice, VirtioSpec, read_config,
};
use inspect::{Inspect, Request};
use save_restore::{NoSavedState, RestoreError, SaveError};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use tokio::sync::Notify;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const QUEUE: u16 = 16;
const WORKING: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK;

/// Answers each request with what it says, once it is let; the second of its queues is never served.
struct Echo {
    interrupt: Arc<Interrupt>,
    config: [u8; 4],
}

struct EchoWorker(Arc<Gate>);

/// Holds requests back while it is closed.
#[derive(Default)]
struct Gate {
    closed: AtomicBool,
    opened: Notify,
    panics: AtomicBool,
    /// Requests are taken and never answered.
    hoards: AtomicBool,
    taken: AtomicU16,
}

impl Gate {
    fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
        self.opened.notify_one();
    }

    async fn pass(&self) {
        assert!(!self.panics.load(Ordering::SeqCst), "a worker with a bug");
        while self.closed.load(Ordering::SeqCst) {
            self.opened.notified().await;
        }
    }
}

impl Inspect for Echo {
    fn inspect(&self, request: Request<'_>) {
        request.respond();
    }
}

impl VirtioDevice for Echo {
    type Worker = EchoWorker;
    type SavedState = NoSavedState;

    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE, 8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (0, Ok(config)) = (offset, data.try_into()) {
            self.config = config;
            self.interrupt.config_changed();
        }
    }

    fn reset(&mut self) {
        self.config = [0; 4];
    }

    fn save(&mut self, _: &mut EchoWorker) -> Result<NoSavedState, SaveError> {
        Ok(NoSavedState {})
    }

    fn restore(&mut self, _: &mut EchoWorker, _: NoSavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl QueueWorker for EchoWorker {
    async fn run(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        let Session { queues, stop, memory, .. } = session;
        let [queue] = Session::queues(queues, [0])?;
        loop {
            let chain = tokio::select! {
                () = stop.requested() => return Ok(()),
                chain = queue.next() => chain?,
            };
            self.0.taken.fetch_add(1, Ordering::SeqCst);
            if self.0.hoards.load(Ordering::SeqCst) {
                continue;
            }
            self.0.pass().await;
            let mut text = Vec::new();
            chain.readable.reader(memory).unwrap().read_to_end(&mut text).unwrap();
            let mut writer = chain.writable.writer(memory).unwrap();
            let _ = writer.write_all(&text);
            let written = writer.written();
            queue.complete(chain, written)?;
            queue.signal()?;
        }
    }

    fn reset(&mut self) {}
}

fn echo() -> (VirtioSpec, Arc<Gate>) {
    let (gate, interrupt) = (Arc::new(Gate::default()), Arc::new(Interrupt::default()));
    let device = Echo { interrupt: interrupt.clone(), config: [0; 4] };
    (VirtioSpec::new("echo", device, EchoWorker(gate.clone()), interrupt), gate)
}

fn ready(features: u64) -> FakeDriver {
    FakeDriver::ready(echo().0, features)
}

fn says_what_was_said(driver: &mut FakeDriver) {
    let reply =
        driver.request(0, &[Buffer::Out(b"to and "), Buffer::Out(b"fro"), Buffer::In(4), Buffer::In(16)]);
    assert_eq!((reply.written, &reply.data[..10]), (10, &b"to and fro"[..]));
}

#[test]
fn a_driver_finds_the_device() {
    let driver = FakeDriver::stopped(echo().0);
    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE), u32::from_le_bytes(*b"virt"));
    assert_eq!((driver.read(VIRTIO_MMIO_VERSION), driver.read(VIRTIO_MMIO_DEVICE_ID)), (2, 3));
    assert_eq!(driver.offered(), 0b101 | 1 << 28 | 1 << 29 | 1 << 32);
    driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, u32::MAX);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    for (queue, size) in [(0, 16), (1, 8), (2, 0), (u32::MAX, 0)] {
        driver.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), size);
    }
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX, "no shared memory");
}

#[test]
fn requests_are_answered_with_and_without_event_indices() {
    for features in [0, EVENT_IDX] {
        let mut driver = ready(features);
        assert_eq!(driver.status(), WORKING);
        for _ in 0..100 {
            says_what_was_said(&mut driver);
        }
        assert_eq!(driver.acknowledge(), VIRTIO_MMIO_INT_VRING);
        assert_eq!(driver.acknowledge(), 0);
    }
}

#[test]
fn indirect_descriptors_are_followed() {
    let mut driver = ready(EVENT_IDX);
    let (text, room, table) = (driver.ram().allocate(3), driver.ram().allocate(3), driver.ram().allocate(32));
    driver.ram().write(text, b"abc");
    driver.ram().write(table, &descriptor(text, 3, VRING_DESC_F_NEXT, 1));
    driver.ram().write(table + 16, &descriptor(room, 3, VRING_DESC_F_WRITE, 0));
    make_available(&mut driver, &[(0, table, 32, VRING_DESC_F_INDIRECT, 0)], 0);
    let used = driver.wait_used(0);
    assert_eq!((used.head, used.written), (0, 3));
    assert_eq!(driver.ram().read(room, 3), b"abc");
}

/// Index, address, length, flags, next.
type RawDescriptor = (u16, u64, u32, u32, u16);

/// Writes descriptors and makes the one at `head` available.
fn make_available(driver: &mut FakeDriver, descriptors: &[RawDescriptor], head: u16) {
    let mut ring = driver.ring(0).clone();
    for &(index, address, length, flags, next) in descriptors {
        ring.write_descriptor(driver.ram(), index, address, length, flags, next);
    }
    ring.make_available(driver.ram(), head);
    *driver.ring(0) = ring;
    driver.ring_doorbell(0);
}

#[test]
fn features_that_the_device_does_not_have_are_refused() {
    let driver = FakeDriver::started(echo().0);
    for features in [1u64 << VIRTIO_F_VERSION_1 | 0b10, 0b101] {
        driver.reset();
        driver.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
        for (select, bits) in [(0, features), (1, features >> 32)] {
            driver.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            driver.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::try_from(bits & 0xffff_ffff).unwrap());
        }
        driver.add_status(VIRTIO_CONFIG_S_FEATURES_OK);
        assert_eq!(driver.status() & VIRTIO_CONFIG_S_FEATURES_OK, 0, "{features:#x}");
        driver.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
        assert_eq!(driver.status() & VIRTIO_CONFIG_S_DRIVER_OK, 0, "{features:#x}");
    }
}

#[test]
fn a_changed_configuration_interrupts_and_is_counted() {
    let driver = ready(0);
    let before = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
    driver.write_config(0, 0x0403_0201u32);
    assert_eq!(driver.config::<u32>(0), 0x0403_0201);
    assert_eq!(driver.config::<u32>(2), 0x0403, "zeros past the end");
    assert_ne!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), before);
    assert_eq!(driver.acknowledge(), VIRTIO_MMIO_INT_CONFIG);
}

#[test]
fn a_stopped_device_answers_when_it_goes_on() {
    let mut driver = ready(EVENT_IDX);
    says_what_was_said(&mut driver);
    driver.stop();
    let head = driver.send(0, &[Buffer::Out(b"later"), Buffer::In(5)]);
    assert_eq!(driver.poll(0), None);
    driver.start();
    let used = driver.wait_used(0);
    assert_eq!(used.head, head);
    assert_eq!(driver.take(&used).data, b"later");
}

#[test]
fn a_stop_finishes_what_was_begun() {
    let (spec, gate) = echo();
    gate.closed.store(true, Ordering::SeqCst);
    let mut driver = FakeDriver::ready(spec, 0);
    driver.send(0, &[Buffer::Out(b"begun"), Buffer::In(5)]);
    driver.wait("the begin", || (gate.taken.load(Ordering::SeqCst) == 1).then_some(()));
    let mut stopping = driver.device().stop();
    let poll = |stopping: &mut crate::Stopping| futures::FutureExt::now_or_never(stopping);
    assert_eq!(poll(&mut stopping), None, "the request is held back");
    gate.open();
    futures::executor::block_on(stopping);
    let used = driver.poll(0).expect("answered before the stop was");
    assert_eq!(driver.take(&used).data, b"begun");
}

#[test]
fn a_reset_waits_for_what_was_begun_and_forgets_everything() {
    let (spec, gate) = echo();
    let mut driver = FakeDriver::ready(spec, 0);
    driver.write_config(0, 7u32);
    gate.closed.store(true, Ordering::SeqCst);
    driver.send(0, &[Buffer::Out(b"begun"), Buffer::In(5)]);
    driver.wait("the begin", || (gate.taken.load(Ordering::SeqCst) == 1).then_some(()));
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| driver.reset());
        gate.open();
        reset.join().unwrap();
    });
    assert_eq!((driver.status(), driver.config::<u32>(0)), (0, 0));
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
    driver.initialize(EVENT_IDX);
    says_what_was_said(&mut driver);
}

#[test]
fn a_worker_that_panics_leaves_a_device_that_needs_a_reset() {
    let (spec, gate) = echo();
    let mut driver = FakeDriver::ready(spec, 0);
    gate.panics.store(true, Ordering::SeqCst);
    driver.send(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
    driver.wait_needs_reset();
    driver.stop();
    assert!(driver.device().save_blob().is_err());
}

#[test]
fn queues_are_not_moved_while_they_are_ready() {
    let mut driver = ready(EVENT_IDX);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    for register in [VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH] {
        driver.write(register, 0xdead_0000);
    }
    driver.write(VIRTIO_MMIO_QUEUE_NUM, 2);
    driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 1);
    driver.stop();
    driver.start();
    says_what_was_said(&mut driver);
}

#[test]
fn a_queue_outside_memory_needs_a_reset() {
    let mut driver = FakeDriver::started(echo().0);
    let features = driver.negotiate(0);
    driver.set_up_queues(features);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    // The only way to move a queue that is ready.
    driver.reset();
    driver.negotiate(0);
    for queue in 0..2 {
        driver.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        driver.write(VIRTIO_MMIO_QUEUE_DESC_LOW, u32::try_from(RAM_BYTES).unwrap() - 16);
        driver.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x1000);
        driver.write(VIRTIO_MMIO_QUEUE_USED_LOW, 0x2000);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }
    driver.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
    driver.wait_needs_reset();
    assert_ne!(driver.acknowledge() & VIRTIO_MMIO_INT_CONFIG, 0);
}

/// Descriptors that no driver writes, the first of them made available.
fn broken_chains() -> Vec<(&'static str, Vec<RawDescriptor>)> {
    let next = VRING_DESC_F_NEXT;
    vec![
        ("a loop of one", vec![(0, 0x1000, 4, next, 0)]),
        ("a loop of two", vec![(0, 0x1000, 4, next, 1), (1, 0x1000, 4, next, 0)]),
        ("a descriptor that is not there", vec![(0, 0x1000, 4, next, QUEUE)]),
        ("a buffer of no bytes", vec![(0, 0x1000, 0, 0, 0)]),
        ("a buffer of 4 GiB", vec![(0, 0x1000, u32::MAX, 0, 0)]),
        ("a buffer beyond memory", vec![(0, RAM_BYTES - 1, 2, 0, 0)]),
        ("a buffer that wraps", vec![(0, u64::MAX, 2, 0, 0)]),
        ("readable after writable", vec![(0, 0x1000, 4, next | VRING_DESC_F_WRITE, 1), (1, 0x1000, 4, 0, 0)]),
        ("an indirect table of no entries", vec![(0, 0x1000, 0, VRING_DESC_F_INDIRECT, 0)]),
        ("an indirect table of half an entry", vec![(0, 0x1000, 24, VRING_DESC_F_INDIRECT, 0)]),
        ("an indirect table beyond memory", vec![(0, RAM_BYTES, 16, VRING_DESC_F_INDIRECT, 0)]),
    ]
}

#[test]
fn broken_chains_need_a_reset_and_then_all_is_well() {
    for (what, descriptors) in broken_chains() {
        let mut driver = ready(EVENT_IDX);
        make_available(&mut driver, &descriptors, 0);
        driver.wait_needs_reset();
        assert_eq!(driver.poll(0), None, "{what}");
        driver.initialize(EVENT_IDX);
        assert_eq!(driver.status(), WORKING, "{what}");
        says_what_was_said(&mut driver);
    }
}

#[test]
fn indirect_in_indirect_needs_a_reset() {
    let mut driver = ready(EVENT_IDX);
    let table = driver.ram().allocate(16);
    driver.ram().write(table, &descriptor(table, 16, VRING_DESC_F_INDIRECT, 0));
    make_available(&mut driver, &[(0, table, 16, VRING_DESC_F_INDIRECT, 0)], 0);
    driver.wait_needs_reset();
}

#[test]
fn an_index_that_jumps_needs_a_reset() {
    let mut driver = ready(EVENT_IDX);
    let mut ring = driver.ring(0).clone();
    ring.set_available_index(driver.ram(), QUEUE + 1);
    driver.ring_doorbell(0);
    driver.wait_needs_reset();
}

#[test]
fn more_requests_than_descriptors_cannot_be_out() {
    let (spec, gate) = echo();
    gate.hoards.store(true, Ordering::SeqCst);
    let mut driver = FakeDriver::ready(spec, EVENT_IDX);
    for _ in 0..QUEUE {
        make_available(&mut driver, &[(0, 0x1000, 1, VRING_DESC_F_WRITE, 0)], 0);
    }
    driver.wait("all that can be out", || (gate.taken.load(Ordering::SeqCst) == QUEUE).then_some(()));
    assert!(!driver.needs_reset());
    make_available(&mut driver, &[], 0);
    driver.wait_needs_reset();
    assert_eq!(gate.taken.load(Ordering::SeqCst), QUEUE);
}

#[test]
fn a_storm_of_doorbells_is_no_work() {
    let mut driver = ready(EVENT_IDX);
    for queue in [0, 1, 2, 7, u32::MAX] {
        (0..10_000).for_each(|_| driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue));
    }
    says_what_was_said(&mut driver);
    assert!(!driver.needs_reset());
}

#[test]
fn a_saved_device_goes_on_in_another() {
    let mut old = ready(EVENT_IDX);
    says_what_was_said(&mut old);
    old.stop();
    old.send(0, &[Buffer::Out(b"on its way"), Buffer::In(10)]);
    let state = old.save();
    let mut new = FakeDriver::stopped(echo().0);
    new.restore(&old, state.clone()).unwrap();
    assert_eq!(new.save(), state);
    new.start();
    let used = new.wait_used(0);
    assert_eq!(new.take(&used).data, b"on its way");
    says_what_was_said(&mut new);
}

#[test]
fn random_bytes_come_and_differ() {
    let mut driver = FakeDriver::ready(Rng::spec("rng"), EVENT_IDX);
    let one = driver.request(0, &[Buffer::In(64)]);
    let other = driver.request(0, &[Buffer::In(32), Buffer::In(32)]);
    assert_eq!((one.written, other.written), (64, 64));
    assert_ne!(one.data, other.data);
    let much = driver.request(0, &[Buffer::In(100_000)]);
    assert_eq!(much.written, 4096, "a driver asks again for the rest");
    driver.send(0, &[Buffer::Out(b"no room")]);
    driver.wait_needs_reset();
}
