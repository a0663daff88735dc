//! A guest's memory balloon.

use crate::call::{Call, failure_beside};
use guest_schema::guest_capnp::{balloon_controller, guest};

/// A guest's memory balloon: pages of 4 KiB that it has given back to the host.
///
/// Its calls fail with `deviceNotPresent` if the guest has none, and with `notRunning` once the guest has ended.
#[derive(Clone)]
pub struct Balloon {
    client: balloon_controller::Client,
    guest: guest::Client,
}

/// How many pages are in a balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonSize {
    /// How many the guest says that there are.
    pub current_pages: u32,
    /// How many the host wants there.
    pub requested_pages: u32,
}

/// One figure of what a guest says of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryStatistic {
    /// What it is, by the number that VIRTIO 1.3, 5.5.6.3 gives it.
    pub tag: u16,
    /// Bytes or events, as its kind has it.
    pub value: u64,
}

impl Balloon {
    pub(crate) fn open(guest: &guest::Client) -> Self {
        let client = guest.get_balloon_controller_request().send().pipeline.get_controller();
        Self { client, guest: guest.clone() }
    }

    /// How many pages are in it.
    pub fn size(&self) -> Call<BalloonSize> {
        Call::send(self.client.size_request(), self.guest.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let (current_pages, requested_pages) =
                (results.get_current_pages(), results.get_requested_pages());
            Ok(refused.map(|()| BalloonSize { current_pages, requested_pages }))
        })
    }

    /// Asks the guest for so many pages in it; answers with the target, which the guest may take long to reach.
    /// `limitExceeded` for more than it has.
    pub fn request_pages(&self, pages: u32) -> Call<u32> {
        let mut request = self.client.request_num_pages_request();
        request.get().set_pages(pages);
        Call::send(request, self.guest.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let accepted = results.get_accepted_pages();
            Ok(refused.map(|()| accepted))
        })
    }

    /// What the guest says of its memory, asked now. `notSupported` while its driver gives none, `transitionTimedOut` if it does
    /// not answer.
    pub fn statistics(&self) -> Call<Vec<MemoryStatistic>> {
        Call::send(self.client.memory_statistics_request(), self.guest.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let read = |entry: guest_schema::guest_capnp::memory_statistic::Reader<'_>| MemoryStatistic {
                tag: entry.get_tag(),
                value: entry.get_value(),
            };
            let statistics = results.get_statistics()?.iter().map(read).collect();
            Ok(refused.map(|()| statistics))
        })
    }
}
