//! The guest's files, sealed: what the boot loader reads once more at a reset is what it read at create.
//!
//! A descriptor of a memfd that is sealed already is used as it is. Anything else is copied into one of our own.

use crate::config::Source;
use guest_schema::common_capnp::file;
use guest_schema::{Failure, GuestError, MAX_FILE_READ};
use rustix::fs::{MemfdFlags, SealFlags};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What must hold of a file that is used without being copied.
pub(crate) const SEALED: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// How long a client may take for each answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Obtains a file of at most `limit` bytes. `what` is the field that it was named in.
pub(crate) async fn obtain(source: Source, what: &'static str, limit: u64) -> Result<File, Failure> {
    match source {
        Source::Descriptor(descriptor) => {
            seal_elsewhere(descriptor.into(), what, limit).await?.map_err(|error| failure(what, &error))
        }
        Source::File(file) => {
            let copy = receive(&file, limit).await.map_err(|problem| failure(what, &problem))?;
            rustix::fs::fcntl_add_seals(&copy, SEALED).map_err(|error| failure(what, error))?;
            Ok(copy)
        }
    }
}

fn failure(what: &str, problem: impl std::fmt::Display) -> Failure {
    Failure::new(GuestError::KernelLoadFailure, format!("{what}: {problem}"))
}

fn too_large(bytes: u64, limit: u64) -> String {
    format!("{bytes} bytes do not fit into {limit} bytes of memory")
}

/// Copies on the blocking pool; what needs no copy does not wait for it.
async fn seal_elsewhere(file: File, what: &str, limit: u64) -> Result<io::Result<File>, Failure> {
    if is_sealed(&file) {
        return Ok(seal(file, limit));
    }
    let sealed = tokio::task::spawn_blocking(move || seal(file, limit)).await;
    sealed.map_err(|_| failure(what, "reading it panicked"))
}

fn is_sealed(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SEALED))
}

fn seal(file: File, limit: u64) -> io::Result<File> {
    let bytes = file.metadata()?.len();
    if bytes > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, too_large(bytes, limit)));
    }
    if is_sealed(&file) {
        return Ok(file);
    }
    let mut copy = memfd()?;
    // Read from the start whatever its offset, and no further than its size now.
    let mut from = At { file, position: 0 };
    io::copy(&mut (&mut from).take(bytes), &mut copy)?;
    rustix::fs::fcntl_add_seals(&copy, SEALED)?;
    Ok(copy)
}

/// An empty file in memory, which can be sealed.
pub(crate) fn memfd() -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(File::from(rustix::fs::memfd_create("guest-file", flags)?))
}

/// A file read at a position of its own: its offset may be shared with the client.
struct At {
    file: File,
    position: u64,
}

impl Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = rustix::io::pread(self.file.as_fd(), &mut *buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

/// Copies a client's file of at most `limit` bytes into one in memory, which is not sealed yet. Pages of zeros are left out.
pub(crate) async fn receive(file: &file::Client, limit: u64) -> Result<File, String> {
    let size = within(file.size_request().send().promise).await?;
    let bytes = size.get().map_err(|error| error.to_string())?.get_bytes();
    if bytes > limit {
        return Err(too_large(bytes, limit));
    }
    let copy = memfd().map_err(|error| error.to_string())?;
    copy.set_len(bytes).map_err(|error| error.to_string())?;
    let mut offset = 0;
    while offset < bytes {
        let count = u32::try_from(bytes - offset).map_or(MAX_FILE_READ, |rest| rest.min(MAX_FILE_READ));
        let mut request = file.read_request();
        request.get().set_offset(offset);
        request.get().set_count(count);
        let answer = within(request.send().promise).await?;
        let chunk =
            answer.get().and_then(|results| results.get_bytes()).map_err(|error| error.to_string())?;
        // Fewer bytes come only at the end of a file, so this one is not as long as it said; a file that came byte by byte could
        // also take for ever.
        if chunk.len() != count as usize {
            return Err(format!("{} bytes came at offset {offset} of {bytes}, not {count}", chunk.len()));
        }
        // A write to a memfd copies memory, a mebibyte at a time.
        write_pages(&copy, chunk, offset).map_err(|error| error.to_string())?;
        offset += chunk.len() as u64;
    }
    Ok(copy)
}

/// Writes what is not zeros, in pages. The file has its length already.
fn write_pages(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    const PAGE: usize = 4096;
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let pages: Vec<_> = bytes.chunks(PAGE).collect();
    let mut at = offset;
    for run in pages.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
        let length = run.iter().map(|page| page.len()).sum::<usize>();
        if !is_zero(run[0]) {
            let from = usize::try_from(at - offset).expect("within the bytes");
            file.write_all_at(&bytes[from..from + length], at)?;
        }
        at += length as u64;
    }
    Ok(())
}

async fn within<T>(answer: impl Future<Output = Result<T, capnp::Error>>) -> Result<T, String> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer.map_err(|error| format!("the client's file failed: {error}")),
        Err(_) => Err(format!("the client's file did not answer within {PATIENCE:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    #[test]
    fn a_file_is_copied_whole_whatever_its_offset_and_a_sealed_one_is_used() {
        let mut file = memfd().expect("a memfd");
        file.write_all(b"kernel").expect("written");
        let mut copy = seal(file.try_clone().expect("cloned"), 6).expect("sealed");
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.write_all(b"change"))
            .expect("the original may change");
        copy.seek(SeekFrom::Start(0)).expect("rewound");
        assert_eq!(io::read_to_string(&copy).expect("read"), "kernel");
        let inode = |file: &File| rustix::fs::fstat(file).expect("stat").st_ino;
        let again = seal(copy.try_clone().expect("cloned"), 6).expect("sealed");
        assert_eq!(inode(&again), inode(&copy));
        let error = seal(again, 5).expect_err("too large");
        assert_eq!(error.to_string(), "6 bytes do not fit into 5 bytes of memory");
    }
}
