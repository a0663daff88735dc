//! The options of `guestctl run` for devices.

use clap::Args;
use guest_client::{ConsoleConfig, DevicesConfig};

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
}

impl DeviceOptions {
    /// What they ask for.
    pub fn config(&self) -> DevicesConfig {
        DevicesConfig { rng: self.rng, balloon: self.balloon, console: self.console.clone() }
    }
}

/// Reads `ports=NAME+NAME`, or nothing. What a name may be is the VMM's to say.
fn console(text: &str) -> Result<ConsoleConfig, String> {
    if text.is_empty() {
        return Ok(ConsoleConfig::default());
    }
    let names = text.strip_prefix("ports=").ok_or_else(|| format!("{text:?} is not ports=NAME+NAME"))?;
    Ok(ConsoleConfig { ports: names.split('+').map(str::to_owned).collect() })
}
