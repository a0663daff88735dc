//! Snapshots of the fake's machines.

use super::{ExitOf, Lifecycle, Machine, refusal};
use guest_schema::SnapshotInfo;
use guest_schema::snapshot_capnp::snapshot;
use guest_transport::{Descriptors, broken};
use std::rc::Rc;

/// What the snapshot of any machine is found by.
pub const TOKEN: &[u8; 16] = b"an unguessed one";

/// The disks of any machine's snapshot.
pub const DISKS: [&str; 1] = ["root"];

/// A machine's snapshot, with the descriptors of the connection that it was found over. It tells its VPs only there.
pub struct Snapshot(pub Machine, pub Option<Descriptors>);

/// The id of a fork.
fn chosen(id: &str) -> &str {
    if id.is_empty() { "chosen" } else { id }
}

impl snapshot::Server for Snapshot {
    async fn info(
        self: Rc<Self>,
        _: snapshot::InfoParams,
        mut results: snapshot::InfoResults,
    ) -> capnp::Result<()> {
        let info = SnapshotInfo {
            parent: "one".into(),
            disks: DISKS.map(str::to_owned).to_vec(),
            vps: if self.1.is_some() { 2 } else { 0 },
            ..SnapshotInfo::default()
        };
        info.write(results.get().init_info());
        Ok(())
    }

    async fn launch(
        self: Rc<Self>,
        params: snapshot::LaunchParams,
        mut results: snapshot::LaunchResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let id = params.get_id()?.to_str()?;
        let descriptors = self.1.as_ref().expect("found over a connection");
        let end = descriptors.take(params.get_server_end()).expect("handed over");
        if let Some(failure) = refusal(id) {
            results.get().set_exit(broken(&failure));
            failure.write(results.get().init_error());
            return Ok(());
        }
        let fork = self.0.fork(id);
        fork.serve(end.into());
        results.get().set_id(chosen(id));
        results.get().set_exit(capnp_rpc::new_client(ExitOf(fork)));
        Ok(())
    }

    async fn launch_proxied(
        self: Rc<Self>,
        params: snapshot::LaunchProxiedParams,
        mut results: snapshot::LaunchProxiedResults,
    ) -> capnp::Result<()> {
        let id = params.get()?.get_id()?.to_str()?;
        let fork = self.0.fork(id);
        results.get().set_id(chosen(id));
        results.get().set_lifecycle(capnp_rpc::new_client(Lifecycle::new(fork.clone(), None)));
        results.get().set_exit(capnp_rpc::new_client(ExitOf(fork)));
        Ok(())
    }
}
