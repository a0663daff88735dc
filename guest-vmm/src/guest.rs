//! One guest as its holders see it. It outlives the VM: holders learn how the guest ended.

use crate::devices::HostEnds;
use crate::events::EventLog;
use crate::output::OutputLog;
use crate::panics::PanicLog;
use crate::ports::{GuestOutputs, GuestPort, PortInput};
use crate::settings::Settings;
use crate::shown;
use ::devices::SerialInput;
use guest_schema::{
    Exit, Failure, GuestError, GuestShape, GuestState, OnReset, Phase, Transition, UnitStatus, chain,
};
use inspect::{Inspection, Node, Request, Update, UpdateError, View};
use machine::{CoreDump, DumpError, MachineView};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long VPs may take to say what they are doing.
const VP_STATE: Duration = Duration::from_millis(500);

/// How long the parts of an inspection tree may take to show themselves, or to take a new value.
const INSPECTION: Duration = Duration::from_millis(500);

/// How many levels of an inspection tree may be asked for.
const MAX_DEPTH: u32 = 32;

/// How much of a path that leads nowhere is told, in characters.
const MAX_SHOWN: usize = 200;

/// The longest new value of a node, in bytes.
const MAX_VALUE: usize = 4096;

/// How long reports of panics are gathered before subscribers are told of more than the first.
const PANICS: Duration = Duration::from_secs(1);

/// What becomes of the guests of a VMM, for whoever watches it.
#[derive(Debug, Clone)]
pub(crate) enum Milestone {
    /// The generation-th guest was created.
    Created { generation: u64, shape: Option<GuestShape> },
    /// It has ended.
    Terminated { generation: u64, exit: Exit },
}

/// A guest.
pub(crate) struct Guest {
    outputs: GuestOutputs,
    events: Rc<EventLog>,
    settings: Settings,
    panics: Arc<PanicLog>,
    /// None once the VM is gone.
    live: RefCell<Option<Live>>,
    exit: watch::Sender<Option<Exit>>,
    phase: Cell<Phase>,
    started: Cell<Option<Instant>>,
    ran: Cell<Duration>,
    resets: Cell<u32>,
}

/// What there is only while the VM is.
struct Live {
    input: SerialInput,
    view: Arc<MachineView>,
    ends: HostEnds,
}

/// What a machine tells of its guest, on its way to those who want to know.
#[derive(Clone, Default)]
pub(crate) struct Told {
    pub outputs: GuestOutputs,
    pub panics: Arc<PanicLog>,
}

impl Guest {
    pub fn new(
        told: Told,
        input: SerialInput,
        view: Arc<MachineView>,
        ends: HostEnds,
        settings: Settings,
    ) -> Self {
        let Told { outputs, panics } = told;
        let events = Rc::new(EventLog::default());
        events.phase(Phase::Created);
        Self {
            outputs,
            events,
            settings,
            panics,
            live: RefCell::new(Some(Live { input, view, ends })),
            exit: watch::Sender::new(None),
            phase: Cell::new(Phase::Created),
            started: Cell::new(None),
            ran: Cell::new(Duration::ZERO),
            resets: Cell::new(0),
        }
    }

    /// Everything that a port has sent, as far as it is kept. None if there is no such port.
    pub fn output(&self, port: &GuestPort) -> Option<&Arc<OutputLog>> {
        self.outputs.get(port)
    }

    /// What became of it.
    pub fn events(&self) -> &Rc<EventLog> {
        &self.events
    }

    /// What the next reset by the guest itself does.
    pub fn on_reset(&self) -> OnReset {
        self.settings.on_reset()
    }

    /// A port's input, while there is one.
    pub fn input(&self, port: &GuestPort) -> Option<PortInput> {
        let live = self.live.borrow();
        let Live { input, ends, .. } = live.as_ref()?;
        match port {
            GuestPort::Serial => Some(PortInput::Serial(input.clone())),
            GuestPort::Console => Some(PortInput::Console(ends.console.as_ref()?.input())),
            GuestPort::Named(name) => Some(PortInput::Console(ends.console.as_ref()?.port_input(name)?)),
        }
    }

    /// The host's end of one of its devices, or the failure of what needs it. `device` is how that calls it.
    pub fn end_of<T>(&self, device: &str, end: impl FnOnce(&HostEnds) -> Option<T>) -> Result<T, Failure> {
        let live = self.live.borrow();
        let live =
            live.as_ref().ok_or_else(|| Failure::new(GuestError::NotRunning, "the guest has ended"))?;
        let absent = || Failure::new(GuestError::DeviceNotPresent, format!("the guest has no {device}"));
        end(&live.ends).ok_or_else(absent)
    }

    /// Resolves when the guest has ended, with how.
    pub async fn exit(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let exit = exit.wait_for(Option::is_some).await.expect("the sender is held by self");
        exit.clone().expect("waited for")
    }

    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    pub fn set_phase(&self, phase: Phase) {
        if !self.has_ended() && self.phase.replace(phase) != phase {
            self.events.phase(phase);
        }
    }

    pub fn was_started(&self) {
        self.started.set(Some(Instant::now()));
    }

    pub fn was_reset(&self) {
        self.resets.set(self.resets.get() + 1);
    }

    /// Tells of its panics until it has ended.
    pub async fn tell_of_panics(&self) {
        while !self.has_ended() {
            tokio::select! {
                () = self.panics.reported() => self.told_of_panics(),
                _ = self.exit() => return,
            }
            tokio::select! {
                () = tokio::time::sleep(PANICS) => {}
                _ = self.exit() => return,
            }
        }
    }

    fn told_of_panics(&self) {
        if let Some(report) = self.panics.take() {
            tracing::warn!(
                panic = report.panic.name(),
                count = report.count,
                "the guest's kernel has panicked"
            );
            self.events.panicked(report);
        }
    }

    /// Its VPs have stopped, to be reset: subscribers hear of what the guest had to say until now.
    pub fn is_to_be_reset(&self) {
        self.told_of_panics();
        self.panics.was_reset();
    }

    /// How it ended, with all that it has reported itself. Its VPs have stopped.
    pub fn with_its_panics(&self, exit: Exit) -> Exit {
        self.panics.known_at(exit)
    }

    /// The VM is gone.
    pub fn end(&self, exit: Exit) {
        self.live.replace(None);
        self.outputs.close();
        self.ran.set(self.started.take().map(|started| started.elapsed()).unwrap_or_default());
        self.phase.set(Phase::Terminated);
        self.told_of_panics();
        self.events.terminated(exit.clone());
        self.exit.send_replace(Some(exit));
    }

    /// Sends its VPs a non-maskable interrupt.
    pub fn inject_nmi(&self) -> Result<(), Failure> {
        self.started_machine()?.inject_nmi();
        Ok(())
    }

    /// Presses its power button.
    pub fn press_power_button(&self) -> Result<(), Failure> {
        self.started_machine()?.press_power_button();
        self.events.power_button();
        Ok(())
    }

    /// Its machine, while it runs or is paused.
    fn started_machine(&self) -> Result<Arc<MachineView>, Failure> {
        let started = matches!(self.phase.get(), Phase::Running | Phase::Paused);
        let view = self.view().filter(|_| started);
        view.ok_or_else(|| Failure::new(GuestError::NotRunning, "the guest does not run"))
    }

    /// Begins a core dump.
    pub async fn dump(&self) -> Result<CoreDump, Failure> {
        self.machine()?.dump(VP_STATE).await.map_err(|error| {
            let code = match error {
                DumpError::Gone => GuestError::NotRunning,
                DumpError::Vp { .. } | DumpError::Memory(_) => GuestError::InternalError,
            };
            Failure::new(code, chain(&error))
        })
    }

    /// What an observer sees.
    pub async fn state(&self) -> GuestState {
        let vps = match self.view() {
            Some(view) => view.vp_states(VP_STATE).await,
            None => Vec::new(),
        };
        let uptime = self.started.get().map_or(self.ran.get(), |started| started.elapsed());
        GuestState {
            phase: self.phase.get(),
            vps: vps.into_iter().map(shown::vp).collect(),
            units: self.units(),
            uptime_us: shown::micros(uptime),
            resets: self.resets.get(),
        }
    }

    /// Its state units; none without a VM.
    pub fn units(&self) -> Vec<UnitStatus> {
        let units = self.view().map(|view| view.graph()).unwrap_or_default();
        units.iter().map(shown::unit).collect()
    }

    /// The latest passes over its state units; none without a VM.
    pub fn timeline(&self) -> Vec<Transition> {
        let passes = self.view().map(|view| view.timeline()).unwrap_or_default();
        passes.iter().map(shown::transition).collect()
    }

    /// A node of its inspection tree.
    pub async fn inspect(&self, path: &str, depth: u32, view: View) -> Result<Node, Failure> {
        let machine = self.machine()?;
        let depth = usize::try_from(depth.min(MAX_DEPTH)).unwrap_or(usize::MAX);
        let inspection = Inspection::start(path, depth, view, |request| self.answer(&machine, request));
        match inspection.finish(INSPECTION).await {
            Node::NotFound => Err(no_node(path)),
            node => Ok(node),
        }
    }

    /// Gives a node of its inspection tree a new value; answers with its value after that, as text.
    pub async fn update(&self, path: &str, value: &str) -> Result<String, Failure> {
        let machine = self.machine()?;
        if value.len() > MAX_VALUE {
            let detail = format!("value: {} bytes are more than {MAX_VALUE}", value.len());
            return Err(Failure::new(GuestError::LimitExceeded, detail));
        }
        let update = Update::start(path, value, |request| self.answer(&machine, request));
        match update.finish(INSPECTION).await {
            Ok(value) => {
                let value = value.to_string();
                tracing::info!(?path, ?value, "a node was updated");
                Ok(value)
            }
            Err(error) => Err(update_failure(path, &error)),
        }
    }

    /// The tree: the machine's, with the settings beside it.
    fn answer(&self, machine: &MachineView, request: Request<'_>) {
        let mut response = request.respond();
        machine.respond_with(&mut response);
        self.settings.respond_with(&mut response);
    }

    /// Its machine, to look at; none once it has ended.
    pub fn view(&self) -> Option<Arc<MachineView>> {
        self.live.borrow().as_ref().map(|live| live.view.clone())
    }

    /// The same, or the failure of what needs it.
    fn machine(&self) -> Result<Arc<MachineView>, Failure> {
        let ended = || Failure::new(GuestError::NotRunning, "the guest has ended, and its machine with it");
        self.view().ok_or_else(ended)
    }
}

/// A path as far as it is told.
fn shown_path(path: &str) -> String {
    path.chars().take(MAX_SHOWN).collect()
}

fn no_node(path: &str) -> Failure {
    let detail = format!("path: there is no node {:?} in the inspection tree", shown_path(path));
    Failure::new(GuestError::BadConfig, detail)
}

fn update_failure(path: &str, error: &UpdateError) -> Failure {
    let (code, of) = match error {
        UpdateError::NotFound => return no_node(path),
        UpdateError::NotWritable => (GuestError::NotSupported, "path"),
        UpdateError::Unanswered => (GuestError::TransitionTimedOut, "path"),
        UpdateError::NotParseable { .. } | UpdateError::Refused { .. } => (GuestError::BadConfig, "value"),
    };
    Failure::new(code, format!("{of}: {:?}: {error}", shown_path(path)))
}
