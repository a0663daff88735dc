//! What a unit is asked, and how it answers.
//!
//! An [`Answer`] is a ticket of the phase that asks: answering it settles the unit there, and lets the units that waited
//! for it go on, on the thread that answers. So a transition costs one message per unit and no trip through the set.
//! A ticket that is dropped says that the unit is gone.

use crate::phase::{Outcome, Phase};
use crate::span::UnitSpan;
use crate::{SaveSupport, UnitError};
use futures::FutureExt;
use inspect::Deferred;
use save_restore::SavedStateBlob;
use std::any::Any;
use std::future::Future;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::Arc;

/// What a unit is asked. [`StateRequest::apply`] handles one.
#[derive(Debug)]
#[non_exhaustive]
pub enum StateRequest {
    /// Begin to run.
    Start(Answer<()>),
    /// Stop running.
    Stop(Answer<()>),
    /// Go back to the state after creation.
    Reset(Answer<()>),
    /// Say whether you can be saved.
    CanSave(Answer<SaveSupport>),
    /// Give your state.
    Save(Answer<Option<SavedStateBlob>>),
    /// Replace your state.
    Restore(SavedStateBlob, Answer<()>),
    /// All units have been restored.
    PostRestore(Answer<()>),
    /// Show yourself, or update a node of yours.
    Inspect(Deferred),
}

impl StateRequest {
    /// Answers a transition with an error; an inspection stays unanswered.
    pub(crate) fn refuse(self, error: impl FnOnce() -> UnitError) {
        if let Some(ticket) = self.into_ticket() {
            ticket.settle(Outcome::Failed(error()));
        }
    }

    /// The ticket of a transition.
    pub(crate) fn into_ticket(self) -> Option<Ticket> {
        match self {
            Self::Start(answer)
            | Self::Stop(answer)
            | Self::Reset(answer)
            | Self::Restore(_, answer)
            | Self::PostRestore(answer) => Some(answer.ticket),
            Self::CanSave(answer) => Some(answer.ticket),
            Self::Save(answer) => Some(answer.ticket),
            Self::Inspect(_) => None,
        }
    }
}

/// A second transition reached a unit that was still busy with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an earlier transition of the unit is still in flight")]
pub struct TransitionInFlight;

/// A unit panicked while it handled a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the unit panicked: {message}")]
pub struct UnitPanicked {
    /// What the panic said.
    pub message: String,
}

/// The duty to answer one request with a `T`. Dropped, it answers that the unit is gone.
#[derive(Debug)]
#[must_use = "a request whose answer is dropped fails the transition"]
pub struct Answer<T> {
    ticket: Ticket,
    value: PhantomData<fn(T)>,
}

impl<T: AnswerValue> Answer<T> {
    pub(crate) fn new(phase: Arc<Phase>, position: usize) -> Self {
        let span = UnitSpan::open(&phase, position);
        Self { ticket: Ticket { phase: Some(phase), position, span }, value: PhantomData }
    }

    /// Answers. What waits for this unit goes on before this returns. After the transition's deadline the answer is
    /// recorded and not acted upon.
    pub fn complete(self, result: Result<T, UnitError>) {
        self.ticket.settle(match result {
            Ok(value) => value.into_outcome(),
            Err(error) => Outcome::Failed(error),
        });
    }

    /// Does `work`, inside the unit's `tracing` span, and answers with its result. If it panics, that is answered, and the panic goes on.
    pub async fn answer_with<E: Into<UnitError>>(self, work: impl Future<Output = Result<T, E>>) {
        self.ticket.begin();
        match AssertUnwindSafe(self.ticket.span.around(work)).catch_unwind().await {
            Ok(result) => self.complete(result.map_err(Into::into)),
            Err(payload) => {
                self.complete(Err(UnitPanicked { message: panic_message(&*payload) }.into()));
                resume_unwind(payload)
            }
        }
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

/// What requests are answered with.
pub trait AnswerValue: sealed::Sealed {}

impl<T: sealed::Sealed> AnswerValue for T {}

mod sealed {
    use super::{Outcome, SaveSupport, SavedStateBlob};

    pub trait Sealed {
        #[expect(private_interfaces, reason = "sealed: nobody else calls or implements it")]
        fn into_outcome(self) -> Outcome;
    }

    #[expect(private_interfaces, reason = "sealed: nobody else calls or implements it")]
    impl Sealed for () {
        fn into_outcome(self) -> Outcome {
            Outcome::Done
        }
    }

    #[expect(private_interfaces, reason = "sealed: nobody else calls or implements it")]
    impl Sealed for SaveSupport {
        fn into_outcome(self) -> Outcome {
            Outcome::Support(self)
        }
    }

    #[expect(private_interfaces, reason = "sealed: nobody else calls or implements it")]
    impl Sealed for Option<SavedStateBlob> {
        fn into_outcome(self) -> Outcome {
            Outcome::Saved(self)
        }
    }
}

/// One unit's place in a phase, to be settled exactly once.
#[derive(Debug)]
pub(crate) struct Ticket {
    phase: Option<Arc<Phase>>,
    position: usize,
    span: UnitSpan,
}

impl Ticket {
    fn begin(&self) {
        if let Some(phase) = &self.phase {
            phase.mark_begun(self.position);
        }
    }

    fn settle(mut self, outcome: Outcome) {
        if let Some(phase) = self.phase.take() {
            phase.settle(self.position, outcome, std::mem::take(&mut self.span));
        }
    }

    /// Gives the duty up without a word: the request was never delivered.
    pub(crate) fn disarm(mut self) -> UnitSpan {
        self.phase = None;
        std::mem::take(&mut self.span)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(phase) = self.phase.take() {
            phase.settle(self.position, Outcome::Gone, std::mem::take(&mut self.span));
        }
    }
}
