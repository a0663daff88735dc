//! What of a machine can be made before it is known whose: its memory, partition and VPs.
//!
//! All of that depends on nothing but the machine's shape. Every machine begins so; one that was made ahead stands until its guest
//! comes, is not charged for the time of waiting, and costs the host the page tables and descriptors of a guest that has touched nothing.
//!
//! Limit: memory that is to be there at once ([`MemoryOptions`]) is there ahead, too; such a shape had better not be prepared.

use crate::machine::MachineError;
use crate::memory::{GuestMemory, MemoryImage, MemoryOptions};
use processor::{
    CpuidMask, HostCpus, Hypervisor, NewPartition, Partition, PartitionConfig, SpawnVpError, TimePolicy,
    VpBinding, VpIndex,
};
use std::ops::Range;
use std::sync::Arc;

/// What a machine's memory, partition and VPs depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineShape {
    /// How many VPs.
    pub vps: u32,
    /// The host's CPUs on which each VP's thread may run, in the order of the VPs; `None`, and none for a VP, for wherever the
    /// thread may that makes the machine.
    pub affinity: Vec<Option<HostCpus>>,
    /// What the VPs are not to see in CPUID.
    pub cpuid_mask: Vec<CpuidMask>,
    /// What the guest sees of the time during which it does not run.
    pub time: TimePolicy,
    /// How much memory, in bytes.
    pub memory_bytes: u64,
    /// Where memory can be plugged later ([`crate::layout::hotplug_region`]), if the guest has a device for that.
    pub hotplug: Option<Range<u64>>,
    /// What kind of memory.
    pub memory: MemoryOptions,
}

impl MachineShape {
    /// With the defaults of all that is optional.
    pub fn new(vps: u32, memory_bytes: u64) -> Self {
        Self {
            vps,
            affinity: Vec::new(),
            cpuid_mask: Vec::new(),
            time: TimePolicy::default(),
            memory_bytes,
            hotplug: None,
            memory: MemoryOptions::default(),
        }
    }

    fn make_memory(&self, image: Option<&MemoryImage>) -> Result<GuestMemory, MachineError> {
        let Self { memory_bytes: bytes, memory: options, hotplug, .. } = self;
        match image {
            None => {
                GuestMemory::with_hotplug(*bytes, *options, hotplug.clone()).map_err(MachineError::Memory)
            }
            Some(image) => {
                GuestMemory::restore(image, *bytes, *options, hotplug.clone()).map_err(MachineError::Image)
            }
        }
    }
}

/// The memory, partition and VPs of a machine that is still to come. Time stands.
///
/// Dropping it blocks for as long as it takes to join the VPs' threads, to close the partition and to unmap the memory.
pub struct PreparedMachine {
    pub(crate) shape: MachineShape,
    // In the order in which they are given back: no mapping goes away under a partition.
    pub(crate) vps: VpBindings,
    pub(crate) partition: Arc<dyn Partition>,
    pub(crate) memory: Arc<GuestMemory>,
}

impl PreparedMachine {
    /// Makes what a machine of this shape begins with, on the runtime's blocking pool.
    ///
    /// # Errors
    /// Nothing is left then.
    pub async fn new<H>(hypervisor: H, shape: MachineShape) -> Result<Self, MachineError>
    where
        H: Hypervisor + Send + 'static,
    {
        let begin = tokio::task::spawn_blocking(move || Self::begin(&hypervisor, shape, None, &|| Ok(())));
        let mut prepared = begin.await.map_err(|_| MachineError::Panicked)??;
        match prepared.bound().await {
            Ok(()) => Ok(prepared),
            Err(error) => {
                prepared.discard().await;
                Err(error)
            }
        }
    }

    /// The same, with an image in memory if there is one, but for the VPs, which are being bound. Blocks. `go_on` is asked between
    /// the steps.
    pub(crate) fn begin<H: Hypervisor>(
        hypervisor: &H,
        shape: MachineShape,
        image: Option<&MemoryImage>,
        go_on: &dyn Fn() -> Result<(), MachineError>,
    ) -> Result<Self, MachineError> {
        let memory = Arc::new(shape.make_memory(image)?);
        go_on()?;
        let config = PartitionConfig {
            time: shape.time,
            cpuid_mask: shape.cpuid_mask.clone(),
            ..PartitionConfig::new(shape.vps, memory.view().clone())
        };
        let NewPartition { partition, processors } =
            hypervisor.build(&config).map_err(MachineError::Partition)?;
        let mut prepared = Self { vps: VpBindings::default(), partition, memory, shape };
        let affinity = prepared.shape.affinity.iter().cloned().chain(std::iter::repeat(None));
        for ((vp, binder), cpus) in (0..).map(VpIndex).zip(processors).zip(affinity) {
            let binding = VpBinding::spawn(vp, cpus, binder, prepared.partition.clone());
            prepared.vps.0.push(binding.map_err(MachineError::Vp)?);
        }
        go_on()?;
        Ok(prepared)
    }

    /// Resolves once all VPs are bound. Time stands from then on: what is saved before the first start is the state of one moment.
    pub(crate) async fn bound(&mut self) -> Result<(), MachineError> {
        self.vps.bound().await.map_err(MachineError::Vp)?;
        self.partition.stop_time().map_err(MachineError::Partition)
    }

    /// What it can become a machine of.
    pub fn shape(&self) -> &MachineShape {
        &self.shape
    }

    /// The partition.
    pub fn partition(&self) -> &Arc<dyn Partition> {
        &self.partition
    }

    /// Gives everything back, on the runtime's blocking pool.
    pub async fn discard(self) {
        if tokio::task::spawn_blocking(move || drop(self)).await.is_err() {
            tracing::error!("giving a prepared machine back panicked");
        }
    }
}

/// VPs on their threads, in order, that are no machine's yet. Dropping them waits for their threads.
#[derive(Default)]
pub(crate) struct VpBindings(Vec<VpBinding>);

impl VpBindings {
    /// Resolves once all are bound, or with the first failure once all have answered.
    pub async fn bound(&mut self) -> Result<(), SpawnVpError> {
        let mut bound = Ok(());
        for vp in &mut self.0 {
            bound = bound.and(vp.bound().await);
        }
        bound
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Hands them over.
    pub fn take(mut self) -> Vec<VpBinding> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for VpBindings {
    fn drop(&mut self) {
        self.0.drain(..).for_each(VpBinding::end);
    }
}
