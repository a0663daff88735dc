//! The options of `guestctl run` for devices.

use crate::disk::{self, Disk, OpenDisk};
use crate::ending::Outcome;
use clap::Args;
use guest_client::{DevicesConfig, Lifecycle};

/// The devices that a guest has beside its board.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub struct DeviceOptions {
    /// Give the guest a disk (virtio-blk): path=FILE of a raw image or block device, then any of id=TEXT (its serial number),
    /// readonly=on, bps=SIZE and iops=N (limits a second; bps-burst, iops-burst), queues=N; may be given again
    #[arg(long, value_name = "DISK", value_parser = disk::parse)]
    pub disk: Vec<Disk>,
    /// Give the guest an entropy device (virtio-rng): /dev/hwrng on Linux
    #[arg(long)]
    pub rng: bool,
    /// Give the guest a memory balloon (virtio-balloon), which gives free pages back to the host by itself, and others when asked:
    /// guestctl update ID balloon/device/requested_pages 25600
    #[arg(long)]
    pub balloon: bool,
}

impl DeviceOptions {
    /// Opens the files that they name.
    pub fn open(&self) -> Outcome<OpenDevices> {
        let disks = self.disk.iter().map(Disk::open).collect::<Outcome<_>>()?;
        Ok(OpenDevices {
            disks,
            others: DevicesConfig { block: Vec::new(), rng: self.rng, balloon: self.balloon },
        })
    }
}

/// What was asked for, its files open.
#[derive(Debug)]
pub struct OpenDevices {
    disks: Vec<OpenDisk>,
    others: DevicesConfig,
}

impl OpenDevices {
    /// As a config for this lifecycle.
    pub fn config(self, lifecycle: &Lifecycle) -> DevicesConfig {
        let block = self.disks.into_iter().map(|disk| disk.config(lifecycle)).collect();
        DevicesConfig { block, ..self.others }
    }
}
