//! A debugger of the machine: it keeps VPs out of the guest, looks into them and at memory, and hears where they stop.
//!
//! A VP runs while its state unit does and the debugger does not hold it. So pauses, resets and deadlines are as without one, and
//! devices and time go on while VPs are held. When a VP stops for the debugger (a step is done, a breakpoint hit), all others are
//! held before it is told.
//!
//! `session` is the task that serves one debugger, `memory` and `paging` how it sees memory.

mod memory;
mod paging;
mod session;

pub use memory::MemoryAccessError;
pub use paging::{Unmapped, translate};
pub use session::{
    DebugError, DebugHalt, DebugHaltReason, DebuggedVp, Debugger, MAX_ACCESS_BYTES, Resumption,
};
pub(crate) use session::{DebugPort, Target};
