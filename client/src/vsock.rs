//! Streams between the guest's programs and this one, over the guest's vsock device.
//!
//! Nothing is lost: who writes waits for who reads. Each direction of a stream ends by itself: the guest's when [`VsockOutput::read`]
//! says so, this one's by [`VsockInput::end`]. A stream that is dropped before is reset, and the other end learns of it.

use crate::call::{Call, SharedCall, failure_beside};
use crate::error::ClientError;
use futures::FutureExt;
use guest_schema::common_capnp::byte_stream;
use guest_schema::guest_capnp::{guest, host_vsock_endpoint, vsock_acceptor, vsock_listener};
use guest_schema::{Failure, GuestError};
use std::rc::Rc;
use tokio::sync::{mpsc, oneshot};

/// Bytes of one call.
const CHUNK: usize = 64 << 10;

/// How many pieces of output wait for their reader.
const WAITING_PIECES: usize = 2;

/// How many requests of the guest's wait for somebody to accept them.
const WAITING_REQUESTS: usize = 16;

/// The host's end of a guest's vsock device.
#[derive(Clone)]
pub struct VsockEndpoint {
    client: host_vsock_endpoint::Client,
    opened: SharedCall<()>,
}

impl VsockEndpoint {
    pub(crate) fn of(guest: &guest::Client) -> Self {
        let sent = guest.get_host_vsock_endpoint_request().send();
        let opened = Call::answer(sent.promise, guest.clone(), |results| {
            failure_beside(results.has_error(), results.get_error())
        });
        Self { client: sent.pipeline.get_endpoint(), opened: opened.shared() }
    }

    /// Whether the guest has the device: `deviceNotPresent`.
    pub async fn opened(&self) -> Result<(), ClientError> {
        self.opened.clone().await
    }

    /// Listens on a port of the host's, until the listener is dropped. `alreadyBound` if somebody listens there, or a connection still
    /// has the port.
    pub fn listen(&self, port: u32) -> Call<VsockListener> {
        let (acceptor, requests) = vsock_acceptor();
        let mut request = self.client.listen_request();
        request.get().set_port(port);
        request.get().set_acceptor(acceptor);
        Call::send(request, self.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let listener = results.get_listener()?;
            Ok(refused.map(|()| VsockListener { requests, _listener: listener }))
        })
    }

    /// Connects to a port of the guest's; answers once the guest has accepted. A guest whose driver is not there yet is waited for.
    /// Dropping the call connects to nothing. `connectionRefused`, `noResources`, `notRunning`.
    pub fn connect(&self, guest_port: u32) -> Call<VsockStream> {
        let (sink, output) = output();
        let mut request = self.client.connect_request();
        request.get().set_guest_port(guest_port);
        request.get().set_output(sink);
        Call::send(request, self.clone(), move |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let input = VsockInput(results.get_input()?);
            let host_port = results.get_host_port();
            Ok(refused.map(|()| VsockStream { guest_port, host_port, input, output }))
        })
    }
}

/// A connection.
pub struct VsockStream {
    /// The guest's port.
    pub guest_port: u32,
    /// The host's port.
    pub host_port: u32,
    /// Bytes towards the guest.
    pub input: VsockInput,
    /// Bytes from the guest.
    pub output: VsockOutput,
}

/// Bytes towards the guest. Dropped before it was ended, it resets the connection.
pub struct VsockInput(byte_stream::Client);

impl VsockInput {
    /// Writes bytes, at the pace of the guest's program. An error may be late, or told only by [`end`](Self::end).
    pub async fn write(&self, bytes: &[u8]) -> Result<(), ClientError> {
        for chunk in bytes.chunks(CHUNK) {
            let mut request = self.0.write_request();
            request.get().set_bytes(chunk);
            request.send().await?;
        }
        Ok(())
    }

    /// Ends this direction. Answers once the guest was given all that was written; fails if some of it was not.
    pub fn end(self) -> Call<()> {
        Call::send(self.0.end_request(), self, |_| Ok(Ok(())))
    }
}

/// The connection was reset, by the guest or with it; what the guest sent last may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection was reset")]
pub struct VsockReset;

/// Bytes from the guest.
pub struct VsockOutput {
    pieces: mpsc::Receiver<Option<Vec<u8>>>,
    ended: bool,
}

impl VsockOutput {
    /// The next bytes; `None` once the guest has ended this direction. May be cancelled at any time.
    ///
    /// # Errors
    /// If the connection was reset; the bytes that came before were read first.
    pub async fn read(&mut self) -> Result<Option<Vec<u8>>, VsockReset> {
        if self.ended {
            return Ok(None);
        }
        match self.pieces.recv().await {
            Some(Some(bytes)) => Ok(Some(bytes)),
            Some(None) => {
                self.ended = true;
                Ok(None)
            }
            None => Err(VsockReset),
        }
    }
}

/// Where the guest's bytes come in, and where they are read.
fn output() -> (byte_stream::Client, VsockOutput) {
    let (sender, pieces) = mpsc::channel(WAITING_PIECES);
    (capnp_rpc::new_client(Sink(sender)), VsockOutput { pieces, ended: false })
}

struct Sink(mpsc::Sender<Option<Vec<u8>>>);

impl Sink {
    async fn put(&self, piece: Option<Vec<u8>>) -> capnp::Result<()> {
        let gone = |_| capnp::Error::disconnected("nobody reads this connection any more".into());
        self.0.send(piece).await.map_err(gone)
    }
}

impl byte_stream::Server for Sink {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> capnp::Result<()> {
        self.put(Some(params.get()?.get_bytes()?.to_vec())).await
    }

    async fn end(self: Rc<Self>, _: byte_stream::EndParams, _: byte_stream::EndResults) -> capnp::Result<()> {
        self.put(None).await
    }
}

/// An acceptor for the guest's connections, to be put into a [`VsockConfig`](crate::VsockConfig), and what it is asked.
pub fn vsock_acceptor() -> (vsock_acceptor::Client, VsockRequests) {
    let (sender, requests) = mpsc::channel(WAITING_REQUESTS);
    (capnp_rpc::new_client(Acceptor(sender)), VsockRequests(requests))
}

/// Requests of the guest's for connections. Those that come after it was dropped are refused.
pub struct VsockRequests(mpsc::Receiver<VsockRequest>);

impl VsockRequests {
    /// The next one; `None` once there will be no more. May be cancelled at any time.
    pub async fn next(&mut self) -> Option<VsockRequest> {
        self.0.recv().await
    }
}

/// Holds a port of the host's. Dropping it refuses what was not accepted, and frees the port once its last connection has ended.
pub struct VsockListener {
    requests: VsockRequests,
    _listener: vsock_listener::Client,
}

impl VsockListener {
    /// The next request; `None` once the guest has ended. May be cancelled at any time.
    pub async fn next(&mut self) -> Option<VsockRequest> {
        self.requests.next().await
    }
}

/// A program of the guest's wants to connect. Dropping this refuses it.
pub struct VsockRequest {
    /// The guest's port.
    pub guest_port: u32,
    /// The host's port.
    pub host_port: u32,
    input: byte_stream::Client,
    reply: oneshot::Sender<byte_stream::Client>,
}

impl VsockRequest {
    /// Accepts it. If the guest has taken it back meanwhile, the stream is reset.
    pub fn accept(self) -> VsockStream {
        let (sink, output) = output();
        let Self { guest_port, host_port, input, reply } = self;
        // Who has asked may be gone, and then so is the other end of both directions.
        let _ = reply.send(sink);
        VsockStream { guest_port, host_port, input: VsockInput(input), output }
    }
}

struct Acceptor(mpsc::Sender<VsockRequest>);

impl vsock_acceptor::Server for Acceptor {
    async fn accept(
        self: Rc<Self>,
        params: vsock_acceptor::AcceptParams,
        mut results: vsock_acceptor::AcceptResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let (reply, accepted) = oneshot::channel();
        let request = VsockRequest {
            guest_port: params.get_src_port(),
            host_port: params.get_port(),
            input: params.get_input()?,
            reply,
        };
        // A request that nobody takes is dropped here, and its reply with it.
        let put = self.0.send(request).await.is_ok();
        match accepted.await {
            Ok(output) if put => results.get().set_output(output),
            _ => {
                let refused = Failure::new(GuestError::ConnectionRefused, "nobody accepts it");
                refused.write(results.get().init_error());
            }
        }
        Ok(())
    }
}
