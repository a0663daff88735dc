//! Snapshots: guests at one moment, from which others go on.

use crate::call::{Call, failure_beside};
use crate::error::ClientError;
use crate::host::{Host, Launched, Lease, read_launched};
use crate::serial::{SerialOutput, Sink};
use guest_schema::snapshot_capnp::snapshot;
use guest_schema::{Failure, GuestConfig, SnapshotInfo};
use guest_snapshot_file::SnapshotSource;
use std::rc::Rc;

/// A guest at one moment, which the service keeps; immutable. It outlives its guest, and lasts for as long as anybody refers to it and
/// the service runs. Clones share one reference.
///
/// A guest is launched from it as by the [`Host`], and goes on from here with its first `run`. The config of its `create` carries grants
/// only: a source for each disk and a back end for each network device, in the order of the snapshot's, each disk's mode, the listeners
/// of the vsock device, and the units that clients implement. All else is the snapshot's and is not looked at; a kernel is `badConfig`.
/// `create` may also be refused with `snapshotIncompatible` (the host lacks what the guest has; the detail names it) and
/// `snapshotCorrupt`.
#[derive(Clone)]
pub struct Snapshot {
    client: snapshot::Client,
    token: Rc<[u8]>,
    host: Option<Host>,
}

impl Snapshot {
    /// `host` is the connection that the capability came over; none for one that came over its guest's channel.
    pub(crate) fn new(client: snapshot::Client, token: &[u8], host: Option<Host>) -> Self {
        Self { client, token: token.into(), host }
    }

    /// What others of the same user find it by, for as long as anybody refers to it: [`Host::snapshot`].
    pub fn token(&self) -> &[u8] {
        &self.token
    }

    /// What it has.
    pub fn info(&self) -> Call<SnapshotInfo> {
        Call::send(self.client.info_request(), self.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let info = SnapshotInfo::read(results.get_info()?)?;
            Ok(refused.map(|()| info))
        })
    }

    /// As [`Host::launch`], of a guest that goes on from here.
    ///
    /// # Errors
    /// As `Host::launch`, and if this came over its guest's channel, because the connection to the service was closed before: find it by
    /// its token then.
    pub fn launch(&self, id: &str) -> Result<Launched, ClientError> {
        let host = self.host()?;
        let (lease, theirs) = Lease::new()?;
        let mut request = self.client.launch_request();
        request.get().set_server_end(host.pass(theirs));
        request.get().set_id(id);
        Ok(host.launched(lease, request.send().promise, |results| {
            read_launched(results.has_error(), results.get_error(), results.get_id(), results.get_exit())
        }))
    }

    /// As [`Host::launch_proxied`], of a guest that goes on from here.
    ///
    /// # Errors
    /// If this came over its guest's channel, as in [`Self::launch`].
    pub fn launch_proxied(&self, id: &str) -> Result<Launched, ClientError> {
        let host = self.host()?;
        let mut request = self.client.launch_proxied_request();
        request.get().set_id(id);
        let sent = request.send();
        let lease = Lease::proxied(sent.pipeline.get_lifecycle(), host);
        Ok(host.launched(lease, sent.promise, |results| {
            read_launched(results.has_error(), results.get_error(), results.get_id(), results.get_exit())
        }))
    }

    /// Whether `create` with these grants would be refused, as far as that can be told without making a guest: as many disks and networks
    /// as it needs, listeners only for a vsock device, each of the clients' units that has a state, no kernel; and states of known types
    /// that can be decoded. Files, back ends and capabilities that are granted are not looked at, nor what the host lacks.
    ///
    /// # Errors
    /// As of `create`: `badConfig` with every fault, `snapshotIncompatible` and `snapshotCorrupt` with the units.
    pub fn can_restore(&self, grants: &GuestConfig) -> Call<()> {
        let mut request = self.client.can_restore_request();
        grants.write(request.get().init_grants().init_as());
        Call::send(request, self.clone(), |results| Failure::read_result(results.get_result()?))
    }

    /// The files that it consists of, sealed: whoever holds them has the snapshot without the service. [`Self::save`] writes them as
    /// one.
    ///
    /// # Errors
    /// If this came over its guest's channel, as in [`Self::launch`].
    pub fn files(&self) -> Call<SnapshotSource> {
        let host = match self.host() {
            Ok(host) => host.clone(),
            Err(error) => return Call::around(std::future::ready(Err(error))),
        };
        Call::send(self.client.files_request(), self.clone(), move |results| {
            let parts = results.get_parts()?;
            // Taken even if they come with a refusal, so that none is left waiting on the channel.
            let files =
                parts.get_files()?.iter().map(|file| host.take_file(file)).collect::<capnp::Result<_>>()?;
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let info = SnapshotInfo::read(parts.get_info()?)?;
            Ok(refused.map(|()| SnapshotSource { files, info }))
        })
    }

    /// Writes its file to `output`, as fast as that takes it, with zeros for the memory that has nothing. Answers once all of it is
    /// taken. For a client that cannot be passed descriptors: [`Self::save`] is faster.
    pub fn export(&self, output: impl SerialOutput) -> Call<()> {
        let mut request = self.client.export_request();
        request.get().set_output(capnp_rpc::new_client(Sink(output)));
        Call::send(request, self.clone(), |results| Failure::read_result(results.get_result()?))
    }

    fn host(&self) -> Result<&Host, ClientError> {
        self.host.as_ref().ok_or_else(|| ClientError::Local {
            what: "cannot launch from a snapshot, or have its files",
            reason: "it came over its guest's channel: find it by its token".into(),
        })
    }
}
