//! The machine: guest memory, boot loaders, ACPI, the VP set, assembled from a list of devices.
//!
//! [`Machine::build`] makes one on any [`processor::Hypervisor`], [`Machine::build_on`] one of parts that were made ahead, and joins its parts as one set of state units, in the order
//! `vps → devices → partition → memory` ("a → b" reads "a depends on b"). Nothing here knows RPC, and only the board's list
//! names devices.

pub mod acpi;
mod board;
mod boot;
pub mod bus;
pub mod debug;
mod dump;
mod injected;
pub mod layout;
pub mod loader;
mod machine;
pub mod memory;
mod prepared;
mod reset_vector;
mod units;
mod virtio;
mod vp_inspect;
mod vp_set;

pub use boot::{BootError, BootFiles};
pub use dump::{CoreDump, DumpError};
pub use injected::{InjectedFault, InjectedStep};
pub use machine::{Machine, MachineConfig, MachineError, MachineSnapshot, MachineView, SnapshotError, VPS};
pub use memory::host_memory_bytes;
pub use prepared::{MachineShape, PreparedMachine};
pub use virtio::PlaceError;
pub use vp_set::{Halt, VpActivity, VpSet};
