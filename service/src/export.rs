//! Writing a snapshot's file to a client's output.
//!
//! The file is made on the blocking pool, a piece at a time, and no thread waits for the client: what has been made and is not answered
//! yet is bounded for each client, and nothing more is made until the output has answered. Whoever can take descriptors writes the file
//! itself.

use capnp::capability::{Promise, Response};
use capnp::traits::HasTypeId;
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use guest_schema::common_capnp::output_sink;
use guest_schema::{Failure, GuestError, chain};
use guest_snapshot_file::{Output, Piece, SnapshotEncoder, SnapshotSource, StreamOutput, WriteError};
use std::rc::Rc;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

/// How many bytes are made at once, about.
const CHUNK: usize = 1 << 20;

/// How many bytes go with one call: as many as are fastest.
const CALL: usize = 128 << 10;

/// How many calls may be unanswered.
const UNANSWERED: usize = 8;

/// How many exports of one client go on at once. What is unanswered of all of them stays well below what cuts its connection.
const AT_ONCE: usize = 2;

/// The exports of one client's, who waits for its own.
#[derive(Clone)]
pub(crate) struct Exports(Rc<Semaphore>);

impl Default for Exports {
    fn default() -> Self {
        Self(Rc::new(Semaphore::new(AT_ONCE)))
    }
}

impl Exports {
    /// Writes the file of this snapshot, once it is its turn. Answers once the output has answered all of it.
    ///
    /// # Errors
    /// `failedServiceConnect` if the output fails, `internalError` if the snapshot cannot be read.
    pub async fn export(&self, source: SnapshotSource, output: &output_sink::Client) -> Result<(), Failure> {
        let _turn = self.0.acquire().await.expect("it is never closed");
        export(source, output).await
    }
}

/// The method `write`, by its ordinal.
const WRITE: u16 = 0;

async fn export(source: SnapshotSource, output: &output_sink::Client) -> Result<(), Failure> {
    let mut pieces =
        blocking(move || Ok(Chunks { encoder: SnapshotEncoder::whole(&source)?, zeros: 0 })).await?;
    let mut answers = FuturesOrdered::new();
    loop {
        let (left, chunk) = blocking(move || {
            let chunk = pieces.next()?;
            Ok((pieces, chunk))
        })
        .await?;
        pieces = left;
        let Some(chunk) = chunk else { break };
        for part in chunk.chunks(CALL) {
            answers.push_back(send(output, part));
            if answers.len() >= UNANSWERED {
                answered(answers.next().await)?;
            }
        }
    }
    while let Some(answer) = answers.next().await {
        answered(Some(answer))?;
    }
    Ok(())
}

/// Sends what comes next. A call of its own and not one of a stream, whose answers nobody sees: the last byte counts as well.
fn send(
    output: &output_sink::Client,
    chunk: &[u8],
) -> Promise<Response<capnp::any_pointer::Owned>, capnp::Error> {
    let size = capnp::MessageSize { word_count: chunk.len() as u64 / 8 + 16, cap_count: 0 };
    let interface = output_sink::Client::TYPE_ID;
    let mut request =
        output.client.new_call::<output_sink::write_params::Owned, _>(interface, WRITE, Some(size));
    request.get().set_bytes(chunk);
    request.send().promise
}

fn answered<T>(answer: Option<capnp::Result<T>>) -> Result<(), Failure> {
    let failed =
        |error| Failure::new(GuestError::FailedServiceConnect, format!("the output takes no more: {error}"));
    answer.transpose().map(drop).map_err(failed)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WriteError> + Send + 'static,
) -> Result<T, Failure> {
    let failed = |problem: String| {
        Failure::new(GuestError::InternalError, format!("the snapshot cannot be written: {problem}"))
    };
    let done = spawn_blocking(work).await.map_err(|error| failed(error.to_string()))?;
    done.map_err(|error| failed(chain(&error)))
}

/// A file in chunks.
struct Chunks {
    encoder: SnapshotEncoder,
    /// How many zeros come before what the encoder makes next.
    zeros: u64,
}

impl Chunks {
    fn next(&mut self) -> Result<Option<Vec<u8>>, WriteError> {
        let mut chunk = StreamOutput(Vec::with_capacity(2 * CHUNK));
        while chunk.0.len() < CHUNK {
            if self.zeros > 0 {
                let count = self.zeros.min((CHUNK - chunk.0.len()) as u64);
                chunk.zeros(count).map_err(WriteError::Output)?;
                self.zeros -= count;
                continue;
            }
            match self.encoder.next_piece()? {
                Some(Piece::Zeros(count)) => self.zeros = count,
                Some(Piece::Bytes(bytes)) => chunk.bytes(bytes).map_err(WriteError::Output)?,
                None => break,
            }
        }
        Ok((!chunk.0.is_empty()).then_some(chunk.0))
    }
}
