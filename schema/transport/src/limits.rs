//! What a peer may have outstanding before the connection is cut.
//!
//! The RPC library bounds none of this. The figures are counted at its public seams: [`Bounded`] wraps its network and sees
//! every message that comes and goes; the halves of the socket count bytes (`meter`).

use crate::meter::Meter;
use capnp::{Error, capability::Promise, message};
use capnp_rpc::rpc_capnp::message as rpc;
use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{Connection, FlowController, IncomingMessage, OutgoingMessage, VatNetwork};
use std::rc::Rc;
use std::time::Duration;

/// What a peer may have outstanding.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The largest message, in words of 8 bytes. It is refused by its header, before any of it is kept.
    pub message_words: usize,
    /// How deep pointers may nest in a message.
    pub nesting: i32,
    /// Calls and bootstraps that are not finished yet.
    pub calls: usize,
    /// The bytes of their messages.
    pub call_bytes: usize,
    /// Calls that were given up before they were answered, and never will be. Each costs the library some memory until the
    /// connection ends.
    pub cancelled: usize,
    /// Bytes of answers queued for the peer at which no further message is read from it; each answer counts 2 KiB more than its
    /// bytes, for what it takes in memory. Of two ends, one at most may have this limit.
    pub queued_soft: usize,
    /// Bytes queued for the peer at which the connection is cut.
    pub queued_hard: usize,
    /// How long a peer may take to read what is queued for it after it has closed its own direction.
    pub drain: Duration,
    /// How long a peer may read nothing at all while more than `queued_soft` is queued for it; whether it has
    /// closed its direction is not seen meanwhile.
    pub stall: Duration,
    /// How long a peer may take until its first whole message; `None` for a peer that may stay silent.
    pub handshake: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_words: 256 << 10,
            nesting: 16,
            calls: 4096,
            call_bytes: 16 << 20,
            cancelled: 16 << 10,
            queued_soft: 4 << 20,
            queued_hard: 16 << 20,
            drain: Duration::from_secs(5),
            stall: Duration::from_secs(60),
            handshake: None,
        }
    }
}

impl Limits {
    /// The limits of a connecting end. It never stops reading: were both ends to wait until the other has read, neither would.
    /// Its peer streams to it: a reader that is slow leaves a window of calls unfinished, which may be very small ones.
    pub fn of_client() -> Self {
        let (calls, call_bytes) = (1 << 20, 64 << 20);
        Self { calls, call_bytes, queued_soft: usize::MAX, queued_hard: 64 << 20, ..Self::default() }
    }

    pub(crate) fn reader_options(&self) -> message::ReaderOptions {
        let mut options = message::ReaderOptions::new();
        options.traversal_limit_in_words(Some(self.message_words)).nesting_limit(self.nesting);
        options
    }
}

/// Which limit a peer exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Limit {
    /// More unfinished calls than `Limits::calls`.
    #[error("too many unfinished calls")]
    Calls,
    /// More bytes in unfinished calls than `Limits::call_bytes`.
    #[error("too many bytes in unfinished calls")]
    CallBytes,
    /// More calls given up than `Limits::cancelled`.
    #[error("too many calls were given up before their answer")]
    Cancelled,
    /// More bytes queued than `Limits::queued_hard`.
    #[error("the peer does not read its answers")]
    Queued,
    /// The peer closed its direction and did not read the rest within `Limits::drain`.
    #[error("the peer closed its direction and did not read the rest in time")]
    Drain,
    /// The peer sent no whole message within `Limits::handshake`.
    #[error("the peer sent no message in time")]
    Handshake,
}

/// A network whose peer is metered.
pub(crate) struct Bounded<N> {
    pub network: N,
    pub meter: Rc<Meter>,
}

impl<N: VatNetwork<Side>> VatNetwork<Side> for Bounded<N> {
    fn connect(&mut self, host: Side) -> Option<Box<dyn Connection<Side>>> {
        let meter = self.meter.clone();
        self.network.connect(host).map(|inner| Box::new(BoundedConnection { inner, meter }) as _)
    }

    fn accept(&mut self) -> Promise<Box<dyn Connection<Side>>, Error> {
        let meter = self.meter.clone();
        let accepted = self.network.accept();
        Promise::from_future(async move {
            Ok(Box::new(BoundedConnection { inner: accepted.await?, meter }) as Box<dyn Connection<Side>>)
        })
    }

    fn drive_until_shutdown(&mut self) -> Promise<(), Error> {
        self.network.drive_until_shutdown()
    }
}

struct BoundedConnection {
    inner: Box<dyn Connection<Side>>,
    meter: Rc<Meter>,
}

impl Connection<Side> for BoundedConnection {
    fn get_peer_vat_id(&self) -> Side {
        self.inner.get_peer_vat_id()
    }

    fn new_outgoing_message(&mut self, first_segment_words: u32) -> Box<dyn OutgoingMessage> {
        let inner = self.inner.new_outgoing_message(first_segment_words);
        Box::new(BoundedMessage { inner, meter: self.meter.clone() })
    }

    fn receive_incoming_message(&mut self) -> Promise<Option<Box<dyn IncomingMessage>>, Error> {
        let meter = self.meter.clone();
        let next = self.inner.receive_incoming_message();
        Promise::from_future(async move {
            meter.room().await;
            let before = meter.bytes_read();
            let message = next.await?;
            if let Some(message) = &message {
                meter.message_came();
                count_incoming(&meter, message.get_body()?.get_as()?, meter.bytes_read() - before)?;
            }
            match meter.exceeded() {
                Some(limit) => Err(Error::overloaded(limit.to_string())),
                None => Ok(message),
            }
        })
    }

    fn new_stream(&mut self) -> (Box<dyn FlowController>, Promise<(), Error>) {
        self.inner.new_stream()
    }

    fn shutdown(&mut self, result: capnp::Result<()>) -> Promise<(), Error> {
        self.inner.shutdown(result)
    }
}

/// Keeps the account of unfinished calls: a call opens one, a finish closes it.
fn count_incoming(meter: &Meter, message: rpc::Reader<'_>, bytes: usize) -> capnp::Result<()> {
    match message.which() {
        Ok(rpc::Call(call)) => meter.call_opened(call?.get_question_id(), bytes),
        Ok(rpc::Bootstrap(bootstrap)) => meter.call_opened(bootstrap?.get_question_id(), bytes),
        Ok(rpc::Finish(finish)) => meter.call_finished(finish?.get_question_id()),
        _ => {}
    }
    Ok(())
}

struct BoundedMessage {
    inner: Box<dyn OutgoingMessage>,
    meter: Rc<Meter>,
}

impl OutgoingMessage for BoundedMessage {
    fn get_body(&mut self) -> capnp::Result<capnp::any_pointer::Builder<'_>> {
        self.inner.get_body()
    }

    fn get_body_as_reader(&self) -> capnp::Result<capnp::any_pointer::Reader<'_>> {
        self.inner.get_body_as_reader()
    }

    fn send(self: Box<Self>) -> (Promise<(), Error>, Rc<message::Builder<message::HeapAllocator>>) {
        let mut answer = false;
        if let Ok(message) = self.inner.get_body_as_reader().and_then(|body| body.get_as::<rpc::Reader<'_>>())
            && let Ok(rpc::Return(Ok(returned))) = message.which()
        {
            answer = true;
            self.meter.call_answered(returned.get_answer_id(), returned.get_no_finish_needed());
        }
        let (sent, message) = self.inner.send();
        let bytes = capnp::serialize::compute_serialized_size_in_words(&*message) * 8;
        self.meter.queued(bytes, answer);
        (sent, message)
    }

    fn take(self: Box<Self>) -> message::Builder<message::HeapAllocator> {
        self.inner.take()
    }

    fn size_in_words(&self) -> usize {
        self.inner.size_in_words()
    }
}
