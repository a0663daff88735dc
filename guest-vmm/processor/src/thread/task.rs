//! What a VP's thread does: it runs the VP and answers commands, one at a time.

use super::VpError;
use super::executor::Wakeup;
use crate::sync::oneshot;
use crate::{
    CpuIo, DebugState, ErasedVpState, PowerRequest, Processor, StateError, StopVpSource, VpHaltReason,
    VpIndex, VpState, Vtl,
};
use futures::StreamExt;
use futures::channel::mpsc;
use futures::future::{Either, select};
use inspect::Deferred;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

/// What is called with a VP's state, or with why it cannot be had.
pub(super) type AccessState = Box<dyn FnOnce(Result<&mut dyn ErasedVpState, VpError>) + Send>;

/// What is done to a VP's state before it runs.
pub(super) type PrepareState = Box<dyn FnOnce(&mut dyn ErasedVpState) -> Result<(), StateError> + Send>;

/// What is asked of a VP's thread. An answer that nobody waits for any more is dropped.
pub(super) enum Command {
    Start(Option<PrepareState>, oneshot::Sender<Result<(), VpError>>),
    Stop(oneshot::Sender<()>),
    Reset(oneshot::Sender<Result<(), VpError>>),
    Save(oneshot::Sender<Result<VpState, VpError>>),
    Restore(Box<VpState>, oneshot::Sender<Result<(), VpError>>),
    Scrub(Vtl, oneshot::Sender<Result<(), VpError>>),
    Debug(Option<DebugState>, oneshot::Sender<Result<(), VpError>>),
    Access(AccessState),
    Inspect(Deferred),
}

/// How a run of the VP ended: by a reason of its own or because a command came. Both may be.
struct RunEnd {
    reason: VpHaltReason,
    command: Option<NextCommand>,
}

/// A command, or the end of them all.
type NextCommand = Option<Command>;

/// The task of one VP's thread.
pub(super) struct VpTask<P, H> {
    pub(super) vp: VpIndex,
    pub(super) processor: P,
    pub(super) commands: mpsc::UnboundedReceiver<Command>,
    pub(super) io: Arc<dyn CpuIo>,
    pub(super) wakeup: Arc<Wakeup>,
    pub(super) on_halt: H,
    pub(super) running: bool,
}

impl<P: Processor, H: Fn(VpIndex, VpHaltReason)> VpTask<P, H> {
    /// Serves commands, of which one has come, until there can be no more.
    pub(super) async fn serve(mut self, first: Command) {
        self.handle(first);
        while let Some(command) = self.next_command().await {
            self.handle(command);
        }
    }

    /// Runs the VP, if it is to run, until a command comes. It is out of the guest then.
    async fn next_command(&mut self) -> NextCommand {
        while self.running {
            let end = self.run().await;
            if !matches!(end.reason, VpHaltReason::Stop | VpHaltReason::Cancel) {
                self.running = false;
                (self.on_halt)(self.vp, end.reason);
            }
            if let Some(command) = end.command {
                return command;
            }
        }
        self.commands.next().await
    }

    /// Runs the VP until it halts or a command comes.
    async fn run(&mut self) -> RunEnd {
        let (source, mut stop) = StopVpSource::new();
        let io = DeviceCalls { io: &*self.io, wakeup: &self.wakeup };
        let run = unless_woken(&self.wakeup, self.processor.run_vp(&mut stop, &io));
        match select(self.commands.next(), pin!(run)).await {
            Either::Left((command, run)) => {
                source.cancel();
                let Err(reason) = run.await;
                RunEnd { reason, command: Some(command) }
            }
            Either::Right((Err(reason), _)) => RunEnd { reason, command: None },
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Start(prepare, answer) => drop(answer.send(self.start(prepare))),
            Command::Stop(answer) => {
                self.running = false;
                let _ = answer.send(());
            }
            Command::Reset(answer) => drop(answer.send(self.reset())),
            Command::Save(answer) => drop(answer.send(self.save())),
            Command::Restore(state, answer) => drop(answer.send(self.restore(&state))),
            Command::Scrub(vtl, answer) => drop(answer.send(self.scrub(vtl))),
            Command::Debug(state, answer) => drop(answer.send(self.debug(state))),
            Command::Access(access) => self.access(access),
            Command::Inspect(deferred) => deferred.inspect_mut(&mut self.processor),
        }
    }

    fn start(&mut self, prepare: Option<PrepareState>) -> Result<(), VpError> {
        self.refuse_running()?;
        if let Some(prepare) = prepare {
            let vp = self.vp;
            self.flush()?;
            prepare(&mut self.state()?).map_err(|source| VpError::State { vp, source })?;
        }
        self.running = true;
        Ok(())
    }

    fn reset(&mut self) -> Result<(), VpError> {
        self.refuse_running()?;
        self.flush()?;
        self.processor.reset().map_err(|source| self.state_error(source))
    }

    fn save(&mut self) -> Result<VpState, VpError> {
        let vp = self.vp;
        self.refuse_running()?;
        self.flush()?;
        VpState::save(&mut self.state()?).map_err(|source| VpError::States { vp, source })
    }

    /// After a reset: what the VP had begun, and was told, is no part of the state that it is put into.
    fn restore(&mut self, state: &VpState) -> Result<(), VpError> {
        let vp = self.vp;
        self.reset()?;
        state.restore(&mut self.state()?).map_err(|source| VpError::States { vp, source })
    }

    fn scrub(&mut self, vtl: Vtl) -> Result<(), VpError> {
        self.refuse_running()?;
        self.flush()?;
        self.processor.scrub(vtl).map_err(|source| self.state_error(source))
    }

    fn debug(&mut self, state: Option<DebugState>) -> Result<(), VpError> {
        self.flush()?;
        let set = self.processor.set_debug_state(Vtl::Vtl0, state.as_ref());
        set.map_err(|source| self.state_error(source))
    }

    fn access(&mut self, access: AccessState) {
        if let Err(error) = self.flush() {
            return access(Err(error));
        }
        match self.state() {
            Ok(mut state) => access(Ok(&mut state)),
            Err(error) => access(Err(error)),
        }
    }

    /// The VP's state. What the VP has begun has to be complete.
    fn state(&mut self) -> Result<P::StateAccess<'_>, VpError> {
        let vp = self.vp;
        let state = self.processor.access_state(Vtl::Vtl0);
        state.map_err(|source| VpError::State { vp, source: source.into() })
    }

    fn refuse_running(&self) -> Result<(), VpError> {
        if self.running { Err(VpError::Running { vp: self.vp }) } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), VpError> {
        self.processor.flush_async_requests().map_err(|source| self.state_error(source))
    }

    fn state_error(&self, source: impl std::error::Error + Send + Sync + 'static) -> VpError {
        VpError::State { vp: self.vp, source: Box::new(source) }
    }
}

/// Polls the future, which may block in the guest, only while nothing else is waiting for the thread.
async fn unless_woken<F>(wakeup: &Wakeup, run: F) -> F::Output
where
    F: Future<Output = Result<Infallible, VpHaltReason>>,
{
    let mut run = pin!(run);
    poll_fn(|context| if wakeup.is_woken() { Poll::Pending } else { run.as_mut().poll(context) }).await
}

/// The bus, with the executor told of every call, so that a device may wake the VP's task from inside it.
struct DeviceCalls<'a> {
    io: &'a dyn CpuIo,
    wakeup: &'a Wakeup,
}

impl CpuIo for DeviceCalls<'_> {
    fn read_io(&self, vp: VpIndex, port: u16, data: &mut [u8]) {
        self.wakeup.in_device(|| self.io.read_io(vp, port, data));
    }

    fn write_io(&self, vp: VpIndex, port: u16, data: &[u8]) -> ControlFlow<PowerRequest> {
        self.wakeup.in_device(|| self.io.write_io(vp, port, data))
    }

    fn read_mmio(&self, vp: VpIndex, address: u64, data: &mut [u8]) {
        self.wakeup.in_device(|| self.io.read_mmio(vp, address, data));
    }

    fn write_mmio(&self, vp: VpIndex, address: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        self.wakeup.in_device(|| self.io.write_mmio(vp, address, data))
    }

    fn handle_eoi(&self, vector: u8) {
        self.wakeup.in_device(|| self.io.handle_eoi(vector));
    }
}
