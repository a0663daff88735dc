//! A driver of the network device and the other end of its back end, both of which mean no good.
//!
//! Holds to: nothing panics; whatever was done, a reset is answered, and then a frame goes out and one comes in, unless the back end
//! was out of step and given up: then frames are still taken from the driver.

#![no_main]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::virtio::fake_driver::{Buffer, FakeDriver, RAM_BYTES, descriptor};
use devices::virtio::net::{Link, Net, NetBackend, NetSpec, Tap};
use devices::virtio::rate_limit::{Rate, RateLimits};
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

/// The queues of a pair, and the one behind them.
const QUEUES: usize = 3;
const HEADER: [u8; 12] = [0; 12];
const FRAME: [u8; 60] = [7; 60];

#[derive(Arbitrary, Debug)]
struct Story {
    stream: bool,
    features: u64,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Descriptor {
        queue: u8,
        index: u8,
        address: u32,
        length: u16,
        flags: u8,
        next: u8,
    },
    /// A table elsewhere, for descriptors to point at.
    Table {
        address: u32,
        entry: (u32, u32, u8, u8),
    },
    Available {
        queue: u8,
        head: u8,
    },
    AvailableIndex {
        queue: u8,
        index: u16,
    },
    Memory {
        address: u32,
        bytes: Vec<u8>,
    },
    Doorbell {
        queue: u8,
    },
    /// The back end sends bytes, in the framing of its kind or not.
    Arrival {
        framed: bool,
        bytes: Vec<u8>,
    },
    Link {
        enabled: bool,
    },
    Pause,
    Reset {
        features: u64,
    },
}

/// The back end's other end.
enum Peer {
    Stream(UnixStream),
    Messages(OwnedFd),
}

impl Peer {
    fn pair(stream: bool) -> (Self, NetBackend) {
        if stream {
            let (ours, its) = UnixStream::pair().expect("sockets");
            ours.set_nonblocking(true).expect("a socket");
            return (Self::Stream(ours), NetBackend::Stream(its.into()));
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, its) = pair.expect("sockets");
        (Self::Messages(ours), NetBackend::Tap(vec![Tap::of_socket(its).expect("a socket")]))
    }

    /// As far as there is room.
    fn send(&mut self, framed: bool, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).expect("short").to_be_bytes();
        match self {
            Self::Stream(stream) if framed => drop(stream.write(&[&length, bytes].concat())),
            Self::Stream(stream) => drop(stream.write(bytes)),
            Self::Messages(socket) if framed => {
                let _ = send(socket, &[&HEADER, bytes].concat(), SendFlags::NOSIGNAL);
            }
            Self::Messages(socket) => drop(send(socket, bytes, SendFlags::NOSIGNAL)),
        }
    }

    /// Whether something came; it is forgotten.
    fn receive(&mut self) -> bool {
        let mut buffer = [0; 1 << 17];
        match self {
            Self::Stream(stream) => stream.read(&mut buffer).is_ok(),
            Self::Messages(socket) => rustix::io::read(socket, &mut buffer[..]).is_ok(),
        }
    }
}

fuzz_target!(|story: Story| {
    let (mut peer, backend) = Peer::pair(story.stream);
    // Nothing is held back for long, but all goes by the limits.
    let rate = Rate { per_second: 1 << 40, burst: 1 << 20 };
    let rates = Arc::new(RateLimits::new(rate, rate));
    let spec = NetSpec { mac: [2; 6], mtu: Some(9000), backend, rates, watcher: None };
    let (spec, link) = Net::spec("net", spec).expect("a device");
    let mut driver = FakeDriver::ready(spec, story.features);
    for step in story.steps {
        take(step, &mut driver, &mut peer, &link);
    }
    link.set_enabled(true);
    driver.reset();
    driver.initialize(0);
    while peer.receive() {}
    driver.request(1, &[Buffer::Out(&HEADER), Buffer::Out(&FRAME)]);
    if link.is_up() && !story.stream {
        driver.wait("a frame from the driver", || peer.receive().then_some(()));
        peer.send(true, &FRAME);
        driver.send(0, &[Buffer::In(4096)]);
        driver.wait_used(0);
    }
});

fn take(step: Step, driver: &mut FakeDriver, peer: &mut Peer, link: &Link) {
    let queue = |queue: u8| usize::from(queue) % QUEUES;
    match step {
        Step::Descriptor { queue: of, index, address, length, flags, next } => {
            let ring = driver.ring(queue(of)).clone();
            let index = u16::from(index) % ring.size;
            ring.write_descriptor(
                driver.ram(),
                index,
                address.into(),
                length.into(),
                flags.into(),
                next.into(),
            );
        }
        Step::Table { address, entry: (to, length, flags, next) } => {
            let at = u64::from(address) % (RAM_BYTES - 16);
            driver.ram().write(at, &descriptor(to.into(), length, flags.into(), next.into()));
        }
        Step::Available { queue: of, head } => {
            let mut ring = driver.ring(queue(of)).clone();
            ring.make_available(driver.ram(), head.into());
            *driver.ring(queue(of)) = ring;
        }
        Step::AvailableIndex { queue: of, index } => {
            let mut ring = driver.ring(queue(of)).clone();
            ring.set_available_index(driver.ram(), index);
        }
        Step::Memory { address, bytes } => {
            let room = RAM_BYTES - bytes.len() as u64;
            driver.ram().write(u64::from(address) % room, &bytes);
        }
        Step::Doorbell { queue: of } => driver.ring_doorbell(queue(of)),
        Step::Arrival { framed, bytes } => peer.send(framed, &bytes),
        Step::Link { enabled } => link.set_enabled(enabled),
        Step::Pause => {
            driver.stop();
            driver.start();
        }
        Step::Reset { features } => {
            driver.reset();
            driver.initialize(features);
        }
    }
}
