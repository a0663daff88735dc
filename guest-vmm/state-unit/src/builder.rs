//! Adding units to a set and taking them away.

use crate::graph::{CycleNames, NewEdges, UnitCell, UnitId};
use crate::set::Shared;
use crate::{RequestReceiver, UnitState};
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Weak};
use tokio::task::JoinHandle;

/// A unit of this name is in the set already.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a unit called {0} is in the set already")]
pub struct NameInUse(pub Arc<str>);

/// Why a unit could not be added. The set is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The name is taken.
    #[error(transparent)]
    NameInUse(#[from] NameInUse),
    /// The edges would close a cycle.
    #[error("the unit would close a dependency cycle: {}", .cycle.join(" → "))]
    Cycle {
        /// Names, each depending on the next; the first is repeated at the end.
        cycle: CycleNames,
    },
    /// An edge leads to a unit of another set.
    #[error("the unit {name} cannot have an edge to {other}, which is of another set")]
    ForeignUnit {
        /// The unit to be added.
        name: Arc<str>,
        /// The unit of the other set.
        other: Arc<str>,
    },
    /// There is no runtime to spawn on.
    #[error("the unit {name} cannot be spawned outside of a tokio runtime")]
    NoRuntime {
        /// The unit to be added.
        name: Arc<str>,
    },
}

/// A unit on its way into the set. Nothing is added before [`build`](Self::build) or a `spawn`.
#[derive(Debug)]
#[must_use = "build() or spawn() adds the unit"]
pub struct UnitBuilder<'a> {
    shared: &'a Arc<Shared>,
    name: Arc<str>,
    edges: NewEdges,
    foreign: Option<Arc<str>>,
}

impl<'a> UnitBuilder<'a> {
    pub(crate) fn new(shared: &'a Arc<Shared>, name: Arc<str>) -> Self {
        Self { shared, name, edges: NewEdges::default(), foreign: None }
    }

    /// The new unit needs `other`: it starts after it and stops before it.
    pub fn depends_on(mut self, other: &UnitHandle) -> Self {
        if let Some(id) = self.own_unit(other) {
            self.edges.dependencies.push(id);
        }
        self
    }

    /// `other` needs the new unit: it starts after it and stops before it.
    pub fn dependency_of(mut self, other: &UnitHandle) -> Self {
        if let Some(id) = self.own_unit(other) {
            self.edges.dependents.push(id);
        }
        self
    }

    fn own_unit(&mut self, other: &UnitHandle) -> Option<UnitId> {
        if !std::ptr::eq(other.shared.as_ptr(), Arc::as_ptr(self.shared)) {
            self.foreign.get_or_insert_with(|| other.cell.name.clone());
            return None;
        }
        Some(other.cell.id)
    }

    /// Adds the unit, stopped, and gives the receiving end of its requests, to be served by [`run_unit`](crate::run_unit)
    /// or by hand. If the set is running, the unit stays stopped until
    /// [`start_stopped_units`](crate::StateUnits::start_stopped_units).
    ///
    /// # Errors
    /// See [`BuildError`]; edges given twice count once.
    pub fn build(self) -> Result<(UnitHandle, RequestReceiver), BuildError> {
        let Self { shared, name, mut edges, foreign } = self;
        if let Some(other) = foreign {
            return Err(BuildError::ForeignUnit { name, other });
        }
        for list in [&mut edges.dependencies, &mut edges.dependents] {
            list.sort_unstable();
            list.dedup();
        }
        let mut graph = shared.graph();
        if graph.has_name(&name) {
            return Err(NameInUse(name).into());
        }
        if let Some(cycle) = graph.find_cycle(&name, &edges) {
            return Err(BuildError::Cycle { cycle });
        }
        let (sender, requests) = RequestReceiver::channel();
        let cell = graph.insert(name, edges, sender);
        drop(graph);
        Ok((UnitHandle { shared: Arc::downgrade(shared), cell, attached: true }, requests))
    }

    /// Adds the unit and spawns the task that serves it on the `tokio` runtime.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn spawn<F>(
        self,
        serve: impl FnOnce(RequestReceiver) -> F,
    ) -> Result<SpawnedUnit<F::Output>, BuildError>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|_| BuildError::NoRuntime { name: self.name.clone() })?;
        let (handle, requests) = self.build()?;
        Ok(SpawnedUnit { handle, task: runtime.spawn(serve(requests)) })
    }

    /// Adds the unit and spawns the task that serves it on this thread.
    ///
    /// # Errors
    /// See [`BuildError`].
    ///
    /// # Panics
    /// Outside of a `tokio` `LocalSet`, as [`tokio::task::spawn_local`] does.
    pub fn spawn_local<F>(
        self,
        serve: impl FnOnce(RequestReceiver) -> F,
    ) -> Result<SpawnedUnit<F::Output>, BuildError>
    where
        F: Future + 'static,
    {
        let (handle, requests) = self.build()?;
        Ok(SpawnedUnit { handle, task: tokio::task::spawn_local(serve(requests)) })
    }
}

/// A unit's membership in its set. Dropping it removes the unit.
#[must_use = "dropping the handle removes the unit"]
pub struct UnitHandle {
    shared: Weak<Shared>,
    cell: Arc<UnitCell>,
    attached: bool,
}

impl UnitHandle {
    /// The unit's name, which is also its name in saved state.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.cell.name
    }

    /// What the unit is known to be doing at this moment.
    #[must_use]
    pub fn state(&self) -> UnitState {
        self.cell.state()
    }

    /// Takes the unit and its edges out of the set and ends its channel, without stopping it. Order that held only
    /// through this unit is not kept. If a transition is in flight, it goes on without the unit.
    pub fn remove(self) {}

    /// Leaves the unit in the set for as long as the set exists.
    pub fn detach(mut self) {
        self.attached = false;
    }
}

impl Drop for UnitHandle {
    fn drop(&mut self) {
        if self.attached
            && let Some(shared) = self.shared.upgrade()
        {
            shared.remove(&self.cell);
        }
    }
}

impl fmt::Debug for UnitHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnitHandle").field("name", &self.cell.name).finish_non_exhaustive()
    }
}

/// A unit with the task that serves it. Dropping it removes the unit; the task then ends by itself.
#[derive(Debug)]
#[must_use = "dropping it removes the unit"]
pub struct SpawnedUnit<T> {
    handle: UnitHandle,
    task: JoinHandle<T>,
}

/// A removed unit could not be given back: its task panicked, or its runtime ended.
#[derive(Debug, thiserror::Error)]
#[error("the task of unit {name} did not end by itself")]
pub struct UnitGone {
    /// The unit.
    pub name: Arc<str>,
    /// How the task ended.
    pub source: tokio::task::JoinError,
}

impl<T> SpawnedUnit<T> {
    /// The unit's membership, to give edges to other units.
    #[must_use = "the handle is borrowed, nothing happens to it"]
    pub fn handle(&self) -> &UnitHandle {
        &self.handle
    }

    /// Removes the unit from the set and gives it back once it has finished what it was asked before.
    ///
    /// # Errors
    /// [`UnitGone`] if its task panicked.
    pub async fn remove(self) -> Result<T, UnitGone> {
        let name = self.handle.cell.name.clone();
        self.handle.remove();
        self.task.await.map_err(|source| UnitGone { name, source })
    }

    /// Leaves the unit in the set, and its task running, for as long as the set exists.
    pub fn detach(self) {
        self.handle.detach();
    }
}
