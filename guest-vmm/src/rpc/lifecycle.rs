//! GuestLifecycle: the lease.

use super::control::Control;
use super::guest::BoundGuest;
use crate::config::RequestedGuest;
use crate::driver::{Command, DriverHandle};
use guest_schema::Failure;
use guest_schema::guest_capnp::{guest, guest_control, guest_lifecycle as lifecycle};
use guest_transport::{Descriptors, broken};
use std::rc::Rc;

/// The bootstrap capability of the lease's channel.
pub(crate) struct Lifecycle {
    driver: DriverHandle,
    descriptors: Descriptors,
}

impl Lifecycle {
    pub fn new(driver: DriverHandle, descriptors: Descriptors) -> Self {
        Self { driver, descriptors }
    }
}

// Every method sends its command before its first await: calls take effect in the order in which they were sent.
impl lifecycle::Server for Lifecycle {
    async fn create(
        self: Rc<Self>,
        params: lifecycle::CreateParams,
        mut results: lifecycle::CreateResults,
    ) -> capnp::Result<()> {
        let requested = RequestedGuest::read(params.get()?.get_config()?, &self.descriptors)?;
        let created = self.driver.ask(|reply| Command::Create(Box::new(requested), reply)).await;
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
                let client: guest_control::Client =
                    capnp_rpc::new_client(Control::new(self.driver.clone(), bound));
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
