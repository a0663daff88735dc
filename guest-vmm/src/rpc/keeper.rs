//! Who keeps the guest's snapshots: the service that launched this VMM.

use crate::snapshot::SealedSnapshot;
use guest_schema::snapshot_capnp::snapshot;
use guest_schema::vmm_capnp::vmm_watcher;
use guest_schema::{Failure, GuestError};
use guest_transport::Descriptors;
use std::fs::File;
use std::sync::Arc;

/// The service, as far as it keeps snapshots.
#[derive(Clone)]
pub(crate) struct Keeper {
    watcher: vmm_watcher::Client,
    /// Of the service's channel.
    descriptors: Descriptors,
}

/// What is said where snapshots have nowhere to go.
pub(crate) fn nobody() -> Failure {
    Failure::new(GuestError::NotSupported, "snapshots are kept by the service, and there is none")
}

/// A snapshot that is kept, and what finds it.
pub(crate) struct KeptSnapshot {
    pub snapshot: snapshot::Client,
    pub token: Vec<u8>,
}

impl Keeper {
    pub fn new(watcher: vmm_watcher::Client, descriptors: Descriptors) -> Self {
        Self { watcher, descriptors }
    }

    /// Hands a snapshot over.
    pub async fn keep(&self, sealed: SealedSnapshot) -> Result<KeptSnapshot, Failure> {
        self.send(&sealed).await.map_err(|error| match error.kind {
            capnp::ErrorKind::Disconnected => nobody(),
            _ => Failure::new(GuestError::InternalError, format!("the service keeps no snapshot: {error}")),
        })?
    }

    async fn send(&self, sealed: &SealedSnapshot) -> capnp::Result<Result<KeptSnapshot, Failure>> {
        let mut request = self.watcher.keep_request();
        let mut parts = request.get().init_parts();
        let files: Vec<_> = sealed.files.iter().collect();
        let length = u32::try_from(files.len()).expect("there are few");
        let mut list = parts.reborrow().init_files(length);
        for (index, (name, file)) in (0..).zip(files) {
            let mut entry = list.reborrow().get(index);
            entry.set_name(name.name());
            entry.set_descriptor(self.push(file)?);
        }
        sealed.info.write(parts.init_info());
        let answer = request.send().promise.await?;
        let results = answer.get()?;
        if results.has_error() {
            return Ok(Err(Failure::read(results.get_error()?)?));
        }
        Ok(Ok(KeptSnapshot { snapshot: results.get_snapshot()?, token: results.get_token()?.to_vec() }))
    }

    fn push(&self, file: &Arc<File>) -> capnp::Result<u64> {
        let descriptor = file.try_clone().map_err(|error| capnp::Error::failed(error.to_string()))?;
        Ok(self.descriptors.push(descriptor.into()))
    }
}
