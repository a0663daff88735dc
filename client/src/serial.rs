//! The guest's ports, the serial one and those of the console: bytes from them ([`SerialOutput`]) and towards them ([`ByteStream`]).

use crate::call::{Call, SharedCall, failure_beside};
use crate::error::ClientError;
use guest_schema::common_capnp::{byte_stream, output_sink};
use guest_schema::guest_capnp::guest;
use std::cell::RefCell;
use std::rc::Rc;
use tokio::sync::mpsc;

/// Bytes of one stream call: what the guest's device takes at once.
const CHUNK: usize = 64 << 10;

/// Takes what the guest writes, in order. Dropped after the last byte.
pub trait SerialOutput: 'static {
    /// The next bytes; `lost` counts the bytes that were dropped before them, because this reader was too slow. Bytes come no
    /// faster than the returned futures complete, and one at a time; the guest never waits for them. After an error nothing
    /// more comes.
    fn write(&self, bytes: &[u8], lost: u64) -> impl Future<Output = Result<(), OutputClosed>>;
}

/// The reader of the output has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nobody reads this output any more")]
pub struct OutputClosed;

/// Some output of the guest, as a channel carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialChunk {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// How many bytes were dropped before these.
    pub lost: u64,
}

/// The channel ends after the guest's last byte.
impl SerialOutput for mpsc::Sender<SerialChunk> {
    async fn write(&self, bytes: &[u8], lost: u64) -> Result<(), OutputClosed> {
        self.send(SerialChunk { bytes: bytes.to_vec(), lost }).await.map_err(|_| OutputClosed)
    }
}

/// The channel ends after the guest's last byte. It holds whatever its reader leaves unread, without bound.
impl SerialOutput for mpsc::UnboundedSender<SerialChunk> {
    async fn write(&self, bytes: &[u8], lost: u64) -> Result<(), OutputClosed> {
        self.send(SerialChunk { bytes: bytes.to_vec(), lost }).map_err(|_| OutputClosed)
    }
}

/// A closure `(bytes, lost)` as the output. It must not block: it runs on the thread of the connection.
pub struct Callback<F>(RefCell<F>);

impl<F: FnMut(&[u8], u64) + 'static> Callback<F> {
    /// Calls this closure for all output, and drops it after the last byte.
    pub fn new(callback: F) -> Self {
        Self(RefCell::new(callback))
    }
}

impl<F: FnMut(&[u8], u64) + 'static> SerialOutput for Callback<F> {
    async fn write(&self, bytes: &[u8], lost: u64) -> Result<(), OutputClosed> {
        self.0.borrow_mut()(bytes, lost);
        Ok(())
    }
}

pub(crate) struct Sink<O>(pub O);

impl<O: SerialOutput> output_sink::Server for Sink<O> {
    async fn write(self: Rc<Self>, params: output_sink::WriteParams) -> capnp::Result<()> {
        let params = params.get()?;
        let written = self.0.write(params.get_bytes()?, params.get_lost()).await;
        written.map_err(|closed| capnp::Error::failed(closed.to_string()))
    }
}

/// A port of a guest's.
#[derive(Clone, Copy)]
pub(crate) enum Port<'a> {
    /// The serial port.
    Serial,
    /// The console's terminal.
    Console,
    /// A further port of the console.
    Named(&'a str),
}

/// Sends a request for a port. There are three, with types of their own.
macro_rules! open_port {
    ($request:expr, $guest:ident, $output:ident) => {{
        let mut request = $request;
        if let Some(output) = $output {
            request.get().set_output(capnp_rpc::new_client(Sink(output)));
        }
        let sent = request.send();
        // The guest may be a promise, which must outlive what was asked of it.
        let opened = Call::answer(sent.promise, $guest.clone(), |results| {
            failure_beside(results.has_error(), results.get_error())
        });
        Self { client: sent.pipeline.get_input(), opened: futures::FutureExt::shared(opened) }
    }};
}

/// Bytes towards the guest. Dropping it is not the end of the stream for the guest, whose ports have none.
pub struct ByteStream {
    client: byte_stream::Client,
    opened: SharedCall<()>,
}

impl ByteStream {
    /// Asks for a port of the guest's, with all its output going to `output`, if there is one.
    pub(crate) fn open<O: SerialOutput>(guest: &guest::Client, port: Port<'_>, output: Option<O>) -> Self {
        match port {
            Port::Serial => open_port!(guest.get_serial_request(), guest, output),
            Port::Console => open_port!(guest.get_console_request(), guest, output),
            Port::Named(name) => {
                let mut request = guest.get_console_port_request();
                request.get().set_name(name);
                open_port!(request, guest, output)
            }
        }
    }

    /// Whether the port was opened: the full reason if not, which `write` and `end` can only tell in one line.
    pub async fn opened(&self) -> Result<(), ClientError> {
        self.opened.clone().await
    }

    /// Sends the first 64 KiB before it returns; the future sends the rest, at the pace of the guest's device, and completes
    /// when there is room for more. An error may be late, or told only by [`ByteStream::end`].
    #[must_use = "more than 64 KiB go out only while this is awaited"]
    pub fn write<'a>(&'a self, bytes: &'a [u8]) -> impl Future<Output = Result<(), ClientError>> + 'a {
        let mut chunks = bytes.chunks(CHUNK);
        let first = chunks.next().map(|chunk| self.send(chunk));
        async move {
            if let Some(first) = first {
                first.await?;
            }
            for chunk in chunks {
                self.send(chunk).await?;
            }
            Ok(())
        }
    }

    /// Answers once the guest's device has accepted all that was written; fails if it has not.
    pub fn end(self) -> Call<()> {
        let request = self.client.end_request();
        Call::send(request, self, |_| Ok(Ok(())))
    }

    fn send(&self, bytes: &[u8]) -> capnp::capability::Promise<(), capnp::Error> {
        let mut request = self.client.write_request();
        request.get().set_bytes(bytes);
        request.send()
    }
}
