//! The driver: one task that makes every transition of the guest.
//!
//! RPC methods turn their parameters into one [`Command`] each and await the answer; nothing else touches the VM. What may be
//! done when is decided by [`crate::admission`]; what waits, waits here, in order. At most one operation is under way; it owns
//! the VM and gives it back. Halts of the guest outrank commands.

use crate::admission::{Phase, Refusal, Request, Verdict, admit};
use crate::config::{RequestedGuest, machine_shape};
use crate::guest::{Guest, Milestone};
use crate::log::LogFilter;
use crate::platform::{Host, Platform};
use crate::snapshot::TakenSnapshot;
use crate::vm::{Cancel, Vm, cancelled};
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use guest_schema::{Exit, Failure, GuestError, GuestShape, OnReset, Outcome, UnitConfig, chain};
use processor::{VpHaltReason, VpIndex};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_local;

/// Where an answer goes. Whoever asked may be gone: that cancels nothing.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Failure>>;

/// How many commands may wait, and how many may wait for the guest's end. Their callers may be long gone.
const MAX_WAITING: usize = 256;

/// One request to the driver.
pub(crate) enum Command {
    Create(Box<RequestedGuest>, Reply<()>),
    Bind(Reply<Rc<Guest>>),
    Run(Reply<()>),
    Stop(Reply<()>),
    Pause(Reply<()>),
    Resume(Reply<()>),
    Reset(Reply<()>),
    Snapshot(Reply<TakenSnapshot>),
    AddUnit(Box<UnitConfig>, Reply<()>),
    /// As stop; the driver then ends.
    End(&'static str, Reply<()>),
}

impl Command {
    fn request(&self) -> Request {
        match self {
            Self::Create(..) => Request::Create,
            Self::Bind(_) => Request::Bind,
            Self::Run(_) => Request::Run,
            Self::Stop(_) | Self::End(..) => Request::Stop,
            Self::Pause(_) => Request::Pause,
            Self::Resume(_) => Request::Resume,
            Self::Reset(_) => Request::Reset,
            Self::Snapshot(_) => Request::Snapshot,
            Self::AddUnit(..) => Request::AddUnit,
        }
    }

    fn refuse(self, failure: Failure) {
        let unheard = match self {
            Self::Bind(reply) => reply.send(Err(failure)).is_err(),
            Self::Snapshot(reply) => reply.send(Err(failure)).is_err(),
            Self::Create(_, reply)
            | Self::AddUnit(_, reply)
            | Self::Run(reply)
            | Self::Stop(reply)
            | Self::Pause(reply)
            | Self::Resume(reply)
            | Self::Reset(reply)
            | Self::End(_, reply) => reply.send(Err(failure)).is_err(),
        };
        tracing::trace!(unheard, "refused");
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, Failure>) {
    // Whoever asked may have gone away meanwhile.
    let _ = reply.send(result);
}

/// A command, and the guest that it is for: a capability to a guest that has ended is none to the next one.
struct Asked {
    command: Command,
    of: Option<Rc<Guest>>,
}

/// The driver as the RPC objects see it.
#[derive(Clone)]
pub(crate) struct DriverHandle {
    commands: mpsc::UnboundedSender<Asked>,
    current: Rc<RefCell<Option<Rc<Guest>>>>,
    host: Rc<Host>,
}

impl DriverHandle {
    /// Sends a command at once, whether or not the answer is ever awaited.
    pub fn ask<T, C>(&self, command: C) -> impl Future<Output = Result<T, Failure>> + use<T, C>
    where
        C: FnOnce(Reply<T>) -> Command,
    {
        self.send(None, command)
    }

    /// The same for one guest: once it has ended, a stop is ok and everything else is refused.
    pub fn ask_of<T, C>(
        &self,
        guest: &Rc<Guest>,
        command: C,
    ) -> impl Future<Output = Result<T, Failure>> + use<T, C>
    where
        C: FnOnce(Reply<T>) -> Command,
    {
        self.send(Some(guest.clone()), command)
    }

    fn send<T, C>(
        &self,
        of: Option<Rc<Guest>>,
        command: C,
    ) -> impl Future<Output = Result<T, Failure>> + use<T, C>
    where
        C: FnOnce(Reply<T>) -> Command,
    {
        let (reply, answered) = oneshot::channel();
        // A driver that has ended drops the command, and with it the reply.
        let _ = self.commands.send(Asked { command: command(reply), of });
        async move { answered.await.unwrap_or_else(|_| Err(lease_ended())) }
    }

    /// Makes ahead what the first guest needs, if it is of this shape.
    pub async fn prepare(&self, shape: &GuestShape) -> Result<(), Failure> {
        let prepared = self.host.prepare(machine_shape(shape)).await;
        prepared.map_err(|error| Failure::new(GuestError::GuestInitializationFailure, chain(&error)))
    }

    /// The guest of the last create, whatever has become of it.
    pub fn current(&self) -> Option<Rc<Guest>> {
        self.current.borrow().clone()
    }
}

fn lease_ended() -> Failure {
    Failure::new(GuestError::NotCreated, "the lease has ended")
}

/// How the VM is being ended.
#[derive(Debug, Clone)]
struct Ending {
    exit: Exit,
    /// What run answers.
    run: Result<(), Failure>,
}

impl Ending {
    fn clean(detail: &str) -> Self {
        Self { exit: Exit::clean(detail), run: Ok(()) }
    }

    fn forced(detail: &str) -> Self {
        let run = Err(Failure::new(GuestError::ControllerForcedHalt, detail));
        Self { exit: Exit::forced(detail), run }
    }

    fn crashed(failure: Failure) -> Self {
        Self { exit: Exit::crashed(&failure), run: Err(failure) }
    }
}

/// What an operation came to.
enum Done {
    Created(Result<Vm, Failure>),
    Started(Vm, Result<(), Failure>),
    Paused(Vm, Result<(), Failure>),
    Resumed(Vm, Result<(), Failure>),
    UnitStarted(Vm, Result<(), Failure>),
    Reset { vm: Vm, running: bool, result: Result<(), Failure> },
    Snapshot { vm: Vm, reply: Reply<TakenSnapshot>, result: Result<TakenSnapshot, Failure> },
    Destroyed(Result<(), Failure>),
}

/// Makes every transition of one VMM's guests.
pub(crate) struct Driver {
    host: Rc<Host>,
    log: Option<LogFilter>,
    commands: mpsc::UnboundedReceiver<Asked>,
    current: Rc<RefCell<Option<Rc<Guest>>>>,
    milestones: mpsc::UnboundedSender<Milestone>,
    generation: u64,
    phase: Phase,
    vm: Option<Vm>,
    operation: Option<LocalBoxFuture<'static, Done>>,
    waiting: VecDeque<Asked>,
    /// What cancels the create under way.
    cancel: Cancel,
    cancelled: bool,
    /// Who asked for the operation under way.
    asked: Option<Reply<()>>,
    /// Who waits for the guest's end.
    run: Option<Reply<()>>,
    stops: Vec<Reply<()>>,
    ending: Option<Ending>,
    /// Why there is no VM, if create failed.
    failed_create: Option<Failure>,
    last: Option<&'static str>,
}

impl Driver {
    /// A driver and its handle. What becomes of guests is told as milestones. Their operators may change the log's filter, if
    /// there is one.
    pub fn new(
        platform: Platform,
        log: Option<LogFilter>,
        milestones: mpsc::UnboundedSender<Milestone>,
    ) -> (Self, DriverHandle) {
        let (sender, commands) = mpsc::unbounded_channel();
        let current = Rc::new(RefCell::new(None));
        let host = Rc::new(Host::new(platform));
        let handle = DriverHandle { commands: sender, current: current.clone(), host: host.clone() };
        let driver = Self {
            host,
            log,
            commands,
            current,
            milestones,
            generation: 0,
            phase: Phase::Empty,
            vm: None,
            operation: None,
            waiting: VecDeque::new(),
            cancel: Cancel::default(),
            cancelled: false,
            asked: None,
            run: None,
            stops: Vec::new(),
            ending: None,
            failed_create: None,
            last: None,
        };
        (driver, handle)
    }

    /// Drives until [`Command::End`] has been carried out.
    pub async fn drive(mut self) {
        let host = self.host.clone();
        spawn_local(async move { host.open_ahead().await });
        while !(self.last.is_some() && self.phase == Phase::Empty) {
            tokio::select! {
                biased;
                done = under_way(&mut self.operation) => {
                    self.operation = None;
                    self.finish(done);
                }
                (vp, reason) = next_halt(&mut self.vm), if self.operation.is_none() => self.halted(vp, reason),
                Some(asked) = self.commands.recv() => self.accept(asked),
            }
            self.retry();
            self.show_phase();
        }
    }

    fn show_phase(&self) {
        if let Some(guest) = &*self.current.borrow() {
            guest.set_phase(self.phase.observed());
        }
    }

    fn accept(&mut self, asked: Asked) {
        if let Command::End(detail, _) = &asked.command {
            // Nothing begins any more.
            self.last = Some(detail);
            self.waiting.drain(..).for_each(|waiting| waiting.command.refuse(lease_ended()));
        }
        let Some(command) = self.screen(asked) else { return };
        let verdict = admit(self.phase, command.command.request());
        // What came first goes first. Only a stop overtakes, and then it ends what it overtook.
        match verdict {
            Verdict::Cancel => {
                self.refuse_waiting();
                self.cancel_create(command.command);
            }
            Verdict::Wait => self.wait(command),
            _ if !self.waiting.is_empty() => self.wait(command),
            verdict => self.carry_out(verdict, command.command),
        }
    }

    fn retry(&mut self) {
        while let Some(asked) = self.waiting.pop_front() {
            let Some(asked) = self.screen(asked) else { continue };
            match admit(self.phase, asked.command.request()) {
                Verdict::Wait => {
                    self.waiting.push_front(asked);
                    return;
                }
                // What is still waiting was asked after the stop.
                Verdict::Cancel => self.cancel_create(asked.command),
                verdict => self.carry_out(verdict, asked.command),
            }
        }
    }

    /// Answers a command that is for no guest of now.
    fn screen(&self, asked: Asked) -> Option<Asked> {
        let stops = asked.command.request() == Request::Stop;
        if self.last.is_some() && !stops {
            asked.command.refuse(lease_ended());
            return None;
        }
        if asked.of.as_ref().is_none_or(|guest| !guest.has_ended()) {
            return Some(asked);
        }
        match asked.command {
            Command::Stop(reply) => answer(reply, Ok(())),
            other => other.refuse(Failure::new(GuestError::NotRunning, "the guest has ended")),
        }
        None
    }

    fn wait(&mut self, asked: Asked) {
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push_back(asked);
        } else {
            let detail = format!("{MAX_WAITING} calls wait for this guest already");
            asked.command.refuse(Failure::new(GuestError::LimitExceeded, detail));
        }
    }

    /// Who waits for the guest's end.
    fn join(&mut self, reply: Reply<()>) {
        if self.stops.len() < MAX_WAITING {
            self.stops.push(reply);
        } else {
            let detail = format!("{MAX_WAITING} calls wait for the guest's end already");
            answer(reply, Err(Failure::new(GuestError::LimitExceeded, detail)));
        }
    }

    fn carry_out(&mut self, verdict: Verdict, command: Command) {
        match verdict {
            Verdict::Refuse(refusal) => command.refuse(self.refusal(refusal)),
            Verdict::Act | Verdict::Replace => self.act(command),
            Verdict::Done | Verdict::Join => self.settle(verdict, command),
            Verdict::Wait | Verdict::Cancel => unreachable!("the callers keep what waits, and cancel"),
        }
    }

    fn settle(&mut self, verdict: Verdict, command: Command) {
        match command {
            Command::Stop(reply) | Command::End(_, reply) if verdict == Verdict::Join => {
                self.stops.push(reply)
            }
            Command::Stop(reply) | Command::End(_, reply) | Command::Pause(reply) => answer(reply, Ok(())),
            other => unreachable!("{:?} is never done before it is begun", other.request()),
        }
    }

    fn refusal(&self, refusal: Refusal) -> Failure {
        let failure = Failure::new(refusal.code(), refusal.to_string());
        match (&self.failed_create, refusal) {
            (Some(cause), Refusal::NotCreated) => failure.caused_by(cause.clone()),
            _ => failure,
        }
    }

    fn act(&mut self, command: Command) {
        match command {
            Command::Create(config, reply) => self.create(config, reply),
            Command::Bind(reply) => {
                let guest = self.current.borrow().clone();
                answer(reply, guest.ok_or_else(|| self.refusal(Refusal::NotCreated)));
            }
            Command::Run(reply) => {
                self.run = Some(reply);
                self.change(|vm| async move {
                    let result = vm.start().await;
                    Done::Started(vm, result)
                });
            }
            Command::Stop(reply) => {
                self.join(reply);
                self.end(Ending::forced("stopped by its controller"));
            }
            Command::End(detail, reply) => {
                self.join(reply);
                self.end(Ending::forced(detail));
            }
            Command::Pause(reply) => {
                self.asked = Some(reply);
                self.change(|vm| async move {
                    let result = vm.pause().await;
                    Done::Paused(vm, result)
                });
            }
            Command::Resume(reply) => {
                self.asked = Some(reply);
                self.change(|vm| async move {
                    let result = vm.resume().await;
                    Done::Resumed(vm, result)
                });
            }
            Command::Reset(reply) => {
                self.asked = Some(reply);
                self.reset();
            }
            Command::Snapshot(reply) => {
                self.change(|vm| async move {
                    let result = vm.snapshot().await;
                    Done::Snapshot { vm, reply, result }
                });
            }
            Command::AddUnit(unit, reply) => self.add_unit(*unit, reply),
        }
    }

    /// Where the others run, the new unit is started too.
    fn add_unit(&mut self, unit: UnitConfig, reply: Reply<()>) {
        let vm = self.vm.as_mut().expect("these phases have a VM");
        let added = vm.add_unit(unit);
        if self.phase != Phase::Running || added.is_err() {
            return answer(reply, added);
        }
        self.asked = Some(reply);
        self.change(|mut vm| async move {
            let result = vm.start_added_unit().await;
            Done::UnitStarted(vm, result)
        });
    }

    /// Hands the VM to an operation between running and paused.
    fn change<F: Future<Output = Done> + 'static>(&mut self, operation: impl FnOnce(Vm) -> F) {
        let vm = self.vm.take().expect("these phases have a VM");
        self.phase = Phase::Changing;
        self.operation = Some(operation(vm).boxed_local());
    }

    fn create(&mut self, config: Box<RequestedGuest>, reply: Reply<()>) {
        let former = self.vm.take();
        if let Some(guest) = self.current.take().filter(|_| former.is_some()) {
            self.terminated(&guest, Exit::forced("another create took its place"));
        }
        self.phase = Phase::Creating;
        self.asked = Some(reply);
        self.cancel = Cancel::default();
        let (host, log, cancel) = (self.host.clone(), self.log.clone(), self.cancel.clone());
        let operation = async move {
            if let Some(former) = former {
                former.destroy().await;
            }
            Done::Created(Vm::create(&host, log, *config, &cancel).await)
        };
        self.operation = Some(operation.boxed_local());
    }

    /// Ends the create under way on behalf of a stop.
    fn cancel_create(&mut self, stop: Command) {
        self.cancelled = true;
        self.cancel.cancel();
        if let Command::Stop(reply) | Command::End(_, reply) = stop {
            self.join(reply);
        }
    }

    /// Refuses what waits behind the create that is being cancelled.
    fn refuse_waiting(&mut self) {
        for waiting in std::mem::take(&mut self.waiting) {
            let failure = match waiting.command.request() {
                Request::Create => cancelled(),
                Request::Bind | Request::Run => {
                    Failure::new(GuestError::NotCreated, "no guest was created").caused_by(cancelled())
                }
                _ => Failure::new(GuestError::NotRunning, "the guest does not run"),
            };
            waiting.command.refuse(failure);
        }
    }

    fn reset(&mut self) {
        let running = self.phase == Phase::Running;
        self.change(|mut vm| async move {
            let result = vm.reset(running).await;
            Done::Reset { vm, running, result }
        });
    }

    /// Takes the VM down.
    fn end(&mut self, ending: Ending) {
        self.phase = Phase::Stopping;
        self.ending = Some(ending);
        let vm = self.vm.take();
        self.operation = Some(
            async move {
                match vm {
                    Some(vm) => Done::Destroyed(vm.stop_and_destroy().await),
                    None => Done::Destroyed(Ok(())),
                }
            }
            .boxed_local(),
        );
    }

    fn halted(&mut self, vp: VpIndex, reason: VpHaltReason) {
        match reason {
            VpHaltReason::Stop | VpHaltReason::Cancel => tracing::debug!(%vp, "a VP stopped by itself"),
            VpHaltReason::SingleStep | VpHaltReason::HwBreak(_) => {
                tracing::debug!(%vp, ?reason, "a VP stopped for a debugger that is gone");
            }
            VpHaltReason::PowerOff => self.end(Ending::clean("the guest powered itself off")),
            VpHaltReason::Hibernate => self.end(Ending::clean("the guest hibernated itself")),
            VpHaltReason::DebugExit(value) => self.end(Ending { exit: Exit::debug(value), run: Ok(()) }),
            VpHaltReason::Reset if self.on_reset() == OnReset::Stop => {
                self.end(Ending::clean("the guest reset itself, which ends it"));
            }
            VpHaltReason::Reset => {
                tracing::debug!("the guest reset itself");
                self.reset();
            }
            VpHaltReason::Fault(fault) | VpHaltReason::TripleFault(fault) => {
                let mut detail = fault.to_string();
                if let Some(registers) = &fault.registers {
                    detail = format!("{detail}; {registers}");
                }
                if let Some(note) = &fault.note {
                    detail = format!("{detail} ({note})");
                }
                tracing::error!("{detail}");
                self.end(Ending::crashed(Failure::new(GuestError::VcpuRuntimeFailure, detail)));
            }
        }
    }

    /// What a reset by the guest itself does now.
    fn on_reset(&self) -> OnReset {
        self.vm.as_ref().map_or(OnReset::default(), |vm| vm.guest().on_reset())
    }

    fn finish(&mut self, done: Done) {
        match done {
            Done::Created(result) => self.created(result),
            Done::Started(vm, result) => self.started(vm, result),
            Done::Paused(vm, result) => {
                // A pause that fails has started the guest again, or says that it could not.
                let undone = if vm.is_faulted() { Phase::Faulted } else { Phase::Running };
                self.changed(vm, if result.is_ok() { Phase::Paused } else { undone }, result);
            }
            Done::Resumed(vm, result) => {
                let undone = if vm.is_faulted() { Phase::Faulted } else { Phase::Paused };
                self.changed(vm, if result.is_ok() { Phase::Running } else { undone }, result);
            }
            Done::UnitStarted(vm, result) => {
                let phase = if vm.is_faulted() { Phase::Faulted } else { Phase::Running };
                self.changed(vm, phase, result);
            }
            Done::Reset { vm, running, result } => self.reset_done(vm, running, result),
            Done::Snapshot { vm, reply, result } => {
                let phase = match (vm.is_faulted(), vm.is_running()) {
                    (true, _) => Phase::Faulted,
                    (false, true) => Phase::Running,
                    (false, false) => Phase::Paused,
                };
                self.changed(vm, phase, Ok(()));
                answer(reply, result);
            }
            Done::Destroyed(result) => self.destroyed(&result),
        }
    }

    fn reset_done(&mut self, vm: Vm, running: bool, result: Result<(), Failure>) {
        match result {
            Ok(()) => {
                vm.guest_was_reset();
                self.changed(vm, if running { Phase::Running } else { Phase::Paused }, Ok(()));
            }
            // An operator hears of it and decides; the guest itself has nobody but those who wait for its end.
            Err(failure) if self.asked.is_some() => self.changed(vm, Phase::Faulted, Err(failure)),
            Err(failure) => {
                self.vm = Some(vm);
                self.end(Ending::crashed(failure));
            }
        }
    }

    fn changed(&mut self, vm: Vm, phase: Phase, result: Result<(), Failure>) {
        self.vm = Some(vm);
        self.phase = phase;
        if let Err(failure) = &result {
            tracing::error!(failure = failure.chain(), "a transition failed");
        }
        if let Some(reply) = self.asked.take() {
            answer(reply, result);
        }
    }

    fn created(&mut self, result: Result<Vm, Failure>) {
        let reply = self.asked.take();
        let result = match result {
            Ok(vm) if !std::mem::take(&mut self.cancelled) => {
                self.phase = Phase::Created;
                self.failed_create = None;
                self.generation += 1;
                let (guest, shape) = (vm.guest().clone(), vm.shape().cloned());
                self.current.replace(Some(guest));
                self.vm = Some(vm);
                self.tell(Milestone::Created { generation: self.generation, shape });
                Ok(())
            }
            Ok(vm) => {
                self.vm = Some(vm);
                self.end(Ending::forced("stopped before it was created"));
                Err(cancelled())
            }
            Err(failure) => {
                self.cancelled = false;
                self.phase = Phase::Empty;
                self.stops.drain(..).for_each(|stop| answer(stop, Ok(())));
                Err(failure)
            }
        };
        if let Err(failure) = &result {
            tracing::debug!(failure = failure.chain(), "create failed");
            self.failed_create = Some(failure.clone());
        }
        if let Some(reply) = reply {
            answer(reply, result);
        }
    }

    fn started(&mut self, vm: Vm, result: Result<(), Failure>) {
        self.vm = Some(vm);
        match result {
            Ok(()) => self.phase = Phase::Running,
            Err(failure) => self.end(Ending::crashed(failure)),
        }
    }

    fn destroyed(&mut self, result: &Result<(), Failure>) {
        self.phase = Phase::Empty;
        let ending = self.ending.take().unwrap_or_else(|| Ending::forced("stopped"));
        let guest = self.current.borrow().clone().filter(|guest| !guest.has_ended());
        if let Some(guest) = guest {
            self.terminated(&guest, ending.exit);
        }
        if let Some(reply) = self.run.take() {
            answer(reply, ending.run);
        }
        self.stops.drain(..).for_each(|stop| answer(stop, result.clone()));
    }

    fn terminated(&self, guest: &Guest, exit: Exit) {
        let exit = guest.with_its_panics(exit);
        match exit.outcome {
            Outcome::Crashed => tracing::error!(detail = exit.detail, "the guest crashed"),
            Outcome::Clean | Outcome::Forced => tracing::info!(detail = exit.detail, "the guest has ended"),
        }
        guest.end(exit.clone());
        self.tell(Milestone::Terminated { generation: self.generation, exit });
    }

    fn tell(&self, milestone: Milestone) {
        // Nobody listens where the VMM runs without a service.
        let _ = self.milestones.send(milestone);
    }
}

async fn under_way(operation: &mut Option<LocalBoxFuture<'static, Done>>) -> Done {
    match operation {
        Some(operation) => operation.await,
        None => std::future::pending().await,
    }
}

async fn next_halt(vm: &mut Option<Vm>) -> (VpIndex, VpHaltReason) {
    match vm {
        Some(vm) => vm.halted().await,
        None => std::future::pending().await,
    }
}
