//! One queue pair's end of a back end: how frames come in and go out.

use super::header::Header;
use super::stream::{StreamIncoming, StreamOutgoing};
use super::tap::{TapIncoming, TapOutgoing, set_features};
use super::vectored::Pieces;
use crate::virtio::watch;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use vm_memory::VolatileSlice;

/// Why a back end did not give or take a frame.
#[derive(Debug)]
pub(super) enum PortError {
    /// Not now.
    Blocked,
    /// This frame never, the next one perhaps.
    Frame,
    /// No more: the reason.
    Gone(String),
}

/// A frame from the driver. Its bytes are the guest's, and may change.
pub(super) struct Frame<'m> {
    pub header: Header,
    pub body: Vec<VolatileSlice<'m>>,
    pub bytes: usize,
}

/// How far a batch of frames came.
pub(super) struct Sent {
    /// How many were sent or cannot be, from the first on.
    pub count: usize,
    /// How many of these were dropped.
    pub dropped: usize,
    /// Why the others were not.
    pub stopped: Option<PortError>,
}

/// A non-blocking descriptor, and the runtime's watch on it.
#[derive(Debug)]
pub(super) enum Descriptor {
    Unwatched(OwnedFd),
    Watched(AsyncFd<OwnedFd>),
    /// The runtime cannot watch it.
    Lost,
}

impl Descriptor {
    /// Makes it non-blocking.
    pub(super) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(Self::Unwatched(descriptor))
    }

    /// Lets the runtime watch it, for good. On the I/O thread.
    pub(super) fn watch(&mut self) -> io::Result<()> {
        match std::mem::replace(self, Self::Lost) {
            Self::Unwatched(descriptor) => *self = Self::Watched(watch(descriptor)?),
            watched => *self = watched,
        }
        Ok(())
    }

    /// Waits until there is something to read, or an error. The guard is to be cleared once a read finds nothing.
    pub(super) async fn readable(&self) -> AsyncFdReadyGuard<'_, OwnedFd> {
        self.ready(Interest::READABLE).await
    }

    /// Waits until there is room to write, or an error. The guard is to be cleared once a write finds none.
    pub(super) async fn writable(&self) -> AsyncFdReadyGuard<'_, OwnedFd> {
        self.ready(Interest::WRITABLE).await
    }

    async fn ready(&self, interest: Interest) -> AsyncFdReadyGuard<'_, OwnedFd> {
        // A TAP device that was deleted shows as nothing but an error.
        if let Self::Watched(watched) = self
            && let Ok(guard) = watched.ready(interest | Interest::ERROR).await
        {
            return guard;
        }
        // The runtime is there for as long as its tasks.
        std::future::pending().await
    }

    /// The descriptor; `None` if it is lost.
    pub(super) fn get(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Unwatched(descriptor) => Some(descriptor.as_fd()),
            Self::Watched(watched) => Some(watched.get_ref().as_fd()),
            Self::Lost => None,
        }
    }
}

/// Frames on their way to the driver.
#[derive(Debug)]
pub(super) enum Incoming {
    Tap(TapIncoming),
    Stream(StreamIncoming),
}

/// A frame that the back end has read into guest memory itself.
pub(super) struct Direct {
    pub header: Header,
    pub bytes: usize,
}

impl Incoming {
    /// Whether frames can be read to guest memory itself, now.
    pub(super) fn reads_directly(&self) -> bool {
        matches!(self, Self::Tap(tap) if tap.frame().is_none())
    }

    /// Reads a frame into `pieces`, which have room for any.
    pub(super) fn read_into(
        &mut self,
        descriptor: BorrowedFd<'_>,
        pieces: &[VolatileSlice<'_>],
    ) -> Result<Direct, PortError> {
        match self {
            Self::Tap(tap) => tap.read_into(descriptor, pieces),
            Self::Stream(_) => Err(PortError::Frame),
        }
    }

    /// Reads a frame into memory of its own, unless one is there already.
    pub(super) fn stage(&mut self, descriptor: BorrowedFd<'_>) -> Result<(), PortError> {
        match self {
            Self::Tap(tap) => tap.stage(descriptor),
            Self::Stream(stream) => stream.stage(descriptor),
        }
    }

    /// The frame that is there.
    pub(super) fn frame(&self) -> Option<(Header, &[u8])> {
        match self {
            Self::Tap(tap) => tap.frame(),
            Self::Stream(stream) => stream.frame().map(|frame| (Header::default(), frame)),
        }
    }

    /// Forgets the frame that is there.
    pub(super) fn consume(&mut self) {
        match self {
            Self::Tap(tap) => tap.consume(),
            Self::Stream(stream) => stream.consume(),
        }
    }
}

/// Frames on their way from the driver.
#[derive(Debug)]
pub(super) enum Outgoing {
    Tap(TapOutgoing),
    Stream(StreamOutgoing),
}

impl Outgoing {
    /// Whether a frame is sent in part: the rest goes out with the next [`send`](Self::send), be it of no frames.
    pub(super) fn is_cut(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.is_cut())
    }

    /// Sends what of `frames` can be sent now; `None` stands for a frame that cannot be, and counts as sent.
    pub(super) fn send(&mut self, descriptor: BorrowedFd<'_>, frames: &[Option<Frame<'_>>]) -> Sent {
        match self {
            Self::Tap(tap) => tap.send(descriptor, frames),
            Self::Stream(stream) => stream.send(descriptor, frames),
        }
    }
}

/// One queue pair's end of a back end.
#[derive(Debug)]
pub(super) struct Port {
    pub descriptor: Descriptor,
    pub incoming: Incoming,
    pub outgoing: Outgoing,
}

/// Adds a frame's bytes.
pub(super) fn push_body<'m>(pieces: &mut Pieces<'m>, body: &[VolatileSlice<'m>]) {
    body.iter().for_each(|slice| pieces.push_guest(slice));
}

/// The error of a call that may also be interrupted; `None` to call again.
pub(super) fn blocked(error: &io::Error) -> Option<PortError> {
    (error.kind() == io::ErrorKind::WouldBlock).then_some(PortError::Blocked)
}

/// What `call` gives once it is not interrupted by a signal.
pub(super) fn uninterrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

impl Port {
    /// One whose back end is gone.
    pub(super) fn lost() -> Self {
        let incoming = Incoming::Stream(StreamIncoming::default());
        let outgoing = Outgoing::Stream(StreamOutgoing::default());
        Self { descriptor: Descriptor::Lost, incoming, outgoing }
    }

    /// Makes it ready for a driver that has accepted these features. On the I/O thread.
    pub(super) fn prepare(&mut self, features: u64) -> io::Result<()> {
        self.descriptor.watch()?;
        match (&self.outgoing, self.descriptor.get()) {
            (Outgoing::Tap(_), Some(descriptor)) => set_features(descriptor, features),
            _ => Ok(()),
        }
    }

    /// The driver uses it from now on, or does not.
    pub(super) fn attach(&mut self, used: bool) -> io::Result<()> {
        match (&mut self.outgoing, self.descriptor.get()) {
            (Outgoing::Tap(tap), Some(descriptor)) => tap.attach(descriptor, used),
            _ => Ok(()),
        }
    }
}
