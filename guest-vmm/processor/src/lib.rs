//! The seam between the VMM and a hypervisor's virtual processors.
//!
//! A [`Hypervisor`] builds a [`Partition`] over guest memory and hands out one [`BindProcessor`] per VP. Each binder is
//! moved to the thread that will run the VP and bound there, which yields a [`Processor`]. The processor enters the guest in
//! [`Processor::run_vp`]; what the guest does to ports and memory-mapped registers reaches the VMM through [`CpuIo`].
//!
//! [`VpThread`] is the thread that a VP is bound to. [`scripted`] is a hypervisor that interprets scripts in guest memory,
//! for tests of everything above this seam.
//!
//! Nothing here knows a hypervisor of the host's or a device. The model is OpenVMM's `virt::Processor`.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("guestd runs on Linux on x86-64 only");

mod io;
mod partition;
pub mod scripted;
mod state;
mod stop;
mod thread;

pub use io::{CpuIo, PowerRequest};
pub use partition::{
    BindProcessor, Hypervisor, MsiRequest, NewPartition, Partition, PartitionConfig, PartitionError,
};
pub use state::{
    AccessVpState, ErasedVpState, MpState, Registers, Segment, StateError, SystemRegisters, Table,
};
pub use stop::{StopVp, StopVpSource, run_guest};
pub use thread::{SpawnVpError, VpError, VpGone, VpThread};

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

/// Why a VP no longer runs.
#[derive(Debug)]
pub enum VpHaltReason {
    /// The VMM asked for it through [`StopVpSource::stop`]: the VP can run again.
    Stop,
    /// The guest asked to be powered off.
    PowerOff,
    /// The guest asked to be reset.
    Reset,
    /// The VP cannot go on: a triple fault, an exit that nothing handles, or an error of the hypervisor.
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
/// Every method is called on that thread alone.
pub trait Processor {
    /// What can go wrong when the VP's state is read or written.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Access to the VP's state while it is stopped.
    type StateAccess<'a>: AccessVpState<Error = Self::Error>
    where
        Self: 'a;

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
    fn access_state(&mut self) -> Self::StateAccess<'_>;

    /// Puts the VP into the state in which its partition created it.
    ///
    /// [`Partition::reset`] comes first.
    fn reset(&mut self) -> Result<(), Self::Error>;
}
