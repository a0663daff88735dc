//! KVM as a hypervisor behind the processor seam: the only crate with KVM ioctls.
//!
//! Parts: `hypervisor` the device and what the host can do, `partition` a virtual machine, `vp` a VP on its thread, `exit` what a
//! VP's run comes back with, `run_page` the memory in which it does, `kick` how it is got out of the guest, with `run_thread` for the thread that is in it, `cpuid` what a VP
//! is told of itself, `routes` which ends of interrupts are reported, `state` the table of a VP's state, with `convert`, `msrs`,
//! `tsc` and `xsave` for its entries, `time` a partition's time, `debug` a debugger's wishes, `fault` the words for a VP that
//! cannot go on.
//!
//! Every partition has local APICs in the kernel and an IOAPIC outside of it (split irqchip, 24 pins), and neither PIC nor
//! PIT. Memory is registered before any interrupt controller, since later that may cost milliseconds.
//!
//! Limits: local APIC IDs have eight bits, so that a partition has 254 VPs at most; tile registers (AMX) are not offered,
//! which would take a permission that this crate never asks for. On a host that shows guests its own time-stamp counter, or
//! has no offset for it (Linux before 5.16), VPs have no such state, and paused time is seen there.

mod convert;
mod cpuid;
mod debug;
mod error;
mod event_fds;
mod exit;
mod fault;
mod hypervisor;
mod kick;
mod msrs;
mod partition;
mod routes;
mod run_page;
mod run_thread;
mod state;
mod sync;
mod time;
mod tsc;
mod unavailable;
mod vp;
mod xsave;

pub use error::KvmError;
pub use hypervisor::KvmHypervisor;
pub use state::KvmState;
pub use vp::{KvmBinder, KvmProcessor};
