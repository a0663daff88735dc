//! The host's end of the guest's vsock device: listening, connecting, and bytes both ways. Nothing is lost: each end is read no faster
//! than the other end takes it.

use capnp::Error;
use devices::virtio::vsock::{
    ANSWER, End, PortError, VsockHost, VsockListener, VsockReader, VsockRequest, VsockWriter,
};
use guest_schema::common_capnp::byte_stream;
use guest_schema::guest_capnp::{host_vsock_endpoint, vsock_acceptor, vsock_listener};
use guest_schema::{Failure, GuestError};
use guest_transport::broken;
use std::cell::Cell;
use std::rc::Rc;
use tokio::sync::Mutex;
use tokio::task::{AbortHandle, JoinSet, spawn_local};
use tokio::time::timeout;

/// How many bytes one call carries at most.
const CHUNK: usize = 64 << 10;

/// How many requests of the guest's are put to one acceptor at once; others wait.
const OFFERS: usize = 64;

/// The endpoint of a guest that has the device.
pub(crate) struct VsockEndpoint(VsockHost);

impl VsockEndpoint {
    pub fn new(host: VsockHost) -> Self {
        Self(host)
    }
}

impl host_vsock_endpoint::Server for VsockEndpoint {
    async fn listen(
        self: Rc<Self>,
        params: host_vsock_endpoint::ListenParams,
        mut results: host_vsock_endpoint::ListenResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let listening = match params.has_acceptor() {
            true => self.0.listen(params.get_port()).map_err(|error| failure(&error)),
            false => Err(Failure::new(GuestError::BadConfig, "acceptor: none was given")),
        };
        let mut results = results.get();
        match listening {
            Ok(listener) => {
                let serving = spawn_local(serve(listener, params.get_acceptor()?));
                let listening: vsock_listener::Client =
                    capnp_rpc::new_client(Listening(serving.abort_handle()));
                results.set_listener(listening);
            }
            Err(failure) => {
                results.set_listener(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }

    async fn connect(
        self: Rc<Self>,
        params: host_vsock_endpoint::ConnectParams,
        mut results: host_vsock_endpoint::ConnectResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let connected = match params.has_output() {
            true => self.0.connect(params.get_guest_port()).await.map_err(|error| failure(&error)),
            false => Err(Failure::new(GuestError::BadConfig, "output: none was given")),
        };
        let mut results = results.get();
        match connected {
            Ok(stream) => {
                results.set_host_port(stream.ports().host);
                let (reader, writer) = stream.split();
                spawn_local(forward(reader, params.get_output()?));
                results.set_input(VsockInput::client(writer));
            }
            Err(failure) => {
                results.set_input(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }
}

fn failure(error: &PortError) -> Failure {
    let code = match error {
        PortError::AlreadyBound(_) | PortError::AllBound => GuestError::AlreadyBound,
        PortError::NoResources { .. } => GuestError::NoResources,
        PortError::TooManyListeners => GuestError::LimitExceeded,
        PortError::NotConnected { .. } => GuestError::ConnectionRefused,
        PortError::Gone => GuestError::NotRunning,
    };
    Failure::new(code, error.to_string())
}

/// Holds a port.
struct Listening(AbortHandle);

impl vsock_listener::Server for Listening {}

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Puts the guest's requests to an acceptor. Cut short, it refuses those that were not answered; what was accepted stays.
pub(crate) async fn serve(listener: VsockListener, acceptor: vsock_acceptor::Client) {
    let mut offers = JoinSet::new();
    while let Some(request) = listener.next().await {
        while offers.len() >= OFFERS {
            offers.join_next().await;
        }
        offers.spawn_local(offer(request, acceptor.clone()));
        while offers.try_join_next().is_some() {}
    }
}

/// Puts one request to an acceptor.
async fn offer(request: VsockRequest, acceptor: vsock_acceptor::Client) {
    let ports = request.ports();
    let (pending, reader, writer) = request.into_parts();
    let mut call = acceptor.accept_request();
    let mut params = call.get();
    params.set_src_cid(GUEST_CID);
    params.set_src_port(ports.guest);
    params.set_port(ports.host);
    params.set_input(VsockInput::client(writer));
    let answered = timeout(ANSWER, accepted(call.send().promise)).await;
    match answered {
        Ok(Ok(Some(output))) => match pending.accept() {
            Ok(()) => drop(spawn_local(forward(reader, output))),
            Err(end) => tracing::debug!(%end, "a vsock connection ended before it was accepted"),
        },
        Ok(Ok(None)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a vsock acceptor failed"),
        Err(_) => tracing::debug!("a vsock acceptor did not answer"),
    }
}

/// The guest's address, as the protocol has it.
const GUEST_CID: u32 = 3;

/// Where an accepted connection's bytes go; `None` if it was refused.
async fn accepted(
    answer: capnp::capability::Promise<
        capnp::capability::Response<vsock_acceptor::accept_results::Owned>,
        Error,
    >,
) -> capnp::Result<Option<byte_stream::Client>> {
    let response = answer.await?;
    let response = response.get()?;
    match response.has_error() || !response.has_output() {
        true => Ok(None),
        false => response.get_output().map(Some),
    }
}

/// Sends a client all that comes from the guest, and its end. A reset is the sink's end without that.
async fn forward(mut reader: VsockReader, sink: byte_stream::Client) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match reader.read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => count,
            Err(end) => return tracing::debug!(%end, "a vsock connection"),
        };
        let mut request = sink.write_request();
        request.get().set_bytes(&buffer[..count]);
        if let Err(error) = request.send().await {
            tracing::debug!(%error, "a reader of a vsock connection is gone");
            return reader.reset();
        }
    }
    drop(reader);
    if let Err(error) = sink.end_request().send().promise.await {
        tracing::debug!(%error, "a reader of a vsock connection did not take all of it");
    }
}

/// Bytes of a connection towards the guest. Dropped without its end, it resets the connection.
struct VsockInput {
    /// Locked while bytes are written: what was sent first goes first, however long it waits for room.
    writer: Mutex<VsockWriter>,
    /// Not all that was to be written was.
    incomplete: Cell<bool>,
}

impl VsockInput {
    fn client(writer: VsockWriter) -> byte_stream::Client {
        capnp_rpc::new_client(Self { writer: Mutex::new(writer), incomplete: Cell::new(false) })
    }

    fn error(end: End) -> Error {
        Error::disconnected(format!("the guest takes no more bytes: {end}"))
    }
}

impl byte_stream::Server for VsockInput {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> capnp::Result<()> {
        let mut writer = self.writer.lock().await;
        // A call that is given up in the middle leaves it so.
        let before = self.incomplete.replace(true);
        writer.write_all(params.get()?.get_bytes()?).await.map_err(Self::error)?;
        self.incomplete.set(before);
        Ok(())
    }

    async fn end(self: Rc<Self>, _: byte_stream::EndParams, _: byte_stream::EndResults) -> capnp::Result<()> {
        let mut writer = self.writer.lock().await;
        if self.incomplete.get() {
            return Err(Error::disconnected("the guest has not taken all bytes".into()));
        }
        writer.end();
        writer.flush().await.map_err(Self::error)
    }
}

#[cfg(test)]
mod tests;
