//! A guest's core dump, read over RPC and written to a file.

use crate::guest::Control;
use crate::{Call, ClientError};
use futures::stream::{self, StreamExt};
use guest_schema::MAX_FILE_READ;
use guest_schema::common_capnp::file;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// How many reads are on their way at a time.
const READS: usize = 4;

/// What is left out of a file if it is all zeros: a page of memory and, on most filesystems, a block.
const PAGE: usize = 4096;

/// A core dump that the guest's VMM computes as it is read.
pub struct CoreDump {
    client: file::Client,
    /// The guest's lease is not this one's to hold, but its channel is.
    _kept: Control,
}

/// Why a core dump could not be written.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// It could not be read.
    #[error(transparent)]
    Read(#[from] ClientError),
    /// The file could not be written.
    #[error("the file cannot be written")]
    Write(#[source] io::Error),
    /// It ended before its size was reached.
    #[error("the core dump ended after {read} of {bytes} bytes")]
    Short {
        /// Where it ended.
        read: u64,
        /// Its size.
        bytes: u64,
    },
}

impl CoreDump {
    pub(crate) fn new(client: file::Client, kept: Control) -> Self {
        Self { client, _kept: kept }
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> Call<u64> {
        Call::send(self.client.size_request(), (), |results| Ok(Ok(results.get_bytes())))
    }

    /// At most `count` bytes from `offset` on, at most 1 MiB, fewer only at the end. Fails once the guest has ended.
    pub fn read(&self, offset: u64, count: u32) -> Call<Vec<u8>> {
        let mut request = self.client.read_request();
        request.get().set_offset(offset);
        request.get().set_count(count);
        Call::send(request, (), |results| Ok(Ok(results.get_bytes()?.to_vec())))
    }

    /// Writes all of it to an empty file, pages of zeros as holes. `progress` is told how many bytes of how many are done.
    pub async fn save(&self, to: &File, mut progress: impl FnMut(u64, u64)) -> Result<(), DumpError> {
        let bytes = self.bytes().await?;
        progress(0, bytes);
        let offsets = (0..bytes).step_by(MAX_FILE_READ as usize);
        let mut reads = stream::iter(offsets)
            .map(|offset| async move { (offset, self.read(offset, MAX_FILE_READ).await) })
            .buffered(READS);
        while let Some((offset, chunk)) = reads.next().await {
            let chunk = chunk?;
            let done = offset + chunk.len() as u64;
            if done != bytes.min(offset + u64::from(MAX_FILE_READ)) {
                return Err(DumpError::Short { read: done, bytes });
            }
            write_sparse(to, &chunk, offset).map_err(DumpError::Write)?;
            progress(done, bytes);
        }
        // A hole at the end too belongs to the file.
        to.set_len(bytes).map_err(DumpError::Write)
    }
}

fn write_sparse(to: &File, chunk: &[u8], offset: u64) -> io::Result<()> {
    for (page, at) in chunk.chunks(PAGE).zip((offset..).step_by(PAGE)) {
        if page.iter().any(|byte| *byte != 0) {
            to.write_all_at(page, at)?;
        }
    }
    Ok(())
}
