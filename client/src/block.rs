//! Disks whose data this process keeps for a guest.

use guest_schema::block_capnp::block_service;
use guest_schema::{BlockServiceInfo, Failure, GuestError, MAX_BLOCK_TRANSFER};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FallocateFlags, FileType, SeekFrom, fallocate, fdatasync, fstat, seek};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

/// How many zeros are written at a time where the file system cannot make them.
const ZEROS: u64 = 1 << 20;

/// A block service over a raw image: an open regular file or block device, to be put into a
/// [`DiskSource`](crate::DiskSource). Its size is the disk's, and does not change.
///
/// The image is locked (F_OFD_SETLK of fcntl(2)) until the last reference to the service is dropped: for writing, or for reading
/// alone, as guests lock images that they are given as descriptors. Operations happen on the runtime's blocking threads.
///
/// # Errors
/// If the file is no image or was not opened for what is to be done with it, and [`ErrorKind::ResourceBusy`] if it is locked.
pub fn image_service(image: impl Into<OwnedFd>, writable: bool) -> io::Result<block_service::Client> {
    let file = File::from(image.into());
    let stat = fstat(&file)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
        let problem = format!("it is neither a regular file nor a block device but {kind:?}");
        return Err(io::Error::new(ErrorKind::InvalidInput, problem));
    }
    lock(&file, writable)?;
    // Of a block device, stat tells no size.
    let bytes = seek(&file, SeekFrom::End(0))?;
    let block_bytes = u32::try_from(stat.st_blksize).unwrap_or(512).clamp(512, 64 << 10);
    let block_bytes = if block_bytes.is_power_of_two() { block_bytes } else { 512 };
    let info = BlockServiceInfo { bytes, block_bytes, read_only: !writable };
    Ok(capnp_rpc::new_client(ImageService { file: Arc::new(file), info }))
}

fn lock(file: &File, writable: bool) -> io::Result<()> {
    let kind = if writable { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock = libc::flock {
        l_type: libc::c_short::try_from(kind).expect("a small number"),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
        Err(Errno::EAGAIN | Errno::EACCES) => {
            let problem = "it is in use: another process or guest holds a lock on it";
            Err(io::Error::new(ErrorKind::ResourceBusy, problem))
        }
        // A file system without locks has none to respect.
        Ok(_) | Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

struct ImageService {
    file: Arc<File>,
    info: BlockServiceInfo,
}

/// The part of a disk that a call is about.
#[derive(Debug, Clone, Copy)]
struct Part {
    offset: u64,
    count: u64,
}

impl ImageService {
    /// Carries out what a call asks for, if it may.
    async fn part<T: Send + 'static>(
        &self,
        part: Part,
        work: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let Part { offset, count } = part;
        let bytes = self.info.bytes;
        if offset.checked_add(count).is_none_or(|end| end > bytes) {
            let problem = format!("{count} bytes at {offset} are not within {bytes}");
            return Err(Failure::new(GuestError::BadConfig, problem));
        }
        self.blocking(work).await
    }

    /// The same for one that changes something.
    async fn change(
        &self,
        part: Part,
        work: impl FnOnce(&File) -> io::Result<()> + Send + 'static,
    ) -> Result<(), Failure> {
        if self.info.read_only {
            return Err(Failure::new(GuestError::NotSupported, "the image is only read"));
        }
        self.part(part, work).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let file = self.file.clone();
        let failure = |error: String| Failure::new(GuestError::InternalError, error);
        let done = tokio::task::spawn_blocking(move || work(&file)).await;
        done.map_err(|panicked| failure(panicked.to_string()))?.map_err(|error| failure(error.to_string()))
    }
}

impl block_service::Server for ImageService {
    async fn info(
        self: Rc<Self>,
        _: block_service::InfoParams,
        mut results: block_service::InfoResults,
    ) -> capnp::Result<()> {
        self.info.write(results.get().init_info());
        Ok(())
    }

    async fn read(
        self: Rc<Self>,
        params: block_service::ReadParams,
        mut results: block_service::ReadResults,
    ) -> capnp::Result<()> {
        let (offset, count) = (params.get()?.get_offset(), params.get()?.get_count());
        let read = match count {
            0..=MAX_BLOCK_TRANSFER => {
                let part = Part { offset, count: count.into() };
                self.part(part, move |file| {
                    let mut bytes = vec![0; count as usize];
                    file.read_exact_at(&mut bytes, offset).map(|()| bytes)
                })
                .await
            }
            _ => Err(too_much(count as usize)),
        };
        match read {
            Ok(bytes) => results.get().set_bytes(&bytes),
            Err(failure) => failure.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn write(
        self: Rc<Self>,
        params: block_service::WriteParams,
        mut results: block_service::WriteResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let (offset, bytes, durable) = (params.get_offset(), params.get_bytes()?, params.get_durable());
        let written = if bytes.len() > MAX_BLOCK_TRANSFER as usize {
            Err(too_much(bytes.len()))
        } else {
            let part = Part { offset, count: bytes.len() as u64 };
            let bytes = bytes.to_vec();
            self.change(part, move |file| {
                file.write_all_at(&bytes, offset)?;
                sync_if(file, durable)
            })
            .await
        };
        Failure::write_result(&written, results.get().init_result());
        Ok(())
    }

    async fn flush(
        self: Rc<Self>,
        _: block_service::FlushParams,
        mut results: block_service::FlushResults,
    ) -> capnp::Result<()> {
        let flushed = self.blocking(|file| sync_if(file, true)).await;
        Failure::write_result(&flushed, results.get().init_result());
        Ok(())
    }

    async fn discard(
        self: Rc<Self>,
        params: block_service::DiscardParams,
        mut results: block_service::DiscardResults,
    ) -> capnp::Result<()> {
        let part = Part { offset: params.get()?.get_offset(), count: params.get()?.get_count() };
        let discarded = self.change(part, move |file| match deallocate(file, part) {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            result => result,
        });
        Failure::write_result(&discarded.await, results.get().init_result());
        Ok(())
    }

    async fn write_zeroes(
        self: Rc<Self>,
        params: block_service::WriteZeroesParams,
        mut results: block_service::WriteZeroesResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let part = Part { offset: params.get_offset(), count: params.get_count() };
        let (unmap, durable) = (params.get_unmap(), params.get_durable());
        let zeroed = self.change(part, move |file| {
            zero(file, part, unmap)?;
            sync_if(file, durable)
        });
        Failure::write_result(&zeroed.await, results.get().init_result());
        Ok(())
    }
}

fn too_much(bytes: usize) -> Failure {
    let problem = format!("{bytes} bytes are more than the {MAX_BLOCK_TRANSFER} of one call");
    Failure::new(GuestError::LimitExceeded, problem)
}

fn sync_if(file: &File, durable: bool) -> io::Result<()> {
    if durable { Ok(fdatasync(file)?) } else { Ok(()) }
}

fn deallocate(file: &File, part: Part) -> io::Result<()> {
    allocation(file, part, FallocateFlags::PUNCH_HOLE)
}

fn zero(file: &File, part: Part, unmap: bool) -> io::Result<()> {
    let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    match allocation(file, part, how) {
        Err(error) if error.kind() == ErrorKind::Unsupported => write_zeros(file, part),
        result => result,
    }
}

fn allocation(file: &File, Part { offset, count }: Part, how: FallocateFlags) -> io::Result<()> {
    if count == 0 {
        return Ok(());
    }
    Ok(fallocate(file, how | FallocateFlags::KEEP_SIZE, offset, count)?)
}

fn write_zeros(file: &File, Part { mut offset, count }: Part) -> io::Result<()> {
    let end = offset + count;
    let zeros = vec![0; usize::try_from(count.min(ZEROS)).expect("a mebibyte at most")];
    while offset < end {
        let piece = &zeros[..usize::try_from((end - offset).min(ZEROS)).expect("a mebibyte at most")];
        file.write_all_at(piece, offset)?;
        offset += piece.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use capnp::capability::Promise;
    use std::fs::OpenOptions;
    use tokio::task::LocalSet;

    fn image(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        file
    }

    fn open(image: &tempfile::NamedTempFile, write: bool) -> File {
        OpenOptions::new().read(true).write(write).open(image.path()).expect("there")
    }

    fn run(test: impl Future<Output = capnp::Result<()>>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        LocalSet::new().block_on(&runtime, test).expect("answers");
    }

    async fn done<R>(
        answer: Promise<R, capnp::Error>,
        result: impl FnOnce(&R) -> capnp::Result<guest_schema::common_capnp::result::Reader<'_>>,
    ) -> Result<(), GuestError> {
        let answer = answer.await.expect("an answer");
        let result = Failure::read_result(result(&answer).expect("a result")).expect("readable");
        result.map_err(|failure| failure.code)
    }

    async fn write(service: &block_service::Client, offset: u64, bytes: &[u8]) -> Result<(), GuestError> {
        let mut call = service.write_request();
        call.get().set_offset(offset);
        call.get().set_bytes(bytes);
        call.get().set_durable(true);
        done(call.send().promise, |results| results.get()?.get_result()).await
    }

    async fn zero(service: &block_service::Client, offset: u64, count: u64, unmap: bool) {
        let mut call = service.write_zeroes_request();
        call.get().set_offset(offset);
        call.get().set_count(count);
        call.get().set_unmap(unmap);
        let zeroed = done(call.send().promise, |results| results.get()?.get_result()).await;
        assert_eq!(zeroed, Ok(()));
    }

    async fn read(service: &block_service::Client, offset: u64, count: u32) -> Result<Vec<u8>, GuestError> {
        let mut call = service.read_request();
        call.get().set_offset(offset);
        call.get().set_count(count);
        let answer = call.send().promise.await.expect("an answer");
        let results = answer.get().expect("readable");
        if results.has_error() {
            return Err(results.get_error().and_then(Failure::read).expect("a failure").code);
        }
        Ok(results.get_bytes().expect("bytes").to_vec())
    }

    #[test]
    fn an_image_is_read_and_written_where_it_says() {
        let image = image(&[7; 8192]);
        run(async {
            let service = image_service(open(&image, true), true)?;
            let answer = service.info_request().send().promise.await?;
            let info = BlockServiceInfo::read(answer.get()?.get_info()?);
            assert_eq!((info.bytes, info.read_only), (8192, false));
            assert_eq!(write(&service, 512, &[1; 1024]).await, Ok(()));
            zero(&service, 1024, 512, false).await;
            zero(&service, 4096, 4096, true).await;
            let expected = [&[7; 512][..], &[1; 512], &[0; 512], &[7; 2560], &[0; 4096]].concat();
            assert_eq!(read(&service, 0, 8192).await.as_ref(), Ok(&expected));
            assert_eq!(done(service.flush_request().send().promise, |r| r.get()?.get_result()).await, Ok(()));
            assert_eq!(std::fs::read(image.path()).expect("there"), expected);
            Ok(())
        });
    }

    #[test]
    fn what_is_outside_or_too_much_is_refused() {
        let image = image(&vec![7; 1 << 20]);
        run(async {
            let service = image_service(open(&image, true), true)?;
            assert_eq!(read(&service, (1 << 20) - 512, 1024).await, Err(GuestError::BadConfig));
            assert_eq!(read(&service, u64::MAX, 512).await, Err(GuestError::BadConfig));
            assert_eq!(write(&service, 1 << 20, &[1; 512]).await, Err(GuestError::BadConfig));
            let more = MAX_BLOCK_TRANSFER + 512;
            assert_eq!(read(&service, 0, more).await, Err(GuestError::LimitExceeded));
            assert_eq!(write(&service, 0, &vec![0; more as usize]).await, Err(GuestError::LimitExceeded));
            assert_eq!(std::fs::read(image.path()).expect("there"), vec![7; 1 << 20]);
            Ok(())
        });
    }

    #[test]
    fn an_image_that_is_only_read_stays_as_it_is() {
        let image = image(&[7; 512]);
        run(async {
            let service = image_service(open(&image, false), false)?;
            assert_eq!(write(&service, 0, &[1; 512]).await, Err(GuestError::NotSupported));
            assert_eq!(read(&service, 0, 512).await, Ok(vec![7; 512]));
            Ok(())
        });
    }

    #[test]
    fn one_writes_or_many_read_and_what_is_no_image_says_so() {
        let image = image(&[7; 512]);
        let busy = |writable| {
            let refused = image_service(open(&image, true), writable).err().expect("taken");
            assert_eq!(refused.kind(), ErrorKind::ResourceBusy);
        };
        let writer = image_service(open(&image, true), true).expect("free");
        busy(true);
        busy(false);
        drop(writer);
        let readers = [(); 2].map(|()| image_service(open(&image, false), false).expect("free"));
        busy(true);
        drop(readers);
        let refused = image_service(File::open("/").expect("there"), false).err().expect("a folder");
        assert_eq!(refused.to_string(), "it is neither a regular file nor a block device but Directory");
        let refused = image_service(open(&image, false), true).err().expect("not for writing");
        assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
    }
}
