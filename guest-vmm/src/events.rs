//! What became of a guest: kept for late subscribers, and never waited for.

use crate::shown::{micros, since_1970};
use guest_schema::guest_capnp::event_sink;
use guest_schema::{DeviceError, Event, EventKind, Exit, Failure, PanicReport, Phase, TransitionEnd};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, mpsc};

/// How many events are kept.
const KEPT: usize = 1024;

/// How many subscriptions a guest may have at a time.
pub(crate) const MAX_SUBSCRIPTIONS: usize = 64;

/// The last [`KEPT`] events of a guest. Every subscriber has a position of its own.
#[derive(Default)]
pub(crate) struct EventLog {
    ring: RefCell<Ring>,
    changed: Notify,
    subscriptions: Cell<usize>,
}

#[derive(Default)]
struct Ring {
    events: VecDeque<Event>,
    /// The sequence number of the next event.
    next: u64,
    closed: bool,
}

impl EventLog {
    /// The guest entered a phase.
    pub fn phase(&self, phase: Phase) {
        self.record(EventKind::Phase(phase));
    }

    /// A transition of its state units has ended.
    pub fn transition(&self, operation: &str, took: Duration, failure: Option<&Failure>) {
        self.record(EventKind::Transition(TransitionEnd {
            operation: operation.to_owned(),
            duration_us: micros(took),
            failure: failure.cloned(),
        }));
    }

    /// Records what the host fails the guest's devices in, until the devices are gone.
    pub async fn device_errors(&self, mut errors: mpsc::Receiver<DeviceError>) {
        while let Some(error) = errors.recv().await {
            self.record(EventKind::DeviceError(error));
        }
    }

    /// Its kernel has panicked.
    pub fn panicked(&self, report: PanicReport) {
        self.record(EventKind::Panic(report));
    }

    /// Its operator has pressed its power button.
    pub fn power_button(&self) {
        self.record(EventKind::PowerButton);
    }

    /// It has ended. Nothing is recorded after that.
    pub fn terminated(&self, exit: Exit) {
        self.record(EventKind::Terminated(exit));
        self.ring.borrow_mut().closed = true;
        self.changed.notify_waiters();
    }

    fn record(&self, kind: EventKind) {
        self.ring.borrow_mut().push(kind);
        self.changed.notify_waiters();
    }

    /// The event at a position or the first one kept after it, with what was missed; the position moves behind it. `None` after
    /// the last one.
    pub async fn next(&self, position: &mut u64) -> Option<Event> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let ring = self.ring.borrow();
                if let Some(event) = ring.after(position) {
                    return Some(event);
                }
                if ring.closed {
                    return None;
                }
            }
            changed.await;
        }
    }

    /// Takes in a subscriber, unless there are as many as may be.
    pub fn subscribe(self: &Rc<Self>, from: u64) -> Option<Subscription> {
        let others = self.subscriptions.get();
        (others < MAX_SUBSCRIPTIONS).then(|| {
            self.subscriptions.set(others + 1);
            Subscription { log: self.clone(), position: from }
        })
    }
}

impl Ring {
    fn push(&mut self, kind: EventKind) {
        if self.closed {
            return;
        }
        let at_us = since_1970(SystemTime::now());
        self.events.push_back(Event { sequence: self.next, missed: 0, at_us, kind });
        self.next += 1;
        let excess = self.events.len().saturating_sub(KEPT);
        self.events.drain(..excess);
    }

    fn after(&self, position: &mut u64) -> Option<Event> {
        let oldest = self.events.front()?.sequence;
        let missed = oldest.saturating_sub(*position);
        let at = usize::try_from((*position).saturating_sub(oldest)).ok()?;
        let event = self.events.get(at)?.clone();
        *position = event.sequence + 1;
        Some(Event { missed, ..event })
    }
}

/// One subscriber's place in the log.
pub(crate) struct Subscription {
    log: Rc<EventLog>,
    position: u64,
}

impl Subscription {
    /// Sends the sink all events from here on. A slow one holds up this task and nothing else.
    pub async fn feed(mut self, sink: event_sink::Client) {
        while let Some(event) = self.log.next(&mut self.position).await {
            let mut request = sink.event_request();
            event.write(request.get().init_event());
            if let Err(error) = request.send().await {
                tracing::debug!(%error, "a subscriber is gone");
                return;
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.log.subscriptions.set(self.log.subscriptions.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn phases(count: usize) -> Rc<EventLog> {
        let log = Rc::new(EventLog::default());
        (0..count).for_each(|_| log.phase(Phase::Running));
        log
    }

    fn next(log: &EventLog, position: &mut u64) -> Option<Option<Event>> {
        log.next(position).now_or_never()
    }

    #[test]
    fn a_late_subscriber_gets_what_is_kept_and_knows_what_is_not() {
        let log = phases(KEPT + 10);
        let mut position = 4;
        let first = next(&log, &mut position).flatten().expect("kept");
        assert_eq!((first.sequence, first.missed), (10, 6));
        let second = next(&log, &mut position).flatten().expect("kept");
        assert_eq!((second.sequence, second.missed), (11, 0));
    }

    #[test]
    fn a_subscriber_from_the_future_waits_for_it() {
        let log = phases(1);
        let mut position = 2;
        assert_eq!(next(&log, &mut position), None);
        log.phase(Phase::Paused);
        assert_eq!(next(&log, &mut position), None);
        log.phase(Phase::Running);
        assert_eq!(next(&log, &mut position).flatten().map(|event| event.sequence), Some(2));
    }

    #[test]
    fn the_end_is_the_last_event() {
        let log = phases(0);
        log.terminated(Exit::clean("done"));
        log.phase(Phase::Running);
        let mut position = 0;
        let last = next(&log, &mut position).flatten().expect("the end");
        assert_eq!(last.kind, EventKind::Terminated(Exit::clean("done")));
        assert_eq!(next(&log, &mut position), Some(None));
    }

    #[test]
    fn subscribers_are_counted() {
        let log = phases(0);
        let all: Vec<_> = (0..MAX_SUBSCRIPTIONS).map(|_| log.subscribe(0).expect("room")).collect();
        assert!(log.subscribe(0).is_none());
        drop(all);
        assert!(log.subscribe(0).is_some());
    }
}
