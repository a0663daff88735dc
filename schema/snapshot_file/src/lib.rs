//! A snapshot of a guest as one file, which any tool can copy.
//!
//! | at | what |
//! | --- | --- |
//! | 0 | `memory`: as it lies in the memory's own file, pages of zeros left out as holes; or `layer`: the pages that differ from another file's memory |
//! | pages, each part at the next one | `pages` (of a layer: which pages are in it), `state` (`machine.snapshot.SnapshotState`), `kernel`, `ramdisk` if there is one |
//! | the next page | the manifest (`machine.snapshot_file.Manifest`) |
//! | at once behind it | the footer, 64 bytes, with which the file ends |
//!
//! So a VMM maps the memory privately and reads of it what the guest touches, and a file whose end is missing is told at once. What
//! lies between parts is zero. The footer, little-endian: 16 bytes `guestd snapshot\n`, the format's version (32 bits), zero (32), the
//! manifest's offset and length (64 each), its checksum (XXH3, 128 bits, big-endian), the checksum of the 56 bytes before (XXH3, 64).
//!
//! Checksums find damage, and not forgery. Opening a file checks all of it but the memory, which is read lazily: [`SnapshotFile::verify_memory`]
//! checks that. Whoever opens a file sees to it that nobody writes to it meanwhile. Limits: pages are of 4 KiB; a state of 256 MiB, a
//! manifest of 4 MiB; a layer's base has all of its memory.

mod checksum;
mod encode;
mod error;
mod footer;
mod layout;
mod memory;
mod open;
mod output;
mod pages;
mod save;
mod state;

pub use checksum::Checksum;
pub use encode::{MemoryMade, Piece, SnapshotEncoder, SnapshotSource};
pub use error::{OpenError, WriteError};
pub use footer::is_snapshot_file;
pub use guest_saved_state::machine::snapshot::{SnapshotState, UnitState};
pub use guest_saved_state::machine::snapshot_file::{LayerBase, Manifest, PartEntry, UnitEntry};
pub use layout::Part;
pub use open::SnapshotFile;
pub use output::{Output, SparseOutput, StreamOutput, write};
pub use save::SavedFile;
pub use state::config_of;

/// The version of the format that is written, and the only one that is read.
pub const FORMAT: u32 = 1;

/// The version of a state's own format ([`SnapshotState::format`]) that is written, and the only one that is read.
pub const STATE_FORMAT: u32 = 1;

/// A page: what parts begin at, and what is left out of memory if it is all zeros.
pub const PAGE: u64 = 4096;

/// How much is read at a time.
const BLOCK: usize = 1 << 20;

#[cfg(test)]
mod tests;
