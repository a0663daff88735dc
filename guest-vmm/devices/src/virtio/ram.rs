//! Guest memory as devices see it.

use std::io;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// A guest's memory: what devices read and write, and give back to the host.
pub trait GuestRam: Send + Sync {
    /// All of it. A clone must not outlive the `GuestRam`.
    fn view(&self) -> &GuestMemoryMmap;

    /// Gives the pages of a range back to the host; the guest reads zeros there from now on. Of memory that a guest goes on with after
    /// a snapshot, pages may stay with it as zeros once thousands of ranges were given back.
    ///
    /// # Errors
    /// If the range is not whole pages of memory, or if the host refuses; some of it may have been given back then.
    fn discard(&self, start: GuestAddress, bytes: u64) -> io::Result<()>;

    /// All of it for another process, too: each region of this view names the file and the offset in it where the region lies. From
    /// now on memory is in this file for as long as it lives. A clone must not outlive the `GuestRam`. The first time, the VPs must not run.
    ///
    /// # Errors
    /// If the host has no room for a copy of memory that was in no such file; [`io::ErrorKind::Unsupported`] if it cannot be shared.
    fn share(&self) -> io::Result<GuestMemoryMmap> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
