//! BalloonController: the host's end of a guest's memory balloon.

use crate::guest::Guest;
use devices::virtio::balloon::{BalloonHandle, StatisticsError, TooManyPages};
use guest_schema::guest_capnp::balloon_controller;
use guest_schema::{Failure, GuestError};
use std::rc::Rc;
use std::time::Duration;

/// How long a guest may take to say how its memory is.
const STATISTICS: Duration = Duration::from_secs(2);

/// A balloon, for as long as its guest lives.
pub(crate) struct Balloon(Rc<Guest>);

impl Balloon {
    pub fn new(guest: Rc<Guest>) -> Self {
        Self(guest)
    }

    fn handle(&self) -> Result<BalloonHandle, Failure> {
        self.0.end_of("balloon", |ends| ends.balloon.clone())
    }
}

fn statistics_failure(error: StatisticsError) -> Failure {
    let code = match error {
        StatisticsError::NoDriver => GuestError::NotSupported,
        StatisticsError::Busy => GuestError::LimitExceeded,
        StatisticsError::Unanswered(_) => GuestError::TransitionTimedOut,
    };
    Failure::new(code, error.to_string())
}

impl balloon_controller::Server for Balloon {
    async fn size(
        self: Rc<Self>,
        _: balloon_controller::SizeParams,
        mut results: balloon_controller::SizeResults,
    ) -> capnp::Result<()> {
        let mut results = results.get();
        match self.handle() {
            Ok(balloon) => {
                results.set_current_pages(balloon.actual_pages());
                results.set_requested_pages(balloon.requested_pages());
            }
            Err(failure) => failure.write(results.init_error()),
        }
        Ok(())
    }

    async fn request_num_pages(
        self: Rc<Self>,
        params: balloon_controller::RequestNumPagesParams,
        mut results: balloon_controller::RequestNumPagesResults,
    ) -> capnp::Result<()> {
        let pages = params.get()?.get_pages();
        let refused =
            |error: TooManyPages| Failure::new(GuestError::LimitExceeded, format!("pages: {error}"));
        let mut results = results.get();
        match self.handle().and_then(|balloon| balloon.request_pages(pages).map_err(refused)) {
            Ok(()) => results.set_accepted_pages(pages),
            Err(failure) => failure.write(results.init_error()),
        }
        Ok(())
    }

    async fn memory_statistics(
        self: Rc<Self>,
        _: balloon_controller::MemoryStatisticsParams,
        mut results: balloon_controller::MemoryStatisticsResults,
    ) -> capnp::Result<()> {
        let answer = match self.handle() {
            Ok(balloon) => balloon.statistics(STATISTICS).await.map_err(statistics_failure),
            Err(failure) => Err(failure),
        };
        let results = results.get();
        match answer {
            Ok(statistics) => {
                let length = u32::try_from(statistics.len()).expect("a few dozen");
                let mut list = results.init_statistics(length);
                for (index, statistic) in (0..).zip(&statistics) {
                    let mut entry = list.reborrow().get(index);
                    entry.set_tag(statistic.tag);
                    entry.set_value(statistic.value);
                }
            }
            Err(failure) => failure.write(results.init_error()),
        }
        Ok(())
    }
}
