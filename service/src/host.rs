//! The bootstrap capability of a connection to the service.

use crate::Service;
use crate::export::Exports;
use crate::launch::Guest;
use crate::launcher::{Launcher, Snapshot, exit_of};
use futures::future::join_all;
use guest_schema::guest_capnp::{guest_control, observer};
use guest_schema::host_capnp::{guest_host, guest_info};
use guest_schema::{GuestState, PROTOCOL, Phase};
use guest_transport::{Descriptors, broken};
use std::rc::Rc;
use std::time::Duration;

/// How long a VMM may take to tell its state before the list goes out without it.
const STATE: Duration = Duration::from_secs(1);

/// What one client sees of the service.
pub(crate) struct Host {
    service: Rc<Service>,
    descriptors: Descriptors,
    uid: u32,
    launcher: Launcher,
    exports: Exports,
}

impl Host {
    pub fn new(service: Rc<Service>, descriptors: Descriptors, uid: u32) -> Self {
        let (passed, new) = (Some(descriptors.clone()), None);
        let launcher = Launcher { service: service.clone(), descriptors: passed, uid, snapshot: new };
        Self { service, descriptors, uid, launcher, exports: Exports::default() }
    }
}

impl guest_host::Server for Host {
    async fn launch(
        self: Rc<Self>,
        params: guest_host::LaunchParams,
        mut results: guest_host::LaunchResults,
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

    async fn launch_proxied(
        self: Rc<Self>,
        params: guest_host::LaunchProxiedParams,
        mut results: guest_host::LaunchProxiedResults,
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

    async fn find(
        self: Rc<Self>,
        params: guest_host::FindParams,
        mut results: guest_host::FindResults,
    ) -> capnp::Result<()> {
        let found = self.service.guests.find(self.uid, params.get()?.get_id()?.to_str()?);
        match found {
            Ok(guest) => {
                // The VMM's own answers go out as they come: a VMM that hangs does not hold up the search.
                let control = guest.vmm.control_request().send().pipeline.get_control();
                let observer = guest.vmm.observer_request().send().pipeline.get_observer();
                let mut results = results.get();
                results.set_id(&guest.id[..]);
                results.set_control(control);
                results.set_observer(observer);
                results.set_exit(exit_of(&guest));
            }
            Err(failure) => {
                let mut results = results.get();
                results.set_control(broken::<guest_control::Client>(&failure));
                results.set_observer(broken::<observer::Client>(&failure));
                results.set_exit(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }

    async fn list(
        self: Rc<Self>,
        _: guest_host::ListParams,
        mut results: guest_host::ListResults,
    ) -> capnp::Result<()> {
        let guests = self.service.guests.of(self.uid);
        let states = join_all(guests.iter().map(|guest| state_of(guest))).await;
        let count = u32::try_from(guests.len()).unwrap_or(u32::MAX);
        let mut list = results.get().init_guests(count);
        for (index, (guest, state)) in (0..count).zip(guests.iter().zip(&states)) {
            write_info(guest, state.as_ref(), list.reborrow().get(index));
        }
        Ok(())
    }

    async fn info(
        self: Rc<Self>,
        _: guest_host::InfoParams,
        mut results: guest_host::InfoResults,
    ) -> capnp::Result<()> {
        let mut info = results.get().init_info();
        info.set_version(env!("CARGO_PKG_VERSION"));
        info.set_protocol(PROTOCOL);
        info.set_guests(u32::try_from(self.service.guests.count()).unwrap_or(u32::MAX));
        info.set_warm(u32::try_from(self.service.pool.ready()).unwrap_or(u32::MAX));
        info.set_prepared(u32::try_from(self.service.pool.prepared()).unwrap_or(u32::MAX));
        info.set_hypervisor(&self.service.config.hypervisor[..]);
        Ok(())
    }

    async fn snapshot(
        self: Rc<Self>,
        params: guest_host::SnapshotParams,
        mut results: guest_host::SnapshotResults,
    ) -> capnp::Result<()> {
        let found = self.service.snapshots.find(self.uid, params.get()?.get_token()?);
        let mut results = results.get();
        match found {
            Ok(kept) => {
                let (service, passed) = (self.service.clone(), Some(self.descriptors.clone()));
                let snapshot = Snapshot::new(service, passed, self.uid, kept, self.exports.clone());
                results.set_snapshot(capnp_rpc::new_client(snapshot));
            }
            Err(failure) => {
                results.set_snapshot(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }
}

/// What the VMM says of its guest, if it says so in time and there is one.
async fn state_of(guest: &Guest) -> Option<GuestState> {
    let observer = guest.vmm.observer_request().send().pipeline.get_observer();
    let answer = tokio::time::timeout(STATE, observer.state_request().send().promise).await.ok()?.ok()?;
    GuestState::read(answer.get().ok()?.get_state().ok()?).ok()
}

fn write_info(guest: &Guest, state: Option<&GuestState>, mut info: guest_info::Builder<'_>) {
    info.set_id(&guest.id[..]);
    info.set_pid(guest.pid);
    info.set_proxied(guest.proxied);
    info.set_phase(state.map_or(Phase::Empty, |state| state.phase).into());
    info.set_uptime_us(state.map_or(0, |state| state.uptime_us));
    info.set_vps(state.map_or(0, |state| u32::try_from(state.vps.len()).unwrap_or(u32::MAX)));
}
