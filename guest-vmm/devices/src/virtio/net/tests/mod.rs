//! The network device by what its driver and the other end of its back end see.

mod control;
mod frames;
mod hostile;
mod limits;
mod link;
mod state;
mod vhost_user;

use super::header::HEADER_BYTES;
use super::{Link, LinkEvent, Net, NetBackend, NetSpec, Tap};
use crate::virtio::fake_driver::{Buffer, FakeDriver, PATIENCE, Used};
use crate::virtio::rate_limit::{Rate, RateLimits};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// The queues of the first pair.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// What Linux would accept, and more than any back end has.
const ALL: u64 = u64::MAX;
const PLAIN: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_CTRL_VQ;
const MERGED: u64 = PLAIN | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// What was told about the link.
type Told = Arc<Mutex<Vec<LinkEvent>>>;

/// A device with its driver, and the other ends of its back end.
struct Bench<P> {
    driver: FakeDriver,
    peers: Vec<P>,
    link: Link,
    told: Told,
}

/// Where the back end's other end is: a socket.
trait Peer: Sized {
    /// The back end with so many ports, and the other ends.
    fn pairs(count: usize) -> (NetBackend, Vec<Self>);
    fn send(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]);
    fn receive(&mut self) -> ([u8; HEADER_BYTES], Vec<u8>);
    /// Whether there is nothing to receive now.
    fn is_silent(&self) -> bool;
}

/// In place of a TAP device: messages of a header and a frame.
struct Messages(OwnedFd);

impl Peer for Messages {
    fn pairs(count: usize) -> (NetBackend, Vec<Self>) {
        let pair = |_| {
            let flags = SocketFlags::CLOEXEC;
            let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
            (Tap::of_socket(its).unwrap(), Self(ours))
        };
        let (queues, peers) = (0..count).map(pair).unzip();
        (NetBackend::Tap(queues), peers)
    }

    fn send(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]) {
        let message = [&header[..], frame].concat();
        assert_eq!(send(&self.0, &message, SendFlags::NOSIGNAL).unwrap(), message.len());
    }

    fn receive(&mut self) -> ([u8; HEADER_BYTES], Vec<u8>) {
        await_input(&self.0);
        let mut message = vec![0; 1 << 17];
        let (count, _) = recv(&self.0, &mut message[..], RecvFlags::empty()).unwrap();
        let (header, frame) = message[..count].split_first_chunk().expect("a header");
        (*header, frame.to_vec())
    }

    fn is_silent(&self) -> bool {
        is_silent(&self.0)
    }
}

/// A stream of frames with their lengths, as passt has it.
impl Peer for UnixStream {
    fn pairs(count: usize) -> (NetBackend, Vec<Self>) {
        assert_eq!(count, 1, "a stream has one pair of queues");
        let (ours, its) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours.set_write_timeout(Some(PATIENCE)).unwrap();
        (NetBackend::Stream(its.into()), vec![ours])
    }

    fn send(&mut self, _: [u8; HEADER_BYTES], frame: &[u8]) {
        let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
        self.write_all(&[&length[..], frame].concat()).unwrap();
    }

    fn receive(&mut self) -> ([u8; HEADER_BYTES], Vec<u8>) {
        let mut length = [0; 4];
        self.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length).try_into().unwrap()];
        self.read_exact(&mut frame).unwrap();
        ([0; HEADER_BYTES], frame)
    }

    fn is_silent(&self) -> bool {
        is_silent(self)
    }
}

fn is_silent(socket: &impl std::os::fd::AsFd) -> bool {
    let mut wait = [PollFd::new(socket, PollFlags::IN)];
    poll(&mut wait, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 0
}

fn await_input(socket: &impl std::os::fd::AsFd) {
    let mut wait = [PollFd::new(socket, PollFlags::IN)];
    let patience = Timespec { tv_sec: PATIENCE.as_secs().try_into().unwrap(), tv_nsec: 0 };
    assert_eq!(poll(&mut wait, Some(&patience)).unwrap(), 1, "nothing came");
}

/// A spec over this back end.
fn spec(backend: NetBackend, mtu: Option<u16>) -> (NetSpec, Told) {
    let told = Told::default();
    let teller = told.clone();
    let watcher = Box::new(move |event| teller.lock().unwrap().push(event));
    (NetSpec { mac: MAC, mtu, backend, rates: Arc::default(), watcher: Some(watcher) }, told)
}

impl<P: Peer> Bench<P> {
    fn new(features: u64) -> Self {
        Self::with(features, 1, None)
    }

    fn with(features: u64, pairs: usize, mtu: Option<u16>) -> Self {
        let mut bench = Self::started(pairs, mtu);
        bench.driver.initialize(features);
        bench
    }

    fn started(pairs: usize, mtu: Option<u16>) -> Self {
        let (backend, peers) = P::pairs(pairs);
        let (spec, told) = spec(backend, mtu);
        let (spec, link) = Net::spec("net0", spec).unwrap();
        Self { driver: FakeDriver::started(spec), peers, link, told }
    }

    /// The driver sends a frame, and has its buffers back.
    fn transmit(&mut self, frame: &[u8]) {
        self.transmit_with([0; HEADER_BYTES], frame);
    }

    fn transmit_with(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]) {
        let reply = self.driver.request(TRANSMIT, &[Buffer::Out(&header), Buffer::Out(frame)]);
        assert_eq!(reply.written, 0, "nothing is written to what is sent");
    }

    /// The driver makes buffers of so many bytes available.
    fn offer(&mut self, count: usize, bytes: u32) {
        for _ in 0..count {
            self.driver.send(RECEIVE, &[Buffer::In(bytes)]);
        }
    }

    /// The next frame that the driver gets, with its header; how many buffers it takes is checked.
    fn received(&mut self) -> ([u8; HEADER_BYTES], Vec<u8>) {
        let used = self.driver.wait_used(RECEIVE);
        let mut bytes = self.filled(&used);
        let header: [u8; HEADER_BYTES] = *bytes.first_chunk().expect("a header");
        for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
            let more = self.driver.poll(RECEIVE).expect("a frame's buffers come together");
            bytes.extend(self.filled(&more));
        }
        (header, bytes.split_off(HEADER_BYTES))
    }

    fn filled(&mut self, used: &Used) -> Vec<u8> {
        let mut reply = self.driver.take(used);
        reply.data.truncate(reply.written.try_into().unwrap());
        reply.data
    }

    fn peer(&mut self) -> &mut P {
        &mut self.peers[0]
    }

    /// Waits until the inspection tree shows this at a path of the device.
    fn await_shown(&self, path: &str, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = shown(&self.driver, path);
            if shown == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{path} is {shown}, not {wanted}");
            std::thread::yield_now();
        }
    }

    /// The link's status as the driver reads it.
    fn status(&self) -> u32 {
        self.driver.config::<u16>(6).into()
    }
}

/// What the device shows at a path.
fn shown(driver: &FakeDriver, path: &str) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let inspection =
            inspect::Inspection::start(&format!("device/{path}"), 9, inspect::View::Everything, |request| {
                driver.device().inspect_mut(request)
            });
        inspection.finish(PATIENCE).await.to_string().trim().to_owned()
    })
}

/// A frame of so many bytes, unlike others.
fn frame(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| ((at / 256) ^ (at * 7 + seed)).to_le_bytes()[0]).collect()
}
