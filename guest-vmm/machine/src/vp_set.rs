//! The VPs of a machine: started, stopped, reset, saved and restored together, and asked what they do.

use crate::debug::DebugPort;
use crate::loader::InitialVpState;
use crate::prepared::VpBindings;
use futures::future::{FutureExt, join_all, try_join_all};
use guest_saved_state::processor::vp::VpSetState;
use processor::{
    CpuIo, ErasedVpState, MpState, SpawnVpError, StateError, VpError, VpHaltReason, VpIndex, VpState,
    VpThread,
};
use save_restore::{RestoreError, SaveError};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, RwLock, mpsc};

/// What a VP is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VpActivity {
    /// The VMM keeps it out of the guest.
    Stopped,
    /// The debugger keeps it out of the guest.
    Debugged,
    /// It runs.
    Running,
    /// It waits in HLT for an interrupt, for ever if it has masked them.
    Halted,
    /// It waits to be started by the guest.
    WaitForSipi,
    /// It cannot go on.
    Failed,
    /// It did not say in time.
    Unanswered,
}

impl fmt::Display for VpActivity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Debugged => "debugged",
            Self::Running => "running",
            Self::Halted => "halted",
            Self::WaitForSipi => "waiting for SIPI",
            Self::Failed => "failed",
            Self::Unanswered => "unanswered",
        })
    }
}

/// A VP that halted by itself, and why.
pub type Halt = (VpIndex, VpHaltReason);

/// The VPs, each on its own thread.
pub struct VpSet {
    /// Empty once the machine is destroyed.
    pub(crate) threads: RwLock<Vec<VpThread>>,
    halted: Arc<Vec<AtomicU8>>,
    /// What a debugger holds, and where it hears of halts.
    pub(crate) debug: Arc<DebugPort>,
    /// Locked, before `threads`, while VPs are started or stopped: each runs only if the set does and no debugger holds it.
    pub(crate) moving: AsyncMutex<()>,
    running: AtomicBool,
    /// What VP 0 starts with, until it has started.
    initial: Mutex<Option<InitialVpState>>,
}

const NOT_HALTED: u8 = 0;
const HALTED: u8 = 1;
const FAILED: u8 = 2;

impl VpSet {
    /// Makes VPs a machine's, once they are bound. Halts are sent in the order in which they happen. VP 0 starts with `initial`, or else
    /// as the VPs are restored.
    ///
    /// # Errors
    /// If one cannot be bound; all threads have ended then.
    pub(crate) async fn serve(
        bindings: VpBindings,
        io: Arc<dyn CpuIo>,
        halts: mpsc::UnboundedSender<Halt>,
        initial: Option<InitialVpState>,
    ) -> Result<Self, SpawnVpError> {
        let halted: Arc<Vec<AtomicU8>> =
            Arc::new((0..bindings.count()).map(|_| AtomicU8::new(NOT_HALTED)).collect());
        let debug = Arc::new(DebugPort::new(halted.len()));
        let threads = bindings.take().into_iter().map(|binding| {
            let (halted, halts, debug) = (halted.clone(), halts.clone(), debug.clone());
            binding.serve(io.clone(), move |vp, reason| {
                let Some(reason) = debug.take(vp, reason) else { return };
                let failed = matches!(reason, VpHaltReason::Fault(_) | VpHaltReason::TripleFault(_));
                let mark = if failed { FAILED } else { HALTED };
                halted[vp.0 as usize].store(mark, Ordering::Release);
                // The driver may have taken the machine down meanwhile.
                let _ = halts.send((vp, reason));
            })
        });
        let threads = join_all(threads).await;
        let (mut bound, mut failure) = (Vec::new(), None);
        for thread in threads {
            match thread {
                Ok(thread) => bound.push(thread),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        match failure {
            None => Ok(Self {
                threads: RwLock::new(bound),
                halted,
                debug,
                moving: AsyncMutex::new(()),
                running: AtomicBool::new(false),
                initial: Mutex::new(initial),
            }),
            Some(error) => {
                join_all(bound.into_iter().map(VpThread::shutdown)).await;
                Err(error)
            }
        }
    }

    /// Lets all VPs run; VP 0 from the boot loader's state if the guest starts anew. If one cannot, none does. One that a debugger
    /// holds runs when that lets it.
    pub async fn start(&self) -> Result<(), VpError> {
        let _moving = self.moving.lock().await;
        let threads = self.threads.read().await;
        self.halted.iter().for_each(|mark| mark.store(NOT_HALTED, Ordering::Release));
        let initial = self.initial().take();
        let states = std::iter::once(initial).chain(std::iter::repeat(None));
        let starts = threads.iter().zip(states).map(|(vp, initial)| match self.debug.holds(vp.vp()) {
            true => prepare_vp(vp, initial).left_future(),
            false => start_vp(vp, initial).right_future(),
        });
        let started = join_all(starts).await;
        if let (Some(state), Some(Err(_))) = (initial, started.first()) {
            self.start_with(state);
        }
        if let Err(error) = started.into_iter().collect::<Result<(), VpError>>() {
            // A VP whose thread is gone runs no more: there is nothing to stop there.
            join_all(threads.iter().map(VpThread::stop)).await;
            return Err(error);
        }
        self.running.store(true, Ordering::Release);
        Ok(())
    }

    /// Stops all VPs: when this resolves, none is in the guest. A VP whose thread is gone counts as stopped.
    pub async fn stop(&self) {
        let _moving = self.moving.lock().await;
        let threads = self.threads.read().await;
        join_all(threads.iter().map(VpThread::stop)).await;
        self.running.store(false, Ordering::Release);
    }

    /// Lets a VP run that a debugger no longer holds, if the set does and the VP can.
    pub(crate) async fn start_released(&self, vp: &VpThread) -> Result<(), VpError> {
        if self.known_activity(vp.vp()).is_some() {
            return Ok(());
        }
        match vp.start().await {
            Err(VpError::Running { .. }) => Ok(()),
            started => started,
        }
    }

    /// Puts all VPs into the state in which they were created.
    pub async fn reset(&self) -> Result<(), VpError> {
        let threads = self.threads.read().await;
        try_join_all(threads.iter().map(VpThread::reset)).await.map(drop)
    }

    /// The state of all VPs, each read on its own thread. Refused while they run.
    ///
    /// A guest that is yet to start is saved with what VP 0 is to start with: where it goes on, there is nothing to load.
    pub async fn save(&self) -> Result<VpSetState, SaveError> {
        self.refuse_running().map_err(SaveError::not_supported)?;
        let threads = self.threads.read().await;
        let mut states = try_join_all(threads.iter().map(VpThread::save)).await?;
        let initial = *self.initial();
        if let (Some(first), Some(InitialVpState { registers, system_registers })) =
            (states.first_mut(), initial)
        {
            (first.registers, first.system_registers) = (Some(registers), Some(system_registers));
        }
        Ok(VpSetState { vps: states.iter().map(Into::into).collect() })
    }

    /// Puts all VPs into a saved state, each on its own thread, so that the next start lets the guest go on from there. Refused
    /// while they run. The whole state is checked before any VP is touched; what a VP refuses has changed it.
    pub async fn restore(&self, state: VpSetState) -> Result<(), RestoreError> {
        self.refuse_running().map_err(RestoreError::not_supported)?;
        let VpSetState { vps } = state;
        if vps.len() != self.count() {
            let counts = format!("{} VPs where the machine has {}", vps.len(), self.count());
            return Err(RestoreError::invalid("vps", counts));
        }
        let states = (0u32..)
            .zip(vps)
            .map(|(vp, state)| VpState::try_from(state).map_err(|error| error.in_child(format!("VP {vp}"))));
        let states = states.collect::<Result<Vec<_>, RestoreError>>()?;
        let threads = self.threads.read().await;
        let restored = join_all(threads.iter().zip(states).map(|(vp, state)| vp.restore(state))).await;
        restored.into_iter().collect::<Result<(), VpError>>()?;
        *self.initial() = None;
        self.halted.iter().for_each(|mark| mark.store(NOT_HALTED, Ordering::Release));
        Ok(())
    }

    /// A VP that has halted by itself is stopped, and yet no state of it goes together with that of those that run on.
    fn refuse_running(&self) -> Result<(), &'static str> {
        if self.is_running() { Err("the VPs are running") } else { Ok(()) }
    }

    /// What VP 0 is to start with.
    pub fn start_with(&self, state: InitialVpState) {
        *self.initial() = Some(state);
    }

    /// A panic of another thread leaves it whole: it is only replaced.
    fn initial(&self) -> MutexGuard<'_, Option<InitialVpState>> {
        self.initial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each VP is doing. A VP that runs leaves the guest for a moment to say so.
    pub async fn activities(&self, within: Duration) -> Vec<VpActivity> {
        let threads = self.threads.read().await;
        let activities = threads.iter().map(|thread| async move {
            match self.known_activity(thread.vp()) {
                Some(known) => known,
                None => match ask(thread, within, |state| state.mp_state().into()).await {
                    Some(answer) => answer.unwrap_or(VpActivity::Failed),
                    None => VpActivity::Unanswered,
                },
            }
        });
        join_all(activities).await
    }

    /// Asks each VP's state, on its thread. `None` in place of what one that does not answer in time would have said.
    pub(crate) async fn collect<T: Send + 'static>(
        &self,
        within: Duration,
        question: impl Fn(&mut dyn ErasedVpState) -> T + Clone + Send + 'static,
    ) -> Vec<Result<T, Option<String>>> {
        let threads = self.threads.read().await;
        let answers = threads.iter().map(|thread| async {
            let answer = ask(thread, within, question.clone()).await;
            answer.ok_or(None)?.map_err(|error| Some(error.to_string()))
        });
        join_all(answers).await
    }

    /// What a VP is doing, as far as that is known without asking it.
    pub(crate) fn known_activity(&self, vp: VpIndex) -> Option<VpActivity> {
        match self.halted[vp.0 as usize].load(Ordering::Acquire) {
            FAILED => Some(VpActivity::Failed),
            HALTED => Some(VpActivity::Stopped),
            _ if !self.is_running() => Some(VpActivity::Stopped),
            _ if self.debug.holds(vp) => Some(VpActivity::Debugged),
            _ => None,
        }
    }

    /// Whether the VPs were started, and not stopped since.
    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// How many VPs there are.
    pub(crate) fn count(&self) -> usize {
        self.halted.len()
    }

    /// Ends all VPs and waits for their threads.
    pub async fn shutdown(&self) {
        let threads = std::mem::take(&mut *self.threads.write().await);
        join_all(threads.into_iter().map(VpThread::shutdown)).await;
    }
}

/// Asks a VP's state, on its thread. `None` if it does not answer in time.
async fn ask<T: Send + 'static>(
    thread: &VpThread,
    within: Duration,
    question: impl FnOnce(&mut dyn ErasedVpState) -> T + Send + 'static,
) -> Option<Result<T, VpError>> {
    tokio::time::timeout(within, thread.access(question)).await.ok()
}

/// What a VP that was started says of itself.
impl From<Result<MpState, StateError>> for VpActivity {
    fn from(said: Result<MpState, StateError>) -> Self {
        match said {
            Ok(MpState::Runnable) => Self::Running,
            Ok(MpState::Halted) => Self::Halted,
            Ok(MpState::WaitForSipi) => Self::WaitForSipi,
            Err(_) => Self::Failed,
        }
    }
}

async fn start_vp(vp: &VpThread, initial: Option<InitialVpState>) -> Result<(), VpError> {
    let Some(state) = initial else { return vp.start().await };
    vp.start_from(move |access| set_initial(access, &state)).await
}

/// Gives a VP the state that it starts with, and leaves it stopped.
async fn prepare_vp(vp: &VpThread, initial: Option<InitialVpState>) -> Result<(), VpError> {
    let Some(state) = initial else { return Ok(()) };
    let set = vp.access(move |access| set_initial(access, &state)).await?;
    set.map_err(|source| VpError::State { vp: vp.vp(), source })
}

fn set_initial(access: &mut dyn ErasedVpState, state: &InitialVpState) -> Result<(), StateError> {
    access.set_system_registers(&state.system_registers)?;
    access.set_registers(&state.registers)
}
