//! KVM as a hypervisor behind the processor seam: the only crate with KVM ioctls.
//!
//! Parts: `hypervisor` the device and what the host can do, `partition` a virtual machine, `vp` a VP on its thread, `exit` what a
//! VP's run comes back with, `run_page` the memory in which it does, `kick` how it is got out of the guest, `cpuid` what a VP
//! is told of itself, `routes` which ends of interrupts are reported, `state` a VP's registers, `snapshot` all of its state
//! for a reset, `fault` the words for a VP that cannot go on.
//!
//! Every partition has local APICs in the kernel and an IOAPIC outside of it (split irqchip, 24 pins), and neither PIC nor
//! PIT. Memory is registered before any interrupt controller, since later that may cost milliseconds.
//!
//! Limits: local APIC IDs have eight bits, so that a partition has 254 VPs at most; tile registers (AMX) are not offered,
//! which would take a permission that this crate never asks for.

mod cpuid;
mod error;
mod exit;
mod fault;
mod hypervisor;
mod kick;
mod partition;
mod routes;
mod run_page;
mod snapshot;
mod state;
mod unavailable;
mod vp;

pub use error::KvmError;
pub use hypervisor::KvmHypervisor;
pub use state::KvmState;
pub use vp::{KvmBinder, KvmProcessor};
