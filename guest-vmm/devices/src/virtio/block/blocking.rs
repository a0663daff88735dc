//! A disk whose operations block: a thread does one after the other, by way of a buffer between it and guest memory.

use super::disk::{Disk, Ended, Operation};
use crate::virtio::{Buffers, GuestRam};
use futures::task::AtomicWaker;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::mem::forget;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

/// The most that is moved at once, in bytes.
const BUFFER: usize = 1 << 20;

/// An image whose operations end before they return. Offsets and lengths are multiples of 512, inside the image.
pub(super) trait BlockingImage: Send + fmt::Debug + 'static {
    /// Reads as much as there is room for.
    fn read(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()>;

    /// Writes all of it.
    fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// Makes zeros. Without the means for it this is [`ErrorKind::Unsupported`], and zeros are written.
    fn zero(&mut self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()>;

    /// Gives the space back, or does nothing.
    fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()>;

    /// What was written is in the file, for whoever opens it next.
    fn flush(&mut self) -> io::Result<()>;

    /// What was written survives the host's crash.
    fn sync(&mut self) -> io::Result<()>;
}

/// A disk over a [`BlockingImage`], with its thread. Dropped, it waits for the operation that the thread is at.
pub(super) struct BlockingDisk {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Not handed over yet.
    begun: Vec<Job>,
    /// While it is started.
    ram: Option<Arc<dyn GuestRam>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to do.
    work: Condvar,
    /// The thread has ended what it was at.
    idle: Condvar,
    /// Who waits for what has ended.
    waker: AtomicWaker,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    ended: Vec<Ended>,
    /// The thread is at an operation.
    busy: bool,
    /// The image is to be flushed once there is nothing else to do.
    flush: bool,
    closed: bool,
}

struct Job {
    tag: usize,
    operation: Operation,
    /// `None` before the first start, and then it fails.
    ram: Option<Arc<dyn GuestRam>>,
}

enum Next {
    Job(Job),
    Flush,
    End,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what the thread is to do next.
    fn next(&self) -> Next {
        let mut state = self.state();
        loop {
            let next = match state.queue.pop_front() {
                Some(job) => Next::Job(job),
                None if std::mem::take(&mut state.flush) => Next::Flush,
                None if state.closed => return Next::End,
                None => {
                    state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            state.busy = true;
            return next;
        }
    }

    fn end(&self, ended: Option<Ended>) {
        let mut state = self.state();
        state.busy = false;
        state.ended.extend(ended);
        drop(state);
        self.idle.notify_all();
        self.waker.wake();
    }

    /// Nothing but what the thread is at goes on; waits for that, and for a flush.
    fn settle(&self) {
        let mut state = self.state();
        state.queue.clear();
        state.flush = true;
        self.work.notify_one();
        while state.busy || state.flush {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.ended.clear();
    }
}

impl BlockingDisk {
    /// A disk over this image, with a thread of this name.
    ///
    /// # Errors
    /// If the host has no thread.
    pub fn spawn(name: &str, image: impl BlockingImage) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut worker = Worker { image: Some(image), buffer: Vec::new() };
        let theirs = shared.clone();
        let run = move || worker.run(&theirs);
        let thread = std::thread::Builder::new().name(name.into()).spawn(run)?;
        Ok(Self { shared, thread: Some(thread), begun: Vec::new(), ram: None })
    }
}

impl fmt::Debug for BlockingDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thread = self.thread.as_ref().and_then(|thread| thread.thread().name());
        f.debug_struct("BlockingDisk").field("thread", &thread).finish_non_exhaustive()
    }
}

impl Disk for BlockingDisk {
    fn start(&mut self, ram: &Arc<dyn GuestRam>) -> io::Result<()> {
        self.ram = Some(ram.clone());
        Ok(())
    }

    fn begin(&mut self, tag: usize, operation: Operation) {
        self.begun.push(Job { tag, operation, ram: self.ram.clone() });
    }

    fn submit(&mut self) -> io::Result<()> {
        if !self.begun.is_empty() {
            self.shared.state().queue.extend(self.begun.drain(..));
            self.shared.work.notify_one();
        }
        Ok(())
    }

    fn take_ended(&mut self, ended: &mut Vec<Ended>) {
        ended.append(&mut self.shared.state().ended);
    }

    fn poll_ended(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.submit()?;
        // Before the look, so that what ends between the two is not missed.
        self.shared.waker.register(context.waker());
        if self.shared.state().ended.is_empty() { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn stop(&mut self) {
        self.begun.clear();
        self.shared.settle();
        self.ram = None;
    }
}

impl Drop for BlockingDisk {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.queue.clear();
        (state.flush, state.closed) = (true, true);
        drop(state);
        self.shared.work.notify_one();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a disk's thread has panicked");
        }
    }
}

/// What the thread has.
struct Worker<I> {
    /// `None` once it has panicked.
    image: Option<I>,
    buffer: Vec<u8>,
}

impl<I: BlockingImage> Worker<I> {
    fn run(&mut self, shared: &Shared) {
        loop {
            match shared.next() {
                Next::Job(Job { tag, operation, ram }) => {
                    let result = self.catch(|worker| worker.go(operation, ram.as_ref()));
                    // Guest memory is let go of before anyone is told.
                    drop(ram);
                    shared.end(Some(Ended { tag, result }));
                }
                Next::Flush => {
                    if let Err(error) = self.catch(|worker| worker.image()?.flush()) {
                        tracing::error!(%error, "an image could not be brought up to date");
                    }
                    shared.end(None);
                }
                Next::End => return,
            }
        }
    }

    /// A library that panics over an image takes the disk along, not the guest.
    fn catch(&mut self, call: impl FnOnce(&mut Self) -> io::Result<()>) -> io::Result<()> {
        catch_unwind(AssertUnwindSafe(|| call(self))).unwrap_or_else(|_| {
            // What it would write when dropped is not to be trusted.
            forget(self.image.take());
            Err(given_up())
        })
    }

    fn image(&mut self) -> io::Result<&mut I> {
        self.image.as_mut().ok_or_else(given_up)
    }

    fn go(&mut self, operation: Operation, ram: Option<&Arc<dyn GuestRam>>) -> io::Result<()> {
        let ram = ram.ok_or_else(|| io::Error::other("the disk is not started"))?;
        match operation {
            Operation::Read { offset, buffers } => self.read(offset, buffers, &**ram),
            Operation::Write { offset, buffers, durable } => {
                self.write(offset, buffers, &**ram)?;
                self.sync_if(durable)
            }
            Operation::Flush => self.sync_if(true),
            Operation::Discard { offset, bytes } => self.image()?.discard(offset, bytes),
            Operation::WriteZeroes { offset, bytes, unmap, durable } => {
                self.zero(offset, bytes, unmap)?;
                self.sync_if(durable)
            }
        }
    }

    /// The image, and the buffer, at least so many bytes of it that some are to be moved of.
    fn parts(&mut self, bytes: u64) -> io::Result<(&mut I, &mut [u8])> {
        let length = usize::try_from(bytes).map_or(BUFFER, |bytes| bytes.min(BUFFER));
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        Ok((self.image.as_mut().ok_or_else(given_up)?, &mut self.buffer[..length]))
    }

    fn read(&mut self, mut offset: u64, mut buffers: Buffers, ram: &dyn GuestRam) -> io::Result<()> {
        while !buffers.is_empty() {
            let (image, buffer) = self.parts(buffers.bytes())?;
            image.read(offset, buffer)?;
            let to = buffers.split_front(buffer.len() as u64);
            to.writer(ram.view()).map_err(io::Error::other)?.write_all(buffer)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    fn write(&mut self, mut offset: u64, mut buffers: Buffers, ram: &dyn GuestRam) -> io::Result<()> {
        while !buffers.is_empty() {
            let (image, buffer) = self.parts(buffers.bytes())?;
            let from = buffers.split_front(buffer.len() as u64);
            from.reader(ram.view()).map_err(io::Error::other)?.read_exact(buffer)?;
            image.write(offset, buffer)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        match self.image()?.zero(offset, bytes, unmap) {
            Err(error) if error.kind() == ErrorKind::Unsupported => self.write_zeroes(offset, bytes),
            result => result,
        }
    }

    fn write_zeroes(&mut self, mut offset: u64, bytes: u64) -> io::Result<()> {
        let end = offset + bytes;
        while offset < end {
            let (image, buffer) = self.parts(end - offset)?;
            buffer.fill(0);
            image.write(offset, buffer)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    fn sync_if(&mut self, durable: bool) -> io::Result<()> {
        if !durable {
            return Ok(());
        }
        let image = self.image()?;
        image.flush()?;
        image.sync()
    }
}

fn given_up() -> io::Error {
    io::Error::other("the image was given up when the library that reads it panicked")
}
