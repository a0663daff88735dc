//! The devices that a config asks for, on their way into the machine. A new device is one more line in [`requested`].

mod rng;

use devices::virtio::VirtioSpec;
use guest_schema::DevicesConfig;

/// What a guest's devices become: their halves in the machine.
#[derive(Default)]
pub(crate) struct RequestedDevices {
    pub specs: Vec<VirtioSpec>,
}

/// The devices of a config, in the order in which a guest finds them.
pub(crate) fn requested(config: &DevicesConfig) -> RequestedDevices {
    let mut devices = RequestedDevices::default();
    rng::add(config, &mut devices);
    devices
}
