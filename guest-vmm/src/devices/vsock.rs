//! The vsock device, and who listens from the beginning.

use super::RequestedDevices;
use crate::rpc::serve_vsock;
use ::devices::virtio::vsock::{PortError, Vsock, VsockHost, VsockLimits};
use guest_schema::{DevicesConfig, VsockConfig};
use tokio::task::spawn_local;

/// Adds it, if it is asked for.
pub(super) fn add(config: &DevicesConfig, devices: &mut RequestedDevices) {
    let Some(config) = &config.vsock else { return };
    let (spec, host) = Vsock::spec("vsock", VsockLimits::default());
    listen(config, &host).expect("each port once, and no more than there may be: the config was checked");
    devices.specs.push(spec);
    devices.ends.vsock = Some(host);
}

/// Begins to listen, for as long as the device is there.
fn listen(config: &VsockConfig, host: &VsockHost) -> Result<(), PortError> {
    for (port, acceptor) in &config.listeners {
        spawn_local(serve_vsock(host.listen(*port)?, acceptor.clone()));
    }
    if let Some(acceptor) = &config.unclaimed {
        spawn_local(serve_vsock(host.listen_unclaimed()?, acceptor.clone()));
    }
    Ok(())
}
