//! The memory balloon.

use super::RequestedDevices;
use ::devices::virtio::balloon::Balloon;
use guest_schema::{ConfigFault, GuestConfig};

/// Adds it, if it is asked for.
pub(super) fn add(config: &GuestConfig, devices: &mut RequestedDevices) {
    if config.devices.balloon {
        let (spec, handle) = Balloon::spec("balloon", config.memory.bytes);
        devices.specs.push(spec);
        devices.ends.balloon = Some(handle);
    }
}

/// A balloon takes pages of 4 KiB.
pub(super) fn faults(config: &GuestConfig) -> Vec<ConfigFault> {
    let problem = "true, and with memory.hugePages no page of 4 KiB can be given back";
    let refused = config.devices.balloon && config.memory.huge_pages;
    refused.then(|| ConfigFault::new("balloon", problem)).into_iter().collect()
}
