//! The connections of one guest: packets in, packets out, and the host's side beside. No I/O, no queues, no clock.
//!
//! What is wrong with a packet resets the connection that it names, and nothing else. What the guest can make the host keep is bounded:
//! the number of connections, the bytes of each, the resets that wait to be sent, the pairs in quarantine.

use super::connection::{Connection, End, State, Violation};
use super::packet::{GUEST_CID, HOST_CID, Header, Op, PortPair, SHUTDOWN_BOTH, TYPE_STREAM};
use super::ports::{BACKLOG, EPHEMERAL, Listener, MAX_LISTENERS, PortError, PortsInUse, Quarantine};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// How long one end may take to answer a request or a shutdown.
pub const ANSWER: Duration = Duration::from_secs(10);

/// The most data in one packet: what Linux takes.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// How many resets of what is no connection may wait to be sent.
const MAX_STRAYS: usize = 256;

/// What there may be of everything.
#[derive(Debug, Clone)]
pub struct VsockLimits {
    /// Connections, whoever asked for them.
    pub connections: usize,
    /// Of these, how many have a wide window: those that begin while there are fewer.
    pub wide: usize,
    /// The bytes that wait in each direction of a connection with a wide window.
    pub wide_window: u32,
    /// Of the others.
    pub narrow_window: u32,
    /// The host's ports for its own connections.
    pub ephemeral: std::ops::RangeInclusive<u32>,
}

/// Up to 2,048 connections with up to 62 MiB in each direction together.
impl Default for VsockLimits {
    fn default() -> Self {
        let (wide_window, narrow_window) = (256 << 10, 16 << 10);
        Self { connections: 2048, wide: 128, wide_window, narrow_window, ephemeral: EPHEMERAL }
    }
}

/// A reset of what is no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stray {
    cid: u64,
    socket_type: u16,
    pair: PortPair,
}

/// What has passed through so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VsockCounters {
    /// Bytes of data from the guest.
    pub from_guest_bytes: u64,
    /// Bytes of data to the guest.
    pub to_guest_bytes: u64,
    /// Packets that broke the rules.
    pub malformed_packets: u64,
    /// Connections that ended uncleanly.
    pub resets: u64,
}

/// The connections of one guest.
#[derive(Debug)]
pub(super) struct Engine {
    limits: VsockLimits,
    connections: HashMap<PortPair, Connection>,
    /// By port; the one without a port has all others.
    listeners: HashMap<Option<u32>, Listener>,
    ports: PortsInUse,
    quarantine: Quarantine,
    deadlines: BTreeSet<(Instant, PortPair)>,
    /// Those that may have something to send, each once: they take turns.
    ready: VecDeque<PortPair>,
    strays: VecDeque<Stray>,
    stray_was_last: bool,
    counters: VsockCounters,
    /// The device is gone.
    gone: bool,
}

impl Engine {
    pub fn new(limits: VsockLimits) -> Self {
        Self {
            ports: PortsInUse::new(limits.ephemeral.clone()),
            limits,
            connections: HashMap::new(),
            listeners: HashMap::new(),
            quarantine: Quarantine::default(),
            deadlines: BTreeSet::new(),
            ready: VecDeque::new(),
            strays: VecDeque::new(),
            stray_was_last: false,
            counters: VsockCounters::default(),
            gone: false,
        }
    }

    pub fn counters(&self) -> VsockCounters {
        self.counters
    }

    pub fn connections(&self) -> impl Iterator<Item = (&PortPair, &Connection)> {
        self.connections.iter()
    }

    pub fn listening(&self) -> impl Iterator<Item = (Option<u32>, usize)> {
        self.listeners.iter().map(|(port, listener)| (*port, listener.backlog.len()))
    }

    pub fn quarantined(&self) -> usize {
        self.quarantine.len()
    }

    /// When [`expire`](Self::expire) has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Ends what was not answered in time.
    pub fn expire(&mut self, now: Instant) {
        while let Some((deadline, pair)) = self.deadlines.first().copied().filter(|(at, _)| *at <= now) {
            self.deadlines.remove(&(deadline, pair));
            match self.connections.get(&pair).map(|connection| connection.state) {
                Some(State::Requested) => self.end(pair, End::TimedOut, true),
                Some(_) => self.end_uncleanly(pair, End::TimedOut, now),
                None => {}
            }
        }
    }

    /// The guest could not answer for a while: whatever it still has to answer, it has all its time for.
    pub fn restart_deadlines(&mut self, now: Instant) {
        let pairs: Vec<PortPair> =
            std::mem::take(&mut self.deadlines).into_iter().map(|(_, pair)| pair).collect();
        for pair in pairs {
            self.change(pair, |connection| connection.deadline = None);
            self.expect_answer(pair, now);
        }
    }

    /// The guest has forgotten every connection: each ends, but for those that it has not heard of.
    pub fn reset_guest(&mut self) {
        self.strays.clear();
        self.quarantine.clear();
        let pairs: Vec<PortPair> = self.connections.keys().copied().collect();
        for pair in pairs {
            if self.connections.get(&pair).is_some_and(|connection| connection.state != State::Requesting) {
                self.end(pair, End::Reset, false);
            }
        }
        for listener in self.listeners.values_mut() {
            listener.backlog.clear();
        }
    }

    /// The device is gone: everything ends, for good.
    pub fn shut_down(&mut self) {
        self.gone = true;
        self.reset_guest();
        let pairs: Vec<PortPair> = self.connections.keys().copied().collect();
        for pair in pairs {
            self.end(pair, End::Reset, false);
        }
        self.listeners.values_mut().for_each(Listener::wake);
    }

    /// Whether another packet of the guest's can be answered; the guest waits until so.
    pub fn can_receive(&self) -> bool {
        self.strays.len() < MAX_STRAYS
    }

    /// Whether there is, or may be, something to send.
    pub fn can_send(&self) -> bool {
        !self.ready.is_empty() || !self.strays.is_empty()
    }
}

/// What happens to a connection.
impl Engine {
    /// Changes a connection, and sees to what follows from it: turns, deadlines, its end.
    fn change<R>(&mut self, pair: PortPair, change: impl FnOnce(&mut Connection) -> R) -> Option<R> {
        let connection = self.connections.get_mut(&pair)?;
        let before = connection.deadline;
        let result = change(connection);
        if connection.deadline != before
            && let Some(before) = before
        {
            self.deadlines.remove(&(before, pair));
        }
        if !connection.queued && connection.due().is_some() {
            connection.queued = true;
            self.ready.push_back(pair);
        }
        if connection.is_over() {
            // A turn that nobody takes would stay for as long as the guest takes no packets.
            if connection.queued {
                self.ready.retain(|ready| *ready != pair);
            }
            self.connections.remove(&pair);
            self.ports.give_back(pair.host);
        }
        Some(result)
    }

    /// Gives the other end its time to answer, unless it has it already.
    fn expect_answer(&mut self, pair: PortPair, now: Instant) {
        if let Some(connection) = self.connections.get_mut(&pair)
            && connection.deadline.is_none()
        {
            connection.deadline = Some(now + ANSWER);
            self.deadlines.insert((now + ANSWER, pair));
        }
    }

    fn end(&mut self, pair: PortPair, end: End, tell: bool) {
        self.change(pair, |connection| {
            connection.close(end, tell);
            if !tell {
                connection.forgive_reset();
            }
        });
        for port in [Some(pair.host), None] {
            if let Some(listener) = self.listeners.get_mut(&port) {
                listener.backlog.retain(|waiting| *waiting != pair);
            }
        }
    }

    /// Ends a connection that one end believes in: its pair has to rest.
    fn end_uncleanly(&mut self, pair: PortPair, end: End, now: Instant) {
        if self.connections.get(&pair).is_some_and(|connection| !connection.is_closed()) {
            self.quarantine.add(pair, now);
            self.counters.resets += 1;
            self.end(pair, end, true);
        }
    }

    fn open(&mut self, pair: PortPair, state: State) {
        let wide = self.connections.len() < self.limits.wide;
        let window = if wide { self.limits.wide_window } else { self.limits.narrow_window };
        self.connections.insert(pair, Connection::new(state, window));
        self.ports.take(pair.host);
        self.change(pair, |_| ());
    }
}

/// Packets from the guest.
impl Engine {
    /// Takes a packet. `payload` is what came behind the header, as far as the header speaks of it.
    pub fn receive(&mut self, header: &Header, payload: &[u8], now: Instant) {
        let pair = PortPair { guest: header.src_port, host: header.dst_port };
        let op = Op::from_number(header.op);
        if header.src_cid != GUEST_CID {
            // Whoever that is, it is not there to be told.
            self.counters.malformed_packets += 1;
        } else if header.dst_cid != HOST_CID || header.socket_type != TYPE_STREAM {
            self.counters.malformed_packets += 1;
            self.refuse(header, pair);
        } else if !self.connections.contains_key(&pair) {
            self.receive_first(header, pair, op, now);
        } else if self.receive_next(header, pair, op, payload, now).is_none() {
            self.counters.malformed_packets += 1;
            self.end_uncleanly(pair, End::Reset, now);
        }
    }

    /// A packet whose sender could not be read.
    pub fn receive_garbage(&mut self) {
        self.counters.malformed_packets += 1;
    }

    /// Answers what is no connection with a reset, unless it is one.
    fn refuse(&mut self, header: &Header, pair: PortPair) {
        if header.op != Op::Rst as u16 {
            let stray = Stray { cid: header.dst_cid, socket_type: header.socket_type, pair };
            if !self.strays.contains(&stray) {
                self.strays.push_back(stray);
            }
        }
    }

    /// A packet of no connection: a request, or nothing that makes sense.
    fn receive_first(&mut self, header: &Header, pair: PortPair, op: Option<Op>, now: Instant) {
        let full = self.connections.len() >= self.limits.connections;
        let port = Some(pair.host).filter(|port| self.listeners.contains_key(&Some(*port)));
        let waiting = self.listeners.get(&port).map(|listener| listener.backlog.len());
        let is_fresh = header.len == 0 && header.fwd_cnt == 0;
        let welcome = waiting.is_some_and(|count| count < BACKLOG) && !full && is_fresh;
        if op != Some(Op::Request) || !welcome || self.quarantine.contains(pair, now) {
            return self.refuse(header, pair);
        }
        self.open(pair, State::Requested);
        self.change(pair, |connection| connection.take_credit(header));
        self.expect_answer(pair, now);
        if let Some(listener) = self.listeners.get_mut(&port) {
            listener.backlog.push_back(pair);
            listener.wake();
        }
    }

    /// A packet of a connection; `None` if it breaks the rules.
    fn receive_next(
        &mut self,
        header: &Header,
        pair: PortPair,
        op: Option<Op>,
        payload: &[u8],
        now: Instant,
    ) -> Option<()> {
        let connection = self.connections.get(&pair)?;
        if connection.is_closed() {
            // Its reset is on its way, or was sent; a new one has to wait until the host has let go of the old one.
            if connection.due().is_none() {
                self.refuse(header, pair);
            }
            return Some(());
        }
        let op =
            op.filter(|op| header.len as usize == payload.len() && (*op == Op::Rw || payload.is_empty()))?;
        if op == Op::Rst {
            self.receive_reset(pair, now);
            return Some(());
        }
        let ended = self.change(pair, |connection| -> Result<(), Violation> {
            connection.take_credit(header)?;
            match op {
                Op::Response => connection.receive_response(),
                Op::Rw => connection.receive_bytes(payload),
                Op::Shutdown => connection.receive_shutdown(header.flags),
                Op::CreditUpdate => Ok(()),
                Op::CreditRequest => {
                    connection.receive_credit_request();
                    Ok(())
                }
                Op::Request | Op::Rst => Err(Violation),
            }
        });
        ended?.ok()?;
        self.counters.from_guest_bytes += payload.len() as u64;
        self.show_life(pair, now);
        Some(())
    }

    /// A guest that still has something to say has not stopped answering.
    fn show_life(&mut self, pair: PortPair, now: Instant) {
        if self.connections.get(&pair).is_some_and(Connection::is_closing) {
            self.change(pair, |connection| connection.deadline = None);
            self.expect_answer(pair, now);
        }
    }

    fn receive_reset(&mut self, pair: PortPair, now: Instant) {
        let Some(connection) = self.connections.get(&pair) else { return };
        match connection.state {
            State::Requesting | State::Awaiting | State::Requested | State::Accepted => {
                self.end(pair, End::Refused, false);
            }
            State::Established if connection.both_directions_ended() => self.end(pair, End::Clean, false),
            State::Established => {
                self.quarantine.add(pair, now);
                self.counters.resets += 1;
                self.end(pair, End::Reset, false);
            }
            State::Closed(_) => {}
        }
    }
}

/// Packets to the guest.
impl Engine {
    /// Sends the next packet, if there is one: `put` gets its header and its data, of which there are `room` bytes at most (and at
    /// least one must fit).
    pub fn send<R>(
        &mut self,
        room: usize,
        now: Instant,
        put: impl FnOnce(&Header, (&[u8], &[u8])) -> R,
    ) -> Option<R> {
        if !self.stray_was_last || self.ready.is_empty() {
            self.stray_was_last = true;
            if let Some(stray) = self.strays.pop_front() {
                return Some(put(&stray.header(), (&[], &[])));
            }
        }
        self.stray_was_last = false;
        while let Some(pair) = self.ready.pop_front() {
            let connection = self.connections.get_mut(&pair);
            let Some((connection, op)) = connection.and_then(|it| it.due().map(|op| (it, op))) else {
                self.forget_turn(pair);
                continue;
            };
            let count = if op == Op::Rw { connection.payload_bytes(room.min(MAX_PAYLOAD)) } else { 0 };
            let result = put(&header(pair, op, count, connection), connection.payload(count));
            self.was_sent(pair, op, count, now);
            return Some(result);
        }
        None
    }

    fn forget_turn(&mut self, pair: PortPair) {
        if let Some(connection) = self.connections.get_mut(&pair) {
            connection.queued = false;
        }
    }

    fn was_sent(&mut self, pair: PortPair, op: Op, count: usize, now: Instant) {
        self.counters.to_guest_bytes += count as u64;
        self.change(pair, |connection| {
            connection.queued = false;
            connection.was_sent(op, count);
        });
        let waits = |it: &Connection| it.state == State::Awaiting || it.is_closing();
        if self.connections.get(&pair).is_some_and(waits) {
            self.expect_answer(pair, now);
        }
    }
}

fn header(pair: PortPair, op: Op, count: usize, connection: &Connection) -> Header {
    let (buf_alloc, fwd_cnt) = connection.own_credit();
    Header {
        src_cid: HOST_CID,
        dst_cid: GUEST_CID,
        src_port: pair.host,
        dst_port: pair.guest,
        len: u32::try_from(count).expect("no more than a packet has"),
        socket_type: TYPE_STREAM,
        op: op as u16,
        flags: connection.flags(op),
        buf_alloc,
        fwd_cnt,
    }
}

impl Stray {
    fn header(&self) -> Header {
        Header {
            src_cid: self.cid,
            dst_cid: GUEST_CID,
            src_port: self.pair.host,
            dst_port: self.pair.guest,
            len: 0,
            socket_type: self.socket_type,
            op: Op::Rst as u16,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

/// The host's side.
impl Engine {
    /// Listens on a port, or on all that nobody else listens on.
    pub fn listen(&mut self, port: Option<u32>) -> Result<(), PortError> {
        if self.gone {
            return Err(PortError::Gone);
        }
        if self.listeners.contains_key(&port) || port.is_some_and(|port| self.ports.contains(port)) {
            return Err(port.map_or(PortError::AllBound, PortError::AlreadyBound));
        }
        if self.listeners.len() >= MAX_LISTENERS {
            return Err(PortError::TooManyListeners);
        }
        self.listeners.insert(port, Listener::default());
        Ok(())
    }

    /// No longer listens: what waits is refused.
    pub fn unlisten(&mut self, port: Option<u32>) {
        let listener = self.listeners.remove(&port);
        for pair in listener.into_iter().flat_map(|listener| listener.backlog) {
            self.end(pair, End::Refused, true);
        }
    }

    /// The next request of the guest's, now the caller's to accept or to let go of; none once the device is gone.
    pub fn poll_request(&mut self, port: Option<u32>, context: &Context<'_>) -> Poll<Option<PortPair>> {
        let Some(listener) = self.listeners.get_mut(&port).filter(|_| !self.gone) else {
            return Poll::Ready(None);
        };
        let Some(pair) = listener.backlog.pop_front() else {
            listener.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        self.change(pair, |connection| connection.held = true);
        Poll::Ready(Some(pair))
    }

    /// Accepts a request; fails if the guest has taken it back meanwhile.
    pub fn accept(&mut self, pair: PortPair) -> Result<(), End> {
        let accepted = self.change(pair, |connection| match connection.state {
            State::Closed(end) => Err(end),
            _ => {
                (connection.state, connection.deadline) = (State::Accepted, None);
                Ok(())
            }
        });
        accepted.unwrap_or(Err(End::Reset))
    }

    /// Refuses a request that was not accepted.
    pub fn refuse_request(&mut self, pair: PortPair) {
        if self.connections.get(&pair).is_some_and(|connection| connection.state == State::Requested) {
            self.end(pair, End::Refused, true);
        }
    }

    /// Asks the guest for a connection.
    pub fn connect(&mut self, guest: u32, now: Instant) -> Result<PortPair, PortError> {
        if self.gone {
            return Err(PortError::Gone);
        }
        let (quarantined, listeners) = (self.quarantine.at(now), &self.listeners);
        let is_free =
            |host| !listeners.contains_key(&Some(host)) && !quarantined.contains(&PortPair { guest, host });
        let connections = self.connections.len();
        let host = if connections < self.limits.connections { self.ports.ephemeral(is_free) } else { None };
        let pair = PortPair { guest, host: host.ok_or(PortError::NoResources { connections })? };
        self.open(pair, State::Requesting);
        Ok(pair)
    }

    /// Does something with a connection that the caller has.
    pub fn with<R>(&mut self, pair: PortPair, act: impl FnOnce(&mut Connection) -> R) -> R {
        self.change(pair, act).expect("a connection is there for as long as somebody has it")
    }

    /// Gives a connection up.
    pub fn reset(&mut self, pair: PortPair, now: Instant) {
        match self.connections.get(&pair).map(|connection| connection.state) {
            // The guest knows nothing of it.
            Some(State::Requesting) => self.end(pair, End::Reset, false),
            // It has nothing to lose by it.
            Some(State::Requested) => self.end(pair, End::Refused, true),
            Some(State::Accepted | State::Awaiting | State::Established) => {
                self.end_uncleanly(pair, End::Reset, now);
            }
            Some(State::Closed(_)) | None => {}
        }
    }

    /// The caller lets go of a connection. What it has written goes on its way; if it has not ended its own direction, the
    /// connection is reset.
    pub fn release(&mut self, pair: PortPair, now: Instant) {
        let whole = self.connections.get(&pair).is_some_and(Connection::has_ended_own);
        if !whole {
            self.reset(pair, now);
        }
        self.change(pair, |connection| {
            connection.shut_down(SHUTDOWN_BOTH);
            connection.held = false;
        });
    }
}
