//! The devices that a config asks for, on their way into the machine. A new device is one more line in [`requested`].

mod net;
mod rng;

use devices::virtio::VirtioSpec;
use guest_schema::{ConfigFault, DevicesConfig, Failure};
use guest_transport::Descriptors;

/// What a guest's devices become: their halves in the machine.
#[derive(Default)]
pub(crate) struct RequestedDevices {
    pub specs: Vec<VirtioSpec>,
}

/// What the devices of a config have on the host: descriptors, taken from the channel on which the config came.
#[derive(Default)]
pub(crate) struct Backends {
    net: Vec<net::RequestedNet>,
}

impl Backends {
    /// Takes them. What cannot be is a fault, and so is what a config says of devices that no guest can have.
    pub fn take(config: &DevicesConfig, descriptors: &Descriptors, faults: &mut Vec<ConfigFault>) -> Self {
        Self { net: net::take(&config.net, descriptors, faults) }
    }
}

/// The devices of a config, in the order in which a guest finds them.
pub(crate) fn requested(config: &DevicesConfig, backends: Backends) -> Result<RequestedDevices, Failure> {
    let mut devices = RequestedDevices::default();
    net::add(backends.net, &mut devices)?;
    rng::add(config, &mut devices);
    Ok(devices)
}
