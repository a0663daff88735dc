//! The options of `guestctl run` for devices.

use clap::Args;
use guest_client::DevicesConfig;

/// The devices that a guest has beside its board.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub struct DeviceOptions {
    /// Give the guest an entropy device (virtio-rng): /dev/hwrng on Linux
    #[arg(long)]
    pub rng: bool,
}

impl DeviceOptions {
    /// What they ask for.
    pub fn config(&self) -> DevicesConfig {
        DevicesConfig { rng: self.rng }
    }
}
