//! The entropy device.

use super::RequestedDevices;
use devices::virtio::Rng;
use guest_schema::DevicesConfig;

/// Adds it, if it is asked for.
pub(super) fn add(config: &DevicesConfig, devices: &mut RequestedDevices) {
    if config.rng {
        devices.specs.push(Rng::spec("rng"));
    }
}
