//! The host's side: listening, connecting, and streams of bytes. Usable from any thread and runtime; the device need not run.

use super::connection::{Connection, End};
use super::engine::{Engine, VsockCounters, VsockLimits};
use super::packet::{PortPair, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::ports::PortError;
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;
use std::time::Instant;
use tokio::sync::Notify;

/// The connections, as the device and the host share them.
#[derive(Debug)]
pub(super) struct Shared {
    engine: Mutex<Engine>,
    /// Rung when there may be something to send.
    pub(super) bell: Notify,
}

impl Shared {
    /// Held for one packet, or one read or write, at most.
    pub fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something on the host's side, and has its packets sent.
    fn act<R>(&self, act: impl FnOnce(&mut Engine) -> R) -> R {
        let mut engine = self.engine();
        let result = act(&mut engine);
        let ring = engine.can_send();
        drop(engine);
        if ring {
            self.bell.notify_one();
        }
        result
    }
}

/// The host's end of a guest's vsock device. Clones are of the same one; it outlives the device, without which everything answers that
/// the guest has ended.
#[derive(Debug, Clone)]
pub struct VsockHost(pub(super) Arc<Shared>);

impl VsockHost {
    pub(super) fn new(limits: VsockLimits) -> Self {
        let engine = Mutex::new(Engine::new(limits));
        Self(Arc::new(Shared { engine, bell: Notify::new() }))
    }

    /// Listens on one of the host's ports.
    ///
    /// # Errors
    /// [`PortError::AlreadyBound`] if somebody listens there, or a connection still has the port.
    pub fn listen(&self, port: u32) -> Result<VsockListener, PortError> {
        self.listen_on(Some(port))
    }

    /// Listens on all ports on which nobody else listens.
    ///
    /// # Errors
    /// [`PortError::AllBound`] if somebody does so.
    pub fn listen_unclaimed(&self) -> Result<VsockListener, PortError> {
        self.listen_on(None)
    }

    fn listen_on(&self, port: Option<u32>) -> Result<VsockListener, PortError> {
        self.0.act(|engine| engine.listen(port))?;
        Ok(VsockListener { shared: self.0.clone(), port })
    }

    /// Connects to one of the guest's ports, from an ephemeral port. Resolves once the guest has accepted; a guest whose driver is
    /// not there yet is waited for. Cancelled by dropping.
    ///
    /// # Errors
    /// [`PortError::NoResources`], [`PortError::NotConnected`] if the guest refuses or does not answer.
    pub async fn connect(&self, port: u32) -> Result<VsockStream, PortError> {
        let pair = self.0.act(|engine| engine.connect(port, Instant::now()))?;
        let handle = Handle { shared: self.0.clone(), pair };
        let connected = poll_fn(|context| handle.poll(|it| it.poll_connected(context))).await;
        connected.map_err(|end| PortError::NotConnected { port, end })?;
        Ok(VsockStream::new(Arc::new(handle)))
    }

    /// How many connections there are, those included that have ended on one side only.
    pub fn connection_count(&self) -> usize {
        self.0.engine().connections().count()
    }

    /// What has passed through so far.
    pub fn counters(&self) -> VsockCounters {
        self.0.engine().counters()
    }
}

/// Listens on a port, until it is dropped: what then waits is refused, what was accepted stays.
#[derive(Debug)]
pub struct VsockListener {
    shared: Arc<Shared>,
    /// None for all that nobody else has.
    port: Option<u32>,
}

impl VsockListener {
    /// The guest's next request; none once the device is gone. For one caller at a time. May be cancelled at any time.
    pub async fn next(&self) -> Option<VsockRequest> {
        let poll =
            |context: &mut Context<'_>| self.shared.act(|engine| engine.poll_request(self.port, context));
        let pair = poll_fn(poll).await?;
        let handle = Arc::new(Handle { shared: self.shared.clone(), pair });
        Some(VsockRequest(VsockStream::new(handle)))
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        self.shared.act(|engine| engine.unlisten(self.port));
    }
}

/// A request of the guest's, refused by dropping it. What is written before it is accepted waits.
#[derive(Debug)]
pub struct VsockRequest(VsockStream);

impl VsockRequest {
    /// The ports.
    pub fn ports(&self) -> PortPair {
        self.0.ports()
    }

    /// Accepts it.
    ///
    /// # Errors
    /// If the guest has taken it back.
    pub fn accept(self) -> Result<VsockStream, End> {
        let handle = &self.0.writer.0;
        handle.shared.act(|engine| engine.accept(handle.pair))?;
        Ok(self.0)
    }

    /// The connection without a decision yet, which [`VsockPending`] makes. Dropping the writer refuses the request.
    pub fn into_parts(self) -> (VsockPending, VsockReader, VsockWriter) {
        let (reader, writer) = self.0.split();
        (VsockPending(writer.0.clone()), reader, writer)
    }
}

/// A request that is to be accepted or refused. Refused by dropping.
#[derive(Debug)]
pub struct VsockPending(Arc<Handle>);

impl VsockPending {
    /// Accepts it.
    ///
    /// # Errors
    /// If the guest has taken it back, or it was not answered in time.
    pub fn accept(self) -> Result<(), End> {
        self.0.shared.act(|engine| engine.accept(self.0.pair))
    }
}

impl Drop for VsockPending {
    /// Without an effect on what was accepted.
    fn drop(&mut self) {
        self.0.shared.act(|engine| engine.refuse_request(self.0.pair));
    }
}

/// A connection, both directions of it.
#[derive(Debug)]
pub struct VsockStream {
    /// From the guest.
    pub reader: VsockReader,
    /// Towards the guest.
    pub writer: VsockWriter,
}

impl VsockStream {
    fn new(handle: Arc<Handle>) -> Self {
        Self { reader: VsockReader(handle.clone()), writer: VsockWriter(handle) }
    }

    /// The ports.
    pub fn ports(&self) -> PortPair {
        self.writer.0.pair
    }

    /// The two directions, each of which can be ended by itself.
    pub fn split(self) -> (VsockReader, VsockWriter) {
        (self.reader, self.writer)
    }
}

/// The bytes from the guest. Dropping it tells the guest that no more are wanted.
#[derive(Debug)]
pub struct VsockReader(Arc<Handle>);

impl VsockReader {
    /// The next bytes; none once the guest has ended this direction. Bytes that came before a reset are read first. May be
    /// cancelled at any time.
    ///
    /// # Errors
    /// If the connection was reset.
    pub async fn read(&mut self, buffer: &mut [u8]) -> Result<usize, End> {
        poll_fn(|context| self.0.poll(|connection| connection.poll_read(context, buffer))).await
    }

    /// Gives the connection up, in both directions.
    pub fn reset(self) {
        self.0.reset();
    }
}

impl Drop for VsockReader {
    fn drop(&mut self) {
        self.0.poll(|connection| connection.shut_down(SHUTDOWN_RECEIVE));
    }
}

/// The bytes towards the guest. To be ended by [`end`](Self::end): dropped without, it resets the connection, since the guest must not
/// take a part for the whole.
#[derive(Debug)]
pub struct VsockWriter(Arc<Handle>);

impl VsockWriter {
    /// Takes bytes, waiting for room for at least one of them; how many. May be cancelled at any time.
    ///
    /// # Errors
    /// If the guest takes no more: it has ended this direction ([`End::Clean`]), or the connection.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<usize, End> {
        poll_fn(|context| self.0.poll(|connection| connection.poll_write(context, bytes))).await
    }

    /// Takes all bytes.
    ///
    /// # Errors
    /// As [`write`](Self::write); some of them may have been taken.
    pub async fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), End> {
        while !bytes.is_empty() {
            bytes = &bytes[self.write(bytes).await?..];
        }
        Ok(())
    }

    /// Resolves once the guest was given all that was written.
    ///
    /// # Errors
    /// If some of it was dropped, because the guest takes no more.
    pub async fn flush(&mut self) -> Result<(), End> {
        poll_fn(|context| self.0.poll(|connection| connection.poll_flush(context))).await
    }

    /// Ends this direction: the guest is told after the last byte.
    pub fn end(&mut self) {
        self.0.poll(|connection| connection.shut_down(SHUTDOWN_SEND));
    }

    /// Gives the connection up, in both directions.
    pub fn reset(self) {
        self.0.reset();
    }
}

impl Drop for VsockWriter {
    fn drop(&mut self) {
        if !self.0.poll(|connection| connection.has_ended_own()) {
            self.0.reset();
        }
    }
}

/// A connection that the host has.
struct Handle {
    shared: Arc<Shared>,
    pair: PortPair,
}

impl Handle {
    fn poll<R>(&self, act: impl FnOnce(&mut Connection) -> R) -> R {
        self.shared.act(|engine| engine.with(self.pair, act))
    }

    fn reset(&self) {
        self.shared.act(|engine| engine.reset(self.pair, Instant::now()));
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.act(|engine| engine.release(self.pair, Instant::now()));
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("pair", &self.pair).finish_non_exhaustive()
    }
}
