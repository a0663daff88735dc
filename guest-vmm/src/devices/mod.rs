//! The devices that a config asks for, on their way into the machine. A new device is one more line in [`requested`].

mod balloon;
mod console;
pub(crate) mod mem;
mod rng;

use crate::ports::GuestOutputs;
use ::devices::virtio::VirtioSpec;
use ::devices::virtio::balloon::BalloonHandle;
use ::devices::virtio::console::ConsoleHandle;
use ::devices::virtio::mem::MemHandle;
use guest_schema::{ConfigFault, Failure, GuestConfig};
use std::ops::Range;

/// What a guest's devices become.
#[derive(Default)]
pub(crate) struct RequestedDevices {
    /// Their halves in the machine, in the order in which a guest finds them.
    pub specs: Vec<VirtioSpec>,
    pub ends: HostEnds,
    /// What their ports send.
    pub outputs: GuestOutputs,
    /// The region for memory that is plugged later.
    pub hotplug: Option<Range<u64>>,
}

/// The host's ends of the devices that have one.
#[derive(Clone, Default)]
pub(crate) struct HostEnds {
    pub balloon: Option<BalloonHandle>,
    pub console: Option<ConsoleHandle>,
    pub mem: Option<MemHandle>,
}

/// The devices of a config that was checked.
pub(crate) fn requested(config: &GuestConfig) -> Result<RequestedDevices, Failure> {
    let mut devices = RequestedDevices::default();
    rng::add(&config.devices, &mut devices);
    balloon::add(config, &mut devices);
    console::add(&config.devices, &mut devices);
    mem::add(config, &mut devices)?;
    Ok(devices)
}

/// What is wrong with the devices of a config; `host_bytes` is the host's memory.
pub(crate) fn faults(config: &GuestConfig, host_bytes: u64) -> Vec<ConfigFault> {
    [balloon::faults(config), console::faults(&config.devices), mem::faults(config, host_bytes)].concat()
}
