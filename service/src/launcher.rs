//! Launches for one client, of new guests and of those that go on from a snapshot; and `Snapshot`, which does nothing else.

use crate::Service;
use crate::export::Exports;
use crate::launch::{Guest, Order};
use crate::proxy::ProxiedLifecycle;
use crate::restorable::can_restore;
use crate::snapshots::Kept;
use guest_schema::guest_capnp::guest_lifecycle;
use guest_schema::host_capnp::guest_exit;
use guest_schema::snapshot_capnp::snapshot;
use guest_schema::vmm_capnp::snapshot_parts;
use guest_schema::{Failure, GuestConfig, GuestError};
use guest_transport::{Connection, Descriptors, Limits, broken};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

/// Who launches guests, and what they begin with.
pub(crate) struct Launcher {
    pub service: Rc<Service>,
    /// What the client passes with its calls; `None` where they come over a channel that is not the client's own.
    pub descriptors: Option<Descriptors>,
    pub uid: u32,
    /// What the guests go on from; `None` for new ones.
    pub snapshot: Option<Rc<Kept>>,
}

impl Launcher {
    /// Launches a guest whose lease is the channel with this number.
    pub async fn launch(&self, server_end: u64, id: &str) -> Result<Rc<Guest>, Failure> {
        self.service.await_id(id).await;
        let bad = |problem: String| Failure::new(GuestError::BadConfig, format!("serverEnd: {problem}"));
        let Some(descriptors) = &self.descriptors else {
            return Err(bad(
                "none comes with this capability: GuestHost.snapshot finds one that takes them".into()
            ));
        };
        let lease = descriptors.take(server_end).map_err(|error| bad(error.to_string()))?;
        self.start(id, lease, false)
    }

    /// Launches a guest whose lease is the lifecycle that is returned.
    pub async fn launch_proxied(&self, id: &str) -> Result<(Rc<Guest>, guest_lifecycle::Client), Failure> {
        self.service.await_id(id).await;
        let no_channel = |error: std::io::Error| {
            Failure::new(GuestError::FailedServiceConnect, format!("no channel for the guest: {error}"))
        };
        let (ours, theirs) = UnixStream::pair().map_err(no_channel)?;
        let channel = Connection::client(ours, Limits::of_client()).map_err(no_channel)?;
        let guest = self.start(id, theirs.into(), true)?;
        Ok((guest, capnp_rpc::new_client(ProxiedLifecycle::new(channel))))
    }

    fn start(&self, id: &str, lease: OwnedFd, proxied: bool) -> Result<Rc<Guest>, Failure> {
        let id = id.to_owned();
        self.service.launch(Order { id, lease, uid: self.uid, proxied, snapshot: self.snapshot.clone() })
    }
}

/// The account of a guest's end.
pub(crate) fn exit_of(guest: &Guest) -> guest_exit::Client {
    capnp_rpc::new_client(guest.ending.clone())
}

/// A snapshot's capability. It holds the snapshot, and belongs to the client whose descriptors it takes.
pub(crate) struct Snapshot {
    kept: Rc<Kept>,
    launcher: Launcher,
    exports: Exports,
}

impl Snapshot {
    /// For a client of this user, whose exports are these.
    pub fn new(
        service: Rc<Service>,
        descriptors: Option<Descriptors>,
        uid: u32,
        kept: Rc<Kept>,
        exports: Exports,
    ) -> Self {
        let launcher = Launcher { service, descriptors, uid, snapshot: Some(kept.clone()) };
        Self { kept, launcher, exports }
    }
}

impl Snapshot {
    fn write_files(&self, parts: snapshot_parts::Builder<'_>) -> Result<(), Failure> {
        let Some(descriptors) = &self.launcher.descriptors else {
            let detail =
                "files: none come with this capability: GuestHost.snapshot finds one with which they do";
            return Err(Failure::new(GuestError::BadConfig, detail));
        };
        let files = self.kept.duplicate().map_err(|error| {
            Failure::new(GuestError::InternalError, format!("files: they cannot be passed on: {error}"))
        })?;
        files.write(descriptors, parts);
        Ok(())
    }
}

impl snapshot::Server for Snapshot {
    async fn info(
        self: Rc<Self>,
        _: snapshot::InfoParams,
        mut results: snapshot::InfoResults,
    ) -> capnp::Result<()> {
        let (info, mut results) = (&self.kept.info, results.get());
        results.set_memory_bytes(info.memory_bytes);
        results.set_parent(&info.parent[..]);
        let mut units = results.reborrow().init_units(u32::try_from(info.units.len()).unwrap_or(u32::MAX));
        (0..).zip(&info.units).for_each(|(index, unit)| units.set(index, &unit[..]));
        info.write(results.init_info());
        Ok(())
    }

    async fn launch(
        self: Rc<Self>,
        params: snapshot::LaunchParams,
        mut results: snapshot::LaunchResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let launched = self.launcher.launch(params.get_server_end(), params.get_id()?.to_str()?).await;
        let mut results = results.get();
        match launched {
            Ok(guest) => {
                results.set_id(&guest.id[..]);
                results.set_exit(exit_of(&guest));
            }
            Err(failure) => {
                results.set_exit(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }

    async fn can_restore(
        self: Rc<Self>,
        params: snapshot::CanRestoreParams,
        mut results: snapshot::CanRestoreResults,
    ) -> capnp::Result<()> {
        let grants = GuestConfig::read(params.get()?.get_grants().get_as()?)?;
        let answer = can_restore(&self.kept, &grants).await;
        Failure::write_result(&answer, results.get().init_result());
        Ok(())
    }

    async fn export(
        self: Rc<Self>,
        params: snapshot::ExportParams,
        mut results: snapshot::ExportResults,
    ) -> capnp::Result<()> {
        let output = params.get()?.get_output()?;
        let exported = self.exports.export(self.kept.source(), &output).await;
        Failure::write_result(&exported, results.get().init_result());
        Ok(())
    }

    async fn files(
        self: Rc<Self>,
        _: snapshot::FilesParams,
        mut results: snapshot::FilesResults,
    ) -> capnp::Result<()> {
        let mut results = results.get();
        if let Err(failure) = self.write_files(results.reborrow().init_parts()) {
            failure.write(results.init_error());
        }
        Ok(())
    }

    async fn launch_proxied(
        self: Rc<Self>,
        params: snapshot::LaunchProxiedParams,
        mut results: snapshot::LaunchProxiedResults,
    ) -> capnp::Result<()> {
        let launched = self.launcher.launch_proxied(params.get()?.get_id()?.to_str()?).await;
        let mut results = results.get();
        match launched {
            Ok((guest, lifecycle)) => {
                results.set_lifecycle(lifecycle);
                results.set_id(&guest.id[..]);
                results.set_exit(exit_of(&guest));
            }
            Err(failure) => {
                results.set_lifecycle(broken(&failure));
                results.set_exit(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }
}
