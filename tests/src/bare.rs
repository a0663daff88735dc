//! The protocol bare: the schema's own capabilities, for what the client library cannot say or would not.
//!
//! Everything belongs to one thread and needs a tokio `LocalSet`, as the client library does.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;

use capnp::capability::FromClientHook;
use capnp_rpc::rpc_twoparty_capnp::Side;
use guest_client::SerialOutput;
use guest_schema::common_capnp::output_sink;
use guest_schema::guest_capnp::guest_lifecycle;
use guest_schema::host_capnp::guest_host;
use guest_transport::{Connection, ConnectionError, Descriptors, Limits};
use tokio::task::{JoinHandle, spawn_local};

use crate::console::{Console, ConsoleWriter};

/// A connection and the bootstrap capability at its other end; dropping it closes the connection.
pub struct Bare<C> {
    /// The capability.
    pub client: C,
    /// The descriptors that go with its calls.
    pub descriptors: Descriptors,
    connection: JoinHandle<Result<(), ConnectionError>>,
}

impl<C: FromClientHook> Bare<C> {
    /// Speaks with whoever serves the other end of this socket.
    ///
    /// # Errors
    /// When the socket cannot be used.
    pub fn over(stream: UnixStream) -> io::Result<Self> {
        let mut connection = Connection::client(stream, Limits::default())?;
        let client = connection.bootstrap(Side::Server);
        let descriptors = connection.descriptors();
        Ok(Self { client, descriptors, connection: spawn_local(connection.run()) })
    }
}

impl<C> Drop for Bare<C> {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Bare<guest_host::Client> {
    /// The service that listens on a socket.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Self::over(UnixStream::connect(socket)?)
    }

    /// Launches a VMM and returns this side's end of its lease's channel, and the launch's answer once it has come.
    ///
    /// # Errors
    /// When the launch fails.
    pub async fn launch_channel(&self, id: &str) -> anyhow::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut request = self.client.launch_request();
        request.get().set_server_end(self.descriptors.push(theirs.into()));
        request.get().set_id(id);
        let answer = request.send().promise.await?;
        anyhow::ensure!(!answer.get()?.has_error(), "the launch was refused");
        Ok(ours)
    }

    /// Launches a VMM and speaks on its lease.
    ///
    /// # Errors
    /// When the launch fails.
    pub async fn launch(&self, id: &str) -> anyhow::Result<Bare<guest_lifecycle::Client>> {
        Ok(Bare::over(self.launch_channel(id).await?)?)
    }
}

/// What a console sees of a guest, as the schema has it.
pub fn sink(console: &Console) -> output_sink::Client {
    capnp_rpc::new_client(Sink(console.writer()))
}

struct Sink(ConsoleWriter);

impl output_sink::Server for Sink {
    async fn write(self: Rc<Self>, params: output_sink::WriteParams) -> capnp::Result<()> {
        let params = params.get()?;
        let written = self.0.write(params.get_bytes()?, params.get_lost()).await;
        written.map_err(|closed| capnp::Error::failed(closed.to_string()))
    }
}
