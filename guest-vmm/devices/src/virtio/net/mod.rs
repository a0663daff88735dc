//! The network device (VIRTIO 1.3, 5.1).
//!
//! - [`Net::spec`] makes one of a [`NetSpec`], over a [`NetBackend`]: a [`Tap`] device, a Unix stream socket in the framing of QEMU and
//!   passt, or a [`VhostUser`] back end, which serves the queues itself
//! - [`Link`] is the host's end of it: switches it off and on, and says whether the back end is there
//! - queue pairs, each with a port of the back end: `receive` and `room`, `transmit`; `control` answers the control queue
//! - `allowance` holds frames back that are more than the rate limits let pass
//! - `header` says what a driver may put before a frame, `vectored` moves frames between descriptor and guest memory
//!
//! A frame that cannot be is dropped and counted; a chain that cannot be is a fault, at which the device needs a reset. A back end that
//! is gone takes the link down for good. Only what the back end can do is offered: a stream has no offloads.
//!
//! Limits: no receive filters (every frame that the back end has goes to the driver), no VLAN filters, no RSS, no UDP segmentation;
//! all queues share the I/O thread, so several pairs spread the guest's work, not the host's, unless a vhost-user back end serves them.

mod allowance;
mod control;
mod device;
mod header;
mod lane;
mod link;
mod port;
mod receive;
mod room;
mod shared;
mod stream;
mod tap;
mod transmit;
mod vectored;
mod vhost_user;
mod worker;

#[cfg(test)]
mod tests;

pub use device::NetDevice;
pub use link::{Link, LinkEvent, LinkWatcher};
pub use shared::MacAddress;
pub use tap::{Tap, TapError};
pub use vhost_user::{VhostUser, VhostUserError};
pub use worker::NetWorker;

use super::rate_limit::RateLimits;
use super::{Interrupt, VirtioSpec};
use allowance::Limiters;
use shared::Shared;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use worker::Frames;

/// The most queue pairs that a device has.
pub const MAX_QUEUE_PAIRS: usize = 16;

/// The least MTU that a driver is told (VIRTIO 1.3, 5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// What the device does whatever the back end is.
const OWN_FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

/// Where frames come from and go to.
#[derive(Debug)]
pub enum NetBackend {
    /// A TAP device: one descriptor per queue pair, 1 to [`MAX_QUEUE_PAIRS`].
    Tap(Vec<Tap>),
    /// A connected Unix stream socket: frames with their length before them, 32 bits, big endian.
    Stream(OwnedFd),
    /// A vhost-user back end. The rates do not hold for it.
    VhostUser(VhostUser),
}

/// What a network device is made of.
pub struct NetSpec {
    /// The address that the driver finds; unicast.
    pub mac: MacAddress,
    /// The MTU that the driver is told, if it is told one; [`MIN_MTU`] at least.
    pub mtu: Option<u16>,
    /// Where frames come from and go to.
    pub backend: NetBackend,
    /// How much may pass, each way: frames, and their bytes from the destination's address on. A frame that is yet to be segmented
    /// counts as one. What is too much waits: in the queue, or in the back end.
    pub rates: Arc<RateLimits>,
    /// Told of what happens to the link by itself.
    pub watcher: Option<LinkWatcher>,
}

impl fmt::Debug for NetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mac, mtu, backend, rates, watcher: _ } = self;
        let mut shown = f.debug_struct("NetSpec");
        shown
            .field("mac", mac)
            .field("mtu", mtu)
            .field("backend", backend)
            .field("rates", rates)
            .finish_non_exhaustive()
    }
}

/// Makes network devices.
#[derive(Debug)]
pub struct Net;

impl Net {
    /// A network device as a unit of this name, and its link.
    ///
    /// # Errors
    /// If the back end's descriptor cannot be made non-blocking.
    pub fn spec(name: impl Into<String>, spec: NetSpec) -> io::Result<(VirtioSpec, Link)> {
        let NetSpec { mac, mtu, backend, rates, watcher } = spec;
        let Served { frames, pairs, features, lacks } = served(backend)?;
        let interrupt = Arc::new(Interrupt::default());
        let link = Link::new(interrupt.clone(), watcher);
        let limiters = Limiters::new(&rates);
        let shared = Arc::new(Shared::new(link.clone(), mac, rates));
        let several = if pairs > 1 { 1 << VIRTIO_NET_F_MQ } else { 0 };
        let told = if mtu.is_some() { 1 << VIRTIO_NET_F_MTU } else { 0 };
        let features = features | several | told;
        let is_served_elsewhere = matches!(frames, Frames::VhostUser(_));
        let worker = NetWorker { frames, mtu, limiters, shared: shared.clone() };
        let device = NetDevice { features, lacks, is_served_elsewhere, pairs, mtu, mac, shared };
        Ok((VirtioSpec::new(name, device, worker, interrupt), link))
    }
}

/// A back end as worker and registers have it.
struct Served {
    frames: Frames,
    /// How many queue pairs there are.
    pairs: u16,
    /// What the device can do for a driver, and what the transport cannot.
    features: u64,
    lacks: u64,
}

fn served(backend: NetBackend) -> io::Result<Served> {
    let (ports, offloads) = match backend {
        NetBackend::Tap(queues) => {
            let offloads = queues.iter().map(Tap::features).fold(u64::MAX, |all, each| all & each);
            (queues.into_iter().map(Tap::into_port).collect(), offloads)
        }
        NetBackend::Stream(socket) => (vec![stream::port(socket)?], 0),
        NetBackend::VhostUser(backend) => {
            // Frames are merged by who writes them.
            let features = OWN_FEATURES & !(1 << VIRTIO_NET_F_MRG_RXBUF) | backend.features();
            let (pairs, lacks) = (backend.pairs, backend.lacks());
            return Ok(Served { frames: Frames::VhostUser(backend), pairs, features, lacks });
        }
    };
    let pairs = u16::try_from(ports.len()).map_err(io::Error::other)?;
    Ok(Served { frames: Frames::Ports(ports), pairs, features: OWN_FEATURES | offloads, lacks: 0 })
}
