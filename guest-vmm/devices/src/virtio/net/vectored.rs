//! Reads and writes of a descriptor that go from and to guest memory itself, in one system call.

// UNSAFETY: the kernel takes addresses, and guest memory is no Rust slice: the guest writes it meanwhile.
#![expect(unsafe_code, reason = "guest memory is read and written by the kernel")]

use rustix::io::Errno;
use std::ffi::c_int;
use std::io;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};
use vm_memory::VolatileSlice;

/// How many pieces one call takes (IOV_MAX of readv(2)).
pub(super) const MAX_PIECES: usize = 1024;

/// Pieces of memory for one call, in order.
pub(super) struct Pieces<'m> {
    pieces: Vec<libc::iovec>,
    bytes: usize,
    // The pieces borrow from memory for as long.
    memory: PhantomData<&'m mut [u8]>,
}

impl<'m> Pieces<'m> {
    /// None, with room for so many.
    pub(super) fn with_capacity(pieces: usize) -> Self {
        Self { pieces: Vec::with_capacity(pieces), bytes: 0, memory: PhantomData }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    /// How many bytes they have together.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn push(&mut self, base: *mut u8, length: usize) {
        self.pieces.push(libc::iovec { iov_base: base.cast(), iov_len: length });
        self.bytes += length;
    }

    /// Adds memory of this process, which may be written.
    pub(super) fn push_own(&mut self, bytes: &'m mut [u8]) {
        self.push(bytes.as_mut_ptr(), bytes.len());
    }

    /// Adds guest memory.
    pub(super) fn push_guest(&mut self, slice: &VolatileSlice<'m>) {
        // The mapping is plain memory for as long as 'm: the guard has nothing to keep.
        self.push(slice.ptr_guard_mut().as_ptr(), slice.len());
    }

    /// readv(2): fills the pieces from the first on, as far as there are bytes.
    pub(super) fn read(&mut self, from: impl AsFd) -> io::Result<usize> {
        // SAFETY: every piece borrows memory of its length for 'm, which may be written: exclusively borrowed, or guest
        // memory, which nothing in this process holds references to.
        let done = unsafe { libc::readv(from.as_fd().as_raw_fd(), self.pieces.as_ptr(), self.count()) };
        outcome(done)
    }

    /// writev(2): writes the pieces from the first on, as far as they are taken.
    pub(super) fn write(&self, to: impl AsFd) -> io::Result<usize> {
        // SAFETY: every piece borrows memory of its length for 'm, which is only read.
        let done = unsafe { libc::writev(to.as_fd().as_raw_fd(), self.pieces.as_ptr(), self.count()) };
        outcome(done)
    }

    /// sendmsg(2), without a signal if nobody is left to read: sends the pieces from the first on, as far as they are taken.
    pub(super) fn send(&self, to: impl AsFd) -> io::Result<usize> {
        // SAFETY: a structure of integers and pointers, for which zero is a value.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = self.pieces.as_ptr().cast_mut();
        message.msg_iovlen = self.pieces.len();
        // SAFETY: the message has nothing but pieces, which borrow memory of their length for 'm, and are only read.
        outcome(unsafe { libc::sendmsg(to.as_fd().as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) })
    }

    fn count(&self) -> c_int {
        c_int::try_from(self.pieces.len()).unwrap_or(c_int::MAX)
    }
}

fn outcome(done: isize) -> io::Result<usize> {
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Whether a call failed with one of these.
pub(super) fn failed_with(error: &io::Error, errors: &[Errno]) -> bool {
    errors.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}
