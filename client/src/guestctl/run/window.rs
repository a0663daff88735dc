//! The size of the user's terminal, which the guest's console follows.

use super::terminal;
use guest_client::Guest;
use rustix::termios;
use std::io;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{AbortHandle, spawn_local};

/// Keeps the guest's console as large as the user's terminal, for as long as it is held.
pub struct Window(AbortHandle);

impl Window {
    /// Tells the guest the size now, and whenever it changes; `None` if the standard input is no terminal.
    pub fn follow(guest: &Guest) -> io::Result<Option<Self>> {
        if !terminal::is_terminal() {
            return Ok(None);
        }
        // Before the first look, so that no change is missed.
        let mut changes = signal(SignalKind::window_change())?;
        let guest = guest.clone();
        let following = spawn_local(async move {
            loop {
                if let Ok(size) = termios::tcgetwinsize(io::stdin())
                    && guest.resize_console(size.ws_col, size.ws_row).await.is_err()
                {
                    // The guest has ended, or was refused; run's answer tells.
                    return;
                }
                if changes.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(Some(Self(following.abort_handle())))
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.0.abort();
    }
}
