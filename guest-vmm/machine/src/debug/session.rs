//! One debugger at a time, served by a task of its own, so that a caller who goes away leaves nothing half done.

use super::memory::{self, MemoryAccessError, Space};
use crate::memory::GuestMemory;
use crate::vp_set::{Halt, VpSet};
use futures::future::join_all;
use inspect::{Inspect, Request};
use processor::{
    AccessKind, DebugCapabilities, DebugState, HardwareBreakpoint, Registers, SystemRegisters, VpError,
    VpHaltReason, VpIndex, VpThread,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// The most bytes of memory that one call reads or writes.
pub const MAX_ACCESS_BYTES: usize = 64 << 10;

/// How many stops may wait to be heard, beside those of one stop of all VPs.
const UNHEARD: usize = 64;

/// How many bits of a linear address there are at most; the others are all alike.
const LINEAR_BITS: u32 = 57;

/// Why a debugger's wish is not fulfilled. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum DebugError {
    /// There is one.
    #[error("the guest has a debugger already")]
    Taken,
    /// The machine is gone, or its VP's thread.
    #[error("the guest has ended")]
    Ended,
    /// There is no such VP.
    #[error("there is no VP {vp}: the guest has {count}")]
    NoVp {
        /// Which was asked for.
        vp: VpIndex,
        /// How many there are.
        count: usize,
    },
    /// A VP is named twice.
    #[error("VP {vp} is named twice")]
    Twice {
        /// Which.
        vp: VpIndex,
    },
    /// The VP has to be held for this, and is not.
    #[error("VP {vp} is not stopped")]
    Running {
        /// Which.
        vp: VpIndex,
    },
    /// More bytes than one call may have.
    #[error("{bytes} bytes are more than the {MAX_ACCESS_BYTES} of one call")]
    TooLong {
        /// How many were asked for.
        bytes: u64,
    },
    /// Memory cannot be read or written.
    #[error(transparent)]
    Memory(#[from] MemoryAccessError),
    /// More breakpoints than the hypervisor has.
    #[error("{count} breakpoints are more than the {available} that there are")]
    TooManyBreakpoints {
        /// How many were asked for.
        count: usize,
        /// How many there are.
        available: usize,
    },
    /// The architecture has no such breakpoint.
    #[error("there is no breakpoint for {0}")]
    NoSuchBreakpoint(HardwareBreakpoint),
    /// The hypervisor cannot do it.
    #[error("the hypervisor has no {0}")]
    NotSupported(&'static str),
    /// Nobody listens to where VPs have stopped.
    #[error("stops that were not listened to wait for the debugger")]
    Unheard,
    /// A VP's state could not be read or written.
    #[error(transparent)]
    Vp(VpError),
}

impl From<VpError> for DebugError {
    fn from(error: VpError) -> Self {
        match error {
            VpError::Gone(_) => Self::Ended,
            error => Self::Vp(error),
        }
    }
}

/// Counts how often a debugger has let VPs go on, from 0.
pub type Resumption = u64;

/// A VP stopped for the debugger. All VPs are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugHalt {
    /// Which VP.
    pub vp: VpIndex,
    /// Why.
    pub reason: DebugHaltReason,
    /// After which resumption.
    pub resumption: Resumption,
}

/// Why a VP stopped for the debugger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugHaltReason {
    /// It has made the step.
    Step,
    /// It has hit this breakpoint.
    Breakpoint(HardwareBreakpoint),
}

/// A VP as its debugger sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebuggedVp {
    /// Whether the debugger holds it.
    pub held: bool,
}

/// Where the VPs' threads find the debugger, if there is one.
pub(crate) struct DebugPort {
    /// Held by a session until it has let go of everything.
    place: Arc<Semaphore>,
    /// Of each VP, whether the debugger keeps it out of the guest.
    held: Vec<AtomicBool>,
    halts: Mutex<Option<mpsc::UnboundedSender<Halt>>>,
}

impl DebugPort {
    pub fn new(vps: usize) -> Self {
        Self {
            place: Arc::new(Semaphore::new(1)),
            held: (0..vps).map(|_| AtomicBool::new(false)).collect(),
            halts: Mutex::new(None),
        }
    }

    pub fn holds(&self, vp: VpIndex) -> bool {
        self.held[vp.0 as usize].load(Ordering::Acquire)
    }

    fn set_held(&self, vp: VpIndex, held: bool) {
        self.held[vp.0 as usize].store(held, Ordering::Release);
    }

    /// Takes a halt that is for the debugger; gives back any other. Called on the VP's thread.
    pub fn take(&self, vp: VpIndex, reason: VpHaltReason) -> Option<VpHaltReason> {
        if !matches!(reason, VpHaltReason::SingleStep | VpHaltReason::HwBreak(_)) {
            return Some(reason);
        }
        let halts = self.halts();
        let Some(sender) = &*halts else { return Some(reason) };
        self.set_held(vp, true);
        sender.send((vp, reason)).err().map(|unsent| unsent.0.1)
    }

    /// A panic of another thread leaves it whole: it is only set and taken.
    fn halts(&self) -> MutexGuard<'_, Option<mpsc::UnboundedSender<Halt>>> {
        self.halts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether there is a debugger, and which VPs it holds.
impl Inspect for DebugPort {
    fn inspect(&self, request: Request<'_>) {
        let held = (0..).zip(&self.held).filter(|(_, held)| held.load(Ordering::Acquire));
        let held: Vec<String> = held.map(|(vp, _): (u32, _)| vp.to_string()).collect();
        let mut response = request.respond();
        response.field("attached", &self.halts().is_some());
        response.field("held_vps", held.join(", ").as_str());
    }
}

/// What there is to debug. Does not keep the machine.
pub(crate) struct Target {
    pub vps: Arc<VpSet>,
    pub memory: Weak<GuestMemory>,
    pub capabilities: DebugCapabilities,
}

type Answer<T> = oneshot::Sender<Result<T, DebugError>>;

enum Command {
    Vps(Answer<Vec<DebuggedVp>>),
    Stop(Answer<()>),
    Resume { run: Vec<VpIndex>, step: Vec<VpIndex>, answer: Answer<Resumption> },
    SetBreakpoints(Vec<HardwareBreakpoint>, Answer<()>),
    Registers(VpIndex, Answer<(Registers, SystemRegisters)>),
    SetRegisters(VpIndex, Box<(Registers, SystemRegisters)>, Answer<()>),
    Read { vp: Option<VpIndex>, address: u64, bytes: usize, answer: Answer<ReadMemory> },
    Write { vp: Option<VpIndex>, address: u64, bytes: Vec<u8>, answer: Answer<()> },
}

/// What was read, up to the first address that cannot be, and why it cannot.
type ReadMemory = (Vec<u8>, Option<MemoryAccessError>);

/// A guest, debugged. Dropping it ends that: breakpoints are removed, and VPs that it holds go on.
///
/// Calls take effect in the order in which they were first polled, and also if they are dropped then.
pub struct Debugger {
    commands: mpsc::UnboundedSender<Command>,
    target: Arc<Target>,
}

impl Debugger {
    /// Begins to debug. VPs go on until they are stopped. Where they stop by themselves is sent to the receiver.
    ///
    /// # Errors
    /// [`DebugError::Taken`], if there is another and it has not let go within this time.
    pub(crate) async fn attach(
        target: Arc<Target>,
        within: Duration,
    ) -> Result<(Self, mpsc::Receiver<DebugHalt>), DebugError> {
        let port = &target.vps.debug;
        let place = tokio::time::timeout(within, port.place.clone().acquire_owned()).await;
        let place = place.map_err(|_| DebugError::Taken)?.expect("never closed");
        let (commands, asked) = mpsc::unbounded_channel();
        let debugger = Self { commands, target: target.clone() };
        let (sender, halts) = mpsc::unbounded_channel();
        *port.halts() = Some(sender);
        let vps = target.vps.count();
        let (told, stops) = mpsc::channel(2 * vps + UNHEARD);
        let session = Session {
            target,
            asked,
            halts,
            told,
            breakpoints: Vec::new(),
            vps: vec![Vp { going: Going::Runs, at: None }; vps],
            resumption: 0,
            _place: place,
        };
        tokio::spawn(session.serve());
        Ok((debugger, stops))
    }

    /// What the hypervisor can do for a debugger.
    pub fn capabilities(&self) -> DebugCapabilities {
        self.target.capabilities
    }

    async fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, DebugError> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).map_err(|_| DebugError::Ended)?;
        answered.await.map_err(|_| DebugError::Ended)?
    }

    /// The VPs, in order.
    pub async fn vps(&self) -> Result<Vec<DebuggedVp>, DebugError> {
        self.ask(Command::Vps).await
    }

    /// Holds all VPs: when this resolves, none is in the guest.
    pub async fn stop(&self) -> Result<(), DebugError> {
        self.ask(Command::Stop).await
    }

    /// Lets held VPs go on, for good or for one instruction; others stay held. While the machine is paused they do so when it goes
    /// on. A VP that stopped at a breakpoint executes the instruction there first.
    pub async fn resume(&self, run: Vec<VpIndex>, step: Vec<VpIndex>) -> Result<Resumption, DebugError> {
        self.ask(|answer| Command::Resume { run, step, answer }).await
    }

    /// Replaces the breakpoints, which are those of all VPs.
    pub async fn set_breakpoints(&self, breakpoints: Vec<HardwareBreakpoint>) -> Result<(), DebugError> {
        self.ask(|answer| Command::SetBreakpoints(breakpoints, answer)).await
    }

    /// The registers of a VP. One that runs leaves the guest for a moment.
    pub async fn registers(&self, vp: VpIndex) -> Result<(Registers, SystemRegisters), DebugError> {
        self.ask(|answer| Command::Registers(vp, answer)).await
    }

    /// Sets the registers of a held VP; the system registers only if they differ from what they are.
    pub async fn set_registers(
        &self,
        vp: VpIndex,
        registers: Registers,
        system: SystemRegisters,
    ) -> Result<(), DebugError> {
        self.ask(|answer| Command::SetRegisters(vp, Box::new((registers, system)), answer)).await
    }

    /// Reads memory at a linear address of a VP, or without one at a guest physical address, up to the first address that cannot be
    /// read, with why.
    pub async fn read(
        &self,
        vp: Option<VpIndex>,
        address: u64,
        bytes: u64,
    ) -> Result<ReadMemory, DebugError> {
        let fits = usize::try_from(bytes).ok().filter(|bytes| *bytes <= MAX_ACCESS_BYTES);
        let bytes = fits.ok_or(DebugError::TooLong { bytes })?;
        self.ask(|answer| Command::Read { vp, address, bytes, answer }).await
    }

    /// Writes memory as [`Self::read`] reads it: all of it or, after an error, nothing.
    pub async fn write(&self, vp: Option<VpIndex>, address: u64, bytes: Vec<u8>) -> Result<(), DebugError> {
        if bytes.len() > MAX_ACCESS_BYTES {
            return Err(DebugError::TooLong { bytes: bytes.len() as u64 });
        }
        self.ask(|answer| Command::Write { vp, address, bytes, answer }).await
    }
}

/// What a VP is to do, as far as the debugger is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Going {
    /// Nothing.
    Held,
    /// Run.
    Runs,
    /// Make a step.
    Steps,
    /// Execute the instruction at the breakpoint where it stopped, and run.
    StepsOver,
}

#[derive(Debug, Clone, Copy)]
struct Vp {
    going: Going,
    /// The breakpoint at which it has stopped, as was told.
    at: Option<u64>,
}

impl Vp {
    /// What its processor has to stop for.
    fn debug_state(&self, breakpoints: &[HardwareBreakpoint]) -> DebugState {
        let single_step = matches!(self.going, Going::Steps | Going::StepsOver);
        // The instruction at which it has stopped is to be executed now.
        let passed = |b: &HardwareBreakpoint| {
            single_step && b.access == AccessKind::Execute && Some(b.address) == self.at
        };
        let mut wanted = breakpoints.iter().filter(|breakpoint| !passed(breakpoint)).copied();
        DebugState { single_step, breakpoints: std::array::from_fn(|_| wanted.next()) }
    }
}

/// The debugger's own task.
struct Session {
    target: Arc<Target>,
    asked: mpsc::UnboundedReceiver<Command>,
    halts: mpsc::UnboundedReceiver<Halt>,
    told: mpsc::Sender<DebugHalt>,
    breakpoints: Vec<HardwareBreakpoint>,
    vps: Vec<Vp>,
    resumption: Resumption,
    _place: OwnedSemaphorePermit,
}

fn answer<T>(to: Answer<T>, answer: Result<T, DebugError>) {
    // Whoever asked may have gone away meanwhile.
    let _ = to.send(answer);
}

impl Session {
    async fn serve(mut self) {
        loop {
            tokio::select! {
                biased;
                Some((vp, reason)) = self.halts.recv() => self.halted(vp, reason).await,
                command = self.asked.recv() => match command {
                    Some(command) => self.handle(command).await,
                    None => break,
                },
            }
        }
        self.let_go().await;
    }

    async fn handle(&mut self, command: Command) {
        match command {
            Command::Vps(to) => {
                let held = self.vps.iter().map(|vp| DebuggedVp { held: vp.going == Going::Held });
                answer(to, Ok(held.collect()));
            }
            Command::Stop(to) => {
                let stopped = self.stop_all().await;
                answer(to, stopped);
            }
            Command::Resume { run, step, answer: to } => answer(to, self.resume(&run, &step).await),
            Command::SetBreakpoints(breakpoints, to) => {
                answer(to, self.set_breakpoints(breakpoints).await);
            }
            Command::Registers(vp, to) => answer(to, self.registers(vp).await),
            Command::SetRegisters(vp, registers, to) => {
                answer(to, self.set_registers(vp, *registers).await);
            }
            Command::Read { vp, address, bytes, answer: to } => {
                answer(to, self.read(vp, address, bytes).await);
            }
            Command::Write { vp, address, bytes, answer: to } => {
                answer(to, self.write(vp, address, &bytes).await);
            }
        }
    }

    fn check(&self, vp: VpIndex) -> Result<(), DebugError> {
        let count = self.vps.len();
        if (vp.0 as usize) < count { Ok(()) } else { Err(DebugError::NoVp { vp, count }) }
    }

    fn vp(&mut self, vp: VpIndex) -> &mut Vp {
        &mut self.vps[vp.0 as usize]
    }

    /// A VP has stopped by itself: all do.
    async fn halted(&mut self, vp: VpIndex, reason: VpHaltReason) {
        let stepped_over =
            matches!(reason, VpHaltReason::SingleStep) && self.vp(vp).going == Going::StepsOver;
        if stepped_over {
            *self.vp(vp) = Vp { going: Going::Runs, at: None };
            match self.go_on(&[vp]).await {
                Ok(()) => return,
                // The guest's end is told elsewhere.
                Err(error) => {
                    self.vp(vp).going = Going::Held;
                    return tracing::debug!(%vp, %error, "a VP cannot go on after a breakpoint");
                }
            }
        }
        self.stopped(vp, &reason);
        if let Err(error) = self.stop_all().await {
            tracing::debug!(%error, "not all VPs could be stopped");
        }
    }

    /// Tells of a VP that has stopped.
    fn stopped(&mut self, vp: VpIndex, reason: &VpHaltReason) {
        let (reason, at) = match *reason {
            VpHaltReason::HwBreak(breakpoint) => {
                let before = breakpoint.access == AccessKind::Execute;
                (DebugHaltReason::Breakpoint(breakpoint), before.then_some(breakpoint.address))
            }
            _ => (DebugHaltReason::Step, None),
        };
        *self.vp(vp) = Vp { going: Going::Held, at };
        let halt = DebugHalt { vp, reason, resumption: self.resumption };
        // There is room, or the VPs would not have been let go on; and whoever listens may be gone.
        let _ = self.told.try_send(halt);
    }

    /// Holds all VPs.
    async fn stop_all(&mut self) -> Result<(), DebugError> {
        let vps = &self.target.vps;
        let moving = vps.moving.lock().await;
        let threads = vps.threads.read().await;
        for thread in threads.iter() {
            vps.debug.set_held(thread.vp(), true);
        }
        let ended = threads.is_empty();
        join_all(threads.iter().map(VpThread::stop)).await;
        drop((threads, moving));
        while let Ok((vp, reason)) = self.halts.try_recv() {
            self.stopped_too(vp, &reason);
        }
        self.vps.iter_mut().for_each(|vp| vp.going = Going::Held);
        if ended { Err(DebugError::Ended) } else { Ok(()) }
    }

    /// A VP that has stopped by itself while all were being stopped. An instruction at a breakpoint has not been executed: that is
    /// hit again, and told then.
    fn stopped_too(&mut self, vp: VpIndex, reason: &VpHaltReason) {
        match (reason, self.vp(vp).going) {
            (VpHaltReason::HwBreak(breakpoint), _) if breakpoint.access == AccessKind::Execute => {
                self.vp(vp).at = None;
            }
            (VpHaltReason::SingleStep, Going::StepsOver) => self.vp(vp).at = None,
            _ => self.stopped(vp, reason),
        }
    }

    async fn resume(&mut self, run: &[VpIndex], step: &[VpIndex]) -> Result<Resumption, DebugError> {
        let all: Vec<VpIndex> = run.iter().chain(step).copied().collect();
        self.check_resumption(&all)?;
        if !step.is_empty() && !self.target.capabilities.single_step {
            return Err(DebugError::NotSupported("single steps"));
        }
        let before = self.vps.clone();
        for &vp in &all {
            let steps = step.contains(&vp);
            let stands = match self.vp(vp).at {
                Some(at) => self.stands_at(vp, at).await?,
                None => false,
            };
            self.vp(vp).going = match (steps, stands) {
                (true, _) => Going::Steps,
                (false, true) => Going::StepsOver,
                (false, false) => Going::Runs,
            };
            if !stands {
                self.vp(vp).at = None;
            }
        }
        self.resumption += 1;
        if let Err(error) = self.go_on(&all).await {
            self.vps = before;
            self.resumption -= 1;
            let _ = self.stop_all().await;
            return Err(error);
        }
        Ok(self.resumption)
    }

    fn check_resumption(&self, vps: &[VpIndex]) -> Result<(), DebugError> {
        if self.told.capacity() < self.vps.len() {
            return Err(DebugError::Unheard);
        }
        let mut named = vec![false; self.vps.len()];
        for &vp in vps {
            self.check(vp)?;
            if std::mem::replace(&mut named[vp.0 as usize], true) {
                return Err(DebugError::Twice { vp });
            }
            if self.vps[vp.0 as usize].going != Going::Held {
                return Err(DebugError::Running { vp });
            }
        }
        Ok(())
    }

    /// Whether the VP still stands at a breakpoint that is still there.
    async fn stands_at(&self, vp: VpIndex, at: u64) -> Result<bool, DebugError> {
        let there = |b: &HardwareBreakpoint| b.access == AccessKind::Execute && b.address == at;
        Ok(self.breakpoints.iter().any(there) && self.registers(vp).await?.0.rip == at)
    }

    /// Lets VPs go on, each as it is to, as soon as the machine does.
    async fn go_on(&self, vps: &[VpIndex]) -> Result<(), DebugError> {
        let set = &self.target.vps;
        let _moving = set.moving.lock().await;
        let threads = set.threads.read().await;
        let threads: Vec<&VpThread> = threads.iter().filter(|thread| vps.contains(&thread.vp())).collect();
        if threads.len() < vps.len() {
            return Err(DebugError::Ended);
        }
        for thread in &threads {
            let state = self.vps[thread.vp().0 as usize].debug_state(&self.breakpoints);
            thread.set_debug_state(Some(state)).await?;
        }
        for thread in threads {
            set.debug.set_held(thread.vp(), false);
            set.start_released(thread).await?;
        }
        Ok(())
    }

    async fn set_breakpoints(&mut self, breakpoints: Vec<HardwareBreakpoint>) -> Result<(), DebugError> {
        self.check_breakpoints(&breakpoints)?;
        let threads = self.target.vps.threads.read().await;
        if threads.is_empty() {
            return Err(DebugError::Ended);
        }
        let set = |to: &[HardwareBreakpoint]| {
            let states: Vec<DebugState> = self.vps.iter().map(|vp| vp.debug_state(to)).collect();
            let set = threads.iter().zip(states);
            join_all(set.map(|(thread, state)| thread.set_debug_state(Some(state))))
        };
        let done: Result<(), VpError> = set(&breakpoints).await.into_iter().collect();
        if done.is_err() {
            // They were taken before, and what fails now is a VP that is gone.
            let _ = set(&self.breakpoints).await;
        }
        done?;
        drop(threads);
        self.breakpoints = breakpoints;
        Ok(())
    }

    fn check_breakpoints(&self, breakpoints: &[HardwareBreakpoint]) -> Result<(), DebugError> {
        let DebugCapabilities { breakpoints: available, watchpoints, .. } = self.target.capabilities;
        let available = available.min(DebugState::default().breakpoints.len());
        if breakpoints.len() > available {
            return Err(DebugError::TooManyBreakpoints { count: breakpoints.len(), available });
        }
        for breakpoint in breakpoints {
            if !breakpoint.is_valid() || !is_linear(breakpoint.address) {
                return Err(DebugError::NoSuchBreakpoint(*breakpoint));
            }
            if breakpoint.access != AccessKind::Execute && !watchpoints {
                return Err(DebugError::NotSupported("watchpoints"));
            }
        }
        Ok(())
    }

    async fn registers(&self, vp: VpIndex) -> Result<(Registers, SystemRegisters), DebugError> {
        self.check(vp)?;
        let threads = self.target.vps.threads.read().await;
        let thread = threads.get(vp.0 as usize).ok_or(DebugError::Ended)?;
        let read = thread.access(|state| Ok((state.registers()?, state.system_registers()?))).await?;
        read.map_err(|source| DebugError::Vp(VpError::State { vp, source }))
    }

    async fn set_registers(
        &self,
        vp: VpIndex,
        (registers, system): (Registers, SystemRegisters),
    ) -> Result<(), DebugError> {
        self.check(vp)?;
        if self.vps[vp.0 as usize].going != Going::Held {
            return Err(DebugError::Running { vp });
        }
        let threads = self.target.vps.threads.read().await;
        let thread = threads.get(vp.0 as usize).ok_or(DebugError::Ended)?;
        let set = thread.access(move |state| {
            if state.system_registers()? != system {
                state.set_system_registers(&system)?;
            }
            state.set_registers(&registers)
        });
        set.await?.map_err(|source| DebugError::Vp(VpError::State { vp, source }))
    }

    async fn read(&self, vp: Option<VpIndex>, address: u64, bytes: usize) -> Result<ReadMemory, DebugError> {
        let system = self.space_of(vp).await?;
        let guest = self.target.memory.upgrade().ok_or(DebugError::Ended)?;
        Ok(memory::read(guest.view(), space(system.as_ref()), address, bytes))
    }

    async fn write(&self, vp: Option<VpIndex>, address: u64, bytes: &[u8]) -> Result<(), DebugError> {
        let system = self.space_of(vp).await?;
        let guest = self.target.memory.upgrade().ok_or(DebugError::Ended)?;
        Ok(memory::write(guest.view(), space(system.as_ref()), address, bytes)?)
    }

    async fn space_of(&self, vp: Option<VpIndex>) -> Result<Option<SystemRegisters>, DebugError> {
        match vp {
            Some(vp) => Ok(Some(self.registers(vp).await?.1)),
            None => Ok(None),
        }
    }

    /// Removes the breakpoints and lets all VPs go on.
    async fn let_go(mut self) {
        let set = &self.target.vps;
        let moving = set.moving.lock().await;
        let threads = set.threads.read().await;
        // Whatever a VP has stopped for by then was told before it answers.
        let cleared = join_all(threads.iter().map(|thread| thread.set_debug_state(None))).await;
        *set.debug.halts() = None;
        self.halts.close();
        for thread in threads.iter() {
            set.debug.set_held(thread.vp(), false);
            if let Err(error) = set.start_released(thread).await {
                tracing::error!(vp = %thread.vp(), %error, "a VP does not go on after its debugger");
            }
        }
        drop((threads, moving));
        cleared.into_iter().filter_map(Result::err).for_each(|error| {
            tracing::debug!(%error, "a VP keeps what its debugger has set");
        });
    }
}

fn space(system: Option<&SystemRegisters>) -> Space<'_> {
    system.map_or(Space::Physical, Space::Linear)
}

/// Whether the address is one in the widest mode.
fn is_linear(address: u64) -> bool {
    let unused = 64 - LINEAR_BITS;
    (address.cast_signed() << unused >> unused).cast_unsigned() == address
}
