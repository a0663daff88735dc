//! A machine's guest at one moment, and a guest that goes on from there in another machine.

use super::Machine;
#[cfg(doc)]
use crate::memory::GuestMemory;
use crate::memory::{FreezeError, Frozen};
use state_unit::{SaveSupport, SavedStateUnit, StateTransitionError, UnitSaveSupport};
use std::io;

/// A guest at one moment.
#[derive(Debug)]
pub struct MachineSnapshot {
    /// The state of each unit, in the order of their addition.
    pub states: Vec<SavedStateUnit>,
    /// Its memory.
    pub memory: Frozen,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Units that cannot be saved, each with its reason.
    #[error("{}", listed(.0))]
    Refused(Vec<(String, String)>),
    /// A transition failed.
    #[error(transparent)]
    Transition(#[from] StateTransitionError),
    /// Memory cannot be frozen.
    #[error("the guest's memory cannot be frozen")]
    Freeze(#[source] FreezeError),
    /// A thread of the blocking pool panicked.
    #[error("freezing the guest's memory panicked")]
    Panicked,
}

fn listed(refused: &[(String, String)]) -> String {
    refused.iter().map(|(unit, reason)| format!("{unit}: {reason}")).collect::<Vec<_>>().join("; ")
}

fn refusal(unit: UnitSaveSupport) -> Option<(String, String)> {
    match unit.support {
        SaveSupport::Refused(reason) => Some((unit.name.to_string(), reason.to_string())),
        SaveSupport::Saves | SaveSupport::Stateless => None,
    }
}

impl Machine {
    /// Takes a snapshot: the guest's state at one moment, from which it goes on if it runs.
    ///
    /// All units are asked first, and one that cannot be saved leaves the guest as it is. The freeze of its memory is prepared while
    /// it runs ([`GuestMemory::prepare_freeze`]). It is paused for as long as saving takes, and the freeze: some system calls the first
    /// time, later also the time to copy what it has written since ([`GuestMemory::freeze`]). What is returned can still be changed by nobody but is not complete before it is sealed
    /// ([`Frozen::seal`]), which may block.
    ///
    /// # Errors
    /// The guest goes on if it ran, unless the error is a transition's that leaves the machine faulted.
    pub async fn snapshot(&self) -> Result<MachineSnapshot, SnapshotError> {
        let refused: Vec<(String, String)> =
            self.units.can_save().await?.into_iter().filter_map(refusal).collect();
        if !refused.is_empty() {
            return Err(SnapshotError::Refused(refused));
        }
        let runs = self.units.is_running();
        if runs {
            self.prepare_freeze().await;
            self.units.pause().await?;
        }
        let taken = self.save_and_freeze().await;
        if runs {
            self.units.start().await?;
        }
        taken
    }

    /// Does beforehand what would take long while the guest stands still. Without it, it does.
    async fn prepare_freeze(&self) {
        if self.memory.is_private() {
            return;
        }
        let memory = self.memory.clone();
        let prepared = tokio::task::spawn_blocking(move || memory.prepare_freeze()).await;
        if let Err(error) = prepared.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            tracing::warn!(%error, "a freeze could not be prepared: the guest stands still the longer");
        }
    }

    async fn save_and_freeze(&self) -> Result<MachineSnapshot, SnapshotError> {
        let states = self.units.save().await?;
        if !self.memory.is_private() {
            // Some system calls.
            let memory = self.memory.freeze().map_err(SnapshotError::Freeze)?;
            return Ok(MachineSnapshot { states, memory });
        }
        let memory = self.memory.clone();
        let frozen = tokio::task::spawn_blocking(move || memory.freeze()).await;
        let memory = frozen.map_err(|_| SnapshotError::Panicked)?.map_err(SnapshotError::Freeze)?;
        Ok(MachineSnapshot { states, memory })
    }

    /// Gives the stopped units the states of a snapshot, whose memory the machine was built with.
    ///
    /// # Errors
    /// If a state is missing, of no unit, or refused by its unit. The machine cannot be started then.
    pub async fn restore(&self, states: Vec<SavedStateUnit>) -> Result<(), StateTransitionError> {
        self.units.restore(states).await
    }
}
