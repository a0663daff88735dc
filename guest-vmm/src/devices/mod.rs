//! The devices that a config asks for, on their way into the machine. A new device is one more line in [`requested`].

mod balloon;
mod console;
mod rng;

use crate::ports::GuestOutputs;
use ::devices::virtio::VirtioSpec;
use ::devices::virtio::balloon::BalloonHandle;
use ::devices::virtio::console::ConsoleHandle;
use guest_schema::{ConfigFault, GuestConfig};

/// What a guest's devices become.
#[derive(Default)]
pub(crate) struct RequestedDevices {
    /// Their halves in the machine, in the order in which a guest finds them.
    pub specs: Vec<VirtioSpec>,
    pub ends: HostEnds,
    /// What their ports send.
    pub outputs: GuestOutputs,
}

/// The host's ends of the devices that have one.
#[derive(Clone, Default)]
pub(crate) struct HostEnds {
    pub balloon: Option<BalloonHandle>,
    pub console: Option<ConsoleHandle>,
}

/// The devices of a config that was checked.
pub(crate) fn requested(config: &GuestConfig) -> RequestedDevices {
    let mut devices = RequestedDevices::default();
    rng::add(&config.devices, &mut devices);
    balloon::add(config, &mut devices);
    console::add(&config.devices, &mut devices);
    devices
}

/// What is wrong with the devices of a config.
pub(crate) fn faults(config: &GuestConfig) -> Vec<ConfigFault> {
    let mut faults = balloon::faults(config);
    faults.extend(console::faults(&config.devices));
    faults
}
