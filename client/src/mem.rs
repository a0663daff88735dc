//! A guest's memory device.

use crate::call::{Call, failure_beside};
use guest_schema::Failure;
use guest_schema::guest_capnp::{guest, mem_controller};

/// A guest's memory device: memory that is plugged while it runs.
///
/// Its calls fail with `deviceNotPresent` if the guest has none, and with `notRunning` once the guest has ended.
#[derive(Clone)]
pub struct Mem {
    client: mem_controller::Client,
    guest: guest::Client,
}

/// The sizes of a memory device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemSize {
    /// Of a block.
    pub block_bytes: u64,
    /// Of the region.
    pub region_bytes: u64,
    /// Of what can be used of the region.
    pub usable_bytes: u64,
    /// Of what is plugged.
    pub plugged_bytes: u64,
    /// Of what is wanted.
    pub requested_bytes: u64,
}

impl Mem {
    pub(crate) fn open(guest: &guest::Client) -> Self {
        let client = guest.get_mem_controller_request().send().pipeline.get_controller();
        Self { client, guest: guest.clone() }
    }

    /// Its sizes.
    pub fn size(&self) -> Call<MemSize> {
        Call::send(self.client.size_request(), self.guest.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let size = MemSize {
                block_bytes: results.get_block_bytes(),
                region_bytes: results.get_region_bytes(),
                usable_bytes: results.get_usable_bytes(),
                plugged_bytes: results.get_plugged_bytes(),
                requested_bytes: results.get_requested_bytes(),
            };
            Ok(refused.map(|()| size))
        })
    }

    /// Asks the guest for so many plugged bytes, which it may take long to reach. `badConfig` unless they are whole blocks,
    /// `limitExceeded` for more than the region.
    pub fn request_size(&self, bytes: u64) -> Call<()> {
        let mut request = self.client.request_size_request();
        request.get().set_bytes(bytes);
        Call::send(request, self.guest.clone(), |results| Failure::read_result(results.get_result()?))
    }
}
