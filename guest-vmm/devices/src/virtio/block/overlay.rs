//! A disk of which writes stay in memory: the image below is only read.
//!
//! A read is one read of the image at most, from the first to the last sector that was not written, over which what was written is
//! laid. A discard gives memory back, and shows the image again.
//!
//! Limits: memory is copied on the I/O thread; no bound below that of [`Clusters`]; what was written cannot be saved.

use super::clusters::Clusters;
use super::disk::{Disk, DiskImage, Ended, Operation};
use crate::virtio::{Buffers, GuestRam};
use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::task::{Context, Poll};

/// A disk of which writes stay in memory, over one that is read. Dropped, it takes them along.
pub struct Overlay {
    image: Box<dyn Disk>,
    written: Clusters,
    /// Reads that the image has, by tag: where, and whereto.
    reads: HashMap<usize, (u64, Buffers)>,
    /// Ended without the image.
    ended: Vec<Ended>,
    /// While it is started.
    ram: Option<Arc<dyn GuestRam>>,
}

impl fmt::Debug for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { image, written, reads, .. } = self;
        let mut shown = f.debug_struct("Overlay");
        shown.field("image", image).field("written", written).field("reads", &reads.len());
        shown.finish_non_exhaustive()
    }
}

impl Overlay {
    /// The image, of which nothing is written.
    pub fn over(image: DiskImage) -> DiskImage {
        let DiskImage { disk, size, physical_block_bytes } = image;
        let overlay = Self {
            image: disk,
            written: Clusters::default(),
            reads: HashMap::new(),
            ended: Vec::new(),
            ram: None,
        };
        DiskImage { disk: Box::new(overlay), size, physical_block_bytes }
    }

    fn ram(&self) -> io::Result<&Arc<dyn GuestRam>> {
        self.ram.as_ref().ok_or_else(|| io::Error::other("the disk is not started"))
    }

    /// Begins a read; whether it has ended.
    fn read(&mut self, tag: usize, offset: u64, mut buffers: Buffers) -> io::Result<bool> {
        let end = offset + buffers.bytes();
        let Some(absent) = self.written.absent(offset..end) else {
            return self.fill(offset, &buffers).map(|()| true);
        };
        self.fill(offset, &buffers.split_front(absent.start - offset))?;
        self.fill(absent.end, &buffers.split_back(end - absent.end))?;
        self.image.begin(tag, Operation::Read { offset: absent.start, buffers: buffers.clone() });
        self.reads.insert(tag, (absent.start, buffers));
        Ok(false)
    }

    /// Lays what was written over what is in the buffers.
    fn fill(&self, offset: u64, buffers: &Buffers) -> io::Result<()> {
        let mut writer = buffers.writer(self.ram()?.view()).map_err(io::Error::other)?;
        for (run, data) in self.written.runs(offset..offset + buffers.bytes()) {
            match data {
                Some(data) => writer.write_all(data)?,
                None => writer.skip(run.end - run.start),
            }
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, buffers: &Buffers) -> io::Result<()> {
        let ram = self.ram()?.clone();
        let mut reader = buffers.reader(ram.view()).map_err(io::Error::other)?;
        self.written.write(offset..offset + buffers.bytes(), &mut reader)
    }

    /// Begins an operation; whether it has ended.
    fn go(&mut self, tag: usize, operation: Operation) -> io::Result<bool> {
        match operation {
            Operation::Read { offset, buffers } => return self.read(tag, offset, buffers),
            Operation::Write { offset, buffers, .. } => self.write(offset, &buffers)?,
            Operation::WriteZeroes { offset, bytes, .. } => self.written.zero(offset..offset + bytes)?,
            Operation::Discard { offset, bytes } => self.written.forget(offset..offset + bytes),
            Operation::Flush => {}
        }
        Ok(true)
    }
}

impl Disk for Overlay {
    fn start(&mut self, ram: &Arc<dyn GuestRam>) -> io::Result<()> {
        self.image.start(ram)?;
        self.ram = Some(ram.clone());
        Ok(())
    }

    fn begin(&mut self, tag: usize, operation: Operation) {
        match self.go(tag, operation) {
            Ok(false) => {}
            Ok(true) => self.ended.push(Ended { tag, result: Ok(()) }),
            Err(error) => self.ended.push(Ended { tag, result: Err(error) }),
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        self.image.submit()
    }

    fn take_ended(&mut self, ended: &mut Vec<Ended>) {
        ended.append(&mut self.ended);
        let first = ended.len();
        self.image.take_ended(ended);
        for Ended { tag, result } in &mut ended[first..] {
            // What was written meanwhile is newer than what the image gave.
            if let (Some((offset, buffers)), Ok(())) = (self.reads.remove(tag), &result) {
                *result = self.fill(offset, &buffers);
            }
        }
    }

    fn poll_ended(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ended.is_empty() { self.image.poll_ended(context) } else { Poll::Ready(Ok(())) }
    }

    fn stop(&mut self) {
        self.image.stop();
        self.reads.clear();
        self.ended.clear();
        self.ram = None;
    }

    fn unsaveable(&self) -> Option<&'static str> {
        Some("what the guest writes to the disk stays in this process's memory (volatileWrite)")
    }
}
