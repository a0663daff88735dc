//! Why a remote unit did not do what it was asked.

use guest_schema::Failure;
use std::time::Duration;

/// Why a remote unit did not do what it was asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteUnitError {
    /// It refused.
    #[error("the remote unit refused to {operation}")]
    Refused {
        /// What it was asked.
        operation: &'static str,
        /// Its reason.
        source: Failure,
    },
    /// It did not answer within its deadline.
    #[error("the remote unit did not {operation} within {deadline:?}")]
    Late {
        /// What it was asked.
        operation: &'static str,
        /// Its deadline.
        deadline: Duration,
    },
    /// Its connection was lost, or its process failed at the call.
    #[error("the remote unit was lost when it was asked to {operation}: {reason}")]
    Lost {
        /// What it was asked.
        operation: &'static str,
        /// What the connection says.
        reason: String,
    },
}

impl RemoteUnitError {
    /// Whether nothing is known of the unit any more, as opposed to a refusal.
    pub(crate) fn is_loss(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}
