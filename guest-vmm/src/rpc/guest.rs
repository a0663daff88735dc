//! Guest: the user's capability.

use super::balloon::Balloon;
use super::mem::Mem;
use super::observer::Observed;
use super::streams::{PortStream, pump};
use super::vsock::VsockEndpoint;
use crate::guest::Guest;
use crate::ports::GuestPort;
use devices::virtio::console::ConsoleSize;
use guest_schema::common_capnp::{byte_stream, output_sink};
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

    /// Opens a port: what it sends goes to `output`, if there is one. Each call is a reader and a sender of its own.
    fn open(
        &self,
        port: GuestPort,
        output: Option<output_sink::Client>,
    ) -> Result<byte_stream::Client, Failure> {
        let log = self.0.output(&port).ok_or_else(|| port.not_present())?;
        if let Some(output) = output {
            spawn_local(pump(log.clone(), output));
        }
        Ok(capnp_rpc::new_client(PortStream::new(self.0.clone(), port)))
    }
}

/// Three methods have these results, with types of their own.
macro_rules! answer_port {
    ($self:ident, $port:expr, $output:ident, $results:ident) => {{
        let mut results = $results.get();
        match $self.open($port, $output) {
            Ok(input) => results.set_input(input),
            Err(failure) => {
                results.set_input(broken(&failure));
                failure.write(results.init_error());
            }
        }
    }};
}

/// Two methods answer with a controller, of types of their own. What has ended is told by the controller itself.
macro_rules! answer_controller {
    ($self:ident, $device:literal, $end:ident, $controller:ident, $results:ident) => {{
        let mut results = $results.get();
        match $self.0.end_of($device, |ends| ends.$end.clone()) {
            Err(failure) if failure.code == GuestError::DeviceNotPresent => {
                results.set_controller(broken(&failure));
                failure.write(results.init_error());
            }
            Ok(_) | Err(_) => {
                results.set_controller(capnp_rpc::new_client($controller::new($self.0.clone())))
            }
        }
    }};
}

impl guest::Server for BoundGuest {
    async fn get_serial(
        self: Rc<Self>,
        params: guest::GetSerialParams,
        mut results: guest::GetSerialResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let output = params.has_output().then(|| params.get_output()).transpose()?;
        answer_port!(self, GuestPort::Serial, output, results);
        Ok(())
    }

    async fn get_console(
        self: Rc<Self>,
        params: guest::GetConsoleParams,
        mut results: guest::GetConsoleResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let output = params.has_output().then(|| params.get_output()).transpose()?;
        answer_port!(self, GuestPort::Console, output, results);
        Ok(())
    }

    async fn get_console_port(
        self: Rc<Self>,
        params: guest::GetConsolePortParams,
        mut results: guest::GetConsolePortResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let output = params.has_output().then(|| params.get_output()).transpose()?;
        answer_port!(self, GuestPort::Named(params.get_name()?.to_string()?), output, results);
        Ok(())
    }

    async fn resize_console(
        self: Rc<Self>,
        params: guest::ResizeConsoleParams,
        mut results: guest::ResizeConsoleResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let size = ConsoleSize { columns: params.get_columns(), rows: params.get_rows() };
        let console = self.0.end_of("console", |ends| ends.console.clone());
        let resized = console.map(|console| console.resize(size));
        Failure::write_result(&resized, results.get().init_result());
        Ok(())
    }

    async fn get_host_vsock_endpoint(
        self: Rc<Self>,
        _: guest::GetHostVsockEndpointParams,
        mut results: guest::GetHostVsockEndpointResults,
    ) -> capnp::Result<()> {
        let mut results = results.get();
        match self.0.end_of("vsock device", |ends| ends.vsock.clone()) {
            Ok(host) => results.set_endpoint(capnp_rpc::new_client(VsockEndpoint::new(host))),
            Err(failure) => {
                results.set_endpoint(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }

    async fn get_balloon_controller(
        self: Rc<Self>,
        _: guest::GetBalloonControllerParams,
        mut results: guest::GetBalloonControllerResults,
    ) -> capnp::Result<()> {
        answer_controller!(self, "balloon", balloon, Balloon, results);
        Ok(())
    }

    async fn get_mem_controller(
        self: Rc<Self>,
        _: guest::GetMemControllerParams,
        mut results: guest::GetMemControllerResults,
    ) -> capnp::Result<()> {
        answer_controller!(self, "memory device", mem, Mem, results);
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
