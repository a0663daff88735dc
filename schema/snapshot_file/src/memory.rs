//! Guest memory as it is read: a file and what lies over it, without what are holes in both.

use crate::BLOCK;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// What of a file is no hole, in ascending order.
struct Extents {
    file: Arc<File>,
    bytes: u64,
    /// The one that was found last, or from where on there is none.
    found: Range<u64>,
}

impl Extents {
    fn new(file: Arc<File>, bytes: u64) -> Self {
        Self { file, bytes, found: 0..0 }
    }

    /// The first that ends behind `at`, which never goes back; empty at the end if there is none.
    fn from(&mut self, at: u64) -> io::Result<Range<u64>> {
        if at >= self.found.end && self.found.start < self.bytes {
            self.found = self.find(at)?;
        }
        Ok(self.found.clone())
    }

    /// The file's own offset, which is moved, is nobody's: all who share it read at offsets of their own.
    fn find(&self, at: u64) -> io::Result<Range<u64>> {
        let none = self.bytes..self.bytes;
        if at >= self.bytes {
            return Ok(none);
        }
        let start = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(start) if start < self.bytes => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(none),
            Err(error) => return Err(error.into()),
        };
        Ok(start..seek(&self.file, SeekFrom::Hole(start))?.min(self.bytes))
    }
}

/// Memory in a file, with pages of another over it.
pub(crate) struct MemorySource {
    base: Extents,
    layer: Option<Extents>,
}

impl MemorySource {
    /// Memory of so many bytes. What is not a hole in the layer is taken from it.
    pub fn new(base: Arc<File>, layer: Option<Arc<File>>, bytes: u64) -> Self {
        Self { base: Extents::new(base, bytes), layer: layer.map(|layer| Extents::new(layer, bytes)) }
    }

    /// The next part of memory, from `at` on, that may be anything but zeros: as much of it as is read at once, or empty and at the
    /// end. `at` never goes back.
    pub fn next(&mut self, at: u64) -> io::Result<Range<u64>> {
        let base = self.base.from(at)?;
        let Some(layer) = &mut self.layer else { return Ok(block(&base, at)) };
        let layer = layer.from(at)?;
        let (first, second) = if base.start <= layer.start { (base, layer) } else { (layer, base) };
        let end = if second.start <= first.end { first.end.max(second.end) } else { first.end };
        Ok(block(&(first.start..end), at))
    }

    /// Reads what is there at `at`, which never goes back further than to the start of the last block.
    pub fn read(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.base.file.read_exact_at(buffer, at)?;
        let Some(layer) = &mut self.layer else { return Ok(()) };
        let end = at + buffer.len() as u64;
        let mut from = at;
        while from < end {
            let data = layer.from(from)?;
            let part = data.start.max(from)..data.end.min(end);
            if part.start >= end {
                break;
            }
            let index = |offset: u64| usize::try_from(offset - at).expect("within the buffer");
            layer.file.read_exact_at(&mut buffer[index(part.start)..index(part.end)], part.start)?;
            from = part.end;
        }
        Ok(())
    }
}

/// What of an extent is read at once from `at` on.
fn block(extent: &Range<u64>, at: u64) -> Range<u64> {
    let start = extent.start.max(at);
    start..extent.end.min(start.saturating_add(BLOCK as u64))
}
