//! How a guest or its VMM's process ended, for as many waiters as ask.

use guest_schema::host_capnp::guest_exit;
use guest_schema::{Exit, Failure, GuestError};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::rc::Rc;
use tokio::sync::watch;

/// What is known of the guest of the last create.
#[derive(Debug, Default)]
struct Known {
    generation: u64,
    exit: Option<Exit>,
}

/// The account of a guest's end; handles share it.
#[derive(Debug, Clone)]
pub(crate) struct Ending(Rc<watch::Sender<Known>>);

impl Ending {
    pub fn new() -> Self {
        Self(Rc::new(watch::Sender::default()))
    }

    /// Resolves once the guest of the last create has ended, or the process without one.
    pub async fn exit(&self) -> Exit {
        let mut known = self.0.subscribe();
        let known = known.wait_for(|known| known.exit.is_some()).await.expect("the sender is held by self");
        known.exit.clone().expect("waited for")
    }

    /// The VMM's process has ended, with a status that may be unknown; `forced` if the service itself ended it. A guest that has not
    /// ended before has ended now.
    pub fn process_ended(&self, status: Option<ExitStatus>, forced: bool, log: &str) {
        self.0.send_if_modified(|known| {
            let changed = known.exit.is_none();
            known.exit.get_or_insert_with(|| process_exit(known.generation, status, forced, log));
            changed
        });
    }

    /// The VMM has created another guest, the generation-th.
    pub fn created(&self, generation: u64) {
        self.0.send_if_modified(|known| {
            let newer = generation > known.generation;
            if newer {
                *known = Known { generation, exit: None };
            }
            newer
        });
    }

    /// The generation-th guest has ended.
    pub fn terminated(&self, generation: u64, exit: Exit) {
        self.0.send_if_modified(|known| {
            let current = generation == known.generation && known.exit.is_none();
            if current {
                known.exit = Some(exit);
            }
            current
        });
    }
}

fn process_exit(generation: u64, status: Option<ExitStatus>, forced: bool, log: &str) -> Exit {
    if forced {
        return Exit::forced("the service ended it");
    }
    let how = match status.map(|status| (status.signal(), status.code())) {
        // An orderly end of the process follows the end of the lease.
        Some((None, Some(0))) if generation == 0 => {
            return Exit::forced("the lease ended before a guest was created");
        }
        Some((None, Some(0))) => return Exit::forced("its lease ended"),
        Some((Some(signal), _)) => format!("was killed by signal {signal}"),
        Some((None, code)) => format!("ended with status {}", code.unwrap_or_default()),
        None => "ended in an unknown way".to_owned(),
    };
    let failure = Failure::new(GuestError::InternalError, format!("guest-vmm {how}"));
    Exit { log: log.to_owned(), ..Exit::crashed(&failure) }
}

impl guest_exit::Server for Ending {
    async fn when_terminated(
        self: Rc<Self>,
        _: guest_exit::WhenTerminatedParams,
        mut results: guest_exit::WhenTerminatedResults,
    ) -> capnp::Result<()> {
        self.exit().await.write(results.get().init_exit());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use guest_schema::Outcome;

    #[test]
    fn a_crash_is_told_unless_the_guest_had_ended() {
        let killed = ExitStatus::from_raw(9);
        let ending = Ending::new();
        ending.created(1);
        assert!(ending.exit().now_or_never().is_none());
        ending.process_ended(Some(killed), false, "last words");
        let exit = ending.exit().now_or_never().expect("ended");
        assert_eq!((exit.outcome, &exit.log[..]), (Outcome::Crashed, "last words"));
        assert!(exit.detail.contains("signal 9"), "{}", exit.detail);

        let ending = Ending::new();
        ending.created(1);
        ending.terminated(1, Exit::clean(""));
        ending.process_ended(Some(killed), false, "");
        assert_eq!(ending.exit().now_or_never().expect("ended").outcome, Outcome::Clean);
    }

    #[test]
    fn what_the_service_ends_is_forced_and_an_unknown_end_is_told() {
        let end_of = |status, forced| {
            let ending = Ending::new();
            ending.created(1);
            ending.process_ended(status, forced, "");
            ending.exit().now_or_never().expect("ended").outcome
        };
        assert_eq!(end_of(Some(ExitStatus::from_raw(9)), true), Outcome::Forced);
        assert_eq!(end_of(Some(ExitStatus::from_raw(0)), false), Outcome::Forced);
        assert_eq!(end_of(None, false), Outcome::Crashed);
    }

    #[test]
    fn the_guest_of_the_last_create_counts() {
        let ending = Ending::new();
        ending.created(1);
        ending.terminated(1, Exit::clean(""));
        ending.created(2);
        ending.terminated(1, Exit::forced("late word of the first"));
        assert!(ending.exit().now_or_never().is_none());
    }
}
