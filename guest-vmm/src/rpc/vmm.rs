//! Vmm: the service's private channel.

use super::control::Control;
use super::keeper::Keeper;
use super::lifecycle::ServiceEnds;
use super::observer::Observed;
use crate::driver::{Command, DriverHandle};
use crate::snapshot::SnapshotFiles;
use guest_schema::guest_capnp::{guest_control, observer};
use guest_schema::vmm_capnp::{vmm, vmm_watcher};
use guest_schema::{Failure, GuestError, GuestShape};
use guest_transport::{Descriptors, broken};
use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::oneshot;

/// What the service has handed over.
pub(crate) struct Attached {
    pub lease: OwnedFd,
    pub id: String,
    pub watcher: vmm_watcher::Client,
    pub service: ServiceEnds,
}

/// The bootstrap capability of the service's channel.
pub(crate) struct VmmChannel {
    driver: DriverHandle,
    descriptors: Descriptors,
    attach: RefCell<Option<oneshot::Sender<Attached>>>,
    /// Once a lease is attached.
    keeper: RefCell<Option<Keeper>>,
}

impl VmmChannel {
    /// Serves the channel; the first lease is sent to `attach`.
    pub fn new(driver: DriverHandle, descriptors: Descriptors, attach: oneshot::Sender<Attached>) -> Self {
        Self { driver, descriptors, attach: RefCell::new(Some(attach)), keeper: RefCell::default() }
    }

    fn attach(
        &self,
        number: u64,
        id: String,
        watcher: vmm_watcher::Client,
        snapshot: Option<SnapshotFiles>,
    ) -> Result<(), Failure> {
        let lease = self.descriptors.take(number);
        let lease =
            lease.map_err(|error| Failure::new(GuestError::BadConfig, format!("serverEnd: {error}")))?;
        let attach = self.attach.borrow_mut().take();
        let attach =
            attach.ok_or_else(|| Failure::new(GuestError::AlreadyRunning, "a lease was attached before"))?;
        let gone = |_| Failure::new(GuestError::InternalError, "the VMM is ending");
        let keeper = Keeper::new(watcher.clone(), self.descriptors.clone());
        self.keeper.replace(Some(keeper.clone()));
        let service = ServiceEnds { keeper: Some(keeper), snapshot };
        attach.send(Attached { lease, id, watcher, service }).map_err(gone)
    }

    /// Takes the files of a snapshot that came over the channel, if there is one.
    fn take_snapshot(
        &self,
        params: vmm::attach_params::Reader<'_>,
    ) -> capnp::Result<Result<Option<SnapshotFiles>, Failure>> {
        if !params.has_snapshot() {
            return Ok(Ok(None));
        }
        let mut files = Vec::new();
        for file in params.get_snapshot()?.get_files()?.iter() {
            let name = file.get_name()?.to_string()?;
            match self.descriptors.take(file.get_descriptor()) {
                Ok(descriptor) => files.push((name, File::from(descriptor))),
                Err(error) => {
                    let problem = format!("snapshot: {name}: {error}");
                    return Ok(Err(Failure::new(GuestError::BadConfig, problem)));
                }
            }
        }
        Ok(SnapshotFiles::from_named(files).map(Some))
    }
}

fn no_guest() -> Failure {
    Failure::new(GuestError::NotCreated, "no guest was created")
}

impl vmm::Server for VmmChannel {
    async fn attach(
        self: Rc<Self>,
        params: vmm::AttachParams,
        mut results: vmm::AttachResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let id = params.get_id()?.to_string()?;
        let watcher = params.get_watcher()?;
        let attached = self
            .take_snapshot(params)?
            .and_then(|snapshot| VmmChannel::attach(&self, params.get_server_end(), id, watcher, snapshot));
        Failure::write_result(&attached, results.get().init_result());
        Ok(())
    }

    async fn control(
        self: Rc<Self>,
        _: vmm::ControlParams,
        mut results: vmm::ControlResults,
    ) -> capnp::Result<()> {
        let mut results = results.get();
        match self.driver.current() {
            Some(guest) => {
                let control: guest_control::Client = capnp_rpc::new_client(Control::new(
                    self.driver.clone(),
                    guest,
                    self.keeper.borrow().clone(),
                ));
                results.set_control(control);
            }
            None => {
                results.set_control(broken(&no_guest()));
                no_guest().write(results.init_error());
            }
        }
        Ok(())
    }

    async fn observer(
        self: Rc<Self>,
        _: vmm::ObserverParams,
        mut results: vmm::ObserverResults,
    ) -> capnp::Result<()> {
        let mut results = results.get();
        match self.driver.current() {
            Some(guest) => {
                let observer: observer::Client = capnp_rpc::new_client(Observed::new(guest));
                results.set_observer(observer);
            }
            None => {
                results.set_observer(broken(&no_guest()));
                no_guest().write(results.init_error());
            }
        }
        Ok(())
    }

    async fn prepare(
        self: Rc<Self>,
        params: vmm::PrepareParams,
        mut results: vmm::PrepareResults,
    ) -> capnp::Result<()> {
        let shape = GuestShape::read(params.get()?.get_shape()?)?;
        let is_free = self.attach.borrow().is_some();
        let prepared = match is_free {
            true => self.driver.prepare(&shape).await,
            false => Err(Failure::new(GuestError::AlreadyRunning, "a lease was attached before")),
        };
        Failure::write_result(&prepared, results.get().init_result());
        Ok(())
    }

    async fn shutdown(
        self: Rc<Self>,
        params: vmm::ShutdownParams,
        mut results: vmm::ShutdownResults,
    ) -> capnp::Result<()> {
        let deadline = Duration::from_millis(params.get()?.get_deadline_ms().into());
        let ended = self.driver.ask(|reply| Command::End("the service ends", reply));
        let ended = tokio::time::timeout(deadline, ended).await.unwrap_or_else(|_| {
            Err(Failure::new(GuestError::TransitionTimedOut, format!("not stopped within {deadline:?}")))
        });
        Failure::write_result(&ended, results.get().init_result());
        Ok(())
    }
}
