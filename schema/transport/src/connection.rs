//! An RPC system on a socket, run as one task.

use crate::descriptors::Descriptors;
use crate::limits::{Bounded, Limit, Limits};
use crate::meter::{Meter, MeteredRead, MeteredWrite};
use capnp::capability::{Client, FromClientHook};
use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{Disconnector, RpcSystem, twoparty};
use futures::io::{BufReader, BufWriter};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

/// Bytes buffered in each direction, so that a burst of small messages is one system call. What is larger goes past the buffer; a
/// buffer is no larger, for a process that opens its first channel pays for each page of it.
const BUFFER: usize = 16 << 10;

/// How many bytes of stream calls may be in flight.
const WINDOW: usize = 1 << 20;

/// How long a connection that was cut may take to fail its calls.
const UNWIND: Duration = Duration::from_secs(1);

/// Why a connection ended other than by its peer closing it.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The peer exceeded a limit.
    #[error("the connection was cut: {0}")]
    Exceeded(Limit),
    /// The peer sent what is no message, or ended with an error, or the socket failed. The text is fit for a log.
    #[error("the connection failed: {0}")]
    Failed(String),
    /// The socket could not be used from the beginning.
    #[error("the socket cannot be used")]
    Socket(#[from] io::Error),
}

/// One connection. It lives as long as [`Connection::run`] is polled; dropping that future closes it at once.
pub struct Connection {
    system: RpcSystem<Side>,
    descriptors: Descriptors,
    meter: Rc<Meter>,
}

impl Connection {
    /// The accepting end: `bootstrap` makes the capability that the peer finds here. The socket is made non-blocking. Has to be called
    /// in a runtime, as the others.
    ///
    /// # Errors
    /// If the socket cannot be registered with the runtime.
    pub fn server(
        stream: UnixStream,
        limits: Limits,
        bootstrap: impl FnOnce(&Descriptors) -> Client,
    ) -> io::Result<Self> {
        Self::server_with(stream, Vec::new(), limits, bootstrap)
    }

    /// As [`Connection::server`], with descriptors that count as received already, numbered from 0.
    ///
    /// # Errors
    /// The same.
    pub fn server_with(
        stream: UnixStream,
        received: Vec<OwnedFd>,
        limits: Limits,
        bootstrap: impl FnOnce(&Descriptors) -> Client,
    ) -> io::Result<Self> {
        Self::new(stream, received, limits, Side::Server, |descriptors| Some(bootstrap(descriptors)))
    }

    /// The connecting end.
    ///
    /// # Errors
    /// The same.
    pub fn client(stream: UnixStream, limits: Limits) -> io::Result<Self> {
        Self::new(stream, Vec::new(), limits, Side::Client, |_| None)
    }

    fn new(
        stream: UnixStream,
        received: Vec<OwnedFd>,
        limits: Limits,
        side: Side,
        bootstrap: impl FnOnce(&Descriptors) -> Option<Client>,
    ) -> io::Result<Self> {
        let meter = Meter::new(limits);
        let (read, write, descriptors) = Descriptors::over(stream, received)?;
        // Metered behind the buffer: what a message cost is what it took from there.
        let read = MeteredRead { inner: BufReader::with_capacity(BUFFER, read), meter: meter.clone() };
        let write = BufWriter::with_capacity(BUFFER, MeteredWrite { inner: write, meter: meter.clone() });
        let mut network = twoparty::VatNetwork::new(read, write, side, limits.reader_options());
        network.set_window_size(WINDOW);
        let bounded = Bounded { network, meter: meter.clone() };
        let system = RpcSystem::new(Box::new(bounded), bootstrap(&descriptors));
        Ok(Self { system, descriptors, meter })
    }

    /// The bootstrap capability of the peer. Calls on it may be made at once; they go out when the connection runs.
    pub fn bootstrap<C: FromClientHook>(&mut self, peer: Side) -> C {
        self.system.bootstrap(peer)
    }

    /// The descriptors that travel on this connection.
    pub fn descriptors(&self) -> Descriptors {
        self.descriptors.clone()
    }

    /// Ends the connection from within, after what is queued has been written.
    pub fn disconnector(&self) -> Disconnector<Side> {
        self.system.get_disconnector()
    }

    /// Runs the connection until its peer closes it, it fails, or a limit cuts it.
    pub async fn run(self) -> Result<(), ConnectionError> {
        let Self { mut system, descriptors, meter } = self;
        // Capabilities that are still held somewhere keep the socket open: close it whichever way this ends.
        let socket = Closing(descriptors);
        let ended = tokio::select! {
            biased;
            ended = &mut system => ended,
            limit = meter.cut() => {
                drop(socket);
                // The system sees the end of the socket and fails every call that is under way.
                let _ = tokio::time::timeout(UNWIND, system).await;
                return Err(ConnectionError::Exceeded(limit));
            }
        };
        match (meter.exceeded(), ended) {
            (Some(limit), _) => Err(ConnectionError::Exceeded(limit)),
            (None, Ok(())) => Ok(()),
            (None, Err(error)) if error.kind == capnp::ErrorKind::Disconnected => Ok(()),
            (None, Err(error)) => Err(ConnectionError::Failed(printable(&error.to_string()))),
        }
    }
}

/// The longest text of a peer's that is passed on, in characters.
const LONGEST_TEXT: usize = 512;

/// Text of a peer's, fit for one line of a log: control characters are blanks, and it is cut.
pub fn printable(text: &str) -> String {
    text.chars().take(LONGEST_TEXT).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

struct Closing(Descriptors);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}
