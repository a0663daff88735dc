//! The devices that a config asks for, on their way into the machine. A new device is one more line in [`requested`].

mod rng;
mod vsock;

use devices::virtio::VirtioSpec;
use devices::virtio::vsock::VsockHost;
use guest_schema::DevicesConfig;

/// What a guest's devices become: their halves in the machine.
#[derive(Default)]
pub(crate) struct RequestedDevices {
    pub specs: Vec<VirtioSpec>,
    pub handles: DeviceHandles,
}

/// The host's side of a guest's devices, for those who may use them.
#[derive(Clone, Default)]
pub(crate) struct DeviceHandles {
    /// The vsock device's, if there is one.
    pub vsock: Option<VsockHost>,
}

/// The devices of a config, in the order in which a guest finds them.
pub(crate) fn requested(config: &DevicesConfig) -> RequestedDevices {
    let mut devices = RequestedDevices::default();
    rng::add(config, &mut devices);
    vsock::add(config, &mut devices);
    devices
}
