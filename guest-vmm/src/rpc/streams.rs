//! Bytes to and from a guest's ports.

use crate::guest::Guest;
use crate::output::OutputLog;
use crate::ports::GuestPort;
use guest_schema::common_capnp::{byte_stream, output_sink};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Mutex;

/// Sends a reader everything that is kept and all that follows. The sink is dropped after the last byte.
///
/// A slow reader holds up this task and nothing else: at most a window of bytes is under way, and the log drops what is oldest.
pub(crate) async fn pump(log: Arc<OutputLog>, sink: output_sink::Client) {
    let mut position = log.position();
    while let Some(piece) = log.next(&mut position).await {
        let mut request = sink.write_request();
        request.get().set_bytes(&piece.bytes);
        request.get().set_lost(piece.lost);
        if let Err(error) = request.send().await {
            tracing::debug!(%error, "a reader of a port is gone");
            return;
        }
    }
}

/// Input of a port.
pub(crate) struct PortStream {
    guest: Rc<Guest>,
    port: GuestPort,
    /// Held while bytes are written: what was sent first goes first, however long it waits for room.
    order: Mutex<()>,
    failed: Cell<bool>,
}

impl PortStream {
    pub fn new(guest: Rc<Guest>, port: GuestPort) -> Self {
        Self { guest, port, order: Mutex::new(()), failed: Cell::new(false) }
    }

    async fn push(&self, mut bytes: &[u8]) -> capnp::Result<()> {
        let gone = || capnp::Error::disconnected("the guest has ended".into());
        let input = self.guest.input(&self.port).ok_or_else(gone)?;
        while !bytes.is_empty() {
            bytes = &bytes[input.push(bytes).ok_or_else(gone)?..];
            if !bytes.is_empty() {
                input.room().await;
            }
        }
        Ok(())
    }
}

impl byte_stream::Server for PortStream {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> capnp::Result<()> {
        let _first = self.order.lock().await;
        let written = self.push(params.get()?.get_bytes()?).await;
        if written.is_err() {
            self.failed.set(true);
        }
        written
    }

    async fn end(self: Rc<Self>, _: byte_stream::EndParams, _: byte_stream::EndResults) -> capnp::Result<()> {
        let _first = self.order.lock().await;
        if self.failed.get() {
            return Err(capnp::Error::disconnected("the guest ended before it had taken all input".into()));
        }
        Ok(())
    }
}
