//! What the machine shows, in the protocol's words.

use guest_schema::{StepOutcome, Transition, UnitStatus, UnitStep, VpState};
use machine::VpActivity;
use state_unit::{TransitionRecord, UnitOutcome, UnitRecord, UnitView};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub(crate) fn vp(activity: VpActivity) -> VpState {
    match activity {
        VpActivity::Stopped => VpState::Stopped,
        VpActivity::Debugged => VpState::Debugged,
        VpActivity::Running => VpState::Running,
        VpActivity::Halted => VpState::Halted,
        VpActivity::WaitForSipi => VpState::WaitForSipi,
        VpActivity::Failed => VpState::Failed,
        VpActivity::Unanswered => VpState::Unanswered,
    }
}

pub(crate) fn unit(view: &UnitView) -> UnitStatus {
    UnitStatus {
        name: view.name.to_string(),
        state: view.state.to_string(),
        depends_on: names(&view.dependencies),
        waits_for: names(&view.waits_for),
    }
}

fn names(names: &[Arc<str>]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

pub(crate) fn transition(record: &TransitionRecord) -> Transition {
    Transition {
        operation: record.operation.to_string(),
        began_at_us: since_1970(record.began_at),
        units: record.units.iter().map(step).collect(),
    }
}

fn step(record: &UnitRecord) -> UnitStep {
    let (outcome, detail) = match &record.outcome {
        UnitOutcome::Waiting(others) => (StepOutcome::Waiting, names(others).join(", ")),
        UnitOutcome::Asked => (StepOutcome::Asked, String::new()),
        UnitOutcome::Done => (StepOutcome::Done, String::new()),
        UnitOutcome::Failed(error) => (StepOutcome::Failed, error.clone()),
        UnitOutcome::Gone => (StepOutcome::Gone, String::new()),
        UnitOutcome::Removed => (StepOutcome::Removed, String::new()),
        UnitOutcome::Skipped => (StepOutcome::Skipped, String::new()),
        UnitOutcome::Late => (StepOutcome::Late, String::new()),
    };
    UnitStep {
        name: record.name.to_string(),
        ready_us: record.ready.map(micros),
        begun_us: record.begun.map(micros),
        ended_us: record.ended.map(micros),
        outcome,
        detail,
    }
}

/// A moment in µs since 1970 (UTC).
pub(crate) fn since_1970(moment: SystemTime) -> u64 {
    micros(moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// A time in µs, as the protocol counts it.
pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
