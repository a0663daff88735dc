//! The devices that a config asks for, on their way into the machine. A new device is one more line in [`requested`].

pub(crate) mod block;
mod rng;

use devices::virtio::VirtioSpec;
use guest_schema::{DeviceError, DevicesConfig, Failure};
use std::os::fd::OwnedFd;
use tokio::sync::mpsc;

/// How many failures of devices may wait to be told.
const WAITING_ERRORS: usize = 64;

/// What a guest's devices become: their halves in the machine, and what the VMM hears of them.
#[derive(Default)]
pub(crate) struct RequestedDevices {
    pub specs: Vec<VirtioSpec>,
}

/// What the host has failed devices in. Ends with the devices.
pub(crate) type DeviceErrors = mpsc::Receiver<DeviceError>;

/// The devices of a config, in the order in which a guest finds them. `images` are the disks', in their order.
pub(crate) fn requested(
    config: &DevicesConfig,
    images: Vec<Option<OwnedFd>>,
) -> Result<(RequestedDevices, DeviceErrors), Failure> {
    let mut devices = RequestedDevices::default();
    let (errors, told) = mpsc::channel(WAITING_ERRORS);
    block::add(&config.block, images, &errors, &mut devices)?;
    rng::add(config, &mut devices);
    Ok((devices, told))
}
