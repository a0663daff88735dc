//! What all of a device's queues have in common while they are served.

use super::allowance::Limiters;
use super::header::{LINK_BYTES, MAX_FRAME, accepted};
use super::shared::Shared;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MTU;
use vm_memory::GuestMemoryMmap;

/// What all of a device's queues have in common while they are served.
#[derive(Clone, Copy)]
pub(super) struct Lane<'a> {
    pub memory: &'a GuestMemoryMmap,
    /// What the driver has accepted.
    pub features: u64,
    pub mtu: Option<u16>,
    pub limiters: &'a Limiters,
    pub shared: &'a Shared,
}

impl Lane<'_> {
    /// The longest frame that the driver takes, but for those that are yet to be segmented (5.1.4.1).
    pub(super) fn max_frame(&self) -> usize {
        let mtu = self.mtu.filter(|_| accepted(self.features, VIRTIO_NET_F_MTU));
        mtu.map_or(MAX_FRAME, |mtu| usize::from(mtu) + LINK_BYTES)
    }
}
