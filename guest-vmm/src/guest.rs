//! One guest as its holders see it. It outlives the VM: holders learn how the guest ended.

use crate::serial::SerialLog;
use devices::SerialInput;
use guest_schema::{Exit, GuestState, Phase, UnitStatus, VpState};
use machine::MachineView;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long VPs may take to say what they are doing.
const VP_STATE: Duration = Duration::from_millis(500);

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
        Self {
            log,
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
        if !self.has_ended() {
            self.phase.set(phase);
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
        self.exit.send_replace(Some(exit));
    }

    /// What an observer sees.
    pub async fn state(&self) -> GuestState {
        let view = self.live.borrow().as_ref().map(|live| live.view.clone());
        let (vps, units) = match &view {
            Some(view) => (view.vp_states(VP_STATE).await, view.graph()),
            None => (Vec::new(), Vec::new()),
        };
        let uptime = self.started.get().map_or(self.ran.get(), |started| started.elapsed());
        GuestState {
            phase: self.phase.get(),
            vps: vps.into_iter().map(observed).collect(),
            units: units
                .into_iter()
                .map(|unit| UnitStatus {
                    name: unit.name.to_string(),
                    state: unit.state.to_string(),
                    depends_on: unit.dependencies.iter().map(ToString::to_string).collect(),
                })
                .collect(),
            uptime_us: u64::try_from(uptime.as_micros()).unwrap_or(u64::MAX),
            resets: self.resets.get(),
        }
    }
}

fn observed(state: machine::VpActivity) -> VpState {
    match state {
        machine::VpActivity::Stopped => VpState::Stopped,
        machine::VpActivity::Running => VpState::Running,
        machine::VpActivity::Halted => VpState::Halted,
        machine::VpActivity::WaitForSipi => VpState::WaitForSipi,
        machine::VpActivity::Failed => VpState::Failed,
        machine::VpActivity::Unanswered => VpState::Unanswered,
    }
}
