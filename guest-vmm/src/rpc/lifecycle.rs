//! GuestLifecycle: the lease.

use super::control::Control;
use super::guest::BoundGuest;
use super::keeper::Keeper;
use crate::config::RequestedGuest;
use crate::driver::{Command, DriverHandle};
use crate::snapshot::SnapshotFiles;
use guest_schema::Failure;
use guest_schema::config_capnp::guest_config;
use guest_schema::guest_capnp::{guest, guest_control, guest_lifecycle as lifecycle};
use guest_transport::{Descriptors, broken};
use std::rc::Rc;

/// The bootstrap capability of the lease's channel.
pub(crate) struct Lifecycle {
    driver: DriverHandle,
    descriptors: Descriptors,
    service: ServiceEnds,
}

/// What a lease has from the service that launched its VMM; nothing without one.
#[derive(Clone, Default)]
pub(crate) struct ServiceEnds {
    pub keeper: Option<Keeper>,
    /// What the lease's guests go on from, in place of being booted.
    pub snapshot: Option<SnapshotFiles>,
}

impl Lifecycle {
    pub fn new(driver: DriverHandle, descriptors: Descriptors, service: ServiceEnds) -> Self {
        Self { driver, descriptors, service }
    }

    /// What a create asks for. Its descriptors are taken from the channel whatever becomes of it.
    fn requested(&self, config: guest_config::Reader<'_>) -> capnp::Result<Result<RequestedGuest, Failure>> {
        match self.service.snapshot.as_ref().map(SnapshotFiles::open) {
            None => RequestedGuest::read(config, &self.descriptors).map(Ok),
            Some(Ok(snapshot)) => RequestedGuest::read_grants(config, &self.descriptors, snapshot).map(Ok),
            Some(Err(failure)) => RequestedGuest::read(config, &self.descriptors).map(|_| Err(failure)),
        }
    }
}

// Every method sends its command before its first await: calls take effect in the order in which they were sent.
impl lifecycle::Server for Lifecycle {
    async fn create(
        self: Rc<Self>,
        params: lifecycle::CreateParams,
        mut results: lifecycle::CreateResults,
    ) -> capnp::Result<()> {
        let created = match self.requested(params.get()?.get_config()?)? {
            Ok(requested) => self.driver.ask(|reply| Command::Create(Box::new(requested), reply)).await,
            Err(failure) => Err(failure),
        };
        Failure::write_result(&created, results.get().init_result());
        Ok(())
    }

    async fn bind(
        self: Rc<Self>,
        _: lifecycle::BindParams,
        mut results: lifecycle::BindResults,
    ) -> capnp::Result<()> {
        let bound = self.driver.ask(Command::Bind).await;
        let mut results = results.get();
        match bound {
            Ok(bound) => {
                let client: guest::Client = capnp_rpc::new_client(BoundGuest::new(bound));
                results.set_guest(client);
            }
            Err(failure) => {
                results.set_guest(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }

    async fn run(
        self: Rc<Self>,
        _: lifecycle::RunParams,
        mut results: lifecycle::RunResults,
    ) -> capnp::Result<()> {
        let ended = self.driver.ask(Command::Run).await;
        Failure::write_result(&ended, results.get().init_result());
        Ok(())
    }

    async fn stop(
        self: Rc<Self>,
        _: lifecycle::StopParams,
        mut results: lifecycle::StopResults,
    ) -> capnp::Result<()> {
        let stopped = self.driver.ask(Command::Stop).await;
        Failure::write_result(&stopped, results.get().init_result());
        Ok(())
    }

    async fn control(
        self: Rc<Self>,
        _: lifecycle::ControlParams,
        mut results: lifecycle::ControlResults,
    ) -> capnp::Result<()> {
        let bound = self.driver.ask(Command::Bind).await;
        let mut results = results.get();
        match bound {
            Ok(bound) => {
                let client: guest_control::Client = capnp_rpc::new_client(Control::new(
                    self.driver.clone(),
                    bound,
                    self.service.keeper.clone(),
                ));
                results.set_control(client);
            }
            Err(failure) => {
                results.set_control(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }
}
