//! The devices that a config asks for, on their way into the machine. A new device is one more line in [`requested`].

mod balloon;
pub(crate) mod mem;
mod net;
mod rng;
mod vsock;

use ::devices::virtio::VirtioSpec;
use ::devices::virtio::balloon::BalloonHandle;
use ::devices::virtio::mem::MemHandle;
use ::devices::virtio::vsock::VsockHost;
use guest_schema::{ConfigFault, DevicesConfig, Failure, GuestConfig};
use guest_transport::Descriptors;
use std::ops::Range;

/// What a guest's devices become.
#[derive(Default)]
pub(crate) struct RequestedDevices {
    /// Their halves in the machine, in the order in which a guest finds them.
    pub specs: Vec<VirtioSpec>,
    pub ends: HostEnds,
    /// The region for memory that is plugged later.
    pub hotplug: Option<Range<u64>>,
}

/// The host's ends of the devices that have one.
#[derive(Clone, Default)]
pub(crate) struct HostEnds {
    pub balloon: Option<BalloonHandle>,
    pub mem: Option<MemHandle>,
    pub vsock: Option<VsockHost>,
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

/// The devices of a config that was checked, in the order in which a guest finds them.
pub(crate) fn requested(config: &GuestConfig, backends: Backends) -> Result<RequestedDevices, Failure> {
    let mut devices = RequestedDevices::default();
    net::add(backends.net, &mut devices)?;
    rng::add(&config.devices, &mut devices);
    balloon::add(config, &mut devices);
    mem::add(config, &mut devices)?;
    vsock::add(&config.devices, &mut devices);
    Ok(devices)
}

/// What is wrong with the devices of a config; `host_bytes` is the host's memory.
pub(crate) fn faults(config: &GuestConfig, host_bytes: u64) -> Vec<ConfigFault> {
    [balloon::faults(config), mem::faults(config, host_bytes)].concat()
}
