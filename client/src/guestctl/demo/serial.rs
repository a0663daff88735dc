//! A conversation with a guest over its serial line.

use guest_client::{ByteStream, ClientError, Guest, SerialChunk};
use std::time::Duration;
use tokio::sync::mpsc;

/// How long the built-in guest may take for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The guest's serial port and what came out of it so far.
pub struct Serial {
    input: ByteStream,
    chunks: mpsc::UnboundedReceiver<SerialChunk>,
    unread: String,
}

impl Serial {
    /// Asks for the guest's serial port.
    pub fn open(guest: &Guest) -> Self {
        let (output, chunks) = mpsc::unbounded_channel();
        Self { input: guest.serial(output), chunks, unread: String::new() }
    }

    /// The port, for its answers.
    pub fn input(&self) -> &ByteStream {
        &self.input
    }

    /// Reads until a line begins with this, and returns that line.
    pub async fn line(&mut self, beginning: &str) -> Result<String, ClientError> {
        let reading = async {
            loop {
                while let Some((line, rest)) = self.unread.split_once('\n') {
                    let line = line.trim_end().to_owned();
                    self.unread = rest.to_owned();
                    if line.starts_with(beginning) {
                        return Ok(line);
                    }
                }
                let Some(chunk) = self.chunks.recv().await else {
                    return Err(ClientError::Lost(format!("the guest ended before it wrote {beginning:?}")));
                };
                self.unread.push_str(&String::from_utf8_lossy(&chunk.bytes));
            }
        };
        let silent = |_| Err(ClientError::Lost(format!("the guest did not write {beginning:?} in time")));
        tokio::time::timeout(PATIENCE, reading).await.unwrap_or_else(silent)
    }
}
