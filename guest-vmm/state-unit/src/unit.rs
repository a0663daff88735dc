//! What a unit is, and the loops that serve one.

use crate::{RequestReceiver, StateRequest};
use inspect::InspectMut;
use save_restore::{RestoreError, SaveError, SavedStateBlob};

/// Why a unit could not do what it was asked. Any error, or text, converts with `?` or `into()`.
pub type UnitError = Box<dyn std::error::Error + Send + Sync>;

/// Whether a unit can be saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SaveSupport {
    /// `save` gives a state, and `restore` needs one.
    Saves,
    /// There is nothing to save: `save` gives none, and the unit is skipped in restore.
    Stateless,
    /// The unit cannot be saved, for this reason.
    Refused(String),
}

/// A component that reacts to VM state changes.
///
/// It is created stopped. The methods are called one at a time. When one is called, the units that this one depends on
/// have done the same (start, reset, restore), or the units that depend on it have (stop).
#[expect(async_fn_in_trait, reason = "a future is Send if the unit's is; units on one thread need not be")]
pub trait StateUnit: InspectMut {
    /// Begins to run. Called only while stopped. After an error the unit is stopped.
    async fn start(&mut self) -> Result<(), UnitError>;

    /// Stops running, with everything in flight drained or handed back. After an error the unit counts as running.
    async fn stop(&mut self) -> Result<(), UnitError>;

    /// Goes back to the state after creation. Called only while stopped.
    async fn reset(&mut self) -> Result<(), UnitError>;

    /// Whether the unit can be saved. Asked at any time, also while running; must not change anything.
    fn can_save(&mut self) -> SaveSupport;

    /// The unit's state, `None` if it has none. Called only while stopped; leaves the unit as it was.
    async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError>;

    /// Replaces the unit's state. Called only while stopped.
    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError>;

    /// Called once all units have been restored, still stopped, in any order: the place to look at other units.
    async fn post_restore(&mut self) -> Result<(), UnitError> {
        Ok(())
    }
}

/// Serves `unit` until the channel ends, and gives it back.
///
/// One request is handled at a time: an inspection waits for the transition in flight. See [`run_async_unit`].
pub async fn run_unit<T: StateUnit>(mut unit: T, mut requests: RequestReceiver) -> T {
    while let Some(request) = requests.recv().await {
        request.apply(&mut unit).await;
    }
    unit
}

/// Serves `unit` until the channel ends, and gives it back. Inspections are answered while a transition is in flight.
pub async fn run_async_unit<T>(unit: T, mut requests: RequestReceiver) -> T
where
    for<'a> &'a T: StateUnit,
{
    while let Some(request) = requests.recv().await {
        request.apply_with_concurrent_inspects(&unit, &mut requests).await;
    }
    unit
}

impl StateRequest {
    /// Lets `unit` do what is asked, and answers. A panic of the unit is answered too, and goes on.
    pub async fn apply(self, unit: &mut impl StateUnit) {
        match self {
            Self::Start(answer) => answer.answer_with(unit.start()).await,
            Self::Stop(answer) => answer.answer_with(unit.stop()).await,
            Self::Reset(answer) => answer.answer_with(unit.reset()).await,
            Self::CanSave(answer) => answer.answer_with(async { Ok::<_, UnitError>(unit.can_save()) }).await,
            Self::Save(answer) => answer.answer_with(unit.save()).await,
            Self::Restore(state, answer) => answer.answer_with(unit.restore(state)).await,
            Self::PostRestore(answer) => answer.answer_with(unit.post_restore()).await,
            Self::Inspect(deferred) => deferred.inspect_mut(unit),
        }
    }

    /// The same for a unit that works through a shared reference: meanwhile, inspections that arrive in `requests` are
    /// answered. Another transition in that time is refused with [`TransitionInFlight`](crate::TransitionInFlight).
    pub async fn apply_with_concurrent_inspects<'a, T>(self, unit: &'a T, requests: &mut RequestReceiver)
    where
        &'a T: StateUnit,
    {
        let (mut worker, mut shown) = (unit, unit);
        let mut work = std::pin::pin!(self.apply(&mut worker));
        let mut open = true;
        while open {
            tokio::select! {
                biased;
                () = &mut work => return,
                request = requests.recv() => match request {
                    Some(Self::Inspect(deferred)) => deferred.inspect_mut(&mut shown),
                    Some(transition) => transition.refuse(|| crate::TransitionInFlight.into()),
                    None => open = false,
                },
            }
        }
        work.await;
    }
}
