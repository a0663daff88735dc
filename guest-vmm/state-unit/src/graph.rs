//! Units, edges and names; and the frozen form of them that a transition walks over.
//!
//! The graph is what is built and taken apart, behind one mutex that is held only for such a change or to read it. A
//! [`Topology`] is a snapshot in flat arrays, made when a transition finds that the graph has changed since the last.

use crate::StateRequest;
use crate::mailbox::RequestSender;
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

/// Identifies a unit in its set for good: ids are not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct UnitId(pub(crate) u64);

/// What a unit is known to be doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum UnitState {
    /// Not running: the state after being added, a stop, a reset, a save or a restore.
    Stopped,
    /// Asked to start, not answered yet.
    Starting,
    /// Running.
    Running,
    /// Asked to stop, not answered yet.
    Stopping,
    /// Asked to reset, not answered yet.
    Resetting,
    /// Asked for its state, not answered yet.
    Saving,
    /// Asked to restore, or told that all are restored; not answered yet.
    Restoring,
    /// Its last transition failed in a way that leaves its state unknown: it was late, is gone, or failed half-way.
    Faulted,
}

impl UnitState {
    const ALL: [Self; 8] = [
        Self::Stopped,
        Self::Starting,
        Self::Running,
        Self::Stopping,
        Self::Resetting,
        Self::Saving,
        Self::Restoring,
        Self::Faulted,
    ];

    /// Whether the unit has been asked for something that it has not answered.
    #[must_use]
    pub fn is_interim(self) -> bool {
        !matches!(self, Self::Stopped | Self::Running | Self::Faulted)
    }
}

impl fmt::Display for UnitState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Resetting => "resetting",
            Self::Saving => "saving",
            Self::Restoring => "restoring",
            Self::Faulted => "faulted",
        })
    }
}

/// The part of a unit that transitions touch.
#[derive(Debug)]
pub(crate) struct UnitCell {
    pub(crate) id: UnitId,
    pub(crate) name: Arc<str>,
    sender: RequestSender,
    state: AtomicU8,
    removed: AtomicBool,
    /// Index in the latest topology.
    position: AtomicUsize,
}

impl UnitCell {
    pub(crate) fn state(&self) -> UnitState {
        UnitState::ALL[usize::from(self.state.load(Ordering::Acquire))]
    }

    pub(crate) fn set_state(&self, state: UnitState) {
        self.state.store(state as u8, Ordering::Release);
    }

    pub(crate) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    pub(crate) fn position(&self) -> usize {
        self.position.load(Ordering::Acquire)
    }

    /// Sends a request, or gives it back if the unit no longer listens.
    pub(crate) fn send(&self, request: StateRequest) -> Result<(), StateRequest> {
        self.sender.send(request)
    }

    /// Ends the unit's channel once it has taken what was sent.
    pub(crate) fn close(&self) {
        self.removed.store(true, Ordering::Release);
        self.sender.close();
    }
}

#[derive(Debug)]
struct Unit {
    cell: Arc<UnitCell>,
    dependencies: Vec<UnitId>,
    dependents: Vec<UnitId>,
}

/// The names of a dependency cycle, in the order "each depends on the next", the first repeated at the end.
pub(crate) type CycleNames = Vec<Arc<str>>;

/// All units of a set.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    units: HashMap<UnitId, Unit>,
    names: HashMap<Arc<str>, UnitId>,
    next_id: u64,
    topology: Option<Arc<Topology>>,
}

impl Graph {
    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// Adds a unit. The name has to be free, and no cycle may arise: see [`find_cycle`](Self::find_cycle).
    pub(crate) fn insert(&mut self, name: Arc<str>, edges: NewEdges, sender: RequestSender) -> Arc<UnitCell> {
        let id = UnitId(self.next_id);
        self.next_id += 1;
        let NewEdges { dependencies, dependents } = edges;
        self.each_of(&dependencies, |unit| unit.dependents.push(id));
        self.each_of(&dependents, |unit| unit.dependencies.push(id));
        let cell = Arc::new(UnitCell {
            id,
            name: name.clone(),
            sender,
            state: AtomicU8::new(UnitState::Stopped as u8),
            removed: AtomicBool::new(false),
            position: AtomicUsize::new(usize::MAX),
        });
        self.units.insert(id, Unit { cell: cell.clone(), dependencies, dependents });
        self.names.insert(name, id);
        self.topology = None;
        cell
    }

    fn each_of(&mut self, ids: &[UnitId], mut change: impl FnMut(&mut Unit)) {
        for id in ids {
            if let Some(unit) = self.units.get_mut(id) {
                change(unit);
            }
        }
    }

    /// Takes a unit and its edges away. False if it is gone already.
    pub(crate) fn remove(&mut self, id: UnitId) -> bool {
        let Some(unit) = self.units.remove(&id) else { return false };
        self.names.remove(&unit.cell.name);
        self.each_of(&unit.dependencies, |other| other.dependents.retain(|&edge| edge != id));
        self.each_of(&unit.dependents, |other| other.dependencies.retain(|&edge| edge != id));
        self.topology = None;
        true
    }

    /// The cycle that a new unit `name` with these edges would close, if it would.
    pub(crate) fn find_cycle(&self, name: &Arc<str>, edges: &NewEdges) -> Option<CycleNames> {
        let goals: HashSet<UnitId> = edges.dependents.iter().copied().collect();
        if goals.is_empty() {
            // Nothing depends on the new unit, so no way leads back to it.
            return None;
        }
        let mut came_from: HashMap<UnitId, Option<UnitId>> = HashMap::new();
        let mut open: Vec<UnitId> = Vec::new();
        for &id in &edges.dependencies {
            came_from.insert(id, None);
            open.push(id);
        }
        while let Some(id) = open.pop() {
            if goals.contains(&id) {
                return Some(self.cycle_names(name, id, &came_from));
            }
            for &next in self.units.get(&id).map_or(&[][..], |unit| &unit.dependencies) {
                came_from.entry(next).or_insert_with(|| {
                    open.push(next);
                    Some(id)
                });
            }
        }
        None
    }

    fn cycle_names(
        &self,
        name: &Arc<str>,
        end: UnitId,
        came_from: &HashMap<UnitId, Option<UnitId>>,
    ) -> CycleNames {
        let way_back = std::iter::successors(Some(end), |id| came_from.get(id).copied().flatten());
        let mut names: CycleNames = vec![name.clone()];
        names.extend(way_back.filter_map(|id| self.units.get(&id)).map(|unit| unit.cell.name.clone()));
        names.push(name.clone());
        // Walked from the end of the path to its beginning.
        names.reverse();
        names
    }

    /// The frozen form of the graph as it is now.
    pub(crate) fn topology(&mut self) -> Arc<Topology> {
        if let Some(topology) = &self.topology {
            return topology.clone();
        }
        let topology = Arc::new(self.snapshot());
        for (position, cell) in topology.cells.iter().enumerate() {
            cell.position.store(position, Ordering::Release);
        }
        self.topology = Some(topology.clone());
        topology
    }

    /// The graph as it is now, to look at; cells keep the positions of the topology that transitions use.
    pub(crate) fn snapshot(&self) -> Topology {
        let mut units: Vec<&Unit> = self.units.values().collect();
        units.sort_unstable_by_key(|unit| unit.cell.id);
        let by_id: HashMap<UnitId, usize> =
            units.iter().enumerate().map(|(position, unit)| (unit.cell.id, position)).collect();
        let positions =
            |ids: &[UnitId]| -> Vec<usize> { ids.iter().filter_map(|id| by_id.get(id).copied()).collect() };
        Topology {
            dependencies: Edges::new(units.iter().map(|unit| positions(&unit.dependencies))),
            dependents: Edges::new(units.iter().map(|unit| positions(&unit.dependents))),
            cells: units.into_iter().map(|unit| unit.cell.clone()).collect(),
        }
    }

    /// Takes all units away; gives them in the order of their addition.
    pub(crate) fn drain(&mut self) -> Vec<Arc<UnitCell>> {
        self.names.clear();
        self.topology = None;
        let mut cells: Vec<Arc<UnitCell>> = self.units.drain().map(|(_, unit)| unit.cell).collect();
        cells.sort_unstable_by_key(|cell| cell.id);
        cells
    }
}

/// The edges that a new unit brings, each to a unit of the set and once.
#[derive(Debug, Default)]
pub(crate) struct NewEdges {
    pub(crate) dependencies: Vec<UnitId>,
    pub(crate) dependents: Vec<UnitId>,
}

/// The graph at one moment, by position.
#[derive(Debug)]
pub(crate) struct Topology {
    pub(crate) cells: Vec<Arc<UnitCell>>,
    pub(crate) dependencies: Edges,
    pub(crate) dependents: Edges,
}

impl Topology {
    pub(crate) fn name(&self, position: usize) -> &Arc<str> {
        &self.cells[position].name
    }

    pub(crate) fn len(&self) -> usize {
        self.cells.len()
    }
}

/// For each position, the positions that its edges of one direction lead to; in two flat arrays.
#[derive(Debug)]
pub(crate) struct Edges {
    ends: Vec<usize>,
    targets: Vec<usize>,
}

impl Edges {
    fn new(lists: impl Iterator<Item = Vec<usize>>) -> Self {
        let mut edges = Self { ends: vec![0], targets: Vec::new() };
        for list in lists {
            edges.targets.extend(list);
            edges.ends.push(edges.targets.len());
        }
        edges
    }

    pub(crate) fn of(&self, position: usize) -> &[usize] {
        &self.targets[self.ends[position]..self.ends[position + 1]]
    }
}
