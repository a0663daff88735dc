//! Calls to a back end: on the runtime's blocking threads, one after another, each for [`PATIENCE`] at most.

use super::VhostUserError;
use crate::virtio::watch;
use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tokio::io::Interest;
use vhost::vhost_user::Frontend;

/// How long the back end may take for all the requests of one call.
const PATIENCE: Duration = Duration::from_secs(3);

/// A connection to a back end.
pub(super) struct Connection {
    frontend: Frontend,
    /// The same socket: shows the back end's end, and ends calls. Nothing is read from it here.
    socket: UnixStream,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.socket).finish()
    }
}

/// Ends the connection, and so whatever waits for an answer, unless it was disarmed.
struct Cut<'a>(Option<&'a UnixStream>);

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        if let Some(socket) = self.0 {
            // Fails only if it has ended by itself.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Connection {
    /// A connection for so many queues by a Unix stream socket.
    pub(super) fn new(socket: OwnedFd, queues: u64) -> io::Result<Self> {
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(false)?;
        let frontend = Frontend::from_stream(socket.try_clone()?, queues);
        Ok(Self { frontend, socket })
    }

    /// Does `work` with the back end. The connection is of no use any more once this was cancelled, or has failed by the back end's silence.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Frontend) -> Result<T, VhostUserError> + Send + 'static,
    ) -> Result<T, VhostUserError> {
        let mut frontend = self.frontend.clone();
        let mut cut = Cut(Some(&self.socket));
        let mut call = tokio::task::spawn_blocking(move || work(&mut frontend));
        let Ok(done) = tokio::time::timeout(PATIENCE, &mut call).await else {
            drop(cut);
            // It ends now, and nothing of it is left behind.
            drop(call.await);
            return Err(VhostUserError::Silent(PATIENCE));
        };
        cut.0 = None;
        done.map_err(|error| VhostUserError::Host(io::Error::other(error)))?
    }

    /// Waits until the back end is gone. It never speaks unless it is asked. On the I/O thread.
    pub(super) async fn closed(&self) -> VhostUserError {
        let socket = self.socket.try_clone().map(OwnedFd::from).and_then(watch);
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => return VhostUserError::Host(error),
        };
        loop {
            let Ok(mut ready) = socket.ready(Interest::READABLE | Interest::ERROR).await else {
                // The runtime is there for as long as its tasks.
                return std::future::pending().await;
            };
            if ready.ready().is_read_closed() || ready.ready().is_error() {
                return VhostUserError::Closed;
            }
            // An answer to a call, for the thread that waits for it.
            ready.clear_ready();
        }
    }
}
