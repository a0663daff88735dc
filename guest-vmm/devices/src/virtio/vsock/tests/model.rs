//! Both ends of several connections, moving in any order: no byte is lost, doubled or moved, no credit is exceeded, and nothing
//! waits for ever.

use super::super::packet::SHUTDOWN_BOTH;
use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};

/// The bytes of one direction, as both ends know them.
#[derive(Debug, Default)]
struct Direction {
    sent: u32,
    received: u32,
    ended: bool,
    end_seen: bool,
}

/// The byte at a position, so that each end can tell what has to come.
fn byte(at: u32) -> u8 {
    u8::try_from(at.wrapping_mul(2_654_435_761) >> 24).unwrap()
}

fn bytes(from: u32, count: u32) -> Vec<u8> {
    (from..from + count).map(byte).collect()
}

/// The guest's end of a connection.
#[derive(Debug, Default)]
struct GuestEnd {
    window: u32,
    /// What it has been sent and has not read.
    unread: VecDeque<u8>,
    taken: u32,
    host_window: u32,
    host_taken: u32,
    to_host: Direction,
    to_guest: Direction,
    reset: bool,
}

struct World {
    bench: Bench,
    guests: BTreeMap<PortPair, GuestEnd>,
    /// What the guest has sent and the host has not looked at.
    wire: VecDeque<(Header, Vec<u8>)>,
}

#[derive(Debug, Clone)]
enum Step {
    GuestWrites(usize, u32),
    GuestReads(usize, u32),
    GuestEnds(usize),
    HostWrites(usize, u32),
    HostReads(usize, u32),
    HostEnds(usize),
    ToHost,
    ToGuest(usize),
}

impl World {
    fn new(windows: &[u32], own_window: u32) -> Self {
        let limits = VsockLimits { wide_window: own_window, ..VsockLimits::default() };
        let mut bench = Bench::with(limits);
        bench.engine.listen(Some(PORT)).unwrap();
        let mut guests = BTreeMap::new();
        for (port, window) in (0..).zip(windows) {
            let pair = PortPair { guest: port, host: PORT };
            bench.engine.receive(&Header { buf_alloc: *window, ..packet(pair, Op::Request) }, &[], bench.now);
            assert_eq!(bench.request(PORT), Some(pair));
            bench.engine.accept(pair).unwrap();
            let (response, _) = bench.sent().unwrap();
            assert_eq!(response.op, Op::Response as u16);
            let host_window = response.buf_alloc;
            guests.insert(pair, GuestEnd { window: *window, host_window, ..GuestEnd::default() });
        }
        Self { bench, guests, wire: VecDeque::new() }
    }

    fn pair(&self, index: usize) -> PortPair {
        *self.guests.keys().nth(index % self.guests.len()).unwrap()
    }

    fn guest_sends(&mut self, pair: PortPair, op: Op, flags: u32, payload: Vec<u8>) {
        let end = &self.guests[&pair];
        let len = u32::try_from(payload.len()).unwrap();
        let header = Header { len, flags, buf_alloc: end.window, fwd_cnt: end.taken, ..packet(pair, op) };
        self.wire.push_back((header, payload));
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::GuestWrites(index, count) => self.guest_writes(self.pair(index), count),
            Step::GuestReads(index, count) => self.guest_reads(self.pair(index), count),
            Step::GuestEnds(index) => self.guest_ends(self.pair(index)),
            Step::HostWrites(index, count) => self.host_writes(self.pair(index), count),
            Step::HostReads(index, count) => self.host_reads(self.pair(index), count),
            Step::HostEnds(index) => self.host_ends(self.pair(index)),
            Step::ToHost => self.deliver_to_host(),
            Step::ToGuest(room) => self.deliver_to_guest(room),
        }
    }

    fn guest_writes(&mut self, pair: PortPair, count: u32) {
        let end = self.guests.get_mut(&pair).unwrap();
        let credit = end.host_window - (end.to_host.sent - end.host_taken);
        let count = count.min(credit);
        if count == 0 || end.to_host.ended {
            return;
        }
        let payload = bytes(end.to_host.sent, count);
        end.to_host.sent += count;
        self.guest_sends(pair, Op::Rw, 0, payload);
    }

    fn guest_reads(&mut self, pair: PortPair, count: u32) {
        let end = self.guests.get_mut(&pair).unwrap();
        let count = count.min(u32::try_from(end.unread.len()).unwrap());
        for byte in end.unread.drain(..count as usize) {
            assert_eq!(byte, self::byte(end.to_guest.received));
            end.to_guest.received += 1;
        }
        end.taken += count;
        if count > 0 {
            self.guest_sends(pair, Op::CreditUpdate, 0, Vec::new());
        }
    }

    fn guest_ends(&mut self, pair: PortPair) {
        let ended = std::mem::replace(&mut self.guests.get_mut(&pair).unwrap().to_host.ended, true);
        if !ended {
            self.guest_sends(pair, Op::Shutdown, SHUTDOWN_SEND, Vec::new());
        }
    }

    fn host_writes(&mut self, pair: PortPair, count: u32) {
        let direction = &mut self.guests.get_mut(&pair).unwrap().to_guest;
        if direction.ended {
            return;
        }
        let payload = bytes(direction.sent, count);
        if let Poll::Ready(taken) = self.bench.write(pair, &payload) {
            self.guests.get_mut(&pair).unwrap().to_guest.sent += u32::try_from(taken.unwrap()).unwrap();
        }
    }

    fn host_reads(&mut self, pair: PortPair, count: u32) {
        let mut buffer = vec![0; count as usize + 1];
        let read = self.bench.engine.with(pair, |it| it.poll_read(&context(), &mut buffer));
        let Poll::Ready(read) = read else { return };
        let count = read.expect("nobody resets it");
        let direction = &mut self.guests.get_mut(&pair).unwrap().to_host;
        direction.end_seen |= count == 0;
        assert_eq!(buffer[..count], bytes(direction.received, u32::try_from(count).unwrap()));
        direction.received += u32::try_from(count).unwrap();
    }

    fn host_ends(&mut self, pair: PortPair) {
        self.bench.end(pair);
        self.guests.get_mut(&pair).unwrap().to_guest.ended = true;
    }

    fn deliver_to_host(&mut self) {
        if let Some((header, payload)) = self.wire.pop_front() {
            self.bench.engine.receive(&header, &payload, self.bench.now);
        }
    }

    fn deliver_to_guest(&mut self, room: usize) {
        let sent = self
            .bench
            .engine
            .send(room.max(1), self.bench.now, |header, (front, back)| (*header, [front, back].concat()));
        let Some((header, payload)) = sent else { return };
        assert_eq!(header.len as usize, payload.len());
        assert!(payload.len() <= room.max(1));
        let pair = PortPair { guest: header.dst_port, host: header.src_port };
        let end = self.guests.get_mut(&pair).unwrap();
        (end.host_window, end.host_taken) = (header.buf_alloc, header.fwd_cnt);
        match Op::from_number(header.op).unwrap() {
            Op::Rw => {
                assert!(!end.to_guest.end_seen, "nothing comes after the end");
                end.unread.extend(payload);
                assert!(end.unread.len() <= end.window as usize, "the guest's credit is not exceeded");
            }
            Op::Shutdown => end.to_guest.end_seen |= header.flags & SHUTDOWN_SEND != 0,
            Op::CreditRequest => self.guest_sends(pair, Op::CreditUpdate, 0, Vec::new()),
            Op::CreditUpdate => {}
            Op::Rst => end.reset = true,
            Op::Request | Op::Response => panic!("it is established"),
        }
    }

    /// Everybody reads, and ends what it has not ended: after a bounded number of rounds all has arrived.
    fn finish(&mut self) {
        let pairs: Vec<PortPair> = self.guests.keys().copied().collect();
        for pair in &pairs {
            self.guest_ends(*pair);
            self.host_ends(*pair);
        }
        for _ in 0..10_000 {
            while !self.wire.is_empty() {
                self.deliver_to_host();
            }
            while self.bench.engine.can_send() {
                self.deliver_to_guest(4096);
            }
            for pair in &pairs {
                self.guest_reads(*pair, u32::MAX);
                self.host_reads(*pair, 4096);
            }
            if self.guests.values().all(GuestEnd::is_done) {
                return;
            }
        }
        panic!("something waits for ever: {:?}", self.guests);
    }

    fn close(&mut self) {
        let pairs: Vec<PortPair> = self.guests.keys().copied().collect();
        for pair in &pairs {
            self.guest_sends(*pair, Op::Shutdown, SHUTDOWN_BOTH, Vec::new());
        }
        while !self.wire.is_empty() {
            self.deliver_to_host();
        }
        while self.bench.engine.can_send() {
            self.deliver_to_guest(1);
        }
        assert!(self.guests.values().all(|end| end.reset), "each close is confirmed");
        for pair in pairs {
            self.bench.release(pair);
        }
        assert_eq!(self.bench.engine.connections().count(), 0);
        assert_eq!((self.bench.engine.quarantined(), self.bench.engine.deadline()), (0, None));
    }
}

impl GuestEnd {
    fn is_done(&self) -> bool {
        let done = |direction: &Direction| direction.end_seen && direction.received == direction.sent;
        done(&self.to_host) && done(&self.to_guest)
    }
}

fn step() -> impl Strategy<Value = Step> {
    let some = 1..6000u32;
    prop_oneof![
        4 => (0..3usize, some.clone()).prop_map(|(at, count)| Step::GuestWrites(at, count)),
        4 => (0..3usize, some.clone()).prop_map(|(at, count)| Step::GuestReads(at, count)),
        4 => (0..3usize, some.clone()).prop_map(|(at, count)| Step::HostWrites(at, count)),
        4 => (0..3usize, some).prop_map(|(at, count)| Step::HostReads(at, count)),
        1 => (0..3usize).prop_map(Step::GuestEnds),
        1 => (0..3usize).prop_map(Step::HostEnds),
        8 => Just(Step::ToHost),
        8 => (1..5000usize).prop_map(Step::ToGuest),
    ]
}

proptest! {
    #[test]
    fn bytes_arrive_whole_and_in_order(
        windows in prop::collection::vec(1..10_000u32, 1..4),
        own_window in 1..10_000u32,
        steps in prop::collection::vec(step(), 0..300),
    ) {
        let mut world = World::new(&windows, own_window);
        for step in &steps {
            world.step(step);
        }
        world.finish();
        world.close();
    }
}
