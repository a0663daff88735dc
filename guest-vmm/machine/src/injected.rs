//! A state unit of its own, added to a machine on purpose, in which tests inject faults.
//!
//! It has a state of no bytes, so that it takes part in all that units are asked for. What it fails at or holds up is one
//! [`InjectedStep`]; in all others it does as it is asked. A step that it holds up is logged before.

use crate::units::{Part, PartUnit};
use inspect::Request;
use save_restore::{RestoreError, SaveError, SavedStateBlob};
use state_unit::{RequestReceiver, SaveSupport, StateRequest, UnitError};
use std::future::pending;
use std::time::Duration;

/// The type of its state.
const STATE: &str = "machine.injected.InjectedState";
/// How long a slow unit takes for its step.
const SLOW: Duration = Duration::from_secs(2);

/// A step of a unit's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InjectedStep {
    /// A start after which nothing was saved before.
    Start,
    /// The start after its state was saved: the guest goes on after its snapshot.
    Resume,
    /// The start after its state was restored: the guest goes on elsewhere.
    GoOn,
    /// A stop.
    Stop,
    /// A reset.
    Reset,
    /// The question whether it can be saved, to which failing is to refuse.
    CanSave,
    /// Giving its state.
    Save,
    /// Taking a state.
    Restore,
}

impl InjectedStep {
    /// All, by the names that a command line knows them by.
    pub const NAMED: [(&str, Self); 8] = [
        ("start", Self::Start),
        ("resume", Self::Resume),
        ("go-on", Self::GoOn),
        ("stop", Self::Stop),
        ("reset", Self::Reset),
        ("can-save", Self::CanSave),
        ("save", Self::Save),
        ("restore", Self::Restore),
    ];
}

/// What an injected unit does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InjectedFault {
    /// It fails at this step.
    Fails(InjectedStep),
    /// It never answers at this step.
    Holds(InjectedStep),
    /// It takes 2 s for this step, and does it.
    IsSlow(InjectedStep),
}

/// The unit.
#[derive(Debug)]
pub(crate) struct InjectedPart {
    fault: InjectedFault,
    /// What its next start is.
    next_start: InjectedStep,
}

impl InjectedPart {
    pub fn new(fault: InjectedFault) -> Self {
        Self { fault, next_start: InjectedStep::Start }
    }

    async fn step(&self, step: InjectedStep) -> Result<(), UnitError> {
        self.wait_at(step).await;
        if self.fault == InjectedFault::Fails(step) {
            return Err(format!("injected fault at {step:?}").into());
        }
        Ok(())
    }

    async fn wait_at(&self, step: InjectedStep) {
        match self.fault {
            InjectedFault::Holds(held) if held == step => {
                tracing::info!("injected unit: held at {step:?}");
                pending().await
            }
            InjectedFault::IsSlow(slow) if slow == step => {
                tracing::info!("injected unit: slow at {step:?}");
                tokio::time::sleep(SLOW).await;
            }
            _ => {}
        }
    }
}

/// Serves the unit until the channel ends. Unlike others it may take its time to say whether it can be saved.
pub(crate) async fn run_injected_unit(part: InjectedPart, mut requests: RequestReceiver) {
    let mut unit = PartUnit(part);
    while let Some(request) = requests.recv().await {
        if let StateRequest::CanSave(_) = request {
            unit.0.wait_at(InjectedStep::CanSave).await;
        }
        request.apply(&mut unit).await;
    }
}

impl Part for InjectedPart {
    async fn start(&mut self) -> Result<(), UnitError> {
        let step = std::mem::replace(&mut self.next_start, InjectedStep::Start);
        self.step(step).await
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        self.step(InjectedStep::Stop).await
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        self.step(InjectedStep::Reset).await
    }

    fn can_save(&mut self) -> SaveSupport {
        if self.fault == InjectedFault::Fails(InjectedStep::CanSave) {
            return SaveSupport::Refused("an injected fault".into());
        }
        SaveSupport::Saves
    }

    async fn save(&mut self) -> Result<SavedStateBlob, SaveError> {
        self.step(InjectedStep::Save).await.map_err(SaveError::other)?;
        self.next_start = InjectedStep::Resume;
        Ok(SavedStateBlob::from_parts(STATE, Vec::new()))
    }

    async fn restore(&mut self, _: SavedStateBlob) -> Result<(), RestoreError> {
        self.step(InjectedStep::Restore).await.map_err(RestoreError::other)?;
        self.next_start = InjectedStep::GoOn;
        Ok(())
    }

    async fn post_restore(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    fn inspect(&mut self, request: Request<'_>) {
        request.respond().field_with("fault", || format!("{:?}", self.fault));
    }
}
