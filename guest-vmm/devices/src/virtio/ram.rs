//! Guest memory as devices see it.

use std::io;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// A guest's memory: what devices read and write, and give back to the host.
pub trait GuestRam: Send + Sync {
    /// All of it. A clone must not outlive the `GuestRam`.
    fn view(&self) -> &GuestMemoryMmap;

    /// Gives the pages of a range back to the host; the guest reads zeros there from now on.
    ///
    /// # Errors
    /// If the range is not whole pages of memory, or if the host refuses; some of it may have been given back then.
    fn discard(&self, start: GuestAddress, bytes: u64) -> io::Result<()>;
}
