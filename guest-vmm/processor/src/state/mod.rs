//! The state of an x86-64 VP, and of the partition around it, as two numbered tables.
//!
//! Saving, restoring, resetting, comparing and inspecting all come from the tables, whose order is the one in which states are
//! restored. A state that a hypervisor lacks is absent from what it saves; to restore one that it lacks is refused, by name.

mod activity;
mod apic;
mod cpuid;
mod registers;
mod saved;
mod table;
mod time;

pub use activity::{Events, Exception, InjectedInterrupt, MpState, SystemManagement};
pub use apic::{LOCAL_APIC_BYTES, LocalApic};
pub use cpuid::{Cpuid, CpuidLeaf, CpuidMask};
pub use registers::{DebugRegisters, NumberedRegisters, Registers, Segment, SystemRegisters, Table, Xsave};
pub use time::{Clock, Tsc};

use crate::MsiRequest;
use inspect::{Inspect, Request};
use std::error::Error;
use std::fmt::{Debug, Display};
use table::state_table;

/// Any hypervisor's error about a state.
pub type StateError = Box<dyn Error + Send + Sync>;

/// Why a table's states could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateAccessError<K: Debug + Display> {
    /// They are to be restored, and this host's hypervisor does not have them.
    #[error("this host lacks the state {}", names(.0))]
    Lacking(Vec<K>),
    /// One could not be read.
    #[error("{kind} cannot be read")]
    Read {
        /// Which.
        kind: K,
        /// Why.
        #[source]
        source: StateError,
    },
    /// One could not be set.
    #[error("{kind} cannot be set")]
    Set {
        /// Which.
        kind: K,
        /// Why.
        #[source]
        source: StateError,
    },
    /// What was set reads back otherwise.
    #[error("{} reads back otherwise than it was set", names(.0))]
    ReadBack(Vec<K>),
}

fn names<K: Display>(kinds: &[K]) -> String {
    kinds.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

state_table! {
    /// A state of a VP.
    kind VpStateKind;
    /// Access to the state of a stopped VP.
    access AccessVpState, erased ErasedVpState;
    /// The state of a VP, as far as its hypervisor has it.
    state VpState;

    /// What CPUID answers. First, since what else a VP has depends on it.
    1 Cpuid cpuid set_cpuid: Cpuid,
    /// The segment and control registers.
    2 SystemRegisters system_registers set_system_registers: SystemRegisters,
    /// The general registers.
    3 Registers registers set_registers: Registers,
    /// The extended control registers (Intel SDM volume 3, section 2.6).
    4 Xcrs xcrs set_xcrs: NumberedRegisters,
    /// The extended state. After the control registers that say what is in it.
    5 Xsave xsave set_xsave: Xsave,
    /// The debug registers, the guest's own.
    6 DebugRegisters debug_registers set_debug_registers: DebugRegisters,
    /// The time-stamp counter. Before the timers that are set by it.
    7 Tsc tsc set_tsc: Tsc,
    /// The local APIC. Its mode comes before its registers.
    8 LocalApic local_apic set_local_apic: LocalApic,
    /// The model-specific registers by the host's list. After the local APIC, of whose timer one is the deadline.
    9 Msrs msrs set_msrs: NumberedRegisters,
    /// What is on its way to the VP. After all that could put something on its way.
    10 Events events set_events: Events,
    /// What the VP is doing. Last, since setting other states may wake it.
    11 MpState mp_state set_mp_state: MpState,
}

state_table! {
    /// A state of a partition.
    kind PartitionStateKind;
    /// Access to the state of a partition whose VPs are stopped.
    access AccessPartitionState, erased ErasedPartitionState;
    /// The state of a partition, as far as its hypervisor has it.
    state PartitionState;

    /// The clock.
    1 Clock clock set_clock: Clock,
    /// What the IOAPIC's pins send.
    2 IrqRoutes irq_routes set_irq_routes: IrqRoutes,
}

/// How many pins the IOAPIC has: 24 of a PC, and one for each virtio device that a guest can have.
pub const IOAPIC_PINS: usize = 96;

/// What each of the IOAPIC's pins sends, if it sends anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqRoutes(pub [Option<MsiRequest>; IOAPIC_PINS]);

impl Default for IrqRoutes {
    fn default() -> Self {
        Self([None; IOAPIC_PINS])
    }
}

impl Inspect for IrqRoutes {
    fn inspect(&self, request: Request<'_>) {
        let mut response = request.respond();
        for (pin, route) in self.0.iter().enumerate() {
            if let Some(MsiRequest { address, data }) = route {
                response.field_with(&pin.to_string(), || format!("{data:#x} to {address:#x}"));
            }
        }
    }
}

/// Registers that change by themselves while their VP is stopped.
const MOVING_MSRS: [u32; 3] = [
    // IA32_TSC_DEADLINE (Intel SDM volume 3, section 11.5.4.1) becomes 0 when the timer expires.
    0x6e0,
    // HV_X64_MSR_VP_RUNTIME and HV_X64_MSR_TIME_REF_COUNT (Hypervisor Top-Level Functional Specification, sections 10.4 and 12.3)
    // count on; the latter takes no value.
    0x4000_0010,
    0x4000_0020,
];

/// IA32_SYSENTER_ESP. KVM on SVM tells all of what the guest has put there and takes the lower half alone, which is all that the
/// processor uses of it: it has no SYSENTER in long mode (AMD64 APM volume 2, section 6.1).
const HALF_TAKEN_MSR: u32 = 0x175;

impl VpState {
    /// Without what changes by itself while the VP is stopped, and what cannot be set.
    fn settled(&self) -> Self {
        let mut settled = self.clone();
        settled.local_apic = self.local_apic.as_ref().map(LocalApic::settled);
        if let Some(msrs) = &mut settled.msrs {
            msrs.0.retain(|(number, _)| !MOVING_MSRS.contains(number));
            let half = msrs.0.iter_mut().filter(|(number, _)| *number == HALF_TAKEN_MSR);
            half.for_each(|(_, value)| *value &= u64::from(u32::MAX));
        }
        settled
    }
}

impl PartitionState {
    /// Nothing of it changes by itself while time is stopped.
    fn settled(&self) -> Self {
        self.clone()
    }
}
