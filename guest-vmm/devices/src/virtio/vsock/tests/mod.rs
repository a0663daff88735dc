//! The engine by the acceptance list and against a model of both ends, and the device by what a driver sees.

mod acceptance;
mod device;
mod hostile;
mod model;

use super::connection::End;
use super::engine::{Engine, VsockLimits};
use super::fake_guest::packet;
use super::packet::{GUEST_CID, HOST_CID, Header, Op, PortPair, SHUTDOWN_SEND};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

const PORT: u32 = 1024;
const GUEST_PORT: u32 = 5000;
const PAIR: PortPair = PortPair { guest: GUEST_PORT, host: PORT };

/// An engine, the time, and the guest's end as far as a test plays it by hand.
struct Bench {
    engine: Engine,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        Self::with(VsockLimits::default())
    }

    fn with(limits: VsockLimits) -> Self {
        Self { engine: Engine::new(limits), now: Instant::now() }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.engine.expire(self.now);
    }

    /// A packet comes from the guest.
    fn take(&mut self, pair: PortPair, op: Op) {
        self.engine.receive(&packet(pair, op), &[], self.now);
    }

    fn take_bytes(&mut self, pair: PortPair, bytes: &[u8]) {
        let len = u32::try_from(bytes.len()).unwrap();
        self.engine.receive(&Header { len, ..packet(pair, Op::Rw) }, bytes, self.now);
    }

    fn take_shutdown(&mut self, pair: PortPair, flags: u32) {
        self.engine.receive(&Header { flags, ..packet(pair, Op::Shutdown) }, &[], self.now);
    }

    /// The next packet to the guest, with its payload.
    fn sent(&mut self) -> Option<(Header, Vec<u8>)> {
        self.engine.send(4096, self.now, |header, (front, back)| (*header, [front, back].concat()))
    }

    /// All packets to the guest, by what they are for and to which pair.
    fn all_sent(&mut self) -> Vec<(Op, PortPair)> {
        std::iter::from_fn(|| self.sent())
            .map(|(header, _)| {
                let pair = PortPair { guest: header.dst_port, host: header.src_port };
                (Op::from_number(header.op).unwrap(), pair)
            })
            .collect()
    }

    /// The next request of the guest's on a port, if there is one.
    fn request(&mut self, port: u32) -> Option<PortPair> {
        match self.engine.poll_request(Some(port), &context()) {
            Poll::Ready(request) => Some(request.expect("somebody listens")),
            Poll::Pending => None,
        }
    }

    /// The guest has connected to a port on which somebody listens.
    fn connected_from_guest(&mut self, pair: PortPair) {
        self.take(pair, Op::Request);
        assert_eq!(self.request(pair.host), Some(pair));
        self.engine.accept(pair).unwrap();
        assert_eq!(self.all_sent(), [(Op::Response, pair)]);
    }

    /// The host has connected to a port of the guest's.
    fn connected_from_host(&mut self, port: u32) -> PortPair {
        let pair = self.engine.connect(port, self.now).unwrap();
        assert_eq!(self.all_sent(), [(Op::Request, pair)]);
        self.take(pair, Op::Response);
        assert_eq!(self.engine.with(pair, |it| it.poll_connected(&context())), Poll::Ready(Ok(())));
        pair
    }

    fn write(&mut self, pair: PortPair, bytes: &[u8]) -> Poll<Result<usize, End>> {
        self.engine.with(pair, |it| it.poll_write(&context(), bytes))
    }

    /// What the host reads; none at the end.
    fn read(&mut self, pair: PortPair) -> Poll<Result<Vec<u8>, End>> {
        let mut buffer = vec![0; 1 << 20];
        let read = self.engine.with(pair, |it| it.poll_read(&context(), &mut buffer));
        read.map_ok(|count| buffer[..count].to_vec())
    }

    /// The host ends its direction.
    fn end(&mut self, pair: PortPair) {
        self.engine.with(pair, |it| it.shut_down(SHUTDOWN_SEND));
    }

    /// The host lets go of a connection.
    fn release(&mut self, pair: PortPair) {
        self.engine.release(pair, self.now);
    }

    /// The host closes a connection, and the guest confirms it.
    fn close_cleanly(&mut self, pair: PortPair) {
        self.end(pair);
        self.release(pair);
        assert_eq!(self.all_sent(), [(Op::Shutdown, pair)]);
        self.take(pair, Op::Rst);
        assert_eq!(self.engine.connections().count(), 0);
    }
}

fn context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}
