//! What a VP is doing, and what it has yet to take.

use inspect::{Inspect, Request};

/// What a VP is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MpState {
    /// It runs, or would if its thread let it.
    Runnable,
    /// It waits in HLT for an interrupt.
    Halted,
    /// It waits to be started by INIT and SIPI.
    WaitForSipi,
}

impl Inspect for MpState {
    fn inspect(&self, request: Request<'_>) {
        request.value(match self {
            Self::Runnable => "runnable",
            Self::Halted => "halted",
            Self::WaitForSipi => "waiting for SIPI",
        });
    }
}

/// An exception on its way to the guest (Intel SDM volume 3, chapter 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Exception {
    /// Its vector.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error_code: Option<u32>,
    /// What goes into CR2 or DR6 once it is delivered, if that is yet to come.
    pub payload: Option<u64>,
    /// Whether its delivery has begun; else it is pending.
    pub injected: bool,
}

/// An external interrupt whose delivery has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InjectedInterrupt {
    /// Its vector.
    pub vector: u8,
    /// Whether an INT instruction has caused it.
    pub soft: bool,
}

/// System management interrupts, of which a host may know nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SystemManagement {
    /// Whether the VP is in system management mode.
    pub active: bool,
    /// Whether an SMI is pending.
    pub pending: bool,
    /// Whether the SMI has come in an NMI's handler.
    pub inside_nmi: bool,
    /// Whether an INIT waits for the end of system management mode.
    pub latched_init: bool,
}

/// What is on its way to a VP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Events {
    /// An exception.
    pub exception: Option<Exception>,
    /// An external interrupt.
    pub interrupt: Option<InjectedInterrupt>,
    /// Interrupts are held back for one instruction by STI.
    pub shadow_of_sti: bool,
    /// Interrupts are held back for one instruction by MOV SS.
    pub shadow_of_mov_ss: bool,
    /// An NMI's delivery has begun.
    pub nmi_injected: bool,
    /// How many NMIs are pending: at most 2.
    pub nmis_pending: u8,
    /// NMIs are held back until the next IRET.
    pub nmi_masked: bool,
    /// System management.
    pub system_management: SystemManagement,
    /// A triple fault is yet to be reported.
    pub triple_fault_pending: bool,
}

impl Inspect for Exception {
    fn inspect(&self, request: Request<'_>) {
        let &Self { vector, error_code, payload, injected } = self;
        let mut response = request.respond();
        response.field("vector", &vector).field("injected", &injected);
        if let Some(code) = error_code {
            response.hex("error_code", code);
        }
        if let Some(payload) = payload {
            response.hex("payload", payload);
        }
    }
}

impl Inspect for InjectedInterrupt {
    fn inspect(&self, request: Request<'_>) {
        request.respond().hex("vector", self.vector).field("soft", &self.soft);
    }
}

impl Inspect for SystemManagement {
    fn inspect(&self, request: Request<'_>) {
        let Self { active, pending, inside_nmi, latched_init } = self;
        let mut response = request.respond();
        response.field("active", active).field("pending", pending);
        response.field("inside_nmi", inside_nmi).field("latched_init", latched_init);
    }
}

impl Inspect for Events {
    fn inspect(&self, request: Request<'_>) {
        let Self {
            exception,
            interrupt,
            shadow_of_sti,
            shadow_of_mov_ss,
            nmi_injected,
            nmis_pending,
            nmi_masked,
            system_management,
            triple_fault_pending,
        } = self;
        let mut response = request.respond();
        if let Some(exception) = exception {
            response.field("exception", exception);
        }
        if let Some(interrupt) = interrupt {
            response.field("interrupt", interrupt);
        }
        response.field("shadow_of_sti", shadow_of_sti).field("shadow_of_mov_ss", shadow_of_mov_ss);
        response.field("nmi_injected", nmi_injected).field("nmis_pending", nmis_pending);
        response.field("nmi_masked", nmi_masked);
        response.field("system_management", system_management);
        response.field("triple_fault_pending", triple_fault_pending);
    }
}
