//! Looking at the set: its state, and each unit with its edges, its state, what it waits for and its own tree.

use crate::graph::{Edges, Topology};
use crate::phase::Phase;
use crate::set::Shared;
use crate::{StateRequest, TransitionRecord, UnitState};
use inspect::{Inspect, Request, Response};
use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The deadlines that an update may set: time for a unit to answer at all, and an end that somebody may still wait for.
const DEADLINES: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(600);

/// Shows a set of units, also while a transition is in flight. Does not keep the set alive: once that is dropped, there
/// is nothing to show.
///
/// The tree: `state`; `deadline`, of each pass from the next one on, which is writable from 100 ms to 10 min; and below `units/<name>` the texts `dependencies`, `dependents` and `unit_state`, and as `unit` what
/// the unit shows of itself. A unit that is busy with a transition may show as unanswered; the others are not concerned.
#[derive(Debug, Clone)]
pub struct StateUnitsInspector {
    shared: Weak<Shared>,
}

impl StateUnitsInspector {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::downgrade(shared) }
    }

    /// As [`StateUnits::graph`](crate::StateUnits::graph); empty once the set is gone.
    #[must_use]
    pub fn graph(&self) -> Vec<UnitView> {
        self.shared.upgrade().map(|shared| shared.view()).unwrap_or_default()
    }

    /// As [`StateUnits::timeline`](crate::StateUnits::timeline); empty once the set is gone.
    #[must_use]
    pub fn timeline(&self) -> Vec<TransitionRecord> {
        self.shared.upgrade().map(|shared| shared.timeline()).unwrap_or_default()
    }

    /// Adds the children of the tree to a response that may have others beside them.
    pub fn respond_with(&self, response: &mut Response<'_>) {
        let Some(shared) = self.shared.upgrade() else { return };
        response
            .field_with("state", || shared.state().to_string())
            .writable("deadline", || shared.deadline(), |deadline| set_deadline(&shared, deadline))
            .child("units", |request| inspect_units(&shared.snapshot(), request));
    }
}

impl Inspect for StateUnitsInspector {
    fn inspect(&self, request: Request<'_>) {
        self.respond_with(&mut request.respond());
    }
}

fn set_deadline(shared: &Shared, deadline: Duration) -> Result<Duration, DeadlineOutOfBounds> {
    if !DEADLINES.contains(&deadline) {
        return Err(DeadlineOutOfBounds { deadline });
    }
    shared.set_deadline(deadline);
    Ok(deadline)
}

/// A deadline that no operator can want.
#[derive(Debug, thiserror::Error)]
#[error("{deadline:?} is not within {:?} to {:?}", DEADLINES.start(), DEADLINES.end())]
struct DeadlineOutOfBounds {
    deadline: Duration,
}

fn inspect_units(topology: &Topology, request: Request<'_>) {
    let mut response = request.respond();
    for (position, cell) in topology.cells.iter().enumerate() {
        response.child(&cell.name, |request| inspect_unit(topology, position, request));
    }
}

fn inspect_unit(topology: &Topology, position: usize, request: Request<'_>) {
    let cell = &topology.cells[position];
    request
        .respond()
        .field_with("dependencies", || names(topology, &topology.dependencies, position).join(", "))
        .field_with("dependents", || names(topology, &topology.dependents, position).join(", "))
        .display("unit_state", &cell.state())
        .child("unit", |request| {
            // Given back undelivered, the request is dropped, which shows as unanswered.
            let _ = cell.send(StateRequest::Inspect(request.defer()));
        });
}

fn names(topology: &Topology, edges: &Edges, position: usize) -> Vec<Arc<str>> {
    edges.of(position).iter().map(|&at| topology.name(at).clone()).collect()
}

/// One unit of the graph at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitView {
    /// The unit.
    pub name: Arc<str>,
    /// What it is known to be doing.
    pub state: UnitState,
    /// The units it depends on.
    pub dependencies: Vec<Arc<str>>,
    /// The units that depend on it.
    pub dependents: Vec<Arc<str>>,
    /// The units that it waits for in the transition in flight.
    pub waits_for: Vec<Arc<str>>,
}

impl UnitView {
    pub(crate) fn all(topology: &Topology, current: Option<&Phase>) -> Vec<Self> {
        let mut waits = current.map(Phase::waits).unwrap_or_default();
        let units = topology.cells.iter().enumerate().map(|(position, cell)| Self {
            name: cell.name.clone(),
            state: cell.state(),
            dependencies: names(topology, &topology.dependencies, position),
            dependents: names(topology, &topology.dependents, position),
            waits_for: waits.remove(&cell.name).unwrap_or_default(),
        });
        units.collect()
    }
}
