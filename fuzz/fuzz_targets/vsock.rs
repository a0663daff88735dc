//! Any packets of a guest's, over the device's queues, while the host listens, connects, reads, writes and lets go.
//!
//! Holds to: nothing panics; the device asks for no reset, whatever the packets; connections stay within their limit; once the host
//! has let go of everything and the guest's driver has begun anew, none is left, and packets pass again.

#![no_main]

use arbitrary::Arbitrary;
use devices::virtio::fake_driver::{Buffer, FakeDriver};
use devices::virtio::vsock::fake_guest::{FakeGuest, TX, packet};
use devices::virtio::vsock::{Header, Op, PortPair, Vsock, VsockLimits, VsockListener, VsockStream};
use futures::FutureExt;
use libfuzzer_sys::fuzz_target;

const PORT: u32 = 1024;
const GUEST_PORT: u32 = 5000;
const CONNECTIONS: usize = 4;

#[derive(Debug, Arbitrary)]
enum Step {
    /// A packet, most of whose fields are likely ones.
    Packet {
        op: u16,
        port: Port,
        len: u8,
        flags: u8,
        buf_alloc: u32,
        fwd_cnt: u8,
    },
    /// Bytes as a packet.
    Bytes(Vec<u8>),
    /// The guest takes what it was sent.
    Take,
    Accept,
    Read(u8),
    Write(u8, u8),
    End(u8),
    Drop(u8),
    Restart,
}

#[derive(Debug, Arbitrary)]
enum Port {
    Listening(u8),
    Connected,
    Any(u32, u32),
}

impl Port {
    fn pair(&self) -> PortPair {
        match *self {
            Self::Listening(guest) => PortPair { guest: guest.into(), host: PORT },
            Self::Connected => PortPair { guest: GUEST_PORT, host: 60000 },
            Self::Any(guest, host) => PortPair { guest, host },
        }
    }
}

/// What the host has.
struct Host {
    listener: VsockListener,
    streams: Vec<VsockStream>,
}

impl Host {
    fn stream(&mut self, index: u8) -> Option<&mut VsockStream> {
        let count = self.streams.len();
        self.streams.get_mut(usize::from(index) % count.max(1))
    }

    fn accept(&mut self) {
        if let Some(Some(request)) = self.listener.next().now_or_never() {
            self.streams.extend(request.accept());
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Accept => self.accept(),
            Step::Read(index) => {
                let mut buffer = [0; 100];
                let _ = self.stream(index).and_then(|stream| stream.reader.read(&mut buffer).now_or_never());
            }
            Step::Write(index, count) => {
                let bytes = vec![1; count.into()];
                let _ = self.stream(index).and_then(|stream| stream.writer.write(&bytes).now_or_never());
            }
            Step::End(index) => drop(self.stream(index).map(|stream| stream.writer.end())),
            Step::Drop(index) if !self.streams.is_empty() => {
                drop(self.streams.remove(usize::from(index) % self.streams.len()));
            }
            _ => {}
        }
    }
}

fn new_guest() -> FakeGuest {
    let limits = VsockLimits { connections: CONNECTIONS, ephemeral: 60000..=60003, ..VsockLimits::default() };
    let (spec, host) = Vsock::spec("vsock", limits);
    let mut guest = FakeGuest { driver: FakeDriver::ready(spec, u64::MAX), host };
    guest.provide(16);
    guest
}

fn take_all(guest: &mut FakeGuest) {
    while guest.poll().is_some() {}
}

/// Sends bytes as a packet, taking what the device sends meanwhile: it takes no packets that it cannot answer.
fn send(guest: &mut FakeGuest, bytes: &[u8]) {
    guest.driver.send(TX, &[Buffer::Out(bytes)]);
    let used = guest.driver.wait_used(TX);
    guest.driver.take(&used);
    take_all(guest);
}

fn play(guest: &mut FakeGuest, host: &mut Host, step: &Step) {
    match step {
        Step::Packet { op, port, len, flags, buf_alloc, fwd_cnt } => {
            let (len, flags, fwd_cnt) = ((*len).into(), (*flags).into(), (*fwd_cnt).into());
            let op = op % 10;
            let header =
                Header { op, len, flags, fwd_cnt, buf_alloc: *buf_alloc, ..packet(port.pair(), Op::Rw) };
            // Not always as many bytes as it says.
            let payload = vec![0; len.min(200) as usize];
            send(guest, &[&header.to_bytes(), &payload[..]].concat());
        }
        Step::Bytes(bytes) if !bytes.is_empty() => send(guest, bytes),
        Step::Take => take_all(guest),
        Step::Restart => {
            guest.driver.initialize(0);
            guest.provide(16);
        }
        step => host.step(step),
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut guest = new_guest();
    let mut host = Host { listener: guest.host.listen(PORT).expect("free"), streams: Vec::new() };
    // A connection of the host's that the guest's packets may answer.
    let mut connecting = Some(Box::pin({
        let host = guest.host.clone();
        async move { host.connect(GUEST_PORT).await }
    }));
    for step in steps.iter().take(200) {
        if let Some(Some(connected)) = connecting.as_mut().map(|connecting| connecting.now_or_never()) {
            connecting = None;
            host.streams.extend(connected);
        }
        play(&mut guest, &mut host, step);
        assert!(!guest.driver.needs_reset(), "packets are no reason");
        assert!(guest.host.connection_count() <= CONNECTIONS);
    }
    drop((connecting, host));
    guest.driver.initialize(0);
    assert_eq!(guest.host.connection_count(), 0, "nobody has any");
    guest.provide(16);
    send(&mut guest, &packet(PortPair { guest: 1, host: 1 }, Op::Rw).to_bytes());
});
