//! The floor of disks: io_uring on a file, as tightly as it goes.

// UNSAFETY: the kernel reads and writes memory at addresses in the ring.
#![expect(unsafe_code, reason = "io_uring works on addresses")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::ensure;
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};

use super::block::Pattern;

/// Alignment of each buffer: what direct I/O needs anywhere.
const ALIGNMENT: usize = 4096;

/// A ring with a file, and memory.
pub struct Bare {
    ring: IoUring,
    memory: Vec<u8>,
}

impl Bare {
    pub fn new(file: &File, bytes: usize) -> anyhow::Result<Self> {
        let ring = IoUring::builder().setup_coop_taskrun().build(256)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self { ring, memory: vec![0x5a; bytes + ALIGNMENT] })
    }

    /// Plays a pattern: so many operations are always under way, and each round trip to the kernel begins as many as have ended.
    pub fn play(&mut self, mut pattern: Pattern) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        (0..pattern.depth).try_for_each(|slot| self.push(&mut pattern, slot))?;
        let mut done = 0;
        let mut slots = Vec::new();
        while done < pattern.operations {
            self.ring.submit_and_wait(1)?;
            for entry in self.ring.completion() {
                ensure!(
                    entry.result() == i32::try_from(pattern.bytes)?,
                    "an operation gave {}",
                    entry.result()
                );
                slots.push(usize::try_from(entry.user_data())?);
            }
            done += slots.len();
            for slot in slots.drain(..) {
                self.push(&mut pattern, slot)?;
            }
        }
        Ok(begin.elapsed())
    }

    fn push(&mut self, pattern: &mut Pattern, slot: usize) -> anyhow::Result<()> {
        let Some(offset) = pattern.next_offset() else { return Ok(()) };
        let start = self.memory.as_ptr().align_offset(ALIGNMENT) + slot * pattern.bytes;
        let place = &mut self.memory[start..start + pattern.bytes];
        let length = u32::try_from(pattern.bytes)?;
        let entry = if pattern.writes {
            opcode::Write::new(Fixed(0), place.as_ptr(), length).offset(offset).build()
        } else {
            opcode::Read::new(Fixed(0), place.as_mut_ptr(), length).offset(offset).build()
        };
        // SAFETY: the memory belongs to the ring's owner, which waits for everything before it ends.
        unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) }?;
        Ok(())
    }
}
