//! A disk whose data somebody else keeps: what the guest asks for becomes [`ServiceCall`]s, which are answered in any order.
//!
//! Reads and writes go in pieces of [`PIECE`] bytes, of which 16 are under way at a time: so much of them is in memory at
//! most. Guest memory is touched on the I/O thread alone, when a piece is sent or answered. Who answers decides how long that may
//! take, and what became of a call that nobody answers: dropped, it has failed.

use super::disk::{Disk, DiskImage, Ended, Operation};
use crate::virtio::{Buffers, GuestRam};
use futures::task::AtomicWaker;
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// The most that one call moves, in bytes.
pub const PIECE: u32 = 256 << 10;
/// How many calls are under way at a time.
const WINDOW: usize = 16;

/// What is asked of whoever keeps the data. Offsets and counts are in bytes, multiples of 512, and inside the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServiceRequest {
    /// The answer is this many bytes, [`PIECE`] at most.
    Read {
        /// Where on the disk.
        offset: u64,
        /// How many.
        count: u32,
    },
    /// To be written; [`PIECE`] at most.
    Write {
        /// Where on the disk.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
        /// Answered only once it would survive a crash.
        durable: bool,
    },
    /// Writes that were answered are to survive a crash.
    Flush,
    /// The data is not needed any more.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        count: u64,
    },
    /// The data is to be zeros.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        count: u64,
        /// The space may be given back.
        unmap: bool,
        /// Answered only once they would survive a crash.
        durable: bool,
    },
}

/// A request, and where its answer goes.
#[derive(Debug)]
pub struct ServiceCall {
    /// What is asked.
    pub request: ServiceRequest,
    /// Whom to tell.
    pub reply: ServiceReply,
}

/// Where an answer goes. Dropped, it tells of a failure.
#[derive(Debug)]
pub struct ServiceReply {
    piece: usize,
    /// `None` once it was used.
    answers: Option<Arc<Answers>>,
}

impl ServiceReply {
    /// Tells how the request ended: with the bytes of a read, or with none. From any thread.
    pub fn send(mut self, result: io::Result<Vec<u8>>) {
        self.tell(result);
    }

    fn tell(&mut self, result: io::Result<Vec<u8>>) {
        if let Some(answers) = self.answers.take() {
            answers.list().push((self.piece, result));
            answers.waker.wake();
        }
    }
}

impl Drop for ServiceReply {
    fn drop(&mut self) {
        self.tell(Err(io::Error::other("the block service has not answered")));
    }
}

/// Answers that the disk has not looked at.
#[derive(Debug, Default)]
struct Answers {
    list: Mutex<Vec<(usize, io::Result<Vec<u8>>)>>,
    waker: AtomicWaker,
}

impl Answers {
    fn list(&self) -> MutexGuard<'_, Vec<(usize, io::Result<Vec<u8>>)>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk whose data somebody else keeps.
pub struct ServiceDisk {
    calls: mpsc::Sender<ServiceCall>,
    answers: Arc<Answers>,
    /// Operations, by tag.
    running: HashMap<usize, Running>,
    /// Those of which something is still to be sent, oldest first.
    unsent: VecDeque<usize>,
    /// What is under way.
    pieces: Slab<Piece>,
    ended: Vec<Ended>,
    /// While it is started.
    ram: Option<Arc<dyn GuestRam>>,
}

/// An operation.
struct Running {
    /// What of it was not sent.
    rest: Option<Operation>,
    under_way: usize,
    result: io::Result<()>,
}

/// A call that is under way.
struct Piece {
    tag: usize,
    /// Where a read's bytes go.
    buffers: Buffers,
}

impl fmt::Debug for ServiceDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceDisk").field("under_way", &self.pieces.len()).finish_non_exhaustive()
    }
}

impl ServiceDisk {
    /// A disk of this many bytes, in blocks of so many, and what it asks. Once nobody receives that, everything fails.
    pub fn image(bytes: u64, physical_block_bytes: u32) -> (DiskImage, mpsc::Receiver<ServiceCall>) {
        // As many as are under way at most: sending never waits.
        let (calls, asked) = mpsc::channel(WINDOW);
        let disk = Self {
            calls,
            answers: Arc::default(),
            running: HashMap::new(),
            unsent: VecDeque::new(),
            pieces: Slab::with_capacity(WINDOW),
            ended: Vec::new(),
            ram: None,
        };
        (DiskImage { disk: Box::new(disk), size: Arc::new(bytes), physical_block_bytes }, asked)
    }

    /// Sends the next piece of an operation, if there is one.
    fn send(&mut self, tag: usize) {
        let Some(running) = self.running.get_mut(&tag) else { return };
        let Some(operation) = running.rest.take() else { return };
        let cut = cut(operation, self.ram.as_ref());
        running.under_way += 1;
        let Cut { request, buffers, rest } = match cut {
            Ok(cut) => cut,
            Err(error) => return self.end_piece(tag, Err(error)),
        };
        running.rest = rest;
        let piece = self.pieces.insert(Piece { tag, buffers });
        let reply = ServiceReply { piece, answers: Some(self.answers.clone()) };
        // One that cannot be sent is dropped, and so answered.
        let _ = self.calls.try_send(ServiceCall { request, reply });
    }

    /// One piece of an operation less is under way. The first failure ends it: what was not sent is left out.
    fn end_piece(&mut self, tag: usize, result: io::Result<()>) {
        let Some(running) = self.running.get_mut(&tag) else { return };
        running.under_way -= 1;
        if result.is_err() && running.result.is_ok() {
            running.result = result;
            running.rest = None;
        }
        if running.under_way == 0
            && running.rest.is_none()
            && let Some(Running { result, .. }) = self.running.remove(&tag)
        {
            self.ended.push(Ended { tag, result });
        }
    }

    fn take_answers(&mut self) {
        let answers = std::mem::take(&mut *self.answers.list());
        for (piece, result) in answers {
            let Some(Piece { tag, buffers }) = self.pieces.try_remove(piece) else { continue };
            let result = result.and_then(|bytes| fill(&buffers, &bytes, self.ram.as_ref()));
            self.end_piece(tag, result);
        }
    }
}

/// A piece of an operation, and what is left of that.
struct Cut {
    request: ServiceRequest,
    buffers: Buffers,
    rest: Option<Operation>,
}

impl Cut {
    fn whole(request: ServiceRequest) -> Self {
        Self { request, buffers: Buffers::default(), rest: None }
    }
}

fn cut(operation: Operation, ram: Option<&Arc<dyn GuestRam>>) -> io::Result<Cut> {
    Ok(match operation {
        Operation::Read { offset, buffers: mut rest } => {
            let buffers = rest.split_front(PIECE.into());
            let count = u32::try_from(buffers.bytes()).expect("a piece at most");
            let next = offset + u64::from(count);
            let rest = (!rest.is_empty()).then_some(Operation::Read { offset: next, buffers: rest });
            Cut { request: ServiceRequest::Read { offset, count }, buffers, rest }
        }
        Operation::Write { offset, buffers: mut rest, durable } => {
            let bytes = copy(&rest.split_front(PIECE.into()), ram)?;
            let next = offset + bytes.len() as u64;
            let rest =
                (!rest.is_empty()).then_some(Operation::Write { offset: next, buffers: rest, durable });
            let request = ServiceRequest::Write { offset, bytes, durable };
            Cut { request, buffers: Buffers::default(), rest }
        }
        Operation::Flush => Cut::whole(ServiceRequest::Flush),
        Operation::Discard { offset, bytes: count } => Cut::whole(ServiceRequest::Discard { offset, count }),
        Operation::WriteZeroes { offset, bytes: count, unmap, durable } => {
            Cut::whole(ServiceRequest::WriteZeroes { offset, count, unmap, durable })
        }
    })
}

fn started(ram: Option<&Arc<dyn GuestRam>>) -> io::Result<&Arc<dyn GuestRam>> {
    ram.ok_or_else(|| io::Error::other("the disk is not started"))
}

/// What a guest wants written.
fn copy(buffers: &Buffers, ram: Option<&Arc<dyn GuestRam>>) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(buffers.bytes()).expect("a piece at most")];
    buffers.reader(started(ram)?.view()).map_err(io::Error::other)?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Gives a guest what was read.
fn fill(buffers: &Buffers, bytes: &[u8], ram: Option<&Arc<dyn GuestRam>>) -> io::Result<()> {
    let wanted = buffers.bytes();
    if bytes.len() as u64 != wanted {
        return Err(io::Error::other(format!(
            "the block service answered with {} bytes, not {wanted}",
            bytes.len()
        )));
    }
    if bytes.is_empty() {
        return Ok(());
    }
    buffers.writer(started(ram)?.view()).map_err(io::Error::other)?.write_all(bytes)
}

impl Disk for ServiceDisk {
    fn start(&mut self, ram: &Arc<dyn GuestRam>) -> io::Result<()> {
        self.ram = Some(ram.clone());
        Ok(())
    }

    fn begin(&mut self, tag: usize, operation: Operation) {
        self.running.insert(tag, Running { rest: Some(operation), under_way: 0, result: Ok(()) });
        self.unsent.push_back(tag);
    }

    fn submit(&mut self) -> io::Result<()> {
        while self.pieces.len() < WINDOW
            && let Some(tag) = self.unsent.front().copied()
        {
            self.send(tag);
            if self.running.get(&tag).is_none_or(|running| running.rest.is_none()) {
                self.unsent.pop_front();
            }
        }
        Ok(())
    }

    fn take_ended(&mut self, ended: &mut Vec<Ended>) {
        self.take_answers();
        ended.append(&mut self.ended);
    }

    fn poll_ended(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Before the look, so that what is answered between the two is not missed.
        self.answers.waker.register(context.waker());
        self.take_answers();
        self.submit()?;
        if self.ended.is_empty() && self.answers.list().is_empty() {
            Poll::Pending
        } else {
            Poll::Ready(Ok(()))
        }
    }

    fn stop(&mut self) {
        // What is still answered is answered to nobody.
        self.answers = Arc::default();
        self.running.clear();
        self.unsent.clear();
        self.pieces.clear();
        self.ended.clear();
        self.ram = None;
    }
}
