//! The guestd protocol: its Cap'n Proto schema as generated code, and plain Rust types for what it carries.
//!
//! The schema's files stand beside this crate's manifest and are the protocol's documentation. The generated code is checked
//! in; `tests/freshness.rs` compares it with what the compiler makes of the schema today.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("guestd runs on Linux on x86-64 only");

mod block;
mod config;
mod debug;
mod devices;
mod failure;
mod generated;
mod grants;
mod mem;
mod net;
mod snapshot;
mod state;
mod timeline;
mod units;
mod vmm;
mod vsock;

pub use block::{
    BlockConfig, BlockMode, BlockServiceInfo, DiskSource, ImageFormat, MAX_BLOCK_TRANSFER, RateLimits,
};
pub use config::{
    ConfigFault, CpuidMask, FileSource, GuestConfig, MemoryConfig, OnReset, ReadConfig, SavedSource,
    VpAffinity,
};
pub use debug::{
    AddressSpace, Breakpoint, BreakpointAccess, DebugHalt, DebuggedVps, HaltReason, SegmentRegister,
    TableRegister, VpRegisters,
};
pub use devices::{ConsoleConfig, DevicesConfig};
pub use failure::{Exit, Failure, GuestError, Outcome, chain};
pub use generated::*;
pub use mem::MemDeviceConfig;
pub use net::{MacAddress, NetBackend, NetConfig, NotAMacAddress};
pub use snapshot::{MemoryKept, SnapshotFile, SnapshotInfo};
pub use state::{GuestState, Panic, Phase, Rendering, UnitStatus, VpState};
pub use timeline::{
    DeviceError, Event, EventKind, PanicReport, StepOutcome, Transition, TransitionEnd, UnitStep,
};
pub use units::{LossPolicy, SavedStateKind, UnitConfig};
pub use vmm::GuestShape;
pub use vsock::VsockConfig;

/// The version of the protocol that this schema describes, as `HostInfo.protocol` tells it.
pub const PROTOCOL: u32 = 1;

/// The most bytes that one `File.read` answers with, whoever keeps the file.
pub const MAX_FILE_READ: u32 = 1 << 20;
