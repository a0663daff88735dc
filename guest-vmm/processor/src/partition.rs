//! The hypervisor, and the partition it builds for one guest.

use crate::{CpuidMask, DebugCapabilities, ErasedPartitionState, NotSupported, Processor, VpIndex, Vtl};
use std::os::fd::BorrowedFd;
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
    /// A non-maskable interrupt for one VP.
    pub fn nmi(to: VpIndex) -> Self {
        const DELIVERY_NMI: u32 = 4 << 8;
        Self { address: 0xfee0_0000 | u64::from(to.0) << 12, data: DELIVERY_NMI }
    }

    /// Whether this is a non-maskable interrupt.
    pub fn is_nmi(&self) -> bool {
        self.data >> 8 & 7 == 4
    }

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
    /// What the guest sees of the time during which its partition's time is stopped.
    pub time: TimePolicy,
    /// What its VPs are not to see in CPUID. A leaf that they do not have has nothing to hide; their places among the VPs are never
    /// hidden. The VPs' CPUID state shows what is left.
    pub cpuid_mask: Vec<CpuidMask>,
}

impl PartitionConfig {
    /// With the defaults of all that is optional.
    pub fn new(vp_count: u32, memory: GuestMemoryMmap) -> Self {
        Self { vp_count, memory, time: TimePolicy::default(), cpuid_mask: Vec::new() }
    }
}

/// What a guest sees of the time during which it did not run: a pause, or between being saved and restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimePolicy {
    /// Nothing: its clocks go on from where they were.
    #[default]
    Hidden,
    /// All of it: its clocks jump to where they would have been.
    CatchUp,
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
    /// It cannot do this.
    #[error(transparent)]
    NotSupported(#[from] NotSupported),
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

/// Eventfds (eventfd(2)) that stand for accesses of the guest's and for interrupts. Each holds for the partition's whole life, which
/// keeps the descriptor. May be called from any thread.
pub trait EventFds: Send + Sync {
    /// Counts `bell` up when a VP writes these 32 bits at a guest physical address, instead of calling
    /// [`CpuIo::write_mmio`](crate::CpuIo::write_mmio).
    fn add_doorbell(&self, address: u64, value: u32, bell: BorrowedFd<'_>) -> Result<(), PartitionError>;

    /// Sends, whenever `trigger` is counted up, what the IOAPIC's pin sends; nothing while that is nothing.
    fn add_irqfd(&self, pin: u8, trigger: BorrowedFd<'_>) -> Result<(), PartitionError>;
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

    /// What takes doorbells out of the guest, and interrupts into it, without a thread of the VMM's in between; `None` if this
    /// hypervisor has no such thing.
    fn event_fds(&self) -> Option<&dyn EventFds> {
        None
    }

    /// Sends a VP a non-maskable interrupt, as a front panel's button does: also if its local APIC is switched off. A VP that is
    /// stopped takes it when it runs.
    fn inject_nmi(&self, vp: VpIndex);

    /// What debuggers may ask of its VPs.
    fn debug_capabilities(&self) -> DebugCapabilities;

    /// Stops the guest's time, all VPs being stopped. Does nothing if it is.
    fn stop_time(&self) -> Result<(), PartitionError>;

    /// Lets the guest's time go on, by its [`TimePolicy`], before the first VP runs. Does nothing if it is not stopped.
    fn start_time(&self) -> Result<(), PartitionError>;

    /// Makes the time for which it has stood no time of the guest's, whatever its [`TimePolicy`]: for a partition that was made
    /// ahead and gets its guest now. Does nothing if time is not stopped.
    fn forget_stopped_time(&self);

    /// The state of the partition, all VPs and time being stopped.
    fn access_state(&self) -> Box<dyn ErasedPartitionState + '_>;

    /// Stops time and puts what belongs to the partition and to no VP into the state in which it was made, all VPs being
    /// stopped. Each VP's [`Processor::reset`] comes next.
    fn reset(&self) -> Result<(), PartitionError>;

    /// Puts what belongs to the VTL and to no VP into the state in which it was made, all VPs being stopped; time goes on.
    /// Each VP's [`Processor::scrub`] comes next.
    fn scrub(&self, vtl: Vtl) -> Result<(), PartitionError>;
}
