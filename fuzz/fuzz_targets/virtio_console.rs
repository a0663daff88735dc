//! Any steps of a driver and of the host with a console of three ports.
//!
//! Holds to: nothing panics, and the device answers; what it says that it has written fits the buffer; input that a port gives
//! comes whole and in the order in which it was sent; a state that was saved is restored in
//! another console, which saves the same.

#![no_main]

use std::collections::VecDeque;
use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::virtio::VirtioSpec;
use devices::virtio::console::{Console, ConsoleHandle, ConsoleInput, ConsoleSize, NamedPort};
use devices::virtio::fake_driver::{Buffer, FakeDriver};
use libfuzzer_sys::fuzz_target;

/// Two for each of the three ports, and two for the control messages.
const QUEUES: usize = 8;
/// More than a page, so that several pushes meet in one buffer.
const MOST_BYTES: usize = 5000;
const STEPS: usize = 64;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A control message, most often of a kind that there is.
    Tell {
        port: u8,
        event: u8,
        value: u8,
    },
    /// A buffer with these bytes for a queue, whatever that is for.
    Send {
        queue: u8,
        bytes: Vec<u8>,
    },
    /// A buffer with room.
    Receive {
        queue: u8,
        room: u16,
    },
    /// Descriptors that no driver writes.
    Raw {
        queue: u8,
        address: u64,
        length: u32,
        flags: u8,
        next: u16,
    },
    Push {
        port: u8,
        count: u16,
    },
    Resize {
        columns: u16,
        rows: u16,
    },
    WriteConfig {
        offset: u8,
        value: u32,
    },
    Initialize {
        features: u64,
    },
    StopAndStart,
    SaveAndRestore,
}

fn spec() -> (VirtioSpec, ConsoleHandle) {
    let nowhere = || Arc::new(|_: &[u8]| ());
    let further = ["agent", "log"].map(|name| NamedPort { name: name.to_owned(), output: nowhere() });
    Console::spec("console", nowhere(), further.into())
}

fn inputs(handle: &ConsoleHandle) -> [ConsoleInput; 3] {
    let named = |name| handle.port_input(name).expect("there is such a port");
    [handle.input(), named("agent"), named("log")]
}

/// A driver, its console, and what the driver is to find in each port.
struct Play {
    driver: FakeDriver,
    handle: ConsoleHandle,
    expected: [VecDeque<u8>; 3],
    next: u8,
}

impl Play {
    fn begin() -> Self {
        let (spec, handle) = spec();
        Self { driver: FakeDriver::ready(spec, u64::MAX), handle, expected: Default::default(), next: 0 }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Tell { port, event, value } => {
                let bytes = [port % 4, 0, 0, 0, event % 9, 0, value % 3, 0];
                self.send(3, &[Buffer::Out(&bytes)]);
            }
            Step::Send { queue, bytes } if !bytes.is_empty() => {
                self.send(queue.into(), &[Buffer::Out(&bytes[..bytes.len().min(MOST_BYTES)])]);
            }
            Step::Send { .. } => {}
            Step::Receive { queue, room } => {
                self.send(queue.into(), &[Buffer::In(u32::from(room) % 8192 + 1)])
            }
            Step::Raw { queue, address, length, flags, next } => {
                self.raw(queue.into(), address, length, flags, next)
            }
            Step::Push { port, count } => self.push(usize::from(port) % 3, usize::from(count) % MOST_BYTES),
            Step::Resize { columns, rows } => self.handle.resize(ConsoleSize { columns, rows }),
            Step::WriteConfig { offset, value } => self.driver.write_config(u32::from(offset), value),
            Step::Initialize { features } => self.initialize(features),
            Step::StopAndStart => {
                self.driver.stop();
                self.driver.start();
            }
            Step::SaveAndRestore => self.save_and_restore(),
        }
        self.look();
    }

    fn send(&mut self, queue: usize, buffers: &[Buffer<'_>]) {
        let queue = queue % QUEUES;
        if self.driver.ring(queue).free_descriptors() < buffers.len() {
            // What a driver does whose queue is full and whose device may need a reset.
            self.initialize(u64::MAX);
        }
        self.driver.send(queue, buffers);
    }

    fn raw(&mut self, queue: usize, address: u64, length: u32, flags: u8, next: u16) {
        let queue = queue % QUEUES;
        let mut ring = self.driver.ring(queue).clone();
        // The last one, which is handed out only when all others are.
        let index = ring.size - 1;
        ring.write_descriptor(self.driver.ram(), index, address, length, u32::from(flags % 8), next);
        ring.make_available(self.driver.ram(), index);
        *self.driver.ring(queue) = ring;
        self.driver.ring_doorbell(queue);
        // It may be written anywhere, the queues included: nothing is sure of this driver's memory any more.
        self.driver.stop();
        *self = Self::begin();
    }

    fn push(&mut self, port: usize, count: usize) {
        let bytes: Vec<u8> = (0..count).map(|at| self.next.wrapping_add(at as u8)).collect();
        let accepted = inputs(&self.handle)[port].push(&bytes).expect("the console is there");
        self.next = self.next.wrapping_add(accepted as u8);
        self.expected[port].extend(&bytes[..accepted]);
    }

    /// A new beginning, after a look at what was answered: input that no buffer got comes later.
    fn initialize(&mut self, features: u64) {
        self.driver.stop();
        self.look();
        self.driver.start();
        self.driver.initialize(features);
    }

    fn save_and_restore(&mut self) {
        self.driver.stop();
        let state = self.driver.save();
        let (spec, handle) = spec();
        let mut other = FakeDriver::stopped(spec);
        other.restore(&self.driver, state.clone()).expect("saved just now");
        assert_eq!(other.save(), state);
        (self.driver, self.handle) = (other, handle);
        self.driver.start();
    }

    /// Looks at what the device has answered.
    fn look(&mut self) {
        for queue in 0..QUEUES {
            while let Some(used) = self.driver.poll(queue) {
                let reply = self.driver.take(&used);
                let written = usize::try_from(reply.written).expect("fits");
                assert!(written <= reply.data.len(), "{written} bytes in {}", reply.data.len());
                let port = match queue {
                    0 => 0,
                    4 => 1,
                    6 => 2,
                    _ => continue,
                };
                let expected: Vec<u8> = self.expected[port].drain(..written).collect();
                assert_eq!(reply.data[..written], expected, "port {port}");
            }
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut play = Play::begin();
    steps.into_iter().take(STEPS).for_each(|step| play.take(step));
    play.driver.stop();
    play.look();
});
