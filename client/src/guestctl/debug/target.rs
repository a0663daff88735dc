//! The guest as gdbstub sees it: on a thread of its own, where each call waits for the answer of the guest's debugger.

use super::breakpoints::{Breakpoints, Kind};
use super::registers::{AllRegisters, RegisterNumber, X86_64};
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as GdbBreakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint,
    HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use guest_client::{
    AddressSpace, Call, ClientError, DebugHalt, DebuggedVps, Debugger, Exit, GuestError, HaltReason, Outcome,
    VpRegisters,
};
use std::collections::BTreeMap;
use std::sync::mpsc::sync_channel;
use tokio::sync::mpsc;

/// The most that is read or written at once.
const MAX_ACCESS: usize = 64 << 10;

/// What is to be done with the debugger, where it lives.
pub type Wish = Box<dyn FnOnce(&Debugger) -> Promised + Send>;

/// The rest of a wish.
pub type Promised = futures::future::LocalBoxFuture<'static, ()>;

/// Linux's numbers, which gdb knows.
const EIO: u8 = 5;
const EFAULT: u8 = 14;
const EINVAL: u8 = 22;

/// The guest, behind a channel.
pub struct GuestTarget {
    wishes: mpsc::UnboundedSender<Wish>,
    vps: u32,
    slots: usize,
    breakpoints: Breakpoints,
    /// What single VPs are to do; the others run, unless they are locked.
    steps: BTreeMap<u32, bool>,
    locked: bool,
    resumption: u64,
}

/// What a VP is called in gdb.
fn thread_of(vp: u32) -> Tid {
    let number = usize::try_from(vp).unwrap_or(usize::MAX).saturating_add(1);
    Tid::new(number).expect("one at least")
}

/// The VP with this name. gdb may invent some: there is no such VP then.
fn vp_of(thread: Tid) -> u32 {
    u32::try_from(thread.get() - 1).unwrap_or(u32::MAX)
}

/// A refusal of this one request.
fn refused<T>(error: &ClientError, errno: u8) -> Result<T, TargetError<ClientError>> {
    match error.failure() {
        Some(_) => Err(TargetError::Errno(errno)),
        None => Err(TargetError::Fatal(error.clone())),
    }
}

impl GuestTarget {
    /// A guest whose VPs are all held.
    pub fn new(wishes: mpsc::UnboundedSender<Wish>, vps: &DebuggedVps) -> Self {
        Self {
            wishes,
            vps: u32::try_from(vps.held.len()).unwrap_or(u32::MAX),
            slots: usize::try_from(vps.breakpoints).unwrap_or(usize::MAX),
            breakpoints: Breakpoints::default(),
            steps: BTreeMap::new(),
            locked: false,
            resumption: 0,
        }
    }

    fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Debugger) -> Call<T> + Send + 'static,
    ) -> Result<T, ClientError> {
        let (answer, answered) = sync_channel(1);
        let wish: Wish = Box::new(move |debugger| {
            let call = call(debugger);
            // Whoever asked waits for it; if it does not, the session is over.
            Box::pin(async move { _ = answer.send(call.await) })
        });
        let over = || ClientError::Lost("the session is over".into());
        self.wishes.send(wish).map_err(|_| over())?;
        answered.recv().map_err(|_| over())?
    }

    /// Holds all VPs, as gdb's Ctrl-C wants it.
    pub fn interrupt(&self) -> Result<MultiThreadStopReason<u64>, ClientError> {
        match self.ask(|debugger| debugger.stop()) {
            // That it has ended comes by itself.
            Err(ClientError::Refused(_)) | Ok(()) => {}
            Err(error) => return Err(error),
        }
        Ok(MultiThreadStopReason::SignalWithThread { tid: thread_of(0), signal: Signal::SIGINT })
    }

    /// What gdb is told of a halt; nothing of one that came before the guest last went on.
    pub fn stop_reason(&self, halt: &DebugHalt) -> Option<MultiThreadStopReason<u64>> {
        let (tid, reason) = match halt {
            DebugHalt::Terminated(exit) => return Some(exited(exit)),
            DebugHalt::Vp { index, resumption, reason } if *resumption == self.resumption => {
                (thread_of(*index), reason)
            }
            DebugHalt::Vp { .. } => return None,
        };
        let trap = MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP };
        let HaltReason::Breakpoint(hit) = reason else { return Some(trap) };
        Some(match self.breakpoints.kind_of(hit) {
            Some(Kind::Software) => MultiThreadStopReason::SwBreak(tid),
            Some(Kind::Hardware) => MultiThreadStopReason::HwBreak(tid),
            Some(Kind::Watch(kind)) => MultiThreadStopReason::Watch { tid, kind, addr: hit.address },
            None => trap,
        })
    }

    /// Sets gdb's breakpoints to these; false if they cannot be.
    fn set_breakpoints(&mut self, wanted: Option<Breakpoints>) -> TargetResult<bool, Self> {
        let Some(wanted) = wanted else { return Ok(false) };
        let hardware = wanted.hardware();
        if hardware.len() > self.slots {
            return Ok(false);
        }
        match self.ask(move |debugger| debugger.set_breakpoints(&hardware)) {
            Ok(()) => {
                self.breakpoints = wanted;
                Ok(true)
            }
            Err(error) => refused(&error, EINVAL),
        }
    }

    fn registers_of(&self, thread: Tid) -> Result<VpRegisters, TargetError<ClientError>> {
        let vp = vp_of(thread);
        self.ask(move |debugger| debugger.registers(vp)).or_else(|error| refused(&error, EIO))
    }

    fn set_registers_of(&self, thread: Tid, registers: VpRegisters) -> TargetResult<(), Self> {
        let vp = vp_of(thread);
        let set = self.ask(move |debugger| debugger.set_registers(vp, &registers));
        set.or_else(|error| refused(&error, EINVAL))
    }
}

/// The guest's end, as that of a process.
fn exited(exit: &Exit) -> MultiThreadStopReason<u64> {
    match exit.outcome {
        Outcome::Clean => MultiThreadStopReason::Exited(0),
        Outcome::Forced => MultiThreadStopReason::Terminated(Signal::SIGKILL),
        Outcome::Crashed => MultiThreadStopReason::Terminated(Signal::SIGABRT),
    }
}

impl Target for GuestTarget {
    type Arch = X86_64;
    type Error = ClientError;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, ClientError> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for GuestTarget {
    fn read_registers(&mut self, registers: &mut AllRegisters, thread: Tid) -> TargetResult<(), Self> {
        registers.0 = self.registers_of(thread)?;
        Ok(())
    }

    fn write_registers(&mut self, registers: &AllRegisters, thread: Tid) -> TargetResult<(), Self> {
        let mut changed = self.registers_of(thread)?;
        if !registers.write_into(&mut changed) {
            return Err(TargetError::Errno(EINVAL));
        }
        self.set_registers_of(thread, changed)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    /// Up to the first address that cannot be read.
    fn read_addrs(&mut self, address: u64, data: &mut [u8], thread: Tid) -> TargetResult<usize, Self> {
        let space = AddressSpace::Linear(vp_of(thread));
        let length = u32::try_from(data.len().min(MAX_ACCESS)).expect("no more than 64 KiB");
        let read = self.ask(move |debugger| debugger.read_memory(space, address, length));
        let read = read.or_else(|error| refused(&error, EFAULT))?;
        if read.bytes.is_empty() && !data.is_empty() {
            return Err(TargetError::Errno(EFAULT));
        }
        data[..read.bytes.len()].copy_from_slice(&read.bytes);
        Ok(read.bytes.len())
    }

    fn write_addrs(&mut self, address: u64, data: &[u8], thread: Tid) -> TargetResult<(), Self> {
        let (space, bytes) = (AddressSpace::Linear(vp_of(thread)), data.to_vec());
        let written = self.ask(move |debugger| debugger.write_memory(space, address, &bytes));
        written.or_else(|error| refused(&error, EFAULT))
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), ClientError> {
        (0..self.vps).map(thread_of).for_each(active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for GuestTarget {
    fn read_register(
        &mut self,
        thread: Tid,
        register: RegisterNumber,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        // gdb takes an error for an unavailable register.
        let bytes = register.read(&self.registers_of(thread)?).ok_or(TargetError::NonFatal)?;
        let place = buffer.get_mut(..bytes.len()).ok_or(TargetError::NonFatal)?;
        place.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_register(
        &mut self,
        thread: Tid,
        register: RegisterNumber,
        value: &[u8],
    ) -> TargetResult<(), Self> {
        let mut registers = self.registers_of(thread)?;
        if !register.write(&mut registers, value) {
            return Err(TargetError::Errno(EINVAL));
        }
        self.set_registers_of(thread, registers)
    }
}

/// Signals that gdb sends along mean nothing to a guest.
impl MultiThreadResume for GuestTarget {
    fn resume(&mut self) -> Result<(), ClientError> {
        let stepping = |vp: &u32| self.steps.get(vp) == Some(&true);
        let step: Vec<u32> = (0..self.vps).filter(stepping).collect();
        let runs = |vp: &u32| self.steps.get(vp).map_or(!self.locked, |step| !step);
        let run: Vec<u32> = (0..self.vps).filter(runs).collect();
        match self.ask(move |debugger| debugger.resume(&run, &step)) {
            Ok(resumption) => self.resumption = resumption,
            // It has ended, which comes by itself.
            Err(ClientError::Refused(failure)) if failure.code == GuestError::NotRunning => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), ClientError> {
        self.steps.clear();
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, thread: Tid, _: Option<Signal>) -> Result<(), ClientError> {
        self.steps.insert(vp_of(thread), false);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for GuestTarget {
    fn set_resume_action_step(&mut self, thread: Tid, _: Option<Signal>) -> Result<(), ClientError> {
        self.steps.insert(vp_of(thread), true);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for GuestTarget {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), ClientError> {
        self.locked = true;
        Ok(())
    }
}

impl GdbBreakpoints for GuestTarget {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for GuestTarget {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.set_breakpoints(self.breakpoints.with(Kind::Software, address, 1))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.set_breakpoints(self.breakpoints.without(Kind::Software, address, 1))
    }
}

impl HwBreakpoint for GuestTarget {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.set_breakpoints(self.breakpoints.with(Kind::Hardware, address, 1))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.set_breakpoints(self.breakpoints.without(Kind::Hardware, address, 1))
    }
}

impl HwWatchpoint for GuestTarget {
    fn add_hw_watchpoint(&mut self, address: u64, length: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.set_breakpoints(self.breakpoints.with(Kind::Watch(kind), address, length))
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        length: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        self.set_breakpoints(self.breakpoints.without(Kind::Watch(kind), address, length))
    }
}
