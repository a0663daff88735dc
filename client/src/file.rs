//! A file of the client that the VMM reads over RPC, for channels that pass no descriptors.

use guest_schema::MAX_FILE_READ;
use guest_schema::common_capnp::file;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

/// Serves an open file. Its offset is neither used nor moved, and reads happen on the runtime's blocking threads.
pub(crate) struct FileServer(Arc<std::fs::File>);

impl FileServer {
    pub fn client(descriptor: OwnedFd) -> file::Client {
        capnp_rpc::new_client(Self(Arc::new(descriptor.into())))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&std::fs::File) -> std::io::Result<T> + Send + 'static,
    ) -> capnp::Result<T> {
        let file = self.0.clone();
        let done = tokio::task::spawn_blocking(move || work(&file)).await;
        done.map_err(|panicked| capnp::Error::failed(panicked.to_string()))?
            .map_err(|error| capnp::Error::failed(format!("cannot read the file: {error}")))
    }
}

impl file::Server for FileServer {
    async fn size(self: Rc<Self>, _: file::SizeParams, mut results: file::SizeResults) -> capnp::Result<()> {
        results.get().set_bytes(self.blocking(|file| Ok(file.metadata()?.len())).await?);
        Ok(())
    }

    async fn read(
        self: Rc<Self>,
        params: file::ReadParams,
        mut results: file::ReadResults,
    ) -> capnp::Result<()> {
        let (offset, count) = (params.get()?.get_offset(), params.get()?.get_count().min(MAX_FILE_READ));
        let bytes = self.blocking(move |file| read_at(file, offset, count)).await?;
        results.get().set_bytes(&bytes);
        Ok(())
    }
}

/// Reads `count` bytes, fewer only at the end of the file.
fn read_at(file: &std::fs::File, offset: u64, count: u32) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; count as usize];
    let mut filled = 0;
    while filled < bytes.len() {
        // Beyond the largest offset there is no file.
        let Some(position) = offset.checked_add(filled as u64).filter(|at| i64::try_from(*at).is_ok()) else {
            break;
        };
        match file.read_at(&mut bytes[filled..], position) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}
