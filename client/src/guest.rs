//! A guest's user, operator and observers.

use crate::call::{Call, SharedCall, failure_beside};
use crate::channel::Channel;
use crate::error::ClientError;
use crate::serial::{ByteStream, Callback, SerialOutput};
use futures::FutureExt;
use guest_schema::guest_capnp::{guest, guest_control, observer};
use guest_schema::host_capnp::guest_exit;
use guest_schema::{Exit, Failure, GuestState};
use std::rc::Rc;

/// The connection that a capability came over, kept open for it; none for what comes over a guest's own channel, which only
/// the `Lifecycle` keeps open.
pub(crate) type Kept = Option<Rc<Channel>>;

/// A guest's user: its devices. Nothing here starts, stops or pauses it, and dropping it changes nothing.
#[derive(Clone)]
pub struct Guest {
    client: guest::Client,
    bound: SharedCall<()>,
}

impl Guest {
    pub(crate) fn new(client: guest::Client, bound: Call<()>) -> Self {
        Self { client, bound: bound.shared() }
    }

    /// Whether there is such a guest: the full answer of bind, with what led to a refusal. Calls on a refused guest fail with
    /// the same code, without the cause.
    pub async fn bound(&self) -> Result<(), ClientError> {
        self.bound.clone().await
    }

    /// Opens the serial port ttyS0: all its output, from the last 64 KiB before now, goes to `output`. Other readers see it too.
    pub fn serial(&self, output: impl SerialOutput) -> ByteStream {
        ByteStream::serial(&self.client, Some(output))
    }

    /// Opens the serial port ttyS0 for its input only.
    pub fn serial_input(&self) -> ByteStream {
        ByteStream::serial(&self.client, None::<Callback<fn(&[u8], u64)>>)
    }

    /// A look at the guest.
    pub fn observer(&self) -> Observer {
        let sent = self.client.observer_request().send();
        let opened = Call::answer(sent.promise, self.client.clone(), |results| {
            failure_beside(results.has_error(), results.get_error())
        });
        Observer::new(sent.pipeline.get_observer(), Some(opened), None)
    }

    /// Answers when the guest has ended, with how, before this guest's calls begin to fail.
    pub fn terminated(&self) -> Call<Exit> {
        Call::send(self.client.when_terminated_request(), self.client.clone(), |results| {
            Ok(Ok(Exit::read(results.get_exit()?)?))
        })
    }
}

/// A guest's operator.
#[derive(Clone)]
pub struct Control {
    client: guest_control::Client,
    opened: Option<SharedCall<()>>,
    kept: Kept,
}

macro_rules! transitions {
    ($($(#[$doc:meta])* $name:ident = $request:ident;)*) => {$(
        $(#[$doc])*
        pub fn $name(&self) -> Call<()> {
            Call::send(self.client.$request(), self.clone(), |results| Failure::read_result(results.get_result()?))
        }
    )*};
}

impl Control {
    pub(crate) fn new(client: guest_control::Client, opened: Option<Call<()>>, kept: Kept) -> Self {
        Self { client, opened: opened.map(FutureExt::shared), kept }
    }

    /// Whether there is such a guest, with what led to a refusal.
    pub async fn opened(&self) -> Result<(), ClientError> {
        match &self.opened {
            Some(opened) => opened.clone().await,
            None => Ok(()),
        }
    }

    transitions! {
        /// Stops VPs and devices; answers when they have stopped. Of a paused guest: nothing to do. `notRunning`, `faulted`.
        pause = pause_request;
        /// Lets a paused guest go on. `notRunning` unless paused.
        resume = resume_request;
        /// Starts the guest anew, whatever its `on_reset`. `notRunning` unless running or paused.
        reset = reset_request;
        /// Halts the guest by force and answers when nothing of it is left.
        stop = stop_request;
    }

    /// A look at the guest.
    pub fn observer(&self) -> Observer {
        let sent = self.client.observer_request().send();
        let opened = Call::answer(sent.promise, self.clone(), |results| {
            failure_beside(results.has_error(), results.get_error())
        });
        Observer::new(sent.pipeline.get_observer(), Some(opened), self.kept.clone())
    }
}

/// Looks at a guest and changes nothing.
#[derive(Clone)]
pub struct Observer {
    client: observer::Client,
    // Never awaited: the calls below fail with the same reason. Held, since dropping it could take back what was asked.
    _opened: Option<Rc<Call<()>>>,
    _kept: Kept,
}

impl Observer {
    pub(crate) fn new(client: observer::Client, opened: Option<Call<()>>, kept: Kept) -> Self {
        Self { client, _opened: opened.map(Rc::new), _kept: kept }
    }

    /// The guest's state now. A VP that does not answer in time is reported so; the call does not wait for it.
    pub fn state(&self) -> Call<GuestState> {
        Call::send(self.client.state_request(), self.clone(), |results| {
            Ok(Ok(GuestState::read(results.get_state()?)?))
        })
    }

    /// As [`Guest::terminated`].
    pub fn terminated(&self) -> Call<Exit> {
        Call::send(self.client.when_terminated_request(), self.clone(), |results| {
            Ok(Ok(Exit::read(results.get_exit()?)?))
        })
    }
}

/// How a guest ended, as the service knows it: it outlives the VMM, and also answers when the VMM's process crashed.
#[derive(Clone)]
pub struct GuestExit {
    client: guest_exit::Client,
    _kept: Kept,
}

impl GuestExit {
    pub(crate) fn new(client: guest_exit::Client, kept: Kept) -> Self {
        Self { client, _kept: kept }
    }

    /// Answers when the guest of the last create has ended, or its VMM's process.
    pub fn terminated(&self) -> Call<Exit> {
        Call::send(self.client.when_terminated_request(), self.clone(), |results| {
            Ok(Ok(Exit::read(results.get_exit()?)?))
        })
    }
}
