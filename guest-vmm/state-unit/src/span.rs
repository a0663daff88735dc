//! Transitions, and the units' parts in them, as `tracing` spans.
//!
//! A transition is a span `transition`, open from its turn to its end. Below it, each unit's part in each pass is a span
//! `unit`, open from the moment the unit is asked until it has answered, be that late. The unit does its work inside that
//! span, so that what it logs carries its name. A unit that is passed over has a span that is closed at once. What is
//! known at the end is recorded then: the outcome, the error, and the moments of the timeline, in µs since the pass began.
//!
//! Where nobody listens, a unit costs one look at a flag.

use crate::StateTransitionError;
use crate::phase::{Operation, Phase};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Context;
use tracing::Span;
use tracing::field::{Empty, display};

/// The span of a transition, within the caller's.
pub(crate) fn transition(operation: Operation) -> Span {
    tracing::info_span!("transition", %operation, outcome = Empty, error = Empty)
}

/// Records how the transition of this span has ended.
pub(crate) fn record_end<T>(span: &Span, result: &Result<T, StateTransitionError>) {
    match result {
        Ok(_) => span.record("outcome", "done"),
        Err(error) => span.record("outcome", "failed").record("error", display(error)),
    };
}

/// What the units' spans of a phase are below: the transition's span, until the phase is over, for the timeline keeps
/// phases for long.
#[derive(Debug)]
pub(crate) struct PhaseSpan {
    enabled: bool,
    span: Mutex<Option<Arc<Span>>>,
}

impl PhaseSpan {
    /// Below the span that this is called in.
    pub(crate) fn current() -> Self {
        let span = Span::current();
        let enabled = !span.is_disabled();
        Self { enabled, span: Mutex::new(enabled.then(|| Arc::new(span))) }
    }

    /// Whether somebody listens.
    pub(crate) fn is_enabled(&self) -> bool {
        self.enabled
    }

    fn get(&self) -> Option<Arc<Span>> {
        self.span.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn close(&self) {
        let span = self.span.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(span);
    }
}

/// The span of one unit's part in a phase; nothing if nobody listens.
#[derive(Debug, Default)]
pub(crate) struct UnitSpan(Option<Box<Span>>);

impl UnitSpan {
    pub(crate) fn open(phase: &Phase, position: usize) -> Self {
        if phase.span.is_enabled() { Self::open_below(phase, position) } else { Self(None) }
    }

    #[cold]
    fn open_below(phase: &Phase, position: usize) -> Self {
        let Some(parent) = phase.span.get() else { return Self(None) };
        Self(Some(Box::new(tracing::info_span!(
            parent: &*parent,
            "unit",
            unit = %phase.topology.name(position),
            operation = %phase.operation,
            outcome = Empty,
            error = Empty,
            ready_us = Empty,
            begun_us = Empty,
            ended_us = Empty,
        ))))
    }

    /// Does `work` inside the span.
    pub(crate) async fn around<F: Future>(&self, work: F) -> F::Output {
        let mut work = pin!(work);
        let poll = |context: &mut Context<'_>| {
            let _entered = self.0.as_deref().map(Span::enter);
            work.as_mut().poll(context)
        };
        std::future::poll_fn(poll).await
    }

    /// Records what has become of the unit, and closes the span.
    pub(crate) fn close(self, phase: &Phase, position: usize) {
        if let Some(span) = self.0 {
            Self::record(&span, phase, position);
        }
    }

    #[cold]
    fn record(span: &Span, phase: &Phase, position: usize) {
        let unit = phase.progress_of(position);
        span.record("outcome", unit.step.name());
        if let Some(error) = phase.error_of(position) {
            span.record("error", display(error));
        }
        let moments =
            [("ready_us", unit.ready), ("begun_us", phase.begun(position)), ("ended_us", unit.ended)];
        for (field, moment) in moments {
            if let Some(moment) = moment.get() {
                span.record(field, u64::try_from(moment.as_micros()).unwrap_or(u64::MAX));
            }
        }
    }
}
