//! The options of `guestctl run` and `fork` for devices.

mod mem;
mod net;
mod tap;

use crate::disk::{self, Disk, OpenDisk};
use crate::ending::Outcome;
use crate::pairs::Pairs;
use crate::run::VsockOption;
use clap::Args;
use guest_client::{ConsoleConfig, DevicesConfig, Lifecycle, MemDeviceConfig};
use net::{NetOption, OpenNet};

/// What `--net` takes, with examples.
pub const NET: &str = "\
--net BACKEND[,mac=ADDRESS][,mtu=BYTES][,queues=N][,bps=SIZE][,iops=N]; may be given again. bps and iops limit bytes and frames a
second, each way for itself (bps-burst, iops-burst: at once). BACKEND is one of
  passt              user networking: passt is started for the guest, and ends with it
  passt=SOCKET       the same from a passt that listens there, or anything in QEMU's framing of streams
  tap=NAME           a TAP device, made if there is none of that name
  fd=N[:N…]          descriptors that this process was started with: of a TAP device (one for each queue pair), or one stream
  vhost-user=SOCKET  a vhost-user back end that listens there: a process that gets the guest's memory and serves the queues itself

Examples:
  guestctl run --kernel vmlinuz --initrd initrd.gz --net passt
  guestctl run --kernel vmlinuz --initrd initrd.gz --net tap=tap0,mac=02:00:00:00:00:01,queues=2 --cpus 2
  guestctl run --kernel vmlinuz --initrd initrd.gz --net vhost-user=/run/switch.sock,queues=2 --cpus 2
  guestctl update web units/net0/unit/device/link false      (pulls the cable)";

/// The devices that a guest has beside its board.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub struct DeviceOptions {
    /// Give the guest a disk (virtio-blk): path=FILE of an image or block device, then any of format=raw or format=qcow2, id=TEXT (its
    /// serial number), readonly=on, volatile=on (what the guest writes stays in memory and ends with it), bps=SIZE and iops=N (limits
    /// a second; bps-burst, iops-burst), queues=N; may be given again
    #[arg(long, value_name = "DISK", value_parser = disk::parse)]
    pub disk: Vec<Disk>,
    /// Give the guest an entropy device (virtio-rng): /dev/hwrng on Linux
    #[arg(long)]
    pub rng: bool,
    /// Give the guest a vsock device; with a path, programs reach it through Unix sockets: `--vsock path=web.sock`
    #[arg(long, value_name = "path=SOCKET", num_args = 0..=1, default_missing_value = "")]
    pub vsock: Option<VsockOption>,
    /// Give the guest a memory balloon (virtio-balloon), which gives free pages back to the host by itself, and others when asked:
    /// guestctl update ID units/balloon/unit/device/requested_pages 25600
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
    /// guestctl update ID units/mem/unit/device/requested_bytes 2147483648. Blocks are of 2M (block=), the region begins at a multiple of 128M
    /// (align=), size= is plugged from the beginning
    #[arg(long, value_name = "region=SIZE[,KEY=VALUE]...", value_parser = mem::parse)]
    pub mem: Option<MemDeviceConfig>,
    /// Give the guest a network device (virtio-net): passt, passt=SOCKET, tap=NAME, fd=N or vhost-user=SOCKET, with any of
    /// ,mac=ADDRESS ,mtu=BYTES ,queues=N ,bps=SIZE ,iops=N; may be given again
    #[arg(long, value_name = "BACKEND", value_parser = net::parse)]
    pub net: Vec<NetOption>,
}

impl DeviceOptions {
    /// Opens what they name, with the user's own rights.
    pub fn open(&self) -> Outcome<OpenDevices> {
        let disks = self.disk.iter().map(Disk::open).collect::<Outcome<_>>()?;
        let net = self.net.iter().map(NetOption::open).collect::<Outcome<_>>()?;
        Ok(OpenDevices {
            disks,
            net,
            rng: self.rng,
            balloon: self.balloon,
            console: self.console.clone(),
            mem: self.mem,
        })
    }
}

/// What a guest that goes on from a snapshot is granted for the devices that it has.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub struct GrantOptions {
    /// The image of its next disk, as `run` takes it: path=FILE, then any of format=qcow2, readonly=on, volatile=on (what the guest
    /// writes stays in memory and ends with it); given again for each of its disks, in their order
    #[arg(long, value_name = "DISK", value_parser = disk::parse)]
    pub disk: Vec<Disk>,
    /// The back end of its next network device, as `run` takes it; given again for each of them, in their order
    #[arg(long, value_name = "BACKEND", value_parser = net::parse)]
    pub net: Vec<NetOption>,
    /// Let programs reach the vsock device of a single fork through Unix sockets, as `run` does: `--vsock path=web-2.sock`
    #[arg(long, value_name = "path=SOCKET")]
    pub vsock: Option<VsockOption>,
}

impl GrantOptions {
    /// Opens what they name, with the user's own rights.
    pub fn open(&self) -> Outcome<OpenDevices> {
        let disks = self.disk.iter().map(Disk::open).collect::<Outcome<_>>()?;
        let net = self.net.iter().map(NetOption::open).collect::<Outcome<_>>()?;
        Ok(OpenDevices { disks, net, rng: false, balloon: false, console: None, mem: None })
    }
}

/// What a guest's devices are made of, open.
pub struct OpenDevices {
    disks: Vec<OpenDisk>,
    net: Vec<OpenNet>,
    rng: bool,
    balloon: bool,
    console: Option<ConsoleConfig>,
    mem: Option<MemDeviceConfig>,
}

impl OpenDevices {
    /// The devices of a guest of this lifecycle. A vsock device comes with its sockets.
    pub fn config(self, lifecycle: &Lifecycle) -> Outcome<DevicesConfig> {
        let Self { disks, net, rng, balloon, console, mem } = self;
        let block = disks.into_iter().map(|disk| disk.config(lifecycle)).collect::<Outcome<_>>()?;
        let net = net.into_iter().map(|net| net.config(lifecycle)).collect::<Outcome<_>>()?;
        Ok(DevicesConfig { block, net, rng, balloon, console, mem, vsock: None })
    }
}

/// Reads `ports=NAME+NAME`, or nothing. What a name may be is the VMM's to say.
fn console(text: &str) -> Result<ConsoleConfig, String> {
    let ports = Pairs::read(text, &["ports"])?.text("ports").map(|names| names.split('+').map(str::to_owned));
    Ok(ConsoleConfig { ports: ports.into_iter().flatten().collect() })
}
