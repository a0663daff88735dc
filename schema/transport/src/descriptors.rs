//! Open descriptors beside the messages of a connection.
//!
//! A descriptor that is pushed goes out as SCM_RIGHTS with the next bytes that are written, and both ends number the
//! descriptors of one direction from 0. Since a message that names a number is written after the push, the descriptor is there
//! when the message is read.

// UNSAFETY: the runtime waits for descriptors by number, so somebody has to promise that they stay open.
#![expect(unsafe_code, reason = "the runtime waits for descriptors by number")]

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown,
};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How many received descriptors may wait to be taken; one more ends the connection.
pub const MAX_WAITING: usize = 512;

/// How many descriptors go with one write.
const PER_WRITE: usize = 16;

/// The most descriptors that Linux lets one message carry (SCM_MAX_FD).
const PER_READ: usize = 253;

/// Why a descriptor could not be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DescriptorError {
    /// Nothing with this number waits here.
    #[error("descriptor {0} was not handed over this channel, or was used before")]
    Unknown(u64),
}

struct Shared {
    /// Registered for reading alone: whoever waits for room in a socket is woken whenever its peer has read from it.
    stream: AsyncFd<OwnedFd>,
    outgoing: RefCell<VecDeque<OwnedFd>>,
    sent: Cell<u64>,
    waiting: RefCell<HashMap<u64, OwnedFd>>,
    received: Cell<u64>,
}

/// The descriptors of one connection. Those that nobody took are closed with it.
#[derive(Clone)]
pub struct Descriptors(Rc<Shared>);

impl Descriptors {
    /// Queues a descriptor and returns the number to put into the message, which must be sent afterwards.
    pub fn push(&self, descriptor: OwnedFd) -> u64 {
        let number = self.0.sent.get();
        self.0.sent.set(number + 1);
        self.0.outgoing.borrow_mut().push_back(descriptor);
        number
    }

    /// Takes a descriptor that the peer sent.
    pub fn take(&self, number: u64) -> Result<OwnedFd, DescriptorError> {
        self.0.waiting.borrow_mut().remove(&number).ok_or(DescriptorError::Unknown(number))
    }

    /// Closes the socket in both directions, and what waits here.
    pub(crate) fn close(&self) {
        self.0.waiting.borrow_mut().clear();
        self.0.outgoing.borrow_mut().clear();
        // Fails only if the peer has closed it already.
        let _ = rustix::net::shutdown(&self.0.stream, Shutdown::Both);
    }

    /// The socket's two halves, and the descriptors that travel on them.
    ///
    /// # Errors
    /// If the socket cannot be registered with the runtime.
    pub(crate) fn over(
        stream: UnixStream,
        received: Vec<OwnedFd>,
    ) -> io::Result<(ReadHalf, WriteHalf, Self)> {
        stream.set_nonblocking(true)?;
        let count = received.len() as u64;
        let shared = Rc::new(Shared {
            stream: watch(stream.into(), Interest::READABLE)?,
            outgoing: RefCell::default(),
            sent: Cell::new(0),
            waiting: RefCell::new((0..).zip(received).collect()),
            received: Cell::new(count),
        });
        Ok((ReadHalf(shared.clone()), WriteHalf { shared: shared.clone(), full: None }, Self(shared)))
    }
}

impl Shared {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PER_READ))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(buffer)];
        let message =
            rustix::net::recvmsg(self.stream.as_fd(), parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                self.keep(descriptors)?;
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the control data was truncated"));
        }
        Ok(message.bytes)
    }

    fn keep(&self, descriptors: impl Iterator<Item = OwnedFd>) -> io::Result<()> {
        let mut waiting = self.waiting.borrow_mut();
        for descriptor in descriptors {
            if waiting.len() >= MAX_WAITING {
                let text = format!("more than {MAX_WAITING} descriptors wait to be used");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            let number = self.received.get();
            self.received.set(number + 1);
            waiting.insert(number, descriptor);
        }
        Ok(())
    }

    /// Registers the socket a second time, for writing.
    fn watch_for_room(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let duplicate = self.stream.as_fd().try_clone_to_owned()?;
        watch(duplicate, Interest::WRITABLE)
    }

    fn send(&self, buffer: &[u8]) -> io::Result<usize> {
        let mut outgoing = self.outgoing.borrow_mut();
        let count = outgoing.len().min(PER_WRITE);
        let borrowed: Vec<BorrowedFd<'_>> = outgoing.iter().take(count).map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PER_WRITE))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if count > 0 {
            assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)), "the space is for PER_WRITE");
        }
        // A message must not be complete before its last descriptor has gone: send one byte at a time until the rest fits.
        let bytes = if outgoing.len() > count { &buffer[..buffer.len().min(1)] } else { buffer };
        let parts = &[IoSlice::new(bytes)];
        let written = rustix::net::sendmsg(self.stream.as_fd(), parts, &mut control, SendFlags::NOSIGNAL)?;
        drop(borrowed);
        if written > 0 {
            outgoing.drain(..count);
        }
        Ok(written)
    }
}

/// Registers a socket with the runtime.
fn watch(socket: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is open, and the same one, for as long as it is owned.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
}

/// The socket for reading.
pub(crate) struct ReadHalf(Rc<Shared>);

impl futures::AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let shared = &self.0;
        loop {
            let mut ready = ready!(shared.stream.poll_read_ready(cx))?;
            match ready.try_io(|_| shared.receive(buffer)) {
                Err(_would_block) => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(done) => return Poll::Ready(done),
            }
        }
    }
}

/// The socket for writing.
pub(crate) struct WriteHalf {
    shared: Rc<Shared>,
    /// The socket once more, while there is no room in it.
    full: Option<AsyncFd<OwnedFd>>,
}

impl futures::AsyncWrite for WriteHalf {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        let Self { shared, full } = &mut *self;
        loop {
            match shared.send(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let room = match full {
                        Some(room) => room,
                        None => full.insert(shared.watch_for_room()?),
                    };
                    ready!(room.poll_write_ready(cx))?.clear_ready();
                }
                done => {
                    *full = None;
                    return Poll::Ready(done);
                }
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(&self.shared.stream, Shutdown::Write) {
            Ok(()) | Err(Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}
