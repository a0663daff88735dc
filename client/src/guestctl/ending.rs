//! How the command ends: its exit status, and what it says.

use guest_client::ClientError;
use std::io;

/// What every command answers with.
pub type Outcome<T = ()> = Result<T, Trouble>;

/// Why a command did not end well.
#[derive(Debug)]
pub enum Trouble {
    /// The guest failed, or the request was refused.
    Failed(String),
    /// What there was to say has been said; this is the exit status.
    Told(u8),
    /// The command line asks for what cannot be.
    Usage(String),
    /// There is no service or no KVM.
    Unavailable(String),
    /// This signal interrupted it.
    Interrupted(i32),
    /// Nobody reads the standard output any more.
    OutputClosed,
}

/// The status of a failed guest or a refused request.
pub const FAILED: u8 = 1;

/// The status without a service or KVM.
pub const UNAVAILABLE: u8 = 3;

/// What a shell reports for a process that SIGPIPE ended.
const BROKEN_PIPE: u8 = 141;

/// What a shell adds to the number of the signal that ended a process.
const BY_SIGNAL: i32 = 128;

impl Trouble {
    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Failed(_) => FAILED,
            Self::Told(status) => *status,
            Self::Usage(_) => 2,
            Self::Unavailable(_) => UNAVAILABLE,
            Self::Interrupted(signal) => u8::try_from(BY_SIGNAL + signal).unwrap_or(u8::MAX),
            Self::OutputClosed => BROKEN_PIPE,
        }
    }

    /// What is to be said on the standard error, if anything.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Failed(text) | Self::Usage(text) | Self::Unavailable(text) => Some(text),
            Self::Told(_) | Self::Interrupted(_) | Self::OutputClosed => None,
        }
    }
}

impl From<ClientError> for Trouble {
    fn from(error: ClientError) -> Self {
        Self::Failed(match error.failure() {
            Some(failure) => failure.chain(),
            None => error.to_string(),
        })
    }
}

/// An error of the standard streams.
impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Failed(error.to_string()),
        }
    }
}
