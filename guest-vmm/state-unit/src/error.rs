//! What a transition can fail with.

use crate::phase::{Phase, Step};
use crate::{Operation, SetState};
use std::collections::HashSet;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Why a transition did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateTransitionError {
    /// The transition is not legal; nothing was asked of any unit.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// The saved state does not match the units; nothing was asked to restore.
    #[error(transparent)]
    SavedState(#[from] SavedStateMismatch),
    /// Units did not do what they were asked.
    #[error(transparent)]
    Units(#[from] Box<UnitFailures>),
}

impl StateTransitionError {
    /// The units that did not do what they were asked, if that is the reason.
    #[must_use]
    pub fn units(&self) -> Option<&UnitFailures> {
        match self {
            Self::Units(failures) => Some(failures),
            _ => None,
        }
    }
}

/// A transition that is not legal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operation} is not possible: {reason}")]
pub struct IllegalTransition {
    /// What was asked for.
    pub operation: Operation,
    /// Why it is refused.
    pub reason: IllegalReason,
}

/// Why a transition is not legal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IllegalReason {
    /// Not in this state of the set.
    #[error("the units are {0}")]
    State(SetState),
    /// The `tokio` runtime is missing, or ended during the transition.
    #[error("there is no tokio runtime to run it")]
    NoRuntime,
}

/// Saved state that does not match the units. All names of each kind are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SavedStateMismatch {
    /// Entries for units that are not in the set.
    pub unknown: Vec<String>,
    /// Names with more than one entry.
    pub duplicate: Vec<String>,
    /// Units that save, but have no entry.
    pub missing: Vec<String>,
    /// Entries without a state in them.
    pub empty: Vec<String>,
}

impl fmt::Display for SavedStateMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the saved state does not match the units")?;
        let kinds = [
            ("unknown", &self.unknown),
            ("duplicate", &self.duplicate),
            ("missing", &self.missing),
            ("without a state", &self.empty),
        ];
        for (kind, names) in kinds {
            if !names.is_empty() {
                write!(f, "; {kind}: {}", names.join(", "))?;
            }
        }
        Ok(())
    }
}

impl Error for SavedStateMismatch {}

/// A unit that answered with an error, or is gone.
#[derive(Debug, Clone)]
pub struct FailedUnit {
    /// The unit.
    pub name: Arc<str>,
    /// Its answer; `None` if it is gone: its channel has ended, or it dropped the request.
    pub cause: Option<Arc<dyn Error + Send + Sync>>,
}

impl fmt::Display for FailedUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(cause) = &self.cause else { return write!(f, "{} is gone", self.name) };
        write!(f, "{} failed: {cause}", self.name)?;
        let mut next = cause.source();
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            next = cause.source();
        }
        Ok(())
    }
}

/// A unit that was not asked, because of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedUnit {
    /// The unit.
    pub name: Arc<str>,
    /// Those it waited for that failed, were late or were skipped themselves.
    pub because: Vec<Arc<str>>,
}

impl fmt::Display for SkippedUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was skipped because of {}", self.name, self.because.join(", "))
    }
}

/// A unit that had not answered by the deadline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LateUnit {
    /// The unit.
    pub name: Arc<str>,
    /// How long ago it had been asked.
    pub asked_ago: Duration,
}

impl fmt::Display for LateUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} had not answered after {:?}", self.name, self.asked_ago)
    }
}

/// The units that did not do what they were asked, each of them in exactly one list, and where that leaves the set.
///
/// Its text holds each unit with its whole chain of causes. There is no `source`: there may be many.
#[derive(Debug, Clone)]
pub struct UnitFailures {
    /// What they were asked.
    pub operation: Operation,
    /// Units that answered with an error, or are gone.
    pub failed: Vec<FailedUnit>,
    /// Units that were not asked.
    pub skipped: Vec<SkippedUnit>,
    /// Units that had not answered by the deadline.
    pub late: Vec<LateUnit>,
    /// The state of the set after the transition.
    pub end: SetState,
    /// What went wrong when the units that had moved already were moved back.
    pub rollback: Option<Box<UnitFailures>>,
}

impl UnitFailures {
    /// What went wrong in `phase`; `None` if nothing did.
    pub(crate) fn of(phase: &Phase, end: SetState) -> Option<Box<Self>> {
        if !phase.is_troubled() {
            return None;
        }
        let (mut failed, mut skipped, mut late) = (Vec::new(), Vec::new(), Vec::new());
        let (units, errors) = (phase.progress(), phase.errors());
        for (position, unit) in units.iter().enumerate() {
            let name = || phase.topology.name(position).clone();
            match unit.step {
                Step::Failed | Step::Gone => {
                    failed.push(FailedUnit { name: name(), cause: errors.get(&position).cloned() });
                }
                Step::Skipped => {
                    skipped.push(SkippedUnit { name: name(), because: phase.culprits(&units, position) });
                }
                Step::Late => {
                    let asked = unit.ready.get().unwrap_or_default();
                    late.push(LateUnit { name: name(), asked_ago: phase.elapsed().saturating_sub(asked) });
                }
                Step::Passive | Step::Waiting | Step::Asked | Step::Done | Step::Removed => {}
            }
        }
        Some(Box::new(Self { operation: phase.operation, failed, skipped, late, end, rollback: None }))
    }

    /// Takes the findings of a further pass over units that `self` lists as skipped.
    pub(crate) fn resume(&mut self, phase: &Phase, further: Option<Box<Self>>) {
        let asked: HashSet<Arc<str>> = (phase.progress().iter().enumerate())
            .filter(|(_, unit)| unit.step != Step::Passive)
            .map(|(position, _)| phase.topology.name(position).clone())
            .collect();
        self.skipped.retain(|unit| !asked.contains(&unit.name));
        if let Some(further) = further {
            self.failed.extend(further.failed);
            self.skipped.extend(further.skipped);
            self.late.extend(further.late);
        }
    }
}

impl fmt::Display for UnitFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed, the units are {}", self.operation, self.end)?;
        self.failed.iter().try_for_each(|unit| write!(f, "; {unit}"))?;
        self.late.iter().try_for_each(|unit| write!(f, "; {unit}"))?;
        self.skipped.iter().try_for_each(|unit| write!(f, "; {unit}"))?;
        if let Some(rollback) = &self.rollback {
            write!(f, "; moving back: {rollback}")?;
        }
        Ok(())
    }
}

impl Error for UnitFailures {}
