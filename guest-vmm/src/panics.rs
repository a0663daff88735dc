//! What a guest has reported of its kernel: counted on the VPs' threads, told at a bounded rate.

use devices::{GuestPanic, PanicSink};
use guest_schema::{Exit, Panic, PanicReport};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// The reports of one guest. However many there are, it keeps counts.
#[derive(Default)]
pub(crate) struct PanicLog {
    counts: Mutex<Counts>,
    changed: Notify,
}

#[derive(Default)]
struct Counts {
    /// The latest since the guest was started or last reset.
    latest: Option<Panic>,
    total: u32,
    /// Those that nobody was told of, the latest of them and how many.
    untold: Option<PanicReport>,
}

impl PanicLog {
    /// Resolves when there is a report that nobody was told of.
    pub async fn reported(&self) {
        while self.counts().untold.is_none() {
            self.changed.notified().await;
        }
    }

    /// The reports that nobody was told of.
    pub fn take(&self) -> Option<PanicReport> {
        self.counts().untold.take()
    }

    /// The guest was reset: what it reported before is no news of it any more.
    pub fn was_reset(&self) {
        self.counts().latest = None;
    }

    /// How the guest ended, with what it has reported.
    pub fn known_at(&self, exit: Exit) -> Exit {
        let counts = self.counts();
        Exit { panic: counts.latest, panics: counts.total, ..exit }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PanicSink for PanicLog {
    fn panicked(&self, panic: GuestPanic) {
        let panic = match panic {
            GuestPanic::Panicked => Panic::Panicked,
            GuestPanic::CrashLoaded => Panic::CrashLoaded,
        };
        {
            let mut counts = self.counts();
            counts.latest = Some(panic);
            counts.total = counts.total.saturating_add(1);
            let before = counts.untold.map_or(0, |report| report.count);
            counts.untold = Some(PanicReport { panic, count: before.saturating_add(1) });
        }
        // With nobody waiting the permit stays: whoever waits next looks again.
        self.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn reports_that_were_not_told_come_as_one_with_their_number() {
        let log = PanicLog::default();
        assert_eq!((log.reported().now_or_never(), log.take()), (None, None));
        log.panicked(GuestPanic::Panicked);
        log.panicked(GuestPanic::Panicked);
        log.panicked(GuestPanic::CrashLoaded);
        assert_eq!(log.reported().now_or_never(), Some(()));
        assert_eq!(log.take(), Some(PanicReport { panic: Panic::CrashLoaded, count: 3 }));
        assert_eq!((log.reported().now_or_never(), log.take()), (None, None));
        log.panicked(GuestPanic::Panicked);
        assert_eq!(log.take(), Some(PanicReport { panic: Panic::Panicked, count: 1 }));
    }

    #[test]
    fn an_end_after_a_reset_is_not_the_panics() {
        let log = PanicLog::default();
        log.panicked(GuestPanic::CrashLoaded);
        log.panicked(GuestPanic::Panicked);
        let exit = log.known_at(Exit::clean("reset"));
        assert_eq!(exit, Exit { panic: Some(Panic::Panicked), panics: 2, ..Exit::clean("reset") });
        log.was_reset();
        assert_eq!(log.known_at(Exit::clean("off")), Exit { panics: 2, ..Exit::clean("off") });
    }

    #[tokio::test]
    async fn a_report_from_another_thread_is_noticed() {
        let log = std::sync::Arc::new(PanicLog::default());
        let guest = log.clone();
        let ((), ()) = tokio::join!(log.reported(), async move {
            tokio::task::yield_now().await;
            std::thread::spawn(move || guest.panicked(GuestPanic::Panicked)).join().expect("reported");
        });
        assert!(log.take().is_some());
    }
}
