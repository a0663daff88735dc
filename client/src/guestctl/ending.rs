//! How the command ends: its exit status, and what it says.

use guest_client::{ClientError, Exit, Outcome as Ended, Panic};
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

/// What a guest's end comes to: its debug-exit value as QEMU's isa-debug-exit has it, else success if it was clean and without a
/// panic.
pub fn of_guest(exit: &Exit) -> Outcome {
    match (exit.debug_exit, exit.outcome, exit.panic) {
        (Some(value), ..) => Err(Trouble::Told(debug_status(value))),
        (None, Ended::Clean, None) => Ok(()),
        _ => Err(Trouble::Told(FAILED)),
    }
}

/// Odd, so that no value is success.
fn debug_status(value: u32) -> u8 {
    value.to_le_bytes()[0] << 1 | 1
}

/// What a guest has reported of its kernel, in words, if anything.
pub fn panic_of(exit: &Exit) -> Option<String> {
    let times = if exit.panics == 1 { String::new() } else { format!(" ({} reports)", exit.panics) };
    match exit.panic {
        Some(Panic::Panicked) => Some(format!("the guest's kernel panicked{times}")),
        Some(Panic::CrashLoaded) => {
            Some(format!("the guest's kernel panicked, and went on with a crash kernel{times}"))
        }
        None if exit.panics > 0 => Some(format!("the guest's kernel panicked before its last reset{times}")),
        None => None,
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn status(exit: &Exit) -> u8 {
        of_guest(exit).map_or_else(|trouble| trouble.status(), |()| 0)
    }

    #[test]
    fn a_debug_exit_is_never_success_and_its_value_is_told() {
        for (value, expected) in [(0, 1), (1, 3), (0x10, 33), (0x7f, 255), (0x80, 1), (0x1_0001, 3)] {
            assert_eq!(status(&Exit::debug(value)), expected, "{value:#x}");
        }
    }

    #[test]
    fn a_guest_that_panicked_has_failed_unless_it_was_reset_since() {
        let ended = |panic, panics| Exit { panic, panics, ..Exit::clean("") };
        let cases = [
            (ended(None, 0), 0, None),
            (ended(Some(Panic::Panicked), 1), 1, Some("the guest's kernel panicked")),
            (
                ended(Some(Panic::CrashLoaded), 2),
                1,
                Some("the guest's kernel panicked, and went on with a crash kernel (2 reports)"),
            ),
            (ended(None, 3), 0, Some("the guest's kernel panicked before its last reset (3 reports)")),
        ];
        for (exit, expected, said) in cases {
            assert_eq!((status(&exit), panic_of(&exit).as_deref()), (expected, said));
        }
    }
}
