//! A new value for one node, given from outside, and the wait for its outcome.

use crate::{FromText, Request, Value};
use std::fmt::Display;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

/// How much of a value that stands for nothing is told, in characters.
const MAX_SHOWN: usize = 64;

/// Why a node did not take a new value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// The path leads to no node.
    #[error("there is no such node")]
    NotFound,
    /// The node has children, or a value that is only shown.
    #[error("the node is not writable")]
    NotWritable,
    /// The text does not stand for a value of the node's type.
    #[error("{value:?} is not {expected}")]
    NotParseable {
        /// The text, as far as its first 64 characters.
        value: String,
        /// What would have been one.
        expected: String,
    },
    /// The component does not take this value. The node is as it was.
    #[error("refused: {reason}")]
    Refused {
        /// What the component says.
        reason: String,
    },
    /// The component took the question away and had not answered by the deadline, or dropped it. What it has not begun to
    /// change by then, it never will.
    #[error("not answered in time")]
    Unanswered,
}

/// What has become of an update at its node, if that is known yet.
#[derive(Debug)]
pub(crate) enum Outcome {
    Known(Result<Value, UpdateError>),
    Deferred(oneshot::Receiver<Outcome>),
}

impl From<Result<Value, UpdateError>> for Outcome {
    fn from(result: Result<Value, UpdateError>) -> Self {
        Self::Known(result)
    }
}

/// Writes the value that `text` stands for, and gives what is there then.
pub(crate) fn written<T: FromText, E: Display>(
    text: &str,
    write: impl FnOnce(T) -> Result<T, E>,
) -> Result<Value, UpdateError> {
    let new = T::from_text(text).ok_or_else(|| UpdateError::NotParseable {
        value: text.chars().take(MAX_SHOWN).collect(),
        expected: T::expected(),
    })?;
    write(new).map(Into::into).map_err(|reason| UpdateError::Refused { reason: reason.to_string() })
}

/// An update under way: a new value on its way to the node at one path.
///
/// Whoever updates may see everything: there is no [`View`](crate::View) to restrict it to, and an
/// [`Inspection`](crate::Inspection), whatever its view, updates nothing.
#[derive(Debug)]
#[must_use = "finish() gives the outcome; dropped, a node that has not answered yet is not updated"]
pub struct Update {
    outcome: Outcome,
}

impl Update {
    /// Gives the node at `path` of `component` (segments joined by `/`) the value that `text` stands for, if it is writable.
    ///
    /// The text is read by the node's type ([`FromText`]). A node that answers at once is updated when this returns.
    pub fn start(path: &str, text: &str, component: impl FnOnce(Request<'_>)) -> Self {
        let mut outcome = Outcome::from(Err(UpdateError::Unanswered));
        component(Request::update(path, text, &mut outcome));
        Self { outcome }
    }

    /// Waits until the node has answered or `patience` is over, and gives the node's value after the update.
    ///
    /// Has to be awaited in a `tokio` runtime with time enabled.
    ///
    /// # Errors
    /// See [`UpdateError`]; the node is as it was, but for [`UpdateError::Unanswered`] while it is just being written.
    pub async fn finish(self, patience: Duration) -> Result<Value, UpdateError> {
        let deadline = Instant::now() + patience;
        let mut outcome = self.outcome;
        loop {
            outcome = match outcome {
                Outcome::Known(result) => return result,
                Outcome::Deferred(answer) => match timeout_at(deadline, answer).await {
                    Ok(Ok(next)) => next,
                    _ => return Err(UpdateError::Unanswered),
                },
            }
        }
    }
}
