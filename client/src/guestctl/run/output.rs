//! The guest's serial output on its way to the standard output.
//!
//! A thread writes, so that a reader who takes its time delays neither the connection nor a signal. At most [`AHEAD`] chunks
//! wait for it; then the VMM keeps the rest, and drops the oldest once its own buffer is full.

use super::report::Clock;
use crate::ending::{Outcome, Trouble};
use crate::out::Out;
use guest_client::{OutputClosed, SerialChunk, SerialOutput};
use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How many chunks may wait to be written.
const AHEAD: usize = 64;

/// The writing end of it all.
pub struct Output {
    clock: Clock,
    chunks: Option<mpsc::Sender<SerialChunk>>,
    seen: Rc<Seen>,
    done: oneshot::Receiver<io::Result<()>>,
    error: Option<Trouble>,
    ended: bool,
}

/// What was noticed while it passed.
#[derive(Default)]
struct Seen {
    first_byte: Cell<Option<Duration>>,
    lost: Cell<u64>,
}

/// What there is to say about the output afterwards.
pub struct Written {
    /// When the first byte came.
    pub first_byte: Option<Duration>,
    /// Bytes that were dropped.
    pub lost: u64,
    /// Why not all of it was written.
    pub error: Option<Trouble>,
}

impl Output {
    /// Starts the thread that writes.
    pub fn start(out: &Out, clock: Clock) -> Outcome<Self> {
        let file = out.another()?;
        let (chunks, waiting) = mpsc::channel(AHEAD);
        let (finished, done) = oneshot::channel();
        std::thread::Builder::new().name("output".into()).spawn(move || {
            // Nobody may wait for it any more.
            let _ = finished.send(write_all(file, waiting));
        })?;
        Ok(Self { clock, chunks: Some(chunks), seen: Rc::default(), done, error: None, ended: false })
    }

    /// What takes the guest's output. The thread ends after the last of these is gone.
    pub fn sink(&mut self) -> impl SerialOutput + use<> {
        let chunks = self.chunks.take().expect("one sink is made");
        Sink { clock: self.clock, chunks, seen: self.seen.clone() }
    }

    /// Resolves when the output cannot be written, with the reason; never, if all of it is.
    pub async fn failed(&mut self) -> Trouble {
        match self.end().await {
            Some(trouble) => trouble,
            None => std::future::pending().await,
        }
    }

    /// Resolves when all output has been written, or cannot be.
    pub async fn written(&mut self) -> Written {
        let error = self.end().await;
        Written { first_byte: self.seen.first_byte.get(), lost: self.seen.lost.get(), error }
    }

    async fn end(&mut self) -> Option<Trouble> {
        if !self.ended {
            let result = (&mut self.done).await;
            self.ended = true;
            self.error = result
                .unwrap_or_else(|_| Err(io::Error::other("the output's thread died")))
                .err()
                .map(Trouble::from);
        }
        self.error.take()
    }
}

fn write_all(mut file: File, mut chunks: mpsc::Receiver<SerialChunk>) -> io::Result<()> {
    while let Some(chunk) = chunks.blocking_recv() {
        file.write_all(&chunk.bytes)?;
    }
    Ok(())
}

struct Sink {
    clock: Clock,
    chunks: mpsc::Sender<SerialChunk>,
    seen: Rc<Seen>,
}

impl SerialOutput for Sink {
    async fn write(&self, bytes: &[u8], lost: u64) -> Result<(), OutputClosed> {
        if self.seen.first_byte.get().is_none() {
            self.seen.first_byte.set(Some(self.clock.now()));
        }
        self.seen.lost.set(self.seen.lost.get() + lost);
        self.chunks.write(bytes, lost).await
    }
}
