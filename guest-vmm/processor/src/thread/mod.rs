//! The thread that one VP is bound to.
//!
//! [`VpThread`] binds a VP on a thread of its own and runs it there. Starting, stopping, resetting and looking at the VP are
//! messages to that thread, answered in the order in which they were first polled; a VP in the guest leaves it for them. A VP can be
//! bound before anybody knows what it is for: [`VpBinding`].
//! `executor` says why no wake-up is lost, `task` what the thread does, `slice` why nobody waits for a guest that computes.
//!
//! Limits: the state is reached with closures that run on the VP's thread, which should not block. A panic there, in the
//! processor or in a device that the VP calls, ends the thread and no more than it: see [`VpThread::spawn`].

mod executor;
mod host_cpus;
#[cfg(test)]
mod model;
mod slice;
mod task;

pub use host_cpus::HostCpus;

use crate::sync::oneshot;
use crate::sync::thread::{Builder, JoinHandle};
use crate::{
    BindProcessor, CpuIo, DebugState, ErasedVpState, Partition, PartitionError, StateAccessError, StateError,
    VpFault, VpHaltReason, VpIndex, VpState, VpStateKind, Vtl,
};
use executor::{Wakeup, block_on};
use futures::StreamExt;
use futures::channel::mpsc;
use inspect::Deferred;
use rustix::thread::{Pid, gettid};
use std::any::Any;
use std::convert::Infallible;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use task::{Command, VpTask};

/// A VP whose thread has ended: it panicked, or the VP is being shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the thread of VP {vp} is gone")]
pub struct VpGone {
    /// The VP.
    pub vp: VpIndex,
}

/// What a VP's thread answers when it cannot do as asked.
#[derive(Debug, thiserror::Error)]
pub enum VpError {
    /// The thread has ended.
    #[error(transparent)]
    Gone(#[from] VpGone),
    /// The VP has to be stopped for this, and runs.
    #[error("VP {vp} is running")]
    Running {
        /// The VP.
        vp: VpIndex,
    },
    /// The VP's state could not be read or written.
    #[error("the state of VP {vp} could not be reached")]
    State {
        /// The VP.
        vp: VpIndex,
        /// What the hypervisor said.
        #[source]
        source: StateError,
    },
    /// The VP could not be saved or restored.
    #[error("VP {vp} could not be saved or restored")]
    States {
        /// The VP.
        vp: VpIndex,
        /// Which of its states, and why.
        #[source]
        source: StateAccessError<VpStateKind>,
    },
}

/// Why a VP has no thread.
#[derive(Debug, thiserror::Error)]
pub enum SpawnVpError {
    /// The system gave no thread.
    #[error("no thread for VP {vp}")]
    Thread {
        /// The VP.
        vp: VpIndex,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The thread may not run on the CPUs that the VP was given.
    #[error("the thread of VP {vp} cannot be kept on the host's CPUs {cpus}")]
    Affinity {
        /// The VP.
        vp: VpIndex,
        /// The CPUs.
        cpus: HostCpus,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The VP could not be bound to its thread.
    #[error("VP {vp} could not be bound to its thread")]
    Bind {
        /// The VP.
        vp: VpIndex,
        /// What the hypervisor said.
        #[source]
        source: PartitionError,
    },
    /// Binding the VP panicked.
    #[error("binding VP {vp} panicked: {message}")]
    Panicked {
        /// The VP.
        vp: VpIndex,
        /// What the panic said.
        message: String,
    },
}

/// What a VP that runs calls.
struct VpService {
    io: Arc<dyn CpuIo>,
    on_halt: Box<dyn Fn(VpIndex, VpHaltReason) + Send>,
}

/// A VP on a thread of its own, bound or about to be, that is no machine's yet.
///
/// Dropping it asks the thread to end and does not wait; [`VpBinding::end`] does.
pub struct VpBinding {
    vp: VpIndex,
    /// The thread's number, once it is known that the VP is bound.
    id: Option<Pid>,
    bound: oneshot::Receiver<Result<Pid, SpawnVpError>>,
    /// Found by the thread when the first command comes, so that it is not woken for this alone. `futures`' own also in models: what
    /// it carries happens before that command.
    service: futures::channel::oneshot::Sender<VpService>,
    commands: mpsc::UnboundedSender<Command>,
    ended: oneshot::Receiver<Infallible>,
    thread: JoinHandle<()>,
}

impl VpBinding {
    /// Starts a thread that binds the VP.
    ///
    /// The thread is kept on the CPUs of `affinity` from before the VP is bound; `None` lets it run wherever the calling thread may.
    ///
    /// # Errors
    /// [`SpawnVpError::Thread`]; whatever else fails is learnt from [`VpBinding::bound`].
    pub fn spawn<B: BindProcessor>(
        vp: VpIndex,
        affinity: Option<HostCpus>,
        binder: B,
        partition: Arc<dyn Partition>,
    ) -> Result<Self, SpawnVpError> {
        let (commands, receiver) = mpsc::unbounded();
        let (bound, is_bound) = oneshot::channel();
        let (service, served) = futures::channel::oneshot::channel();
        let (ending, ended) = oneshot::channel();
        let body = move || {
            // Dropped last, whatever happens: the thread has nothing left to do then.
            let _ending: oneshot::Sender<Infallible> = ending;
            run_thread(vp, NewVp { affinity, binder, partition, commands: receiver, service: served }, bound);
        };
        let thread = Builder::new()
            .name(format!("vp-{vp}"))
            .spawn(body)
            .map_err(|source| SpawnVpError::Thread { vp, source })?;
        Ok(Self { vp, id: None, bound: is_bound, service, commands, ended, thread })
    }

    /// Resolves once the VP is bound.
    ///
    /// # Errors
    /// If it cannot be; nothing is left but the thread's way out.
    pub async fn bound(&mut self) -> Result<(), SpawnVpError> {
        if self.id.is_none() {
            let bound = (&mut self.bound).await;
            let bound = bound.expect("the thread answers before it drops its end, and binding cannot unwind");
            self.id = Some(bound?);
        }
        Ok(())
    }

    /// Makes it a machine's VP, once it is bound: see [`VpThread::spawn`].
    pub async fn serve(
        mut self,
        io: Arc<dyn CpuIo>,
        on_halt: impl Fn(VpIndex, VpHaltReason) + Send + 'static,
    ) -> Result<VpThread, SpawnVpError> {
        self.bound().await?;
        let Self { vp, id, bound: _, service, commands, ended, thread } = self;
        // A thread that has ended is noticed by the first who asks it for something.
        let _ = service.send(VpService { io, on_halt: Box::new(on_halt) });
        Ok(VpThread { vp, id: id.expect("it is bound"), commands, ended, thread })
    }

    /// Ends the thread and waits until it has. Blocks for as long as binding takes, if that is under way.
    pub fn end(self) {
        let Self { commands, service, thread, .. } = self;
        drop((commands, service));
        // A panic while binding was reported to whoever asked.
        let _ = thread.join();
    }
}

/// The thread of one VP, named `vp-N`.
///
/// Dropping it asks the thread to end and does not wait; [`VpThread::shutdown`] waits. The thread drops the processor
/// before it ends. A partition should be dropped only after all its VPs were shut down, or it may be closed by a VP's thread.
///
/// The futures of its methods are `Send` and may be polled by any executor. One that is dropped after its first poll leaves
/// its command in force.
pub struct VpThread {
    vp: VpIndex,
    id: Pid,
    commands: mpsc::UnboundedSender<Command>,
    ended: oneshot::Receiver<Infallible>,
    thread: JoinHandle<()>,
}

impl VpThread {
    /// Starts a thread and binds the VP there; the VP does not run yet. Resolves when it is bound or could not be.
    ///
    /// The thread is kept on the CPUs of `affinity` from before the VP is bound; `None` lets it run wherever the calling thread may.
    ///
    /// `on_halt` is called on the VP's thread whenever the VP halts by itself (power-off, reset, breakpoint, fault), once for
    /// each time it was started, and never for a stop. The VP then waits to be started again.
    ///
    /// A panic on the VP's thread ends it. `on_halt` is then called with a [`VpHaltReason::Fault`] that has the panic's
    /// message in it, and every call that waits for the thread, or comes later, answers [`VpGone`].
    pub async fn spawn<B: BindProcessor>(
        vp: VpIndex,
        affinity: Option<HostCpus>,
        binder: B,
        partition: Arc<dyn Partition>,
        io: Arc<dyn CpuIo>,
        on_halt: impl Fn(VpIndex, VpHaltReason) + Send + 'static,
    ) -> Result<Self, SpawnVpError> {
        VpBinding::spawn(vp, affinity, binder, partition)?.serve(io, on_halt).await
    }

    /// The VP's number.
    pub fn vp(&self) -> VpIndex {
        self.vp
    }

    /// The host's CPUs on which the thread may run now, whoever has decided that.
    ///
    /// # Errors
    /// The thread has ended, or the host has more CPUs than a set can hold.
    pub fn affinity(&self) -> io::Result<HostCpus> {
        // Another thread of the system may have its number then.
        if self.commands.is_closed() {
            return Err(io::Error::other(VpGone { vp: self.vp }));
        }
        HostCpus::of_thread(Some(self.id))
    }

    /// Lets the VP run. It is an error if it does already.
    pub async fn start(&self) -> Result<(), VpError> {
        self.ask(|answer| Command::Start(None, answer)).await?
    }

    /// Calls `prepare` with the stopped VP's state, on the VP's thread, and lets the VP run unless that fails. One message where
    /// [`VpThread::access`] and [`VpThread::start`] are two, each with its way there and back.
    pub async fn start_from<F>(&self, prepare: F) -> Result<(), VpError>
    where
        F: FnOnce(&mut dyn ErasedVpState) -> Result<(), StateError> + Send + 'static,
    {
        self.ask(|answer| Command::Start(Some(Box::new(prepare)), answer)).await?
    }

    /// Stops the VP. When this resolves it has left the guest and stays out, even if it had halted by itself or was never
    /// started. A halt that came first has been reported by then.
    pub async fn stop(&self) -> Result<(), VpGone> {
        self.ask(Command::Stop).await
    }

    /// Puts the stopped VP into the state in which its partition created it. [`Partition::reset`] comes first.
    pub async fn reset(&self) -> Result<(), VpError> {
        self.ask(Command::Reset).await?
    }

    /// The state of the stopped VP, everything that it had begun being complete.
    pub async fn save(&self) -> Result<VpState, VpError> {
        self.ask(Command::Save).await?
    }

    /// Puts the stopped VP into a saved state; what is not in it is as the partition created it. [`Partition::reset`] comes first.
    ///
    /// A state that the hypervisor lacks is refused. After an error the VP's state is unspecified.
    pub async fn restore(&self, state: VpState) -> Result<(), VpError> {
        self.ask(|answer| Command::Restore(Box::new(state), answer)).await?
    }

    /// Scrubs the stopped VP: see [`crate::Processor::scrub`]. [`Partition::scrub`] comes first.
    pub async fn scrub(&self, vtl: Vtl) -> Result<(), VpError> {
        self.ask(|answer| Command::Scrub(vtl, answer)).await?
    }

    /// Sets what the VP halts for on a debugger's behalf, from its next entry into the guest on; `None` ends debugging. A VP that
    /// runs leaves the guest for it and goes on.
    pub async fn set_debug_state(&self, state: Option<DebugState>) -> Result<(), VpError> {
        self.ask(|answer| Command::Debug(state, answer)).await?
    }

    /// Lets the processor answer what it shows of itself, on the VP's thread. A VP that runs leaves the guest for it and goes on. If
    /// the thread has ended, the question stays unanswered.
    pub fn inspect(&self, deferred: Deferred) {
        // Dropped with the command, a question counts as unanswered.
        let _ = self.commands.unbounded_send(Command::Inspect(deferred));
    }

    /// Calls `access` with the VP's state, on the VP's thread, everything that the VP had begun being complete.
    ///
    /// A VP that runs is stopped for it and goes on afterwards, of which `on_halt` learns nothing.
    pub async fn access<R, F>(&self, access: F) -> Result<R, VpError>
    where
        R: Send + 'static,
        F: FnOnce(&mut dyn ErasedVpState) -> R + Send + 'static,
    {
        self.ask(|answer| {
            Command::Access(Box::new(move |state| {
                let _ = answer.send(state.map(access));
            }))
        })
        .await?
    }

    /// Ends the thread, wherever the VP is, and resolves when it has ended and its processor is no more.
    pub async fn shutdown(self) {
        let Self { vp: _, id: _, commands, ended, thread } = self;
        drop(commands);
        let _ = ended.await;
        // Nothing is left on that thread but its way out of the system. A panic of it was reported to `on_halt`.
        let _ = thread.join();
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, VpGone> {
        let gone = VpGone { vp: self.vp };
        let (answer, answered) = oneshot::channel();
        self.commands.unbounded_send(command(answer)).map_err(|_| gone)?;
        answered.await.map_err(|_| gone)
    }
}

/// What a thread makes its VP of.
struct NewVp<B> {
    affinity: Option<HostCpus>,
    binder: B,
    partition: Arc<dyn Partition>,
    commands: mpsc::UnboundedReceiver<Command>,
    service: futures::channel::oneshot::Receiver<VpService>,
}

/// The whole of a VP's thread.
fn run_thread<B: BindProcessor>(
    vp: VpIndex,
    new: NewVp<B>,
    bound: oneshot::Sender<Result<Pid, SpawnVpError>>,
) {
    let NewVp { affinity, binder, partition, mut commands, mut service } = new;
    if let Err(error) = slice::lengthen_this_threads() {
        tracing::debug!(%vp, %error, "the VP's thread has a slice like any other");
    }
    let processor = match keep_on(vp, affinity).and_then(|()| bind(vp, binder)) {
        Ok(processor) => processor,
        Err(error) => return drop(bound.send(Err(error))),
    };
    let wakeup = Wakeup::new(vp, partition);
    if bound.send(Ok(gettid())).is_err() {
        return; // Whoever wanted the VP has gone away meanwhile.
    }
    let Some(first) = block_on(&wakeup, commands.next()) else { return };
    let service = service.try_recv().ok().flatten();
    let VpService { io, on_halt } = service.expect("whoever can send commands has sent it before");
    let served = catch_unwind(AssertUnwindSafe(|| {
        let on_halt = &*on_halt;
        let task = VpTask { vp, processor, commands, io, wakeup: wakeup.clone(), on_halt, running: false };
        block_on(&wakeup, task.serve(first));
    }));
    if let Err(panic) = served {
        report_panic(vp, &message(&*panic), on_halt);
    }
}

fn keep_on(vp: VpIndex, affinity: Option<HostCpus>) -> Result<(), SpawnVpError> {
    let Some(cpus) = affinity else { return Ok(()) };
    cpus.bind_this_thread().map_err(|source| SpawnVpError::Affinity { vp, cpus, source })
}

fn bind<B: BindProcessor>(vp: VpIndex, binder: B) -> Result<B::Processor, SpawnVpError> {
    match catch_unwind(AssertUnwindSafe(|| binder.bind())) {
        Ok(bound) => bound.map_err(|source| SpawnVpError::Bind { vp, source }),
        Err(panic) => Err(SpawnVpError::Panicked { vp, message: message(&*panic) }),
    }
}

fn report_panic(vp: VpIndex, message: &str, on_halt: impl Fn(VpIndex, VpHaltReason)) {
    let reason = format!("the VP's thread panicked: {message}");
    let fault = Box::new(VpFault { vp, reason, registers: None, note: None });
    let reported = catch_unwind(AssertUnwindSafe(|| on_halt(vp, VpHaltReason::Fault(fault))));
    if reported.is_err() {
        tracing::error!(%vp, message, "a VP's thread panicked, and so did the report of it");
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}
