//! A guest's user, operator and observers.

use crate::balloon::Balloon;
use crate::call::{Call, SharedCall, failure_beside};
use crate::channel::Channel;
use crate::debugger::Debugger;
use crate::dump::CoreDump;
use crate::error::ClientError;
use crate::events::{Events, Sink};
use crate::host::WeakHost;
use crate::mem::Mem;
use crate::serial::{ByteStream, Callback, Port, SerialOutput};
use crate::snapshot::Snapshot;
use crate::vsock::VsockEndpoint;
use futures::FutureExt;
use guest_schema::guest_capnp::{guest, guest_control, observer, subscription};
use guest_schema::host_capnp::guest_exit;
use guest_schema::{DebugHalt, Exit, Failure, GuestState, Rendering, Transition, UnitConfig, UnitStatus};
use std::rc::Rc;
use tokio::sync::mpsc;

/// The connection that a capability came over, kept open for it; none for what comes over a guest's own channel, which only
/// the `Lifecycle` keeps open.
pub(crate) type Kept = Option<Rc<Channel>>;

type Ignored = fn(&[u8], u64);

const NO_OUTPUT: Option<Callback<Ignored>> = None;

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
        ByteStream::open(&self.client, Port::Serial, Some(output))
    }

    /// Opens the serial port ttyS0 for its input only.
    pub fn serial_input(&self) -> ByteStream {
        ByteStream::open(&self.client, Port::Serial, NO_OUTPUT)
    }

    /// Opens the terminal of its console, hvc0, as [`serial`](Self::serial) does the serial port. `deviceNotPresent` without one.
    pub fn console(&self, output: impl SerialOutput) -> ByteStream {
        ByteStream::open(&self.client, Port::Console, Some(output))
    }

    /// Opens the terminal of its console for its input only.
    pub fn console_input(&self) -> ByteStream {
        ByteStream::open(&self.client, Port::Console, NO_OUTPUT)
    }

    /// Opens a further port of its console by its name. Input waits for as long as the guest does not have the port open.
    /// `deviceNotPresent` without such a port.
    pub fn console_port(&self, name: &str, output: impl SerialOutput) -> ByteStream {
        ByteStream::open(&self.client, Port::Named(name), Some(output))
    }

    /// Opens a further port of its console for its input only.
    pub fn console_port_input(&self, name: &str) -> ByteStream {
        ByteStream::open(&self.client, Port::Named(name), NO_OUTPUT)
    }

    /// Tells the guest that the terminal of its console has this size now, in characters. `deviceNotPresent` without a console,
    /// `notRunning` once the guest has ended.
    pub fn resize_console(&self, columns: u16, rows: u16) -> Call<()> {
        let mut request = self.client.resize_console_request();
        let mut params = request.get();
        params.set_columns(columns);
        params.set_rows(rows);
        Call::send(request, self.client.clone(), |results| Failure::read_result(results.get_result()?))
    }

    /// The host's end of its vsock device.
    pub fn vsock(&self) -> VsockEndpoint {
        VsockEndpoint::of(&self.client)
    }

    /// Its memory balloon.
    pub fn balloon(&self) -> Balloon {
        Balloon::open(&self.client)
    }

    /// Its memory device.
    pub fn mem(&self) -> Mem {
        Mem::open(&self.client)
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
    host: WeakHost,
}

macro_rules! transitions {
    ($($(#[$doc:meta])* $name:ident = $request:ident;)*) => {$(
        $(#[$doc])*
        pub fn $name(&self) -> Call<()> {
            Call::send(self.client.$request(), self.clone(), |results| Failure::read_result(results.get_result()?))
        }
    )*};
}

/// Both capabilities have this method, with types of their own.
macro_rules! inspect {
    ($self:ident, $path:ident, $depth:ident, $rendering:ident) => {{
        let mut request = $self.client.inspect_request();
        let mut params = request.get();
        params.set_path($path);
        params.set_depth($depth);
        params.set_rendering($rendering.into());
        Call::send(request, $self.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let tree = results.get_tree()?.to_string()?;
            Ok(refused.map(|()| tree))
        })
    }};
}

impl Control {
    pub(crate) fn new(
        client: guest_control::Client,
        opened: Option<Call<()>>,
        kept: Kept,
        host: WeakHost,
    ) -> Self {
        Self { client, opened: opened.map(FutureExt::shared), kept, host }
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

    /// Lets a unit join the guest's state units, and starts it if they run; if that fails, it is not added. `badConfig`,
    /// `notRunning` once the guest has ended, `faulted`, `deviceStartFailure`.
    pub fn add_unit(&self, unit: &UnitConfig) -> Call<()> {
        let mut request = self.client.add_unit_request();
        unit.write(request.get().init_unit());
        Call::send(request, self.clone(), |results| Failure::read_result(results.get_result()?))
    }

    /// Sends every VP a non-maskable interrupt. `notRunning` unless running or paused.
    pub fn nmi(&self) -> Call<()> {
        let request = self.client.nmi_request();
        Call::send(request, self.clone(), |results| Failure::read_result(results.get_result()?))
    }

    /// Presses the power button, which asks the guest's operating system to shut down; answers when the button is pressed. A paused
    /// guest hears of it when it goes on. `notRunning` unless running or paused.
    pub fn power_button(&self) -> Call<()> {
        let request = self.client.power_button_request();
        Call::send(request, self.clone(), |results| Failure::read_result(results.get_result()?))
    }

    /// Begins a core dump, an ELF file: the registers as of now, the memory as of each read. Pause the guest for a dump of one
    /// moment. `notRunning` once the guest has ended.
    pub fn dump(&self) -> Call<CoreDump> {
        let kept = self.clone();
        Call::send(self.client.dump_request(), self.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let core = results.get_core()?;
            Ok(refused.map(|()| CoreDump::new(core, kept)))
        })
    }

    /// Keeps the guest as it is at this moment, which it runs on from; one that is paused stays so. Answers when nothing can change the
    /// snapshot any more. It is held through the connection to the service that the guest was launched or found over, and outlives the
    /// guest; if that connection was closed before, it comes over the guest's own channel and ends with it.
    ///
    /// `snapshotNotSupported` (the detail says which units refuse and why), `notRunning` unless running or paused, `notSupported`
    /// without a service, `limitExceeded` if the service keeps too many, `internalError` if the host has no room for it.
    pub fn snapshot(&self) -> Call<Snapshot> {
        let taken = Call::send(self.client.snapshot_request(), self.clone(), |results| {
            if results.has_error() {
                return Ok(Err(Failure::read(results.get_error()?)?));
            }
            Ok(Ok((results.get_snapshot()?, results.get_token()?.to_vec())))
        });
        let host = self.host.upgrade();
        Call::around(async move {
            // Held until there is another reference to it.
            let (taken, token) = taken.await?;
            match host {
                Some(host) => host.snapshot(&token).await,
                None => Ok(Snapshot::new(taken, &token, None)),
            }
        })
    }

    /// As [`Observer::inspect`], with what is the guest's own: its registers, its command line.
    pub fn inspect(&self, path: &str, depth: u32, rendering: Rendering) -> Call<String> {
        inspect!(self, path, depth, rendering)
    }

    /// Gives the writable node at `path` of the guest's inspection tree a new value, written as `inspect` shows it in text;
    /// answers with the value that it then has. `badConfig` if there is no such node or it does not take the value,
    /// `notSupported` if it is not writable, `limitExceeded`, `transitionTimedOut`, `notRunning` once the guest has ended.
    pub fn update(&self, path: &str, value: &str) -> Call<String> {
        let mut request = self.client.update_request();
        let mut params = request.get();
        params.set_path(path);
        params.set_value(value);
        Call::send(request, self.clone(), |results| {
            let updated = Failure::read_result(results.get_result()?)?;
            let value = results.get_value()?.to_string()?;
            Ok(updated.map(|()| value))
        })
    }

    /// Begins to debug the guest, whose VPs go on until they are stopped. Where they stop by themselves goes to `halts`, and the guest's
    /// end as the last.
    pub fn debugger(&self, halts: mpsc::Sender<DebugHalt>) -> Debugger {
        Debugger::attach(&self.client, self.clone(), halts)
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

    /// The state units as they are at this moment, also during a transition; none once the guest has ended.
    pub fn unit_graph(&self) -> Call<Vec<UnitStatus>> {
        Call::send(self.client.unit_graph_request(), self.clone(), |results| {
            Ok(Ok(UnitStatus::read_all(results.get_units()?)?))
        })
    }

    /// The latest passes over the state units, the oldest first; none once the guest has ended.
    pub fn timeline(&self) -> Call<Vec<Transition>> {
        Call::send(self.client.timeline_request(), self.clone(), |results| {
            Ok(Ok(Transition::read_all(results.get_transitions()?)?))
        })
    }

    /// The node at `path` (names joined by "/", "" for the root) of the guest's inspection tree, with `depth` levels of children
    /// below it. `badConfig` if there is no such node, `notRunning` once the guest has ended.
    pub fn inspect(&self, path: &str, depth: u32, rendering: Rendering) -> Call<String> {
        inspect!(self, path, depth, rendering)
    }

    /// Sends `events` what becomes of the guest, beginning with the event of this sequence number as far as it is kept, for as
    /// long as the subscription is held. `limitExceeded` if there are too many.
    pub fn subscribe(&self, from_sequence: u64, events: impl Events) -> Call<Subscription> {
        let mut request = self.client.subscribe_request();
        let mut params = request.get();
        params.set_from_sequence(from_sequence);
        params.set_sink(capnp_rpc::new_client(Sink::new(events)));
        let kept = self.clone();
        Call::send(request, self.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let client = results.get_subscription()?;
            Ok(refused.map(|()| Subscription { _client: client, _kept: kept }))
        })
    }

    /// As [`Guest::terminated`].
    pub fn terminated(&self) -> Call<Exit> {
        Call::send(self.client.when_terminated_request(), self.clone(), |results| {
            Ok(Ok(Exit::read(results.get_exit()?)?))
        })
    }
}

/// Holds a guest's events coming. Dropped, none comes any more.
pub struct Subscription {
    _client: subscription::Client,
    _kept: Observer,
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
