//! The devices that a config asks for, on their way into the machine. A new device is one more line in [`requested`].

mod balloon;
pub(crate) mod block;
mod console;
pub(crate) mod mem;
mod net;
mod rng;
mod vsock;

use crate::ports::GuestOutputs;
use crate::vm::{Cancel, cancelled};
use ::devices::virtio::VirtioSpec;
use ::devices::virtio::balloon::BalloonHandle;
use ::devices::virtio::console::ConsoleHandle;
use ::devices::virtio::mem::MemHandle;
use ::devices::virtio::vsock::VsockHost;
use guest_schema::{ConfigFault, DeviceError, DevicesConfig, Failure, GuestConfig};
use guest_transport::Descriptors;
use std::ops::Range;
use std::os::fd::OwnedFd;
use tokio::sync::mpsc;

/// How many failures of devices may wait to be told.
const WAITING_ERRORS: usize = 64;

/// What a guest's devices become.
pub(crate) struct RequestedDevices {
    /// Their halves in the machine, in the order in which a guest finds them.
    pub specs: Vec<VirtioSpec>,
    pub ends: HostEnds,
    /// What their ports send.
    pub outputs: GuestOutputs,
    /// The region for memory that is plugged later.
    pub hotplug: Option<Range<u64>>,
    /// What the host has failed them in. Ends with them.
    pub errors: mpsc::Receiver<DeviceError>,
    /// Where that comes from.
    told: mpsc::Sender<DeviceError>,
}

/// The host's ends of the devices that have one.
#[derive(Clone, Default)]
pub(crate) struct HostEnds {
    pub balloon: Option<BalloonHandle>,
    pub console: Option<ConsoleHandle>,
    pub mem: Option<MemHandle>,
    pub vsock: Option<VsockHost>,
}

/// What the devices of a config have on the host: descriptors, taken from the channel on which the config came.
#[derive(Default)]
pub(crate) struct Backends {
    /// Of each disk.
    images: Vec<Option<OwnedFd>>,
    net: Vec<net::RequestedNet>,
}

impl Backends {
    /// Takes them. What cannot be is a fault.
    pub fn take(config: &DevicesConfig, descriptors: &Descriptors, faults: &mut Vec<ConfigFault>) -> Self {
        let images = block::take_images(&config.block, descriptors, faults);
        Self { images, net: net::take(&config.net, descriptors, faults) }
    }

    /// Has them serve the devices of this config, in place of those of the config that they came with.
    pub fn serve(&mut self, config: &DevicesConfig) {
        net::serve(&mut self.net, &config.net);
    }
}

/// The devices of a config that was checked, in the order in which a guest finds them. What may take the host long is done on the
/// blocking pool, and back ends that have to be agreed with are waited for. On an error, also that the create was cancelled, nothing is
/// open or locked any more.
pub(crate) async fn requested(
    config: &GuestConfig,
    backends: Backends,
    cancel: &Cancel,
) -> Result<RequestedDevices, Failure> {
    let (told, errors) = mpsc::channel(WAITING_ERRORS);
    let (specs, ends) = (Vec::new(), HostEnds::default());
    let mut devices =
        RequestedDevices { specs, ends, hotplug: None, outputs: GuestOutputs::default(), errors, told };
    let Backends { images, net } = backends;
    block::add(&config.devices.block, images, &mut devices, cancel).await?;
    tokio::select! {
        biased;
        added = net::add(net, &mut devices) => added?,
        () = cancel.cancelled() => return Err(cancelled()),
    }
    rng::add(&config.devices, &mut devices);
    balloon::add(config, &mut devices);
    console::add(&config.devices, &mut devices);
    mem::add(config, &mut devices)?;
    vsock::add(&config.devices, &mut devices);
    Ok(devices)
}

/// What is wrong with the disks and networks of a config.
pub(crate) fn faults(config: &GuestConfig) -> Vec<ConfigFault> {
    [block::faults(&config.devices.block), net::faults(&config.devices.net)].concat()
}

/// What is wrong with the other devices of a config, which need nothing of the host but its memory, of so many bytes.
pub(crate) fn own_faults(config: &GuestConfig, host_bytes: u64) -> Vec<ConfigFault> {
    let console = console::faults(&config.devices);
    [balloon::faults(config), console, mem::faults(config, host_bytes)].concat()
}
