//! The options of `guestctl run` for devices.

use crate::disk::{self, Disk, OpenDisk};
use crate::ending::Outcome;
use crate::mem;
use clap::Args;
use guest_client::{DevicesConfig, Lifecycle, MemDeviceConfig};

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
    /// Give the guest a region for memory that is plugged while it runs (virtio-mem), for instance --mem region=4G,size=1G, and later
    /// guestctl update ID mem/device/requested_bytes 2147483648. Blocks are of 2M (block=), the region begins at a multiple of 128M
    /// (align=), size= is plugged from the beginning
    #[arg(long, value_name = "region=SIZE[,KEY=VALUE]...", value_parser = mem::parse)]
    pub mem: Option<MemDeviceConfig>,
}

impl DeviceOptions {
    /// Opens the files that they name.
    pub fn open(&self) -> Outcome<OpenDevices> {
        let disks = self.disk.iter().map(Disk::open).collect::<Outcome<_>>()?;
        Ok(OpenDevices {
            disks,
            others: DevicesConfig { block: Vec::new(), rng: self.rng, balloon: self.balloon, mem: self.mem },
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
