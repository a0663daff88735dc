//! Looking at the set: its state, and each unit with its edges, its state, what it waits for and its own tree.

use crate::graph::{Edges, Topology};
use crate::phase::Phase;
use crate::set::Shared;
use crate::{StateRequest, TransitionRecord, UnitState};
use inspect::{Inspect, Request, Response};
use std::sync::{Arc, Weak};

/// Shows a set of units, also while a transition is in flight. Does not keep the set alive: once that is dropped, there
/// is nothing to show.
///
/// The tree: `state`, and below `units/<name>` the texts `dependencies`, `dependents` and `unit_state`, and as `unit` what
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
            .child("units", |request| inspect_units(&shared.snapshot(), request));
    }
}

impl Inspect for StateUnitsInspector {
    fn inspect(&self, request: Request<'_>) {
        self.respond_with(&mut request.respond());
    }
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
