//! One connection: its state, the bytes on their way, and the credit of both ends (VIRTIO 1.3, 5.10.6.3 to 5.10.6.6).

use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use inspect::{Inspect, Request};
use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// Both ends had shut it down.
    #[error("the connection is closed")]
    Clean,
    /// It never came about: the other end did not want it.
    #[error("the connection was refused")]
    Refused,
    /// It never came about: the other end did not answer.
    #[error("the connection was not answered in time")]
    TimedOut,
    /// One end gave it up; bytes may be lost.
    #[error("the connection was reset")]
    Reset,
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The guest has asked for it, the host has not answered.
    Requested,
    /// The host has accepted it, the guest has not been told.
    Accepted,
    /// The host wants it, the guest has not been asked.
    Requesting,
    /// The guest was asked and has not answered.
    Awaiting,
    /// Bytes may flow.
    Established,
    Closed(End),
}

/// What the other end has done that this connection does not survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Violation;

/// A connection. The guest's bytes wait in `incoming` for the host, and the host's in `outgoing` for the guest.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) state: State,
    /// The room for the guest's bytes (buf_alloc), and for the host's.
    window: u32,
    incoming: VecDeque<u8>,
    outgoing: VecDeque<u8>,
    /// How many bytes the host has taken (fwd_cnt), and as the guest last heard it.
    forwarded: u32,
    told_forwarded: u32,
    /// How many bytes the guest was sent, and how many of them it has taken.
    sent: u32,
    taken: u32,
    /// The guest's room (its buf_alloc).
    guest_window: u32,
    /// The directions that the guest has ended, those that the host wants to end, and those that the guest was told of.
    guest_shutdown: u32,
    host_shutdown: u32,
    told_shutdown: u32,
    owes_credit: bool,
    owes_reset: bool,
    /// The guest was asked for credit since it last was sent data: a guest without room says so once, and speaks up later.
    asked_credit: bool,
    /// Bytes for the guest were dropped.
    lost: bool,
    /// Somebody on the host has it.
    pub(super) held: bool,
    /// It is in the engine's queue of those that have something to send.
    pub(super) queued: bool,
    /// When what it waits for is overdue.
    pub(super) deadline: Option<Instant>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Connection {
    pub fn new(state: State, window: u32) -> Self {
        Self {
            state,
            window,
            incoming: VecDeque::new(),
            outgoing: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            sent: 0,
            taken: 0,
            guest_window: 0,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            owes_credit: false,
            owes_reset: false,
            asked_credit: false,
            lost: false,
            held: state == State::Requesting,
            queued: false,
            deadline: None,
            reader: None,
            writer: None,
        }
    }

    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed(_))
    }

    /// Nobody needs it any more.
    pub fn is_over(&self) -> bool {
        self.is_closed() && !self.held && !self.owes_reset
    }

    /// All is said, and the guest's reset has to confirm it.
    pub fn is_closing(&self) -> bool {
        self.state == State::Established && self.told_shutdown == SHUTDOWN_BOTH
    }

    /// Neither direction has bytes to come, so that a reset loses nothing.
    pub fn both_directions_ended(&self) -> bool {
        let from_guest = self.guest_shutdown & SHUTDOWN_SEND | self.told_shutdown & SHUTDOWN_RECEIVE;
        let to_guest = self.told_shutdown & SHUTDOWN_SEND | self.guest_shutdown & SHUTDOWN_RECEIVE;
        from_guest != 0 && to_guest != 0
    }

    /// Ends it, if it has not ended, and wakes whoever waits for it; the guest is told by a reset if `tell`.
    pub fn close(&mut self, end: End, tell: bool) {
        if self.is_closed() {
            return;
        }
        self.state = State::Closed(end);
        self.owes_reset = tell;
        self.deadline = None;
        self.drop_outgoing();
        self.wake_reader();
    }

    /// The guest takes no more.
    fn drop_outgoing(&mut self) {
        self.lost |= !self.outgoing.is_empty();
        self.outgoing = VecDeque::new();
        self.wake_writer();
    }

    /// The guest is gone, or has forgotten everything, and so need not be told.
    pub fn forgive_reset(&mut self) {
        self.owes_reset = false;
    }

    fn wake_reader(&mut self) {
        self.reader.take().map(Waker::wake).unwrap_or_default();
    }

    fn wake_writer(&mut self) {
        self.writer.take().map(Waker::wake).unwrap_or_default();
    }
}

/// What the guest sends.
impl Connection {
    /// How many bytes the guest has sent that were not taken yet, as it could have known: what its credit is counted by.
    fn used(&self) -> u32 {
        u32::try_from(self.incoming.len()).expect("no more than the window")
    }

    /// Takes note of the guest's room, of which every packet tells.
    pub fn take_credit(&mut self, header: &Header) -> Result<(), Violation> {
        let moved = header.fwd_cnt.wrapping_sub(self.taken);
        if moved <= self.sent.wrapping_sub(self.taken) {
            self.taken = header.fwd_cnt;
        } else if moved < 1 << 31 {
            // It has taken more than it was sent. Less than before is what was said earlier and comes late.
            return Err(Violation);
        }
        self.guest_window = header.buf_alloc;
        Ok(())
    }

    /// The guest has accepted it.
    pub fn receive_response(&mut self) -> Result<(), Violation> {
        if self.state != State::Awaiting {
            return Err(Violation);
        }
        (self.state, self.deadline) = (State::Established, None);
        self.wake_writer();
        Ok(())
    }

    pub fn receive_bytes(&mut self, payload: &[u8]) -> Result<(), Violation> {
        let room = self.window - self.used();
        let fits = u32::try_from(payload.len()).is_ok_and(|count| count <= room);
        if self.state != State::Established || self.guest_shutdown & SHUTDOWN_SEND != 0 || !fits {
            return Err(Violation);
        }
        if self.host_shutdown & SHUTDOWN_RECEIVE != 0 {
            // They were on their way when the host stopped listening.
            self.forward(payload.len());
            return Ok(());
        }
        self.incoming.extend(payload);
        self.wake_reader();
        Ok(())
    }

    /// The guest ends directions. Once it has ended both, the connection has ended, and the guest has to be told so.
    pub fn receive_shutdown(&mut self, flags: u32) -> Result<(), Violation> {
        if self.state != State::Established {
            return Err(Violation);
        }
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        self.wake_reader();
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.drop_outgoing();
        }
        if self.guest_shutdown == SHUTDOWN_BOTH {
            self.close(End::Clean, true);
        }
        Ok(())
    }

    pub fn receive_credit_request(&mut self) {
        self.owes_credit = true;
    }
}

/// What the guest is sent.
impl Connection {
    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_window.saturating_sub(self.sent.wrapping_sub(self.taken))
    }

    /// The directions to be told as ended: the host's own once its last byte is sent.
    fn due_shutdown(&self) -> u32 {
        let ready = if self.outgoing.is_empty() { SHUTDOWN_BOTH } else { SHUTDOWN_RECEIVE };
        self.host_shutdown & ready
    }

    /// What to send next.
    pub fn due(&self) -> Option<Op> {
        match self.state {
            State::Closed(_) => self.owes_reset.then_some(Op::Rst),
            State::Requesting => Some(Op::Request),
            State::Accepted => Some(Op::Response),
            State::Requested | State::Awaiting => None,
            State::Established if self.due_shutdown() != self.told_shutdown => Some(Op::Shutdown),
            State::Established if !self.outgoing.is_empty() && self.credit() > 0 => Some(Op::Rw),
            State::Established if self.owes_credit => Some(Op::CreditUpdate),
            State::Established => {
                (!self.outgoing.is_empty() && !self.asked_credit).then_some(Op::CreditRequest)
            }
        }
    }

    /// How many bytes a data packet takes, with room for `room`.
    pub fn payload_bytes(&self, room: usize) -> usize {
        self.outgoing.len().min(room).min(self.credit() as usize)
    }

    /// The first `count` bytes for the guest, in two parts.
    pub fn payload(&self, count: usize) -> (&[u8], &[u8]) {
        let (front, back) = self.outgoing.as_slices();
        let front = &front[..count.min(front.len())];
        (front, &back[..count - front.len()])
    }

    /// What every packet tells of the host's room: buf_alloc and fwd_cnt.
    pub fn own_credit(&self) -> (u32, u32) {
        (self.window, self.forwarded)
    }

    /// The flags of a packet of this kind.
    pub fn flags(&self, op: Op) -> u32 {
        if op == Op::Shutdown { self.due_shutdown() } else { 0 }
    }

    /// A packet was sent, `count` bytes of data in it.
    pub fn was_sent(&mut self, op: Op, count: usize) {
        self.told_forwarded = self.forwarded;
        self.owes_credit = false;
        match op {
            Op::Rst => self.owes_reset = false,
            Op::Request => self.state = State::Awaiting,
            Op::Response => self.state = State::Established,
            Op::Shutdown => self.told_shutdown = self.due_shutdown(),
            Op::CreditRequest => self.asked_credit = true,
            Op::CreditUpdate => {}
            Op::Rw => {
                self.outgoing.drain(..count);
                self.asked_credit = false;
                self.sent = self.sent.wrapping_add(u32::try_from(count).expect("no more than the credit"));
                self.wake_writer();
            }
        }
    }
}

/// What the host does.
impl Connection {
    /// Bytes were taken, of which the guest hears once it matters: a guest that has used up its credit always does.
    fn forward(&mut self, count: usize) {
        let count = u32::try_from(count).expect("no more than the window");
        self.forwarded = self.forwarded.wrapping_add(count);
        if self.forwarded.wrapping_sub(self.told_forwarded) >= self.window / 4 {
            self.owes_credit = true;
        }
    }

    /// The guest's next bytes; none at the end.
    pub fn poll_read(&mut self, context: &Context<'_>, buffer: &mut [u8]) -> Poll<Result<usize, End>> {
        if !self.incoming.is_empty() {
            let count = buffer.len().min(self.incoming.len());
            copy_front(&self.incoming, &mut buffer[..count]);
            self.incoming.drain(..count);
            self.forward(count);
            return Poll::Ready(Ok(count));
        }
        match self.state {
            State::Closed(End::Clean) => Poll::Ready(Ok(0)),
            State::Closed(end) => Poll::Ready(Err(end)),
            _ if self.guest_shutdown & SHUTDOWN_SEND != 0 => Poll::Ready(Ok(0)),
            _ => {
                self.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Takes bytes for the guest, as many as there is room for.
    pub fn poll_write(&mut self, context: &Context<'_>, bytes: &[u8]) -> Poll<Result<usize, End>> {
        if let Some(end) = self.write_end() {
            return Poll::Ready(Err(end));
        }
        let count = bytes.len().min(self.window as usize - self.outgoing.len());
        if count == 0 && !bytes.is_empty() {
            self.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        self.outgoing.extend(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    /// Resolves once the guest was sent all that was written; fails if some of it was dropped.
    pub fn poll_flush(&mut self, context: &Context<'_>) -> Poll<Result<(), End>> {
        if self.lost {
            return Poll::Ready(Err(self.write_end().unwrap_or(End::Reset)));
        }
        if self.outgoing.is_empty() {
            return Poll::Ready(Ok(()));
        }
        self.writer = Some(context.waker().clone());
        Poll::Pending
    }

    /// Why nothing can be written any more.
    fn write_end(&self) -> Option<End> {
        match self.state {
            State::Closed(end) => Some(end),
            _ if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 || self.has_ended_own() => Some(End::Clean),
            _ => None,
        }
    }

    /// Resolves once the guest has answered a request.
    pub fn poll_connected(&mut self, context: &Context<'_>) -> Poll<Result<(), End>> {
        match self.state {
            State::Requesting | State::Awaiting => {
                self.writer = Some(context.waker().clone());
                Poll::Pending
            }
            State::Closed(end) => Poll::Ready(Err(end)),
            State::Requested | State::Accepted | State::Established => Poll::Ready(Ok(())),
        }
    }

    /// Whether the host has ended its own direction.
    pub fn has_ended_own(&self) -> bool {
        self.host_shutdown & SHUTDOWN_SEND != 0
    }

    /// The host ends directions.
    pub fn shut_down(&mut self, directions: u32) {
        self.host_shutdown |= directions;
        if directions & SHUTDOWN_RECEIVE != 0 {
            let rest = std::mem::take(&mut self.incoming);
            self.forward(rest.len());
        }
    }
}

/// Shows where it stands, and what waits.
impl Inspect for Connection {
    fn inspect(&self, request: Request<'_>) {
        request
            .respond()
            .field_with("state", || format!("{:?}", self.state).to_lowercase())
            .field("window_bytes", &self.window)
            .field("guest_credit_bytes", &self.credit())
            .field_with("waiting_for_host_bytes", || self.incoming.len() as u64)
            .field_with("waiting_for_guest_bytes", || self.outgoing.len() as u64)
            .field("shut_down_by_guest", &self.guest_shutdown)
            .field("shut_down_by_host", &self.host_shutdown);
    }
}

fn copy_front(bytes: &VecDeque<u8>, buffer: &mut [u8]) {
    let (front, back) = bytes.as_slices();
    let split = buffer.len().min(front.len());
    let (head, tail) = buffer.split_at_mut(split);
    head.copy_from_slice(&front[..split]);
    tail.copy_from_slice(&back[..tail.len()]);
}
