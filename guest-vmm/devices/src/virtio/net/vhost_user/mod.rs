//! Back ends in other processes that serve the queues themselves (vhost-user, QEMU's docs/interop/vhost-user.rst).
//!
//! - [`VhostUser`] is such a back end: what it agreed to, and what it is asked
//! - `connection` makes calls to it, each of bounded time and never on the I/O thread
//! - `lent` are the queues that it has: it gets the guest's memory, the queues' addresses and their doorbells. Its interrupts come to us,
//!   so that the device's interrupt status is set before the driver is interrupted
//! - `session` is the back end at work, from the driver's start to its stop. While nobody drives the device it has no queue
//!
//! A back end that breaks the protocol, closes its socket or does not answer in time is gone, as any other. It is not trusted with more
//! than the guest's memory, all of which it can read and write from the first start on, and for as long as it wants.
//!
//! Limits: a back end needs VHOST_USER_F_PROTOCOL_FEATURES; it is not told the MTU and the address, nor a changed receive mode; while the
//! link is switched off its queues are disabled, and whether frames from the driver are dropped meanwhile or wait is its own affair; frames
//! are not counted; no reconnecting, no log of dirty pages, no record of what is in flight.

mod connection;
mod lent;
mod session;

pub(super) use session::{Ended, VhostUserSession};

use super::header::accepted;
use super::tap::TAP_FEATURES;
use crate::virtio::VirtQueue;
use connection::Connection;
use lent::Lent;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// What is done by us in the back end's place unless it can do it.
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the back end does for a driver, if it can.
const FRAME_FEATURES: u64 = TAP_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Why there is no vhost-user back end, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// The host refuses something.
    #[error("the vhost-user back end cannot be reached: {0}")]
    Host(io::Error),
    /// The back end refuses a request, breaks the protocol, or is gone.
    #[error("the vhost-user back end fails: {0}")]
    Backend(vhost::Error),
    /// It has closed its socket.
    #[error("the vhost-user back end has closed the connection")]
    Closed,
    /// It does not answer.
    #[error("the vhost-user back end has not answered within {0:?}")]
    Silent(Duration),
    /// It lacks what every back end needs.
    #[error("the vhost-user back end has no {0}")]
    Lacks(&'static str),
    /// It has fewer queues than the device.
    #[error("the vhost-user back end has {has} queues, not {needed}")]
    Queues {
        /// How many it has.
        has: u64,
        /// How many are needed.
        needed: u64,
    },
    /// It says of a queue that it gives back what cannot be.
    #[error(
        "the vhost-user back end has taken queue {queue} to {next}, which is not from {used} to {available}"
    )]
    Index {
        /// The queue.
        queue: usize,
        /// The available index up to which it says that it has taken chains.
        next: u32,
        /// The used index.
        used: u16,
        /// The available index.
        available: u16,
    },
    /// Memory that another process cannot have.
    #[error(
        "the guest's memory at {0:#x} is no shared mapping of a file: a vhost-user back end cannot have it"
    )]
    PrivateMemory(u64),
}

impl From<vhost::Error> for VhostUserError {
    fn from(error: vhost::Error) -> Self {
        Self::Backend(error)
    }
}

/// A vhost-user back end, with which is agreed what it does.
#[derive(Debug)]
pub struct VhostUser {
    connection: Connection,
    /// The bits of VIRTIO's that it offers, and VHOST_USER_F_PROTOCOL_FEATURES.
    features: u64,
    pub(super) pairs: u16,
}

impl VhostUser {
    /// Agrees with the back end at the other end of a connected Unix stream socket about what it does for so many queue pairs. To be called
    /// within a runtime with time. Takes some seconds at most; dropping it ends the connection.
    ///
    /// # Errors
    /// If the back end is none, has too few queues or lacks what it needs.
    pub async fn connect(socket: OwnedFd, pairs: u16) -> Result<Self, VhostUserError> {
        let queues = 2 * u64::from(pairs);
        let connection = Connection::new(socket, queues).map_err(VhostUserError::Host)?;
        let features = connection.call(move |frontend| agree(frontend, queues)).await?;
        Ok(Self { connection, features, pairs })
    }

    /// What it can do for a driver's frames.
    pub(super) fn features(&self) -> u64 {
        self.features & FRAME_FEATURES
    }

    /// Which of the transport's features it cannot do.
    pub(super) fn lacks(&self) -> u64 {
        TRANSPORT_FEATURES & !self.features
    }

    /// Hands it the queues, of which it is to serve the first `enabled`.
    async fn begin(
        &self,
        features: u64,
        memory: &GuestMemoryMmap,
        lent: Vec<Lent>,
        enabled: usize,
    ) -> Result<(), VhostUserError> {
        let regions = regions(memory)?;
        // It was asked for no others, and refuses what it has not offered: what the device does by itself is none of its business.
        let features = features & self.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.connection
            .call(move |frontend| {
                frontend.set_features(features)?;
                frontend.set_mem_table(&regions)?;
                // A queue is as enabled as it was before, and would be served as soon as it is there.
                enable(frontend, &lent, 0)?;
                lent.iter().try_for_each(|lent| lent.set_up(frontend))?;
                enable(frontend, &lent, enabled)?;
                // Without acknowledgements this is the only sign that it has taken all of it.
                frontend.get_features()?;
                Ok(())
            })
            .await
    }

    /// Lets it serve the first `enabled` of these queues and no others.
    async fn enable(&self, lent: Vec<Lent>, enabled: usize) -> Result<(), VhostUserError> {
        self.connection.call(move |frontend| enable(frontend, &lent, enabled)).await
    }

    /// Waits until it is gone. On the I/O thread.
    async fn closed(&self) -> VhostUserError {
        self.connection.closed().await
    }

    /// Takes the queues back: up to which available index it has taken chains of each. What it has begun is finished.
    async fn finish(&self, lent: &[Lent]) -> Result<Vec<u32>, VhostUserError> {
        let queues: Vec<_> = lent.iter().map(|lent| lent.index).collect();
        let take_back = move |frontend: &mut Frontend| {
            let next = queues.iter().map(|queue| frontend.get_vring_base(*queue));
            Ok(next.collect::<Result<_, _>>()?)
        };
        self.connection.call(take_back).await
    }
}

/// What a back end offers, once it has what is needed. Protocol features that are not asked for stay off.
fn agree(frontend: &mut Frontend, needed: u64) -> Result<u64, VhostUserError> {
    frontend.set_owner()?;
    let features = frontend.get_features()?;
    if !accepted(features, VIRTIO_F_VERSION_1) {
        return Err(VhostUserError::Lacks("VIRTIO_F_VERSION_1"));
    }
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
        return Err(VhostUserError::Lacks("VHOST_USER_F_PROTOCOL_FEATURES"));
    }
    let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    let protocol = frontend.get_protocol_features()? & wanted;
    frontend.set_protocol_features(protocol)?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    let has = if protocol.contains(VhostUserProtocolFeatures::MQ) { frontend.get_queue_num()? } else { 2 };
    if has < needed {
        return Err(VhostUserError::Queues { has, needed });
    }
    Ok(features)
}

fn enable(frontend: &mut Frontend, lent: &[Lent], enabled: usize) -> Result<(), VhostUserError> {
    lent.iter().try_for_each(|lent| lent.enable(frontend, lent.index < enabled))
}

/// The guest's memory as the back end is told of it.
fn regions(memory: &GuestMemoryMmap) -> Result<Vec<VhostUserMemoryRegionInfo>, VhostUserError> {
    let region = |region: &GuestRegionMmap| {
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let told = VhostUserMemoryRegionInfo::from_guest_region(region).ok().filter(|_| shared);
        told.ok_or_else(|| VhostUserError::PrivateMemory(region.start_addr().0))
    };
    memory.iter().map(region).collect()
}

/// The queues that are ready, as they are lent.
fn lend(queues: &[Option<VirtQueue>], memory: &GuestMemoryMmap) -> Result<Vec<Lent>, VhostUserError> {
    let ready = queues.iter().enumerate().filter_map(|(index, queue)| Some((index, queue.as_ref()?)));
    ready.map(|(index, queue)| Lent::new(index, queue, memory).map_err(VhostUserError::Host)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use vm_memory::{FileOffset, GuestAddress, MmapRegion};

    const BYTES: usize = 0x1000;

    fn file(bytes: u64) -> File {
        let file = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        file.into()
    }

    /// Without a file, and with one that is copied on writing.
    #[test]
    fn memory_of_a_process_alone_is_refused() {
        let at = GuestAddress(0x4000);
        let file = FileOffset::new(file(0x1000), 0);
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let copied = MmapRegion::build(Some(file), BYTES, protection, flags).unwrap();
        let copied = GuestRegionMmap::new(copied, at).unwrap();
        for memory in [
            GuestMemoryMmap::from_ranges(&[(at, BYTES)]).unwrap(),
            GuestMemoryMmap::from_regions(vec![copied]).unwrap(),
        ] {
            let refusal = regions(&memory).err().expect("refused").to_string();
            let expected = "the guest's memory at 0x4000 is no shared mapping of a file: a vhost-user back end cannot have it";
            assert_eq!(refusal, expected);
        }
    }

    #[test]
    fn memory_is_told_with_its_place_in_the_file() {
        let file = file(0x3000);
        let at = |offset| Some(FileOffset::new(file.try_clone().unwrap(), offset));
        let ranges = [(GuestAddress(0), 0x2000, at(0)), (GuestAddress(0x1_0000_0000), 0x1000, at(0x2000))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let told = regions(&memory).unwrap();
        let told = told.iter().map(|region| (region.guest_phys_addr, region.memory_size, region.mmap_offset));
        assert_eq!(told.collect::<Vec<_>>(), [(0, 0x2000, 0), (0x1_0000_0000, 0x1000, 0x2000)]);
    }
}
