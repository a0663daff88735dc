//! What can go wrong for a client.

use guest_schema::Failure;
use std::io;
use std::path::{Path, PathBuf};

/// Why a call has no good answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The request was refused, or the guest ended with a failure: the protocol's own word for it.
    #[error(transparent)]
    Refused(#[from] Failure),
    /// The connection ended before the answer came.
    #[error("the connection was lost: {0}")]
    Lost(String),
    /// The peer answered with what the protocol has no place for.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// This process could not do its own part, for instance for want of descriptors.
    #[error("{what}: {reason}")]
    Local {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        reason: String,
    },
}

impl ClientError {
    /// The failure, if the request was refused.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Refused(failure) => Some(failure),
            _ => None,
        }
    }

    pub(crate) fn local(what: &'static str, error: impl Into<io::Error>) -> Self {
        Self::Local { what, reason: error.into().to_string() }
    }
}

/// What each hop puts before the text of an exception.
const HOP: &str = "remote exception: ";

impl From<capnp::Error> for ClientError {
    fn from(error: capnp::Error) -> Self {
        if let Some(failure) = guest_transport::failure_of(&error) {
            return Self::Refused(failure);
        }
        let text = error.extra.trim_start_matches(HOP);
        match error.kind {
            capnp::ErrorKind::Disconnected if text.is_empty() => Self::Lost("the peer closed it".into()),
            capnp::ErrorKind::Disconnected => Self::Lost(text.to_owned()),
            capnp::ErrorKind::Failed => Self::Protocol(text.to_owned()),
            kind => Self::Protocol(format!("{kind:?}: {text}")),
        }
    }
}

/// Why there is no connection to guestd.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing exists at the path.
    #[error("there is no socket at {}: start guestd with it, or name the socket of one that runs", .path.display())]
    Missing {
        /// The socket's path.
        path: PathBuf,
    },
    /// There is a socket, left over from a guestd that ended.
    #[error("nobody listens at {}: start guestd again, it replaces the socket", .path.display())]
    NotListening {
        /// The socket's path.
        path: PathBuf,
    },
    /// The socket is somebody else's.
    #[error("no permission for {}: a guestd serves only the user that it runs as", .path.display())]
    Forbidden {
        /// The socket's path.
        path: PathBuf,
    },
    /// The connection failed otherwise: the path is too long, no socket, or the process has no descriptors left.
    #[error("cannot connect to {}", .path.display())]
    Failed {
        /// The socket's path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl ConnectError {
    pub(crate) fn new(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::Missing { path },
            io::ErrorKind::ConnectionRefused => Self::NotListening { path },
            io::ErrorKind::PermissionDenied => Self::Forbidden { path },
            _ => Self::Failed { path, source },
        }
    }

    /// Whether no guestd is there at all, as opposed to one that cannot be reached.
    pub fn nobody_there(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::NotListening { .. })
    }
}
