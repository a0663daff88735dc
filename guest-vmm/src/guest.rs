//! One guest as its holders see it. It outlives the VM: holders learn how the guest ended.

use crate::events::EventLog;
use crate::serial::SerialLog;
use crate::shown;
use devices::SerialInput;
use guest_schema::{Exit, Failure, GuestError, GuestState, Phase, Transition, UnitStatus};
use inspect::{Node, View};
use machine::MachineView;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long VPs may take to say what they are doing.
const VP_STATE: Duration = Duration::from_millis(500);

/// How long the parts of an inspection tree may take to show themselves.
const INSPECTION: Duration = Duration::from_millis(500);

/// How many levels of an inspection tree may be asked for.
const MAX_DEPTH: u32 = 32;

/// How much of a path that leads nowhere is told, in characters.
const MAX_SHOWN: usize = 200;

/// What becomes of the guests of a VMM, for whoever watches it.
#[derive(Debug, Clone)]
pub(crate) enum Milestone {
    /// The generation-th guest was created.
    Created { generation: u64 },
    /// It has ended.
    Terminated { generation: u64, exit: Exit },
}

/// A guest.
pub(crate) struct Guest {
    log: Arc<SerialLog>,
    events: Rc<EventLog>,
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
}

impl Guest {
    pub fn new(log: Arc<SerialLog>, input: SerialInput, view: Arc<MachineView>) -> Self {
        let events = Rc::new(EventLog::default());
        events.phase(Phase::Created);
        Self {
            log,
            events,
            live: RefCell::new(Some(Live { input, view })),
            exit: watch::Sender::new(None),
            phase: Cell::new(Phase::Created),
            started: Cell::new(None),
            ran: Cell::new(Duration::ZERO),
            resets: Cell::new(0),
        }
    }

    /// Everything that the serial port has sent, as far as it is kept.
    pub fn log(&self) -> &Arc<SerialLog> {
        &self.log
    }

    /// What became of it.
    pub fn events(&self) -> &Rc<EventLog> {
        &self.events
    }

    /// The serial port's input, while there is one.
    pub fn input(&self) -> Option<SerialInput> {
        self.live.borrow().as_ref().map(|live| live.input.clone())
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

    /// The VM is gone.
    pub fn end(&self, exit: Exit) {
        self.live.replace(None);
        self.log.close();
        self.ran.set(self.started.take().map(|started| started.elapsed()).unwrap_or_default());
        self.phase.set(Phase::Terminated);
        self.events.terminated(exit.clone());
        self.exit.send_replace(Some(exit));
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
        let machine = self.view().ok_or_else(|| {
            Failure::new(GuestError::NotRunning, "the guest has ended, and its machine with it")
        })?;
        let depth = usize::try_from(depth.min(MAX_DEPTH)).unwrap_or(usize::MAX);
        match machine.inspect(path, depth, view).finish(INSPECTION).await {
            Node::NotFound => {
                let shown: String = path.chars().take(MAX_SHOWN).collect();
                let detail = format!("path: there is no node {shown:?} in the inspection tree");
                Err(Failure::new(GuestError::BadConfig, detail))
            }
            node => Ok(node),
        }
    }

    /// Its machine, to look at; none once it has ended.
    pub fn view(&self) -> Option<Arc<MachineView>> {
        self.live.borrow().as_ref().map(|live| live.view.clone())
    }
}
