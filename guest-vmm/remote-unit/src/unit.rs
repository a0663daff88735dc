//! The unit, and the calls that it is made of.

use crate::RemoteUnitError;
use crate::shown;
use guest_schema::Failure;
use guest_schema::common_capnp::result;
use guest_schema::config_capnp::state_unit::Client;
use inspect::{InspectMut, Request};
use save_restore::{RestoreError, SaveError, SavedStateBlob};
use state_unit::{BuildError, SaveSupport, StateUnit, UnitBuilder, UnitError, UnitHandle, run_async_unit};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use tokio::task::spawn_local;
use tokio::time::timeout;

/// What becomes of a transition whose unit is late or lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WhenLost {
    /// It fails, and names the unit.
    #[default]
    Fault,
    /// It goes on without the unit, which leaves the graph for good. A restore, whose state would be lost, fails all the same.
    Evict,
}

/// How a remote unit is treated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteUnitOptions {
    /// How long it may take to answer. The deadline of the set's transitions holds besides.
    pub deadline: Duration,
    /// What happens after that, or when its connection is lost.
    pub when_lost: WhenLost,
    /// Whether it saves; what `can_save` answers, so that asking needs no call.
    pub saves: SaveSupport,
}

/// 5 s, a loss fails the transition, nothing to save.
impl Default for RemoteUnitOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(5),
            when_lost: WhenLost::default(),
            saves: SaveSupport::Stateless,
        }
    }
}

/// The unit's place in the graph, until it is evicted.
type Place = Rc<RefCell<Option<UnitHandle>>>;

/// A remote unit's membership in its set. Dropping it removes the unit.
#[derive(Debug)]
pub struct RemoteUnit {
    place: Place,
}

impl RemoteUnit {
    /// Adds the unit that `client` stands for, stopped, and serves it on this thread.
    ///
    /// # Errors
    /// See [`BuildError`].
    ///
    /// # Panics
    /// Outside of a `tokio` `LocalSet`, as [`tokio::task::spawn_local`] does.
    pub fn join(
        builder: UnitBuilder<'_>,
        client: Client,
        options: RemoteUnitOptions,
    ) -> Result<Self, BuildError> {
        let (handle, requests) = builder.build()?;
        let place = Rc::new(RefCell::new(Some(handle)));
        let worker = Worker { client, options, place: place.clone() };
        spawn_local(async move { drop(run_async_unit(worker, requests).await) });
        Ok(Self { place })
    }

    /// Gives other units edges to this one, as long as it is in the graph.
    pub fn with_handle<T>(&self, look: impl FnOnce(&UnitHandle) -> T) -> Option<T> {
        self.place.borrow().as_ref().map(look)
    }

    /// Whether it was lost, and left the graph.
    #[must_use]
    pub fn is_evicted(&self) -> bool {
        self.place.borrow().is_none()
    }
}

impl Drop for RemoteUnit {
    fn drop(&mut self) {
        self.place.take();
    }
}

/// What serves the requests.
struct Worker {
    client: Client,
    options: RemoteUnitOptions,
    place: Place,
}

/// A call's answer: what it gave, or the unit's refusal.
type Answered<T> = capnp::Result<Result<T, Failure>>;

impl Worker {
    /// Makes one call, within the deadline.
    async fn call<T>(
        &self,
        operation: &'static str,
        call: impl Future<Output = Answered<T>>,
    ) -> Result<T, RemoteUnitError> {
        let deadline = self.options.deadline;
        match timeout(deadline, call).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(source))) => Err(RemoteUnitError::Refused { operation, source }),
            Ok(Err(error)) => Err(RemoteUnitError::Lost { operation, reason: error.to_string() }),
            Err(_) => Err(RemoteUnitError::Late { operation, deadline }),
        }
    }

    /// The same for a transition that can go on without the unit.
    async fn call_or_leave<T: Default>(
        &self,
        operation: &'static str,
        call: impl Future<Output = Answered<T>>,
    ) -> Result<T, RemoteUnitError> {
        match self.call(operation, call).await {
            Err(error) if error.is_loss() && self.options.when_lost == WhenLost::Evict => {
                tracing::warn!(%error, "a remote unit leaves the graph");
                self.place.take();
                Ok(T::default())
            }
            other => other,
        }
    }
}

fn plain(result: capnp::Result<result::Reader<'_>>) -> Answered<()> {
    Failure::read_result(result?)
}

impl StateUnit for &Worker {
    async fn start(&mut self) -> Result<(), UnitError> {
        let sent = self.client.start_request().send().promise;
        let call = async { plain(sent.await?.get()?.get_result()) };
        Ok(self.call_or_leave("start", call).await?)
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        let sent = self.client.stop_request().send().promise;
        let call = async { plain(sent.await?.get()?.get_result()) };
        Ok(self.call_or_leave("stop", call).await?)
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        let sent = self.client.reset_request().send().promise;
        let call = async { plain(sent.await?.get()?.get_result()) };
        Ok(self.call_or_leave("reset", call).await?)
    }

    fn can_save(&mut self) -> SaveSupport {
        self.options.saves.clone()
    }

    async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError> {
        match &self.options.saves {
            SaveSupport::Stateless => return Ok(None),
            SaveSupport::Refused(reason) => return Err(SaveError::not_supported(reason.clone())),
            SaveSupport::Saves => {}
        }
        let sent = self.client.save_request().send().promise;
        let call = async {
            let response = sent.await?;
            let results = response.get()?;
            let saved = plain(results.get_result())?;
            let blob =
                SavedStateBlob::from_parts(results.get_type_name()?.to_string()?, results.get_state()?);
            Ok(saved.map(|()| Some(blob)))
        };
        self.call_or_leave("save", call).await.map_err(SaveError::other)
    }

    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        let mut request = self.client.restore_request();
        let mut params = request.get();
        params.set_type_name(state.type_name());
        params.set_state(state.value());
        let sent = request.send().promise;
        let call = async { plain(sent.await?.get()?.get_result()) };
        // State that was not taken is lost, so that no transition goes on without the unit here.
        self.call("restore", call).await.map_err(RestoreError::other)
    }

    async fn post_restore(&mut self) -> Result<(), UnitError> {
        let sent = self.client.post_restore_request().send().promise;
        let call = async { plain(sent.await?.get()?.get_result()) };
        Ok(self.call_or_leave("go on after the restore", call).await?)
    }
}

impl InspectMut for &Worker {
    fn inspect_mut(&mut self, request: Request<'_>) {
        let deferred = request.defer();
        let sent = self.client.inspect_request().send().promise;
        let deadline = self.options.deadline;
        spawn_local(async move {
            let call = async { Ok::<_, capnp::Error>(sent.await?.get()?.get_json()?.to_string()?) };
            // Dropped unanswered, it shows as such.
            if let Ok(Ok(json)) = timeout(deadline, call).await {
                deferred.answer(|request| shown::answer(request, &json));
            }
        });
    }
}
