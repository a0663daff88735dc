//! GuestControl: the operator's capability, to the guest of one create.

use super::debugger;
use super::observer::{Observed, inspected};
use crate::config::refused;
use crate::driver::{Command, DriverHandle};
use crate::guest::Guest;
use guest_schema::guest_capnp::{guest_control, observer};
use guest_schema::{Failure, UnitConfig};
use guest_transport::broken;
use inspect::View;
use std::rc::Rc;

/// A guest, controlled.
pub(crate) struct Control {
    driver: DriverHandle,
    guest: Rc<Guest>,
}

impl Control {
    pub fn new(driver: DriverHandle, guest: Rc<Guest>) -> Self {
        Self { driver, guest }
    }
}

impl guest_control::Server for Control {
    async fn pause(
        self: Rc<Self>,
        _: guest_control::PauseParams,
        mut results: guest_control::PauseResults,
    ) -> capnp::Result<()> {
        Failure::write_result(
            &self.driver.ask_of(&self.guest, Command::Pause).await,
            results.get().init_result(),
        );
        Ok(())
    }

    async fn resume(
        self: Rc<Self>,
        _: guest_control::ResumeParams,
        mut results: guest_control::ResumeResults,
    ) -> capnp::Result<()> {
        Failure::write_result(
            &self.driver.ask_of(&self.guest, Command::Resume).await,
            results.get().init_result(),
        );
        Ok(())
    }

    async fn reset(
        self: Rc<Self>,
        _: guest_control::ResetParams,
        mut results: guest_control::ResetResults,
    ) -> capnp::Result<()> {
        Failure::write_result(
            &self.driver.ask_of(&self.guest, Command::Reset).await,
            results.get().init_result(),
        );
        Ok(())
    }

    async fn stop(
        self: Rc<Self>,
        _: guest_control::StopParams,
        mut results: guest_control::StopResults,
    ) -> capnp::Result<()> {
        let stopped = self.driver.ask_of(&self.guest, Command::Stop).await;
        Failure::write_result(&stopped, results.get().init_result());
        Ok(())
    }

    async fn observer(
        self: Rc<Self>,
        _: guest_control::ObserverParams,
        mut results: guest_control::ObserverResults,
    ) -> capnp::Result<()> {
        let observer: observer::Client = capnp_rpc::new_client(Observed::new(self.guest.clone()));
        results.get().set_observer(observer);
        Ok(())
    }
    async fn inspect(
        self: Rc<Self>,
        params: guest_control::InspectParams,
        mut results: guest_control::InspectResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let (path, depth, rendering) =
            (params.get_path()?.to_str()?, params.get_depth(), params.get_rendering()?);
        match inspected(&self.guest, path, depth, rendering, View::Everything).await {
            Ok(tree) => results.get().set_tree(&tree[..]),
            Err(failure) => failure.write(results.get().init_error()),
        }
        Ok(())
    }
    async fn debugger(
        self: Rc<Self>,
        params: guest_control::DebuggerParams,
        mut results: guest_control::DebuggerResults,
    ) -> capnp::Result<()> {
        let sink = params.get()?.get_sink()?;
        match debugger::attach(&self.guest, sink).await {
            Ok(debugger) => results.get().set_debugger(debugger),
            Err(failure) => {
                let mut results = results.get();
                results.set_debugger(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }
    async fn add_unit(
        self: Rc<Self>,
        params: guest_control::AddUnitParams,
        mut results: guest_control::AddUnitResults,
    ) -> capnp::Result<()> {
        let added = match UnitConfig::read(params.get()?.get_unit()?)? {
            Ok(unit) => {
                self.driver.ask_of(&self.guest, |reply| Command::AddUnit(Box::new(unit), reply)).await
            }
            Err(faults) => refused(&faults).map_or(Ok(()), Err),
        };
        Failure::write_result(&added, results.get().init_result());
        Ok(())
    }
}
