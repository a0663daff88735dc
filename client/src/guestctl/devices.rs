//! The options of `guestctl run` for devices.

use crate::mem;
use crate::run::VsockOption;
use clap::Args;
use guest_client::{DevicesConfig, MemDeviceConfig};

/// The devices that a guest has beside its board.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub struct DeviceOptions {
    /// Give the guest an entropy device (virtio-rng): /dev/hwrng on Linux
    #[arg(long)]
    pub rng: bool,
    /// Give the guest a vsock device; with a path, programs reach it through Unix sockets: `--vsock path=web.sock`
    #[arg(long, value_name = "path=SOCKET", num_args = 0..=1, default_missing_value = "")]
    pub vsock: Option<VsockOption>,
    /// Give the guest a memory balloon (virtio-balloon), which gives free pages back to the host by itself, and others when asked:
    /// guestctl update ID balloon/device/requested_pages 25600
    #[arg(long)]
    pub balloon: bool,
    /// Give the guest a region for memory that is plugged while it runs (virtio-mem), for instance --mem region=4G,size=1G, and later
    /// guestctl update ID mem/device/requested_bytes 2147483648. Blocks are of 2M (block=), the region begins at a multiple of 128M
    /// (align=), size= is plugged from the beginning
    #[arg(long, value_name = "region=SIZE[,KEY=VALUE]...", value_parser = mem::parse)]
    pub mem: Option<MemDeviceConfig>,
}

impl DeviceOptions {
    /// What they ask for by themselves: a vsock device comes with its sockets.
    pub fn config(&self) -> DevicesConfig {
        DevicesConfig { rng: self.rng, balloon: self.balloon, mem: self.mem, vsock: None }
    }
}
