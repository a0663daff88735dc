//! What the latest passes over the units did, unit by unit.
//!
//! The ring keeps the phases themselves, which have noted the moments already; records are made when somebody looks.

use crate::phase::{Mark, Operation, Phase, Step};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// At most this many passes are kept.
const MAX_PHASES: usize = 64;

/// Passes are dropped, the oldest first, while they hold more units than this together.
const MAX_UNITS: usize = 16 * 1024;

/// A bounded ring of phases.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    phases: VecDeque<Arc<Phase>>,
    units: usize,
}

impl Timeline {
    /// Keeps `phase`, at the cost of the oldest.
    pub(crate) fn push(&mut self, phase: Arc<Phase>) {
        self.units += phase.topology.len();
        self.phases.push_back(phase);
        while self.phases.len() > MAX_PHASES || (self.units > MAX_UNITS && self.phases.len() > 1) {
            let Some(oldest) = self.phases.pop_front() else { return };
            self.units -= oldest.topology.len();
        }
    }

    pub(crate) fn phases(&self) -> impl Iterator<Item = &Arc<Phase>> {
        self.phases.iter()
    }
}

/// One pass over the units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransitionRecord {
    /// What the units were asked.
    pub operation: Operation,
    /// When the pass began; every unit that takes part is queued from then on. Other times count from here.
    pub began_at: SystemTime,
    /// The units that take part, in the order of their addition.
    pub units: Vec<UnitRecord>,
}

/// One unit's part in a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitRecord {
    /// The unit.
    pub name: Arc<str>,
    /// When the units that it waits for were done and it was asked.
    pub ready: Option<Duration>,
    /// When it took up the request.
    pub begun: Option<Duration>,
    /// When it answered, late or not, or was passed over.
    pub ended: Option<Duration>,
    /// How far it has come.
    pub outcome: UnitOutcome,
}

/// How a unit's part in a pass ended, if it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnitOutcome {
    /// It waits for other units, these.
    Waiting(Vec<Arc<str>>),
    /// It has been asked and has not answered.
    Asked,
    /// It did what it was asked.
    Done,
    /// It answered with this error.
    Failed(String),
    /// Its channel has ended, or it dropped the request.
    Gone,
    /// It was removed from the set.
    Removed,
    /// It was not asked, because of others.
    Skipped,
    /// It had not answered by the deadline.
    Late,
}

impl TransitionRecord {
    pub(crate) fn of(phase: &Phase) -> Self {
        let (progress, errors) = (phase.progress(), phase.errors());
        let error_of = |position| errors.get(&position).map(ToString::to_string).unwrap_or_default();
        let outcome_of = |position: usize, step| {
            Some(match step {
                Step::Passive => return None,
                Step::Waiting => UnitOutcome::Waiting(phase.culprits(&progress, position)),
                Step::Asked => UnitOutcome::Asked,
                Step::Done => UnitOutcome::Done,
                Step::Failed => UnitOutcome::Failed(error_of(position)),
                Step::Gone => UnitOutcome::Gone,
                Step::Removed => UnitOutcome::Removed,
                Step::Skipped => UnitOutcome::Skipped,
                Step::Late => UnitOutcome::Late,
            })
        };
        let units = progress.iter().enumerate().filter_map(|(position, unit)| {
            let [ready, begun, ended] = [unit.ready, phase.begun(position), unit.ended].map(Mark::get);
            let name = phase.topology.name(position).clone();
            Some(UnitRecord { name, ready, begun, ended, outcome: outcome_of(position, unit.step)? })
        });
        Self { operation: phase.operation, began_at: phase.began_at, units: units.collect() }
    }
}
