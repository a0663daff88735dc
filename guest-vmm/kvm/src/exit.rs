//! What a VP's run comes back with, as plain values.

use kvm_bindings::*;

/// Where in the run page the data of an exit lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Data {
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

/// The instruction that KVM could not emulate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Emulation {
    pub(crate) len: u8,
    pub(crate) bytes: [u8; 15],
}

/// Why KVM_RUN came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Elements of `size` bytes are to be read from a port.
    IoIn {
        port: u16,
        size: u8,
        data: Data,
    },
    /// Elements of `size` bytes are to be written to a port.
    IoOut {
        port: u16,
        size: u8,
        data: Data,
    },
    MmioRead {
        address: u64,
        data: Data,
    },
    MmioWrite {
        address: u64,
        data: Data,
    },
    /// A local APIC has ended a level-triggered interrupt.
    IoapicEoi {
        vector: u8,
    },
    /// A triple fault.
    Shutdown,
    /// The guest asked the hypervisor for it.
    SystemEvent {
        kind: u32,
    },
    InternalError {
        suberror: u32,
        emulation: Option<Emulation>,
    },
    FailEntry {
        reason: u64,
        cpu: u32,
    },
    /// What a debugger has asked for, by DR6.
    Debug {
        dr6: u64,
    },
    /// Nothing that this crate has switched on.
    Other {
        reason: u32,
    },
}

/// Pairs each exit with its name.
macro_rules! names {
    ($($exit:ident)*) => { [$(($exit, stringify!($exit)),)*] };
}

/// The names of the exits that end a VP and have no more to tell, as KVM's header has them; those of other architectures too.
const NAMES: [(u32, &str); 32] = names! {
    KVM_EXIT_UNKNOWN
    KVM_EXIT_EXCEPTION
    KVM_EXIT_HYPERCALL
    KVM_EXIT_HLT
    KVM_EXIT_IRQ_WINDOW_OPEN
    KVM_EXIT_INTR
    KVM_EXIT_SET_TPR
    KVM_EXIT_TPR_ACCESS
    KVM_EXIT_S390_SIEIC
    KVM_EXIT_S390_RESET
    KVM_EXIT_DCR
    KVM_EXIT_NMI
    KVM_EXIT_OSI
    KVM_EXIT_PAPR_HCALL
    KVM_EXIT_S390_UCONTROL
    KVM_EXIT_WATCHDOG
    KVM_EXIT_S390_TSCH
    KVM_EXIT_EPR
    KVM_EXIT_S390_STSI
    KVM_EXIT_HYPERV
    KVM_EXIT_ARM_NISV
    KVM_EXIT_X86_RDMSR
    KVM_EXIT_X86_WRMSR
    KVM_EXIT_DIRTY_RING_FULL
    KVM_EXIT_AP_RESET_HOLD
    KVM_EXIT_X86_BUS_LOCK
    KVM_EXIT_XEN
    KVM_EXIT_RISCV_SBI
    KVM_EXIT_RISCV_CSR
    KVM_EXIT_NOTIFY
    KVM_EXIT_LOONGARCH_IOCSR
    KVM_EXIT_MEMORY_FAULT
};

/// The name of an exit reason that this crate does not handle.
pub(crate) fn name(reason: u32) -> Option<&'static str> {
    NAMES.iter().find(|(number, _)| *number == reason).map(|(_, name)| *name)
}
