//! Where a snapshot's file is written to.

use crate::encode::{Piece, SnapshotEncoder};
use crate::error::WriteError;
use std::fs::File;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

/// The most zeros that are written at once.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What takes a file, from its beginning to its end.
pub trait Output {
    /// Takes what comes next.
    ///
    /// # Errors
    /// If it cannot be written.
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Takes so many zeros. Never the last of a file.
    ///
    /// # Errors
    /// If they cannot be written.
    fn zeros(&mut self, count: u64) -> io::Result<()>;
}

/// A file that is empty, in which zeros are left out as holes.
pub struct SparseOutput<'a> {
    file: &'a File,
    at: u64,
}

impl<'a> SparseOutput<'a> {
    /// From the beginning of this file on.
    pub fn new(file: &'a File) -> Self {
        Self { file, at: 0 }
    }
}

impl Output for SparseOutput<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn zeros(&mut self, count: u64) -> io::Result<()> {
        self.at += count;
        Ok(())
    }
}

/// A stream, to which all zeros are written.
pub struct StreamOutput<W>(pub W);

impl<W: Write> Output for StreamOutput<W> {
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn zeros(&mut self, mut count: u64) -> io::Result<()> {
        while count > 0 {
            let length = ZEROS.len().min(usize::try_from(count).unwrap_or(usize::MAX));
            self.0.write_all(&ZEROS[..length])?;
            count -= length as u64;
        }
        Ok(())
    }
}

/// Writes all of a snapshot's file. `progress` is told how many bytes of how many are done, holes included, and may end it. Blocks.
///
/// # Errors
/// If the snapshot cannot be read, the file not be written, or it was ended.
pub fn write(
    encoder: &mut SnapshotEncoder,
    output: &mut impl Output,
    mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(), WriteError> {
    while let Some(piece) = encoder.next_piece()? {
        match piece {
            Piece::Bytes(bytes) => output.bytes(bytes),
            Piece::Zeros(count) => output.zeros(count),
        }
        .map_err(WriteError::Output)?;
        if progress(encoder.at(), encoder.bytes()).is_break() {
            return Err(WriteError::Ended);
        }
    }
    Ok(())
}
