//! A virtio driver as a script, for devices with a guest that needs no hypervisor.
//!
//! Limits: split queues without optional features (VIRTIO 1.3, 2.7); no descriptor and no memory is used twice, so that a driver's life
//! is as long as its queues: [`DESCRIPTORS`] each. Queues lie in memory from [`MEMORY`] on, which the guest has to have.

use devices::virtio::NOTIFY_OFFSET;
use machine::layout::{DEVICE_PINS, DEVICE_WINDOWS, IOAPIC, PAGE_BYTES};
use processor::scripted::Script;

/// The number of a queue's descriptors.
pub const DESCRIPTORS: u16 = 64;
/// Where in guest memory the queues and their buffers are.
pub const MEMORY: u64 = 8 << 20;

/// The registers (4.2.2).
mod register {
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const STATUS: u64 = 0x70;
    /// Descriptor, driver and device area: the low half of each; the high one is behind it.
    pub const QUEUE_AREAS: [u64; 3] = [0x80, 0x90, 0xa0];
}

/// ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK, each with those before it (2.1).
const STATUSES: [u32; 4] = [1, 3, 11, 15];
/// VIRTIO_F_VERSION_1, in the high half of the features.
const VERSION_1: u32 = 1;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// VIRTQ_AVAIL_F_NO_INTERRUPT
const NO_INTERRUPT: u16 = 1;

const DESCRIPTOR_BYTES: u64 = 16;
/// Of the IOAPIC (Intel 82093AA, 3.2.4): the low half of a pin's entry, and what chooses it.
const FIRST_ENTRY: u32 = 0x10;
const IOAPIC_DATA: u64 = IOAPIC + 0x10;
/// The interrupt's vector: edge-triggered, to VP 0.
const VECTOR: u32 = 0x40;

/// A piece of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffer<'a> {
    /// Bytes that the device reads.
    Out(&'a [u8]),
    /// So many bytes that it writes.
    In(u32),
}

impl Buffer<'_> {
    fn length(self) -> u32 {
        match self {
            Self::Out(bytes) => u32::try_from(bytes.len()).expect("a short one"),
            Self::In(length) => length,
        }
    }
}

/// The driver of one device.
#[derive(Debug)]
pub struct ScriptedDriver {
    window: u64,
    queues: Vec<Queue>,
    next_free: u64,
}

#[derive(Debug)]
struct Queue {
    descriptors: u64,
    available: u64,
    next_descriptor: u16,
    next_available: u16,
}

impl ScriptedDriver {
    /// Has the script drive the guest's first virtio device, with so many queues. Its interrupts end a [`Script::hlt`].
    pub fn set_up(script: &mut Script, queues: u32) -> Self {
        let (window, pin) = (DEVICE_WINDOWS.start, u32::from(*DEVICE_PINS.start()));
        let mut driver = Self { window, queues: Vec::new(), next_free: MEMORY };
        for (register, value) in [(FIRST_ENTRY + 2 * pin + 1, 0), (FIRST_ENTRY + 2 * pin, VECTOR)] {
            script.write(IOAPIC, &register.to_le_bytes()).write(IOAPIC_DATA, &value.to_le_bytes());
        }
        let [acknowledged, driven, features, ready] = STATUSES;
        driver.registers(script, &[(register::STATUS, acknowledged), (register::STATUS, driven)]);
        for (half, wanted) in [(0, 0), (1, VERSION_1)] {
            let select = (register::DRIVER_FEATURES_SEL, half);
            driver.registers(script, &[select, (register::DRIVER_FEATURES, wanted)]);
        }
        driver.registers(script, &[(register::STATUS, features)]);
        for index in 0..queues {
            driver.add_queue(script, index);
        }
        driver.registers(script, &[(register::STATUS, ready)]);
        driver
    }

    fn add_queue(&mut self, script: &mut Script, index: u32) {
        let [descriptors, available, used] = [(); 3].map(|()| self.page());
        let size = (register::QUEUE_SIZE, u32::from(DESCRIPTORS));
        self.registers(script, &[(register::QUEUE_SEL, index), size]);
        for (register, area) in register::QUEUE_AREAS.into_iter().zip([descriptors, available, used]) {
            let low = u32::try_from(area).expect("below 4 GiB");
            self.registers(script, &[(register, low), (register + 4, 0)]);
        }
        self.registers(script, &[(register::QUEUE_READY, 1)]);
        self.queues.push(Queue { descriptors, available, next_descriptor: 0, next_available: 0 });
    }

    fn registers(&self, script: &mut Script, values: &[(u64, u32)]) {
        for (register, value) in values {
            script.write(self.window + register, &value.to_le_bytes());
        }
    }

    fn page(&mut self) -> u64 {
        let page = self.next_free;
        self.next_free += PAGE_BYTES;
        page
    }

    /// The device is to send no interrupt for what it gives back in this queue.
    pub fn silence(&self, script: &mut Script, queue: usize) {
        script.write(self.queues[queue].available, &NO_INTERRUPT.to_le_bytes());
    }

    /// Gives the device a request, of buffers of at most a page, and tells it. Returns where each buffer is.
    pub fn send(&mut self, script: &mut Script, queue: usize, buffers: &[Buffer<'_>]) -> Vec<u64> {
        let places: Vec<u64> = buffers.iter().map(|_| self.page()).collect();
        let Queue { descriptors, available, next_descriptor, next_available } = &mut self.queues[queue];
        let head = *next_descriptor;
        for (at, (&buffer, &place)) in (1..).zip(buffers.iter().zip(&places)) {
            if let Buffer::Out(bytes) = buffer {
                script.write(place, bytes);
            }
            let next = if at < buffers.len() { NEXT } else { 0 };
            let flags = next | if matches!(buffer, Buffer::In(_)) { WRITE } else { 0 };
            let address = *descriptors + u64::from(*next_descriptor) * DESCRIPTOR_BYTES;
            *next_descriptor += 1;
            script.write(address, &place.to_le_bytes()).write(address + 8, &buffer.length().to_le_bytes());
            script
                .write(address + 12, &flags.to_le_bytes())
                .write(address + 14, &next_descriptor.to_le_bytes());
        }
        assert!(*next_descriptor <= DESCRIPTORS, "the driver's life is over");
        script.write(*available + 4 + 2 * u64::from(*next_available), &head.to_le_bytes());
        *next_available += 1;
        script.write(*available + 2, &next_available.to_le_bytes());
        let queue = u32::try_from(queue).expect("there are few");
        script.write(self.window + NOTIFY_OFFSET, &queue.to_le_bytes());
        places
    }
}
