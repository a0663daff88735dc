//! The user's terminal while a guest has it.
//!
//! In raw mode every key goes to the guest as it is. The former mode comes back when the [`RawTerminal`] is dropped, and
//! before a panic's message. SIGKILL leaves the terminal raw, as it does with every program: `reset` repairs it.

use rustix::termios::{self, OptionalActions, Termios};
use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};

/// Ctrl-].
const ESCAPE: u8 = 0x1d;

/// The mode to come back to, while the terminal is raw.
static FORMER: Mutex<Option<Termios>> = Mutex::new(None);

/// Whether the standard input is a terminal.
pub fn is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// The standard input's terminal in raw mode.
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes it raw; `None` if the terminal belongs to another job: touching it would stop this process.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if termios::tcgetpgrp(&stdin).ok() != Some(rustix::process::getpgrp()) {
            return Ok(None);
        }
        let former = termios::tcgetattr(&stdin)?;
        let mut raw = former.clone();
        raw.make_raw();
        // Output is left as it was: a guest that ends its lines with LF alone stays readable.
        raw.output_modes = former.output_modes;
        *FORMER.lock().unwrap_or_else(PoisonError::into_inner) = Some(former);
        restore_before_panic_messages();
        termios::tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore_before_panic_messages() {
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        next(panic);
    }));
}

/// Puts the terminal back, once.
fn restore() {
    if let Some(former) = FORMER.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // A terminal that has gone has no mode.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &former);
    }
}

/// Finds the keys that are for this command, not for the guest: Ctrl-] and then q leaves; Ctrl-] Ctrl-] is one Ctrl-] for the
/// guest; Ctrl-] and anything else goes to the guest as it is.
#[derive(Default)]
pub struct Escape {
    begun: bool,
}

/// What came of some keys.
#[derive(Debug, PartialEq, Eq)]
pub enum Key {
    /// These go to the guest.
    Through(Vec<u8>),
    /// The user leaves.
    Leave,
}

impl Escape {
    /// Passes what was read.
    pub fn pass(&mut self, bytes: &[u8]) -> Key {
        let mut through = Vec::with_capacity(bytes.len() + 1);
        for &byte in bytes {
            match (std::mem::take(&mut self.begun), byte) {
                (true, b'q' | b'Q') => return Key::Leave,
                (true, ESCAPE) => through.push(ESCAPE),
                (true, other) => through.extend([ESCAPE, other]),
                (false, ESCAPE) => self.begun = true,
                (false, other) => through.push(other),
            }
        }
        Key::Through(through)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(bytes: &[u8]) -> Key {
        Key::Through(bytes.to_vec())
    }

    #[test]
    fn keys_go_through_but_for_the_escape_and_q() {
        let mut escape = Escape::default();
        assert_eq!(escape.pass(b"ls q\x03\r"), through(b"ls q\x03\r"));
        assert_eq!(escape.pass(b"a\x1d\x1db"), through(b"a\x1db"));
        assert_eq!(escape.pass(b"\x1dx"), through(b"\x1dx"));
        assert_eq!(escape.pass(b"before\x1dqafter"), Key::Leave);
    }

    #[test]
    fn the_escape_may_come_in_two_reads() {
        let mut escape = Escape::default();
        assert_eq!(escape.pass(b"\x1d"), through(b""));
        assert_eq!(escape.pass(b"q"), Key::Leave);
    }
}
