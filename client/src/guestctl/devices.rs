//! The options of `guestctl run` for devices.

use crate::run::VsockOption;
use clap::Args;
use guest_client::DevicesConfig;

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
}

impl DeviceOptions {
    /// What they ask for by themselves: a vsock device comes with its sockets.
    pub fn config(&self) -> DevicesConfig {
        DevicesConfig { rng: self.rng, balloon: self.balloon, ..DevicesConfig::default() }
    }
}
