//! What `guestctl run` says at the end.

use crate::ending::{self, FAILED, Outcome, Trouble, UNAVAILABLE};
use guest_client::{Exit, Failure, GuestError, Panic};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Time since the command asked for the guest.
#[derive(Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    /// Starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// How long ago that was.
    pub fn now(self) -> Duration {
        self.0.elapsed()
    }
}

/// How it ended.
#[derive(Debug)]
pub enum Ended {
    /// The guest never ran.
    Refused(Failure),
    /// It ran, and ended so.
    Exit(Exit),
    /// Nobody knows: the service went away too.
    Lost(String),
}

/// How long what took.
#[derive(Debug, Clone, Copy)]
pub struct Timings {
    launch: Option<Duration>,
    create: Duration,
    first_byte: Option<Duration>,
    total: Duration,
}

impl Timings {
    /// All from the start, as the clock told them.
    pub fn new(
        launch: Option<Duration>,
        create: Duration,
        first_byte: Option<Duration>,
        total: Duration,
    ) -> Self {
        // run takes effect when create has.
        let first_byte = first_byte.map(|at| at.saturating_sub(create));
        Self { launch, create, first_byte, total }
    }

    fn json(self) -> Value {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        json!({
            "launch": self.launch.map(us), "create": us(self.create),
            "first_byte": self.first_byte.map(us), "total": us(self.total),
        })
    }
}

/// All there is to say.
#[derive(Debug)]
pub struct Report {
    /// The guest's id.
    pub id: String,
    /// How it ended.
    pub ended: Ended,
    /// Bytes of output that were dropped.
    pub lost: u64,
    /// How long what took.
    pub timings: Timings,
    /// What ended it from this side.
    pub interruption: Option<Trouble>,
}

impl Report {
    /// Says it on the standard error, and makes the exit status of it.
    pub fn tell(self, json: bool) -> Outcome {
        if json {
            eprintln!("{}", self.json());
        } else if self.interruption.is_none() {
            self.tell_in_words();
        }
        match (self.interruption, &self.ended) {
            (Some(trouble), _) => Err(trouble),
            (None, Ended::Exit(exit)) => ending::of_guest(exit),
            (None, Ended::Refused(failure)) if is_no_kvm(failure) => Err(Trouble::Told(UNAVAILABLE)),
            (None, Ended::Refused(_) | Ended::Lost(_)) => Err(Trouble::Told(FAILED)),
        }
    }

    fn tell_in_words(&self) {
        if self.lost > 0 {
            eprintln!("guestctl: {} bytes of output were lost: they were not read in time", self.lost);
        }
        match &self.ended {
            Ended::Refused(failure) => eprintln!("guestctl: {}", failure.chain()),
            Ended::Lost(text) => eprintln!("guestctl: {text}"),
            Ended::Exit(exit) => {
                if let Some(panic) = ending::panic_of(exit) {
                    eprintln!("guestctl: {panic}");
                }
                if let Some(failure) = exit.failure() {
                    eprintln!("guestctl: {failure}");
                }
                if !exit.log.is_empty() {
                    eprintln!("guestctl: the end of the VMM's log:\n{}", exit.log.trim_end());
                }
            }
        }
    }

    fn json(&self) -> Value {
        let (outcome, code, detail, log) = match &self.ended {
            Ended::Refused(failure) => ("refused", Some(failure.code), failure.detail.as_str(), ""),
            Ended::Lost(text) => ("lost", None, text.as_str(), ""),
            Ended::Exit(exit) => (exit.outcome.name(), exit.code, exit.detail.as_str(), exit.log.as_str()),
        };
        let exit = if let Ended::Exit(exit) = &self.ended { Some(exit) } else { None };
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        json!({
            "id": self.id, "outcome": outcome, "code": code.map(|code| code.name()), "detail": some(detail),
            "log": some(log), "panic": exit.and_then(|exit| exit.panic).map(Panic::name),
            "panics": exit.map_or(0, |exit| exit.panics), "debug_exit": exit.and_then(|exit| exit.debug_exit),
            "lost": self.lost, "timings_us": self.timings.json(),
        })
    }
}

/// Whether the VMM could not have a virtual machine from its host at all.
fn is_no_kvm(failure: &Failure) -> bool {
    failure.code == GuestError::GuestInitializationFailure && failure.detail.contains("/dev/kvm")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(ended: Ended) -> Report {
        let us = Duration::from_micros;
        let timings = Timings::new(Some(us(10)), us(100), Some(us(150)), us(900));
        Report { id: "one".into(), ended, lost: 0, timings, interruption: None }
    }

    #[test]
    fn json_has_every_field() {
        let failure = Failure::new(GuestError::VcpuRuntimeFailure, "vp 0: shutdown");
        let expected = json!({
            "id": "one", "outcome": "crashed", "code": "vcpuRuntimeFailure", "detail": "vp 0: shutdown", "log": null,
            "panic": null, "panics": 0, "debug_exit": null,
            "lost": 0, "timings_us": { "launch": 10, "create": 100, "first_byte": 50, "total": 900 },
        });
        assert_eq!(report(Ended::Exit(Exit::crashed(&failure))).json(), expected);
        let exit = Exit { panic: Some(Panic::Panicked), panics: 2, ..Exit::debug(7) };
        let told = report(Ended::Exit(exit)).json();
        assert_eq!(
            [&told["panic"], &told["panics"], &told["debug_exit"]],
            [&json!("panicked"), &json!(2), &json!(7)]
        );
    }

    #[test]
    fn the_status_follows_the_end_unless_interrupted() {
        let clean = || report(Ended::Exit(Exit::clean("powered off")));
        assert!(clean().tell(false).is_ok());
        let refused = report(Ended::Refused(Failure::new(GuestError::BadConfig, "cpus: 0")));
        assert_eq!(refused.tell(false).expect_err("failed").status(), 1);
        let no_kvm = Failure::new(GuestError::GuestInitializationFailure, "/dev/kvm: no such file");
        assert_eq!(report(Ended::Refused(no_kvm)).tell(false).expect_err("failed").status(), 3);
        let left = Report { interruption: Some(Trouble::Interrupted(15)), ..clean() };
        assert_eq!(left.tell(false).expect_err("interrupted").status(), 143);
        let unread = Report { interruption: Some(Trouble::OutputClosed), ..clean() };
        assert_eq!(unread.tell(false).expect_err("unread").status(), 141);
    }
}
