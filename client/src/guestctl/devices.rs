//! The options of `guestctl run` for devices.

use crate::mem;
use crate::pairs::Pairs;
use clap::Args;
use guest_client::{ConsoleConfig, DevicesConfig, MemDeviceConfig};

/// The devices that a guest has beside its board.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub struct DeviceOptions {
    /// Give the guest an entropy device (virtio-rng): /dev/hwrng on Linux
    #[arg(long)]
    pub rng: bool,
    /// Give the guest a memory balloon (virtio-balloon), which gives free pages back to the host by itself, and others when asked:
    /// guestctl update ID balloon/device/requested_pages 25600
    #[arg(long)]
    pub balloon: bool,
    /// Give the guest a console (virtio-console): hvc0 on Linux; with ports=agent+log, also ports of these names for programs:
    /// /dev/virtio-ports/agent
    #[arg(
        long,
        value_name = "ports=NAME+NAME",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = console
    )]
    pub console: Option<ConsoleConfig>,
    /// Give the guest a region for memory that is plugged while it runs (virtio-mem), for instance --mem region=4G,size=1G, and later
    /// guestctl update ID mem/device/requested_bytes 2147483648. Blocks are of 2M (block=), the region begins at a multiple of 128M
    /// (align=), size= is plugged from the beginning
    #[arg(long, value_name = "region=SIZE[,KEY=VALUE]...", value_parser = mem::parse)]
    pub mem: Option<MemDeviceConfig>,
}

impl DeviceOptions {
    /// What they ask for.
    pub fn config(&self) -> DevicesConfig {
        DevicesConfig { rng: self.rng, balloon: self.balloon, console: self.console.clone(), mem: self.mem }
    }
}

/// Reads `ports=NAME+NAME`, or nothing. What a name may be is the VMM's to say.
fn console(text: &str) -> Result<ConsoleConfig, String> {
    let ports = Pairs::read(text, &["ports"])?.text("ports").map(|names| names.split('+').map(str::to_owned));
    Ok(ConsoleConfig { ports: ports.into_iter().flatten().collect() })
}
