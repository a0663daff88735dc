//! VPs as guestd runs them: on the threads of the crate `processor`, with a machine's bus.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, ensure};
use devices::{IoApic, IoApicRouting, IoDevice};
use futures::future::try_join_all;
use kvm::KvmHypervisor;
use machine::bus::{Bus, BusBuilder};
use processor::{
    ErasedVpState, Hypervisor, MpState, MsiRequest, NewPartition, Partition, PartitionConfig, PowerRequest,
    Registers, StateError, VpHaltReason, VpIndex, VpState, VpStateKind, VpThread,
};
use tokio::sync::mpsc;
use vm_memory::GuestMemoryMmap;

use super::no_halts;
use super::program::{self, Program};
use super::state::{self, REPEATS, Times};

/// A guest whose VPs are there and have not run yet.
pub(super) struct GuestVps {
    threads: Vec<VpThread>,
    halts: mpsc::UnboundedReceiver<VpHaltReason>,
    port: Arc<Mutex<CountedPort>>,
    partition: Arc<dyn Partition>,
    pub(super) memory: GuestMemoryMmap,
}

impl GuestVps {
    pub(super) async fn new(
        hypervisor: &KvmHypervisor,
        count: u32,
        program: Program,
    ) -> anyhow::Result<Self> {
        let memory = program.load()?;
        let config = PartitionConfig::new(count, memory.clone());
        let NewPartition { partition, processors } = hypervisor.build(&config)?;
        let port = Arc::new(Mutex::new(CountedPort::default()));
        let bus = Arc::new(bus(&port)?);
        let (halt, halts) = mpsc::unbounded_channel();
        let threads = (0..).zip(processors).map(|(vp, binder)| {
            let halt = halt.clone();
            // The one that a halt is reported to may be gone.
            let on_halt = move |_, reason| drop(halt.send(reason));
            VpThread::spawn(VpIndex(vp), None, binder, partition.clone(), bus.clone(), on_halt)
        });
        let threads = try_join_all(threads).await?;
        for thread in &threads {
            thread.access(enter_program).await?.map_err(anyhow::Error::from_boxed)?;
        }
        Ok(Self { threads, halts, port, partition, memory })
    }

    pub(super) async fn start(&self) -> anyhow::Result<()> {
        try_join_all(self.threads.iter().map(VpThread::start)).await?;
        Ok(())
    }

    pub(super) async fn stop(&self) -> anyhow::Result<()> {
        try_join_all(self.threads.iter().map(VpThread::stop)).await?;
        Ok(())
    }

    fn first(&self) -> anyhow::Result<&VpThread> {
        self.threads.first().context("there are no VPs")
    }

    /// Has the first VP leave the guest and go back, and says when it was out.
    pub(super) async fn out(&self) -> anyhow::Result<Instant> {
        Ok(self.first()?.access(|_| Instant::now()).await?)
    }

    /// Runs the only VP for so many exits, and says when the first was there and when they were over.
    pub(super) async fn run_exits(&mut self, exits: u32) -> anyhow::Result<(Instant, Instant)> {
        *lock(&self.port) = CountedPort { rest: Some(exits), ..CountedPort::default() };
        self.start().await?;
        let halt = self.halts.recv().await.context("the VP's thread is gone")?;
        ensure!(matches!(halt, VpHaltReason::PowerOff), "the VP has halted: {halt:?}");
        let port = lock(&self.port);
        port.first_exit.zip(port.ended).context("the VP has not written to the end")
    }

    /// Whether the first VP's time-stamp counter is part of its state.
    pub(super) async fn has_tsc(&self) -> anyhow::Result<bool> {
        Ok(self.first()?.access(|state| state.supports(VpStateKind::Tsc)).await?)
    }

    /// Reads the first VP's state, and sets it with other values for some MSRs. The VP is stopped, as is time meanwhile.
    pub(super) async fn save_and_restore(&self) -> anyhow::Result<Times> {
        self.partition.stop_time()?;
        let times = self.first()?.access(save_and_restore).await?;
        self.partition.start_time()?;
        times.map_err(anyhow::Error::from_boxed)
    }

    /// Ends the threads.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        self.stop().await?;
        futures::future::join_all(self.threads.drain(..).map(VpThread::shutdown)).await;
        no_halts(&mut self.halts)
    }
}

/// Everything from here on is done on the VP's thread.
fn enter_program(state: &mut dyn ErasedVpState) -> Result<(), StateError> {
    let mut system = state.system_registers()?;
    (system.cs.base, system.cs.selector) = (0, 0);
    state.set_system_registers(&system)?;
    state.set_registers(&Registers { rip: program::CODE, rflags: 2, ..Registers::default() })?;
    state.set_mp_state(&MpState::Runnable)
}

fn save_and_restore(state: &mut dyn ErasedVpState) -> Result<Times, StateError> {
    let mut times = Times::default();
    for _ in 0..REPEATS {
        let begin = Instant::now();
        let mut saved = VpState::save(state)?;
        times.save += begin.elapsed();
        let msrs = saved.msrs.iter_mut().flat_map(|msrs| &mut msrs.0);
        msrs.for_each(|(index, value)| *value = state::other_value(*index, *value));
        let begin = Instant::now();
        saved.restore(state)?;
        times.restore += begin.elapsed();
    }
    Ok(times.of_one())
}

fn lock(port: &Mutex<CountedPort>) -> MutexGuard<'_, CountedPort> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bus(port: &Arc<Mutex<CountedPort>>) -> anyhow::Result<Bus> {
    let ioapic = IoApic::new(Box::new(NoInterrupts));
    let mut builder = BusBuilder::new(Arc::new(Mutex::new(ioapic)));
    builder.ports("counted", program::PORT, 1, port.clone())?;
    Ok(builder.build())
}

/// The guests use no interrupts.
struct NoInterrupts;

impl IoApicRouting for NoInterrupts {
    fn set_irq_route(&self, _: u8, _: Option<MsiRequest>) {}

    fn assert_irq(&self, _: u8, _: MsiRequest) {}
}

/// A port that powers the guest off at the write after so many.
#[derive(Debug, Default)]
struct CountedPort {
    rest: Option<u32>,
    first_exit: Option<Instant>,
    ended: Option<Instant>,
}

impl IoDevice for CountedPort {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        std::hint::black_box(data);
        self.first_exit.get_or_insert_with(Instant::now);
        match self.rest {
            Some(0) => {
                self.ended = Some(Instant::now());
                return ControlFlow::Break(PowerRequest::PowerOff);
            }
            Some(rest) => self.rest = Some(rest - 1),
            None => {}
        }
        ControlFlow::Continue(())
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}
