//! The hypervisor, and the partition it builds for one guest.

use crate::{Processor, VpIndex};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// A message-signalled interrupt (Intel SDM volume 3, section 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MsiRequest {
    /// The address, 0xfeexxxxx.
    pub address: u64,
    /// The data: vector, delivery mode, level and trigger mode.
    pub data: u32,
}

impl MsiRequest {
    /// Whether the interrupt is level-triggered, so that its end has to be reported.
    pub fn level_triggered(&self) -> bool {
        self.data & (1 << 15) != 0
    }
}

/// What a partition is made of.
#[derive(Clone)]
pub struct PartitionConfig {
    /// How many VPs it has, from 1 to the hypervisor's limit.
    pub vp_count: u32,
    /// Its memory. Held by the partition, so that no mapping goes away while the guest can reach it.
    pub memory: GuestMemoryMmap,
}

/// What the hypervisor refused or failed at.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// The hypervisor is not there, or not for this user. The text says why and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// The host lacks something that every guest needs.
    #[error("the hypervisor lacks {0}")]
    Missing(&'static str),
    /// More VPs than the hypervisor has.
    #[error("{wanted} VPs asked for, the host allows {limit}")]
    TooManyVps {
        /// How many were asked for.
        wanted: u32,
        /// How many the hypervisor has.
        limit: u32,
    },
    /// A call to the hypervisor failed.
    #[error("{call} failed")]
    Call {
        /// The call, by its name.
        call: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// A partition and what is needed to bind its VPs.
pub struct NewPartition<B> {
    /// The partition.
    pub partition: Arc<dyn Partition>,
    /// One binder a VP, in order.
    pub processors: Vec<B>,
}

/// Something that makes partitions.
pub trait Hypervisor {
    /// What binds a VP of such a partition.
    type Binder: BindProcessor;

    /// The most VPs that a partition can have.
    fn max_vps(&self) -> Result<u32, PartitionError>;

    /// Makes a partition, its memory in place before any interrupt controller.
    ///
    /// May block for some milliseconds. On an error nothing is left behind.
    fn build(&self, config: &PartitionConfig) -> Result<NewPartition<Self::Binder>, PartitionError>;
}

/// A VP on its way to its thread.
pub trait BindProcessor: Send + 'static {
    /// The VP, bound.
    type Processor: Processor;

    /// Binds the VP to the calling thread, which alone may use it from now on.
    fn bind(self) -> Result<Self::Processor, PartitionError>;
}

/// The parts of a partition that all of the VMM shares. May be called from any thread.
pub trait Partition: Send + Sync {
    /// Asks a VP to leave the guest soon, so that its thread can look at what else there is to do.
    ///
    /// Never lost: a VP that is about to enter the guest leaves it at once. Spurious requests cost a little time, no more.
    fn request_yield(&self, vp: VpIndex);

    /// Delivers a message-signalled interrupt.
    fn signal_msi(&self, request: MsiRequest) -> Result<(), PartitionError>;

    /// Says what the IOAPIC's pin sends when it is asserted, or that it sends nothing, so that the local APICs report the
    /// end of level-triggered interrupts through [`crate::CpuIo::handle_eoi`].
    fn set_irq_route(&self, pin: u8, request: Option<MsiRequest>) -> Result<(), PartitionError>;

    /// Resets what belongs to the partition and to no VP, all VPs being stopped.
    fn reset(&self) -> Result<(), PartitionError>;
}
