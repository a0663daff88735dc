//! The seam between the VMM and a hypervisor's virtual processors.
//!
//! A [`Hypervisor`] builds a [`Partition`] over guest memory and hands out one [`BindProcessor`] per VP. Each binder is
//! moved to the thread that will run the VP and bound there, which yields a [`Processor`]. The processor enters the guest in
//! [`Processor::run_vp`]; what the guest does to ports and memory-mapped registers reaches the VMM through [`CpuIo`].
//!
//! [`VpState`] and [`PartitionState`] are what there is to save, restore, compare and show, each from one numbered table.
//! They travel as messages of the schema of saved state, into which and from which they are converted here. What a hypervisor
//! cannot do is [`NotSupported`], or absent from its state.
//!
//! [`VpThread`] is the thread that a VP is bound to, [`VpBinding`] the same before it is known what for. [`scripted`] is a hypervisor that interprets scripts in guest memory,
//! for tests of everything above this seam.
//!
//! Nothing here knows a hypervisor of the host's or a device. The model is OpenVMM's `virt::Processor`.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("guestd runs on Linux on x86-64 only");

mod debug;
mod io;
mod partition;
pub mod scripted;
mod state;
mod stop;
mod sync;
mod thread;

pub use debug::{AccessKind, DebugCapabilities, DebugState, HardwareBreakpoint};
pub use io::{CpuIo, PowerRequest};
pub use partition::{
    BindProcessor, EventFds, Hypervisor, MsiRequest, NewPartition, Partition, PartitionConfig,
    PartitionError, TimePolicy,
};
pub use state::{
    AccessPartitionState, AccessVpState, Clock, Cpuid, CpuidLeaf, CpuidMask, DebugRegisters,
    ErasedPartitionState, ErasedVpState, Events, Exception, IOAPIC_PINS, InjectedInterrupt, IrqRoutes,
    LOCAL_APIC_BYTES, LocalApic, MpState, NumberedRegisters, PartitionState, PartitionStateKind, Registers,
    Segment, StateAccessError, StateError, SystemManagement, SystemRegisters, Table, Tsc, VpState,
    VpStateKind, Xsave,
};
pub use stop::{StopVp, StopVpSource, run_guest};
pub use thread::{HostCpus, SpawnVpError, VpBinding, VpError, VpGone, VpThread};

use inspect::InspectMut;
use std::convert::Infallible;
use std::future::Future;

/// The number of a VP in its partition, from 0; VP 0 is the one that starts the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VpIndex(pub u32);

impl std::fmt::Display for VpIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A virtual trust level: which of a VP's contexts is meant (Hypervisor Top-Level Functional Specification, chapter 15).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Vtl {
    /// The one that every guest has.
    #[default]
    Vtl0,
    /// A more trusted one.
    Vtl1,
    /// The most trusted one.
    Vtl2,
}

impl std::fmt::Display for Vtl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VTL {}", *self as u8)
    }
}

/// What this hypervisor cannot do, and can be asked not to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the hypervisor does not support {0}")]
pub struct NotSupported(pub std::borrow::Cow<'static, str>);

impl Vtl {
    /// For a hypervisor that has [`Vtl::Vtl0`] alone.
    pub fn only_vtl0(self) -> Result<(), NotSupported> {
        match self {
            Self::Vtl0 => Ok(()),
            other => Err(NotSupported(other.to_string().into())),
        }
    }
}

/// Why a VP no longer runs.
#[derive(Debug)]
pub enum VpHaltReason {
    /// The VMM asked for it through [`StopVpSource::stop`]: the VP can run again.
    Stop,
    /// The VMM called this run off through [`StopVpSource::cancel`], to run the VP again soon.
    Cancel,
    /// The guest asked to be powered off.
    PowerOff,
    /// The guest asked to be reset.
    Reset,
    /// The guest has saved itself to its disk and asked to be powered off (ACPI S4).
    Hibernate,
    /// The guest, a test, has ended itself and leaves this value.
    DebugExit(u32),
    /// A triple fault: the VP cannot go on.
    TripleFault(Box<VpFault>),
    /// The VP has executed one instruction, as [`DebugState::single_step`] wants it.
    SingleStep,
    /// The VP has hit one of [`DebugState::breakpoints`]. One for execution has not executed the instruction.
    HwBreak(HardwareBreakpoint),
    /// The VP cannot go on: an exit that nothing handles, or an error of the hypervisor.
    Fault(Box<VpFault>),
}

/// What is known of a VP that cannot go on.
#[derive(Debug, Clone, thiserror::Error)]
#[error("VP {vp}: {reason}")]
pub struct VpFault {
    /// The VP that failed.
    pub vp: VpIndex,
    /// The hypervisor's name for what happened, with its values: `triple fault (KVM_EXIT_SHUTDOWN)`, for instance.
    pub reason: String,
    /// The general registers as the hypervisor reported them after the fault, if it could.
    pub registers: Option<Box<Registers>>,
    /// What a reader of the registers has to know, for instance that they follow an INIT.
    pub note: Option<String>,
}

/// A virtual processor, bound to the thread that runs it.
///
/// Every method is called on that thread alone. Inspected, it shows what its hypervisor keeps for it beside its state.
pub trait Processor: InspectMut {
    /// What can go wrong when the VP's state is read or written, [`NotSupported`] included.
    type Error: std::error::Error + From<NotSupported> + Send + Sync + 'static;

    /// Access to the VP's state while it is stopped.
    type StateAccess<'a>: AccessVpState<Error = Self::Error>
    where
        Self: 'a;

    /// Sets what a debugger wants to be told of, from the next run on; `None` ends debugging.
    ///
    /// The guest's own debug registers keep their values, and have no effect meanwhile. What the hypervisor cannot watch for
    /// ([`Partition::debug_capabilities`]) is [`NotSupported`], and changes nothing.
    fn set_debug_state(&mut self, vtl: Vtl, state: Option<&DebugState>) -> Result<(), Self::Error>;

    /// Runs the VP until there is a reason not to.
    ///
    /// A poll may block in the guest until [`Partition::request_yield`] is called for this VP; it then returns pending at
    /// least once, having woken its own task. The future may be dropped whenever it is pending: the VP's state is whole
    /// after [`Processor::flush_async_requests`].
    fn run_vp(
        &mut self,
        stop: &mut StopVp,
        io: &impl CpuIo,
    ) -> impl Future<Output = Result<Infallible, VpHaltReason>>;

    /// Completes what the VP has begun (an I/O exit whose result is not yet in its registers) without running the guest.
    ///
    /// To be called before the state of a stopped VP is read, written or reset.
    fn flush_async_requests(&mut self) -> Result<(), Self::Error>;

    /// The state of the stopped VP.
    fn access_state(&mut self, vtl: Vtl) -> Result<Self::StateAccess<'_>, NotSupported>;

    /// Whether [`Processor::access_state`] of this VTL may be called now. [`Vtl::Vtl0`] always may.
    fn vtl_inspectable(&self, vtl: Vtl) -> bool {
        vtl == Vtl::Vtl0
    }

    /// Puts the VP into the state in which its partition created it.
    ///
    /// [`Partition::reset`] comes first.
    fn reset(&mut self) -> Result<(), Self::Error>;

    /// Puts what belongs to the VTL into the state in which the partition created it; what it shares with others (time, what
    /// CPUID answers) goes on.
    ///
    /// [`Partition::scrub`] comes first.
    fn scrub(&mut self, vtl: Vtl) -> Result<(), Self::Error>;
}
