//! A driver that does anything, for the targets of devices whose every answer is checked elsewhere.
//!
//! [`play`] holds to: nothing panics, on no thread; a device that is set up again works, and can be saved; its state is restored in
//! another one, which saves the same.

use arbitrary::Arbitrary;
use devices::virtio::VirtioSpec;
use devices::virtio::fake_driver::{Buffer, FakeDriver};

/// More than a page, less than what a fuzzer can fill.
const MOST_BYTES: usize = 5000;
const STEPS: usize = 64;

/// What the driver, or the machine, does next.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// Reads a register.
    Read {
        /// Of a window of 4 KiB, in words.
        word: u16,
    },
    /// Writes a register.
    Write {
        /// Of a window of 4 KiB, in words.
        word: u16,
        /// What to write.
        value: u32,
    },
    /// Makes a proper chain available.
    Send {
        /// The queue.
        queue: u8,
        /// What the device can read.
        bytes: Vec<u8>,
        /// How much it can write; nothing for 0.
        room: u16,
    },
    /// Writes a descriptor, and makes it available if it says so.
    Raw {
        /// The queue.
        queue: u8,
        /// Which one.
        index: u8,
        /// Where its buffer is.
        address: u64,
        /// How long that is.
        length: u32,
        /// Next, write, indirect.
        flags: u8,
        /// The one behind it.
        next: u8,
        /// Whether the device is to look at it.
        available: bool,
    },
    /// Says how far chains are available.
    Jump {
        /// The queue.
        queue: u8,
        /// Up to where.
        index: u16,
    },
    /// Begins anew with these features.
    Initialize {
        /// As far as the device has them.
        features: u64,
    },
    /// The guest pauses and goes on.
    StopAndStart,
    /// The machine is reset.
    Reset,
    /// The guest goes on in another machine.
    SaveAndRestore,
}

/// Does these steps with a device, which `make` makes.
pub fn play(steps: Vec<Step>, make: impl Fn() -> VirtioSpec) {
    let mut driver = FakeDriver::ready(make(), u64::MAX);
    for step in steps.into_iter().take(STEPS) {
        take(&mut driver, step, &make);
    }
    // Whatever was done to it, a device that is set up anew is as good as new.
    driver.initialize(u64::MAX);
    assert!(!driver.needs_reset());
    save_and_restore(&mut driver, &make);
}

fn take(driver: &mut FakeDriver, step: Step, make: &impl Fn() -> VirtioSpec) {
    let queues = driver.queue_count();
    match step {
        Step::Read { word } => drop(driver.read(u32::from(word % 1024) * 4).to_le_bytes()),
        Step::Write { word, value } => driver.write(u32::from(word % 1024) * 4, value),
        Step::Send { queue, bytes, room } => send(driver, usize::from(queue) % queues, &bytes, room),
        Step::Raw { queue, index, address, length, flags, next, available } => {
            let queue = usize::from(queue) % queues;
            let mut ring = driver.ring(queue).clone();
            let index = u16::from(index) % ring.size;
            ring.write_descriptor(driver.ram(), index, address, length, u32::from(flags % 8), next.into());
            if available {
                ring.make_available(driver.ram(), index);
            }
            *driver.ring(queue) = ring;
            driver.ring_doorbell(queue);
        }
        Step::Jump { queue, index } => {
            let queue = usize::from(queue) % queues;
            let mut ring = driver.ring(queue).clone();
            ring.set_available_index(driver.ram(), index);
            *driver.ring(queue) = ring;
            driver.ring_doorbell(queue);
        }
        Step::Initialize { features } => driver.initialize(features),
        Step::StopAndStart => {
            driver.stop();
            driver.start();
        }
        Step::Reset => {
            driver.stop();
            driver.device().reset();
            driver.start();
            driver.initialize(u64::MAX);
        }
        Step::SaveAndRestore => save_and_restore(driver, make),
    }
}

fn send(driver: &mut FakeDriver, queue: usize, bytes: &[u8], room: u16) {
    if driver.ring(queue).free_descriptors() < 2 {
        driver.initialize(u64::MAX);
    }
    let out = &bytes[..bytes.len().min(MOST_BYTES)];
    let mut buffers = Vec::new();
    if !out.is_empty() {
        buffers.push(Buffer::Out(out));
    }
    if room > 0 {
        buffers.push(Buffer::In(room.into()));
    }
    if !buffers.is_empty() {
        driver.send(queue, &buffers);
    }
}

fn save_and_restore(driver: &mut FakeDriver, make: &impl Fn() -> VirtioSpec) {
    driver.stop();
    let state = driver.save();
    let mut other = FakeDriver::stopped(make());
    other.restore(driver, state.clone()).expect("saved just now");
    assert_eq!(other.save(), state);
    *driver = other;
    driver.start();
}
