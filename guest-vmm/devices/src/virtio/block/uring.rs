//! A raw image through io_uring(7): one ring a disk, straight between the file and guest memory.
//!
//! Guest memory is given to the host address by address and never registered, so that pages which are given back stay given back.
//! Limits: no I/O without the host's page cache, unless the file was opened so.

// UNSAFETY: the kernel reads and writes memory at addresses in the ring after the call that hands them over.
#![expect(unsafe_code, reason = "io_uring works on addresses")]

use super::disk::{Disk, DiskImage, Ended, Operation};
use super::file::{ImageError, ImageFile};
use crate::virtio::{Buffers, GuestRam, watch};
use io_uring::types::{CancelBuilder, Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};
use slab::Slab;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::thread::sleep;
use std::time::Duration;
use tokio::io::unix::AsyncFd;

/// How many operations are handed over at once. More may be under way.
const ENTRIES: u32 = 256;

/// The disk's file in the ring's table.
const FILE: Fixed = Fixed(0);

/// The most pieces of memory that one call takes (IOV_MAX).
const MAX_PIECES: usize = 1024;

/// What a cancellation's own end is known by.
const CANCELLATION: u64 = u64::MAX;

/// Zeros to write where the host cannot make them otherwise.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// So many of them at once: a mebibyte.
const ZERO_PIECES: usize = 16;

/// A raw image.
pub struct UringDisk {
    ring: IoUring,
    /// Keeps the lock.
    _file: Arc<ImageFile>,
    jobs: Slab<Job>,
    /// Those that the ring had no room for.
    waiting: VecDeque<usize>,
    /// How many entries are in the ring that have not ended.
    under_way: usize,
    /// Ended without the host.
    failed: Vec<Ended>,
    /// What the host has answered; empty but while that is looked at.
    answers: Vec<(u64, i32)>,
    /// While it is started.
    ram: Option<Arc<dyn GuestRam>>,
    ready: Option<AsyncFd<OwnedFd>>,
}

impl fmt::Debug for UringDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringDisk").field("under_way", &self.under_way).finish_non_exhaustive()
    }
}

/// An operation that was begun.
struct Job {
    tag: usize,
    work: Work,
}

// SAFETY: the addresses are those of guest memory, or of static zeros; they are used by whoever has the disk.
unsafe impl Send for Job {}

enum Work {
    Read(Transfer),
    Write(Transfer, i32),
    Flush,
    Discard {
        offset: u64,
        bytes: u64,
    },
    Zero {
        offset: u64,
        bytes: u64,
        mode: i32,
        durable: bool,
    },
    /// The host cannot make zeros: they are written, and so many bytes of them follow.
    WriteZeroes(Transfer, u64, i32),
    /// What is there has to survive the host's crash.
    Sync,
}

/// Memory that moves from or to the file.
struct Transfer {
    offset: u64,
    pieces: Vec<libc::iovec>,
    /// The pieces before this one have been moved.
    first: usize,
}

impl UringDisk {
    /// The image in this file.
    ///
    /// # Errors
    /// [`ImageError::NoUring`].
    pub fn open(file: ImageFile) -> Result<DiskImage, ImageError> {
        // The kernel finishes work when this thread is in it anyway, instead of interrupting it.
        let ring = IoUring::builder().setup_coop_taskrun().dontfork().build(ENTRIES);
        let ring = ring.map_err(ImageError::NoUring)?;
        ring.submitter().register_files(&[file.as_raw_fd()]).map_err(ImageError::NoUring)?;
        let physical_block_bytes = file.physical_block_bytes();
        let file = Arc::new(file);
        let disk = Self {
            ring,
            _file: file.clone(),
            jobs: Slab::new(),
            waiting: VecDeque::new(),
            under_way: 0,
            failed: Vec::new(),
            answers: Vec::new(),
            ram: None,
            ready: None,
        };
        Ok(DiskImage { disk: Box::new(disk), size: file, physical_block_bytes })
    }

    /// Puts a job's next step into the ring, or into the line for it.
    fn push(&mut self, key: usize) {
        let entry = self.jobs[key].entry().user_data(key as u64);
        // SAFETY: what the entry refers to is in the job, which stays until the entry has ended, and in guest memory, which `ram`
        // keeps, or is static. Dropping the disk waits for the entry.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            self.under_way += 1;
        } else {
            self.waiting.push_back(key);
        }
    }

    /// Goes on with a job of which `result` has come.
    fn step(&mut self, key: usize, result: i32, ended: &mut Vec<Ended>) {
        match self.jobs[key].advance(result) {
            None => self.push(key),
            Some(result) => ended.push(Ended { tag: self.jobs.remove(key).tag, result }),
        }
    }

    fn transfer(&self, offset: u64, buffers: &Buffers) -> io::Result<Transfer> {
        let ram = self.ram.as_ref().ok_or_else(|| io::Error::other("the disk is not started"))?;
        let slices = buffers.slices(ram.view()).map_err(io::Error::other)?;
        let piece = |slice: &vm_memory::VolatileSlice<'_>| iovec(slice.ptr_guard_mut().as_ptr(), slice.len());
        Ok(Transfer { offset, pieces: slices.iter().map(piece).collect(), first: 0 })
    }

    fn work(&self, operation: &Operation) -> io::Result<Work> {
        Ok(match *operation {
            Operation::Read { offset, ref buffers } => Work::Read(self.transfer(offset, buffers)?),
            Operation::Write { offset, ref buffers, durable } => {
                Work::Write(self.transfer(offset, buffers)?, write_flags(durable))
            }
            Operation::Flush => Work::Flush,
            Operation::Discard { offset, bytes } => Work::Discard { offset, bytes },
            Operation::WriteZeroes { offset, bytes, unmap, durable } => {
                let mode = if unmap { FALLOC_FL_PUNCH_HOLE } else { FALLOC_FL_ZERO_RANGE };
                Work::Zero { offset, bytes, mode: mode | FALLOC_FL_KEEP_SIZE, durable }
            }
        })
    }

    /// Cancels what can be, and waits for all of it.
    fn abandon(&mut self) {
        self.waiting.clear();
        let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(CANCELLATION);
        // SAFETY: the entry refers to no memory. Without it, what is under way is waited for all the same.
        if self.under_way > 0 && unsafe { self.ring.submission().push(&cancel) }.is_ok() {
            self.under_way += 1;
        }
        while self.under_way > 0 {
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.kind() != ErrorKind::Interrupted
            {
                // Nothing else will do: whoever goes on could give the memory to somebody else.
                tracing::error!(%error, "waiting for a disk's last operations");
                sleep(Duration::from_millis(10));
            }
            self.under_way -= self.ring.completion().count();
        }
    }
}

fn write_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

fn iovec(start: *mut u8, length: usize) -> libc::iovec {
    libc::iovec { iov_base: start.cast(), iov_len: length }
}

impl Job {
    fn entry(&self) -> squeue::Entry {
        match &self.work {
            Work::Read(transfer) => transfer.read(),
            Work::Write(transfer, flags) => transfer.write(*flags),
            Work::WriteZeroes(transfer, _, flags) => transfer.write(*flags),
            Work::Flush | Work::Sync => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
            &Work::Discard { offset, bytes } => {
                let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(FILE, bytes).offset(offset).mode(mode).build()
            }
            &Work::Zero { offset, bytes, mode, .. } => {
                opcode::Fallocate::new(FILE, bytes).offset(offset).mode(mode).build()
            }
        }
    }

    /// What the host's answer makes of the job: its end, or one more step.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let moved = match usize::try_from(result) {
            Ok(moved) => moved,
            Err(_) if -result == libc::EINTR => return None,
            Err(_) => return self.refused(io::Error::from_raw_os_error(-result)),
        };
        match &mut self.work {
            Work::Read(transfer) => transfer.advance(moved, ErrorKind::UnexpectedEof),
            Work::Write(transfer, _) => transfer.advance(moved, ErrorKind::WriteZero),
            Work::WriteZeroes(transfer, rest, _) => match transfer.advance(moved, ErrorKind::WriteZero) {
                Some(Ok(())) if *rest > 0 => {
                    *transfer = Transfer::of_zeroes(transfer.offset, rest);
                    None
                }
                end => end,
            },
            Work::Zero { durable: true, .. } => {
                self.work = Work::Sync;
                None
            }
            Work::Flush | Work::Sync | Work::Discard { .. } | Work::Zero { .. } => Some(Ok(())),
        }
    }

    /// A file system that cannot discard need not; one that cannot make zeros is given some.
    fn refused(&mut self, error: io::Error) -> Option<io::Result<()>> {
        let unsupported =
            matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV));
        match self.work {
            Work::Discard { .. } if unsupported => Some(Ok(())),
            Work::Zero { offset, bytes, durable, .. } if unsupported => {
                let mut rest = bytes;
                let first = Transfer::of_zeroes(offset, &mut rest);
                self.work = Work::WriteZeroes(first, rest, write_flags(durable));
                None
            }
            _ => Some(Err(error)),
        }
    }
}

impl Transfer {
    /// So many zeros as are written at once; `rest` is how many bytes are left after that.
    fn of_zeroes(offset: u64, rest: &mut u64) -> Self {
        let mut pieces = Vec::with_capacity(ZERO_PIECES);
        while *rest > 0 && pieces.len() < ZERO_PIECES {
            let length = usize::try_from(*rest).map_or(ZEROES.len(), |rest| rest.min(ZEROES.len()));
            // Written from, never to.
            pieces.push(iovec(ZEROES.as_ptr().cast_mut(), length));
            *rest -= length as u64;
        }
        Self { offset, pieces, first: 0 }
    }

    fn rest(&self) -> &[libc::iovec] {
        let rest = &self.pieces[self.first..];
        &rest[..rest.len().min(MAX_PIECES)]
    }

    fn read(&self) -> squeue::Entry {
        match self.rest() {
            [piece] if u32::try_from(piece.iov_len).is_ok() => {
                opcode::Read::new(FILE, piece.iov_base.cast(), length(piece)).offset(self.offset).build()
            }
            pieces => opcode::Readv::new(FILE, pieces.as_ptr(), count(pieces)).offset(self.offset).build(),
        }
    }

    fn write(&self, flags: i32) -> squeue::Entry {
        match self.rest() {
            [piece] if u32::try_from(piece.iov_len).is_ok() => {
                let write = opcode::Write::new(FILE, piece.iov_base.cast(), length(piece));
                write.offset(self.offset).rw_flags(flags).build()
            }
            pieces => {
                let write = opcode::Writev::new(FILE, pieces.as_ptr(), count(pieces));
                write.offset(self.offset).rw_flags(flags).build()
            }
        }
    }

    /// So many bytes more were moved. None at all are the end, with an error of this kind if there is something left.
    fn advance(&mut self, moved: usize, none: ErrorKind) -> Option<io::Result<()>> {
        self.offset += moved as u64;
        let mut rest = moved;
        while let Some(piece) = self.pieces.get_mut(self.first) {
            if rest < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(rest).cast();
                piece.iov_len -= rest;
                return (moved == 0).then(|| Err(none.into()));
            }
            rest -= piece.iov_len;
            self.first += 1;
        }
        Some(Ok(()))
    }
}

fn length(piece: &libc::iovec) -> u32 {
    u32::try_from(piece.iov_len).expect("looked at before")
}

fn count(pieces: &[libc::iovec]) -> u32 {
    u32::try_from(pieces.len()).expect("at most IOV_MAX")
}

impl Disk for UringDisk {
    fn start(&mut self, ram: &Arc<dyn GuestRam>) -> io::Result<()> {
        // SAFETY: the ring is open for as long as this call.
        let ring = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        self.ready = Some(watch(ring.try_clone_to_owned()?)?);
        self.ram = Some(ram.clone());
        Ok(())
    }

    fn begin(&mut self, tag: usize, operation: Operation) {
        match self.work(&operation) {
            Ok(work) => {
                let key = self.jobs.insert(Job { tag, work });
                self.push(key);
            }
            Err(error) => self.failed.push(Ended { tag, result: Err(error) }),
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        loop {
            if self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // Not before some that are under way have ended.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    return if self.under_way > self.ring.submission().len() { Ok(()) } else { Err(error) };
                }
                Err(error) => return Err(error),
            }
            while let Some(key) = self.waiting.front().copied().filter(|_| !self.ring.submission().is_full())
            {
                self.waiting.pop_front();
                self.push(key);
            }
        }
    }

    fn take_ended(&mut self, ended: &mut Vec<Ended>) {
        ended.append(&mut self.failed);
        let mut answers = std::mem::take(&mut self.answers);
        answers.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
        self.under_way -= answers.len();
        for (key, result) in answers.drain(..) {
            self.step(usize::try_from(key).expect("a job's key"), result, ended);
        }
        self.answers = answers;
    }

    fn poll_ended(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What goes on with another step.
        self.submit()?;
        let Some(ready) = &self.ready else { return Poll::Ready(Err(io::Error::other("not started"))) };
        loop {
            if !self.failed.is_empty() || !self.ring.completion().is_empty() {
                return Poll::Ready(Ok(()));
            }
            // The ring is readable while there is something in it; what comes from now on makes it so anew.
            ready!(ready.poll_read_ready(context))?.clear_ready();
        }
    }

    fn stop(&mut self) {
        self.abandon();
        (self.ready, self.ram) = (None, None);
    }
}

impl Drop for UringDisk {
    fn drop(&mut self) {
        self.abandon();
        // The host takes a ring down in its own time, and would keep the image locked until then.
        if let Err(error) = self.ring.submitter().unregister_files() {
            tracing::warn!(%error, "an image stays locked until the host has taken its ring down");
        }
    }
}
