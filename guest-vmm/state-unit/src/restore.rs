//! Restoring a set: matching saved entries with units before anything is touched.

use crate::graph::Topology;
use crate::phase::{OnFailure, Operation, Phase};
use crate::set::{SetState, Shared};
use crate::{SaveSupport, SavedStateMismatch, StateTransitionError, UnitFailures};
use save_restore::SavedStateBlob;
use std::collections::HashMap;
use std::sync::Arc;

/// One unit's saved state. A protobuf message, `state_unit.SavedStateUnit`; the schema of saved state has it in
/// `state_unit.proto`, and a test compares the two.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SavedStateUnit {
    /// The unit's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its state; an entry without one is refused.
    #[prost(message, optional, tag = "2")]
    pub state: Option<SavedStateBlob>,
}

impl prost::Name for SavedStateUnit {
    const NAME: &'static str = "SavedStateUnit";
    const PACKAGE: &'static str = "state_unit";
}

pub(crate) async fn restore(
    shared: &Shared,
    states: Vec<SavedStateUnit>,
) -> Result<(), StateTransitionError> {
    shared.admit(Operation::Restore, &[SetState::Stopped])?;
    let topology = shared.topology();
    let (payload, mut mismatch) = assign(&topology, states);
    mismatch.missing = missing(shared, &topology, &payload).await?;
    if mismatch != SavedStateMismatch::default() {
        return Err(mismatch.into());
    }
    let phase = Phase::new(Operation::Restore, OnFailure::SkipRest, topology.clone(), |position, _| {
        payload[position].is_some()
    });
    phase.set_payload(payload);
    let phase = shared.run(phase).await;
    shared.fault_if_troubled(&phase)?;
    let post_restore = Phase::new(Operation::PostRestore, OnFailure::GoOn, topology, |_, _| true);
    shared.fault_if_troubled(&*shared.run(post_restore).await)
}

/// Gives each state to the position of its unit, and lists the entries for which that is not possible.
fn assign(
    topology: &Topology,
    states: Vec<SavedStateUnit>,
) -> (Vec<Option<SavedStateBlob>>, SavedStateMismatch) {
    let mut positions = Positions::new(topology);
    let mut payload = vec![None; topology.len()];
    let mut mismatch = SavedStateMismatch::default();
    for SavedStateUnit { name, state } in states {
        match (positions.find(&name), state) {
            (None, _) => mismatch.unknown.push(name),
            (Some(_), None) => mismatch.empty.push(name),
            (Some(position), Some(_)) if payload[position].is_some() => mismatch.duplicate.push(name),
            (Some(position), state) => payload[position] = state,
        }
    }
    mismatch.duplicate.sort_unstable();
    mismatch.duplicate.dedup();
    (payload, mismatch)
}

/// Finds units by name. Entries mostly come in the units' own order, so the one after the last found is tried first, and
/// the names are hashed only when that fails.
struct Positions<'a> {
    topology: &'a Topology,
    next: usize,
    by_name: Option<HashMap<&'a str, usize>>,
}

impl<'a> Positions<'a> {
    fn new(topology: &'a Topology) -> Self {
        Self { topology, next: 0, by_name: None }
    }

    fn find(&mut self, name: &str) -> Option<usize> {
        let cells = &self.topology.cells;
        let position = if cells.get(self.next).is_some_and(|cell| &*cell.name == name) {
            self.next
        } else {
            let by_name = self.by_name.get_or_insert_with(|| {
                cells.iter().enumerate().map(|(position, cell)| (&*cell.name, position)).collect()
            });
            *by_name.get(name)?
        };
        self.next = position + 1;
        Some(position)
    }
}

/// The units that save, but have no entry. Only those without an entry are asked.
async fn missing(
    shared: &Shared,
    topology: &Arc<Topology>,
    payload: &[Option<SavedStateBlob>],
) -> Result<Vec<String>, StateTransitionError> {
    if payload.iter().all(Option::is_some) {
        return Ok(Vec::new());
    }
    let without = |position: usize, _: &_| payload[position].is_none();
    let phase = Phase::new(Operation::CanSave, OnFailure::GoOn, topology.clone(), without);
    let phase = shared.run(phase).await;
    if let Some(failures) = UnitFailures::of(&phase, SetState::Stopped) {
        return Err(failures.into());
    }
    let saves = phase.take_support().into_iter().filter(|(_, support)| *support == SaveSupport::Saves);
    Ok(saves.map(|(position, _)| topology.name(position).to_string()).collect())
}
