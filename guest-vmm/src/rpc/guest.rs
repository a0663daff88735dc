//! Guest: the user's capability.

use super::balloon::Balloon;
use super::mem::Mem;
use super::observer::Observed;
use super::streams::{SerialStream, pump};
use crate::guest::Guest;
use guest_schema::common_capnp::byte_stream;
use guest_schema::guest_capnp::{guest, observer};
use guest_schema::{Failure, GuestError};
use guest_transport::broken;
use std::rc::Rc;
use tokio::task::spawn_local;

/// A guest, bound.
pub(crate) struct BoundGuest(Rc<Guest>);

impl BoundGuest {
    pub fn new(guest: Rc<Guest>) -> Self {
        Self(guest)
    }
}

impl guest::Server for BoundGuest {
    async fn get_serial(
        self: Rc<Self>,
        params: guest::GetSerialParams,
        mut results: guest::GetSerialResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        if params.has_output() {
            spawn_local(pump(self.0.log().clone(), params.get_output()?));
        }
        let input: byte_stream::Client = capnp_rpc::new_client(SerialStream::new(self.0.clone()));
        results.get().set_input(input);
        Ok(())
    }

    async fn get_console(
        self: Rc<Self>,
        _: guest::GetConsoleParams,
        mut results: guest::GetConsoleResults,
    ) -> capnp::Result<()> {
        let failure = Failure::new(GuestError::DeviceNotPresent, "the guest has no console");
        let mut results = results.get();
        results.set_input(broken(&failure));
        failure.write(results.init_error());
        Ok(())
    }

    async fn get_balloon_controller(
        self: Rc<Self>,
        _: guest::GetBalloonControllerParams,
        mut results: guest::GetBalloonControllerResults,
    ) -> capnp::Result<()> {
        let mut results = results.get();
        match self.0.end_of("balloon", |ends| ends.balloon.clone()) {
            Err(failure) if failure.code == GuestError::DeviceNotPresent => {
                results.set_controller(broken(&failure));
                failure.write(results.init_error());
            }
            // What has ended is told by the controller itself.
            Ok(_) | Err(_) => results.set_controller(capnp_rpc::new_client(Balloon::new(self.0.clone()))),
        }
        Ok(())
    }

    async fn get_mem_controller(
        self: Rc<Self>,
        _: guest::GetMemControllerParams,
        mut results: guest::GetMemControllerResults,
    ) -> capnp::Result<()> {
        let mut results = results.get();
        match self.0.end_of("memory device", |ends| ends.mem.clone()) {
            Err(failure) if failure.code == GuestError::DeviceNotPresent => {
                results.set_controller(broken(&failure));
                failure.write(results.init_error());
            }
            Ok(_) | Err(_) => results.set_controller(capnp_rpc::new_client(Mem::new(self.0.clone()))),
        }
        Ok(())
    }

    async fn observer(
        self: Rc<Self>,
        _: guest::ObserverParams,
        mut results: guest::ObserverResults,
    ) -> capnp::Result<()> {
        let observer: observer::Client = capnp_rpc::new_client(Observed::new(self.0.clone()));
        results.get().set_observer(observer);
        Ok(())
    }

    async fn when_terminated(
        self: Rc<Self>,
        _: guest::WhenTerminatedParams,
        mut results: guest::WhenTerminatedResults,
    ) -> capnp::Result<()> {
        self.0.exit().await.write(results.get().init_exit());
        Ok(())
    }
}
