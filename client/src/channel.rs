//! A connection as an object: it is open as long as somebody holds it.

use crate::ClientError;
use capnp::capability::FromClientHook;
use capnp::private::capability::ClientHook;
use capnp_rpc::rpc_twoparty_capnp::Side;
use guest_transport::{Connection, Descriptors, Limits};
use rustix::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use tokio::task::spawn_local;

/// One connection, run by a task of its own. The last drop closes the socket at once, whatever is still under way: every
/// pending call then fails, and the task ends.
pub(crate) struct Channel {
    socket: OwnedFd,
    pub descriptors: Descriptors,
    bootstrap: Box<dyn ClientHook>,
}

impl Channel {
    /// Opens the connecting end, and the capability that the peer offers on it.
    pub fn open<C: FromClientHook + Clone>(stream: UnixStream) -> Result<(Rc<Self>, C), ClientError> {
        let socket = stream
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| ClientError::local("cannot duplicate a socket", error))?;
        let connection = Connection::client(stream, Limits::of_client());
        let mut connection = connection.map_err(|error| ClientError::local("cannot use a socket", error))?;
        let bootstrap: C = connection.bootstrap(Side::Server);
        let descriptors = connection.descriptors();
        // How it ended is told to every call that was under way.
        spawn_local(connection.run());
        let kept = bootstrap.clone().into_client_hook();
        Ok((Rc::new(Self { socket, descriptors, bootstrap: kept }), bootstrap))
    }

    /// The capability that the peer offers, as it was opened.
    pub fn bootstrap<C: FromClientHook>(&self) -> C {
        C::new(self.bootstrap.add_ref())
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Fails only if the peer has closed it already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}
