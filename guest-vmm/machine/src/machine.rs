//! The machine, assembled: memory, partition, devices and VPs as one set of state units.

use crate::board::{Board, Placed, Window};
use crate::boot::{BootError, BootFiles, BootImage};
use crate::bus::{Bus, BusBuilder, BusError};
use crate::loader::LoadedGuest;
use crate::memory::{GuestMemory, MemoryError, MemoryOptions};
use crate::units::{DevicePart, InjectedFault, MemoryPart, Part, PartUnit, PartitionPart, VpsPart};
use crate::vp_set::{Halt, VpActivity, VpSet};
use devices::{SerialInput, SerialOutput};
use futures::future::join_all;
use inspect::{Inspect, Request, Response};
use processor::{Hypervisor, NewPartition, Partition, PartitionConfig, PartitionError, SpawnVpError};
use state_unit::{
    BuildError as UnitBuildError, SetState, StateTransitionError, StateUnits, StateUnitsInspector,
    TransitionRecord, UnitBuilder, UnitHandle, UnitView, run_unit,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};

/// How long the state units' tasks may take to end once their machine is taken down.
const UNIT_END: Duration = Duration::from_secs(1);

/// The name of the VPs' state unit.
pub const VPS: &str = "vps";

/// What a machine is made of.
pub struct MachineConfig {
    /// How many VPs.
    pub vps: u32,
    /// How much memory, in bytes.
    pub memory_bytes: u64,
    /// What kind of memory.
    pub memory: MemoryOptions,
    /// What it boots.
    pub boot: BootFiles,
    /// A fault to inject, for tests.
    pub inject: Option<InjectedFault>,
}

/// Why a machine could not be made. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No memory.
    #[error("the guest's memory cannot be had")]
    Memory(#[source] MemoryError),
    /// No partition.
    #[error("the partition cannot be made")]
    Partition(#[source] PartitionError),
    /// The kernel or initrd cannot be loaded.
    #[error(transparent)]
    Boot(BootError),
    /// Two devices want the same place.
    #[error(transparent)]
    Overlap(BusError),
    /// A VP has no thread.
    #[error(transparent)]
    Vp(SpawnVpError),
    /// A state unit cannot be added.
    #[error("a state unit cannot be added")]
    Unit(#[source] UnitBuildError),
    /// The work was cancelled between two steps.
    #[error("cancelled")]
    Cancelled,
    /// A thread of the blocking pool panicked.
    #[error("making the machine panicked")]
    Panicked,
}

/// A machine whose units move together.
///
/// To be ended with [`Machine::destroy`]: dropping it leaves the closing of the partition to whichever thread is last.
pub struct Machine {
    units: StateUnits,
    handles: Vec<UnitHandle>,
    view: Arc<MachineView>,
    input: SerialInput,
    tasks: Vec<JoinHandle<()>>,
    // In the order in which they are given back: no mapping goes away under a partition.
    partition: Arc<dyn Partition>,
    memory: Arc<GuestMemory>,
}

/// A machine to look at, also while a transition is under way. Does not keep the machine.
pub struct MachineView {
    vps: Arc<VpSet>,
    units: StateUnitsInspector,
}

impl MachineView {
    /// What each VP is doing, `Unanswered` for one that does not say in time.
    pub async fn vp_states(&self, within: Duration) -> Vec<VpActivity> {
        self.vps.activities(within).await
    }

    /// The state units, in the order in which they were added. None once the machine is destroyed.
    pub fn graph(&self) -> Vec<UnitView> {
        self.units.graph()
    }

    /// The latest passes over the state units, the oldest first; the last may be in flight.
    pub fn timeline(&self) -> Vec<TransitionRecord> {
        self.units.timeline()
    }

    /// Adds the children of the machine's tree to a response that may have others beside them.
    pub fn respond_with(&self, response: &mut Response<'_>) {
        self.units.respond_with(response);
        response.child(VPS, |request| self.vps.inspect(request));
    }
}

/// The tree is the set's ([`StateUnitsInspector`]), with `vps/<number>` beside it: `activity` and `registers`. What is the
/// guest's own (what registers hold, its command line) is marked as sensitive. Units, VPs and devices that are stuck show as
/// unanswered. To be asked in the machine's runtime.
impl Inspect for MachineView {
    fn inspect(&self, request: Request<'_>) {
        self.respond_with(&mut request.respond());
    }
}

/// Memory with the guest in it, the partition around it, and the devices beside it.
struct Foundation<B> {
    memory: Arc<GuestMemory>,
    image: BootImage,
    loaded: LoadedGuest,
    partition: NewPartition<B>,
    board: Board,
    devices: Vec<Placed>,
    bus: Bus,
}

impl Machine {
    /// Makes a machine, stopped. Halts of its VPs are sent to `halts`.
    ///
    /// Blocking work is done on the runtime's blocking pool. `cancelled` is asked between the steps.
    pub async fn build<H>(
        hypervisor: H,
        config: MachineConfig,
        output: Arc<dyn SerialOutput>,
        halts: mpsc::UnboundedSender<Halt>,
        cancelled: impl Fn() -> bool + Send + 'static,
    ) -> Result<Self, MachineError>
    where
        H: Hypervisor + Send + 'static,
        H::Binder: Send + 'static,
    {
        let (inject, vp_count) = (config.inject, config.vps);
        let lay =
            tokio::task::spawn_blocking(move || lay_foundation(&hypervisor, config, output, &cancelled));
        let Foundation { memory, image, loaded, partition, board, devices, bus } =
            lay.await.map_err(|_| MachineError::Panicked)??;
        let shared = partition.partition.clone();
        let vps = VpSet::bind(partition, Arc::new(bus), halts, loaded.vp).await;
        let vps = Arc::new(vps.map_err(MachineError::Vp)?);
        let mut assembly = Assembly::default();
        let image = Arc::new(image);
        let memory_part = MemoryPart { memory: memory.clone(), image, loaded, vps: vps.clone() };
        assembly.add("memory", memory_part, &[])?;
        assembly.add("partition", PartitionPart { partition: shared.clone(), vps: vp_count }, &["memory"])?;
        for placed in &devices {
            let uses: Vec<&str> = std::iter::once("partition").chain(placed.uses.iter().copied()).collect();
            assembly.add(placed.name, DevicePart(placed.device.clone()), &uses)?;
        }
        if let Some(fault) = inject {
            assembly.add("injected", fault, &["partition"])?;
        }
        assembly.add_after_all(VPS, VpsPart(vps.clone()))?;
        let Assembly { units, handles, tasks, places: _ } = assembly;
        let view = Arc::new(MachineView { vps, units: units.inspector() });
        let input = SerialInput::new(&board.serial);
        Ok(Self { units, handles, view, input, tasks, partition: shared, memory })
    }

    /// The machine to look at.
    pub fn view(&self) -> &Arc<MachineView> {
        &self.view
    }

    /// One of the machine's own units.
    pub fn unit(&self, name: &str) -> Option<&UnitHandle> {
        self.handles.iter().find(|unit| unit.name() == name)
    }

    /// Begins to add a unit that is none of the machine's own, stopped. It moves with them, in the order of its edges.
    pub fn add_unit(&self, name: &str) -> UnitBuilder<'_> {
        self.units.add(name)
    }

    /// The serial port's input.
    pub fn serial_input(&self) -> SerialInput {
        self.input.clone()
    }

    /// Starts all units, dependencies first; VP 0 then runs the guest.
    pub async fn start(&self) -> Result<(), StateTransitionError> {
        self.units.start().await
    }

    /// Starts the units that were added while the others run.
    pub async fn start_stopped_units(&self) -> Result<(), StateTransitionError> {
        self.units.start_stopped_units().await
    }

    /// Stops all units, to go on later. If one cannot, those that stopped are started again.
    pub async fn pause(&self) -> Result<(), StateTransitionError> {
        self.units.pause().await
    }

    /// Stops all units that run. What fails does not hold up the rest.
    pub async fn stop(&self) -> Result<(), StateTransitionError> {
        match self.units.state() {
            SetState::Stopped => Ok(()),
            _ => self.units.stop().await,
        }
    }

    /// Resets the stopped units: memory is zeroed and the guest loaded again.
    pub async fn reset(&self) -> Result<(), StateTransitionError> {
        self.units.reset().await
    }

    /// Whether a transition failed that could not be undone.
    pub fn is_faulted(&self) -> bool {
        self.units.state() == SetState::Faulted
    }

    /// Joins the VPs, removes the units and gives everything back.
    pub async fn destroy(self) {
        let Self { units, handles, view, input: _, tasks, partition, memory } = self;
        view.vps.shutdown().await;
        drop(units);
        drop(handles);
        // Each task ends with its unit's channel, and drops its part of the machine; one that hangs is not waited for.
        let aborts: Vec<_> = tasks.iter().map(JoinHandle::abort_handle).collect();
        if tokio::time::timeout(UNIT_END, join_all(tasks)).await.is_err() {
            tracing::error!("a state unit did not end: aborted");
            aborts.iter().for_each(AbortHandle::abort);
        }
        // Closing a partition and unmapping its memory take their time.
        let closed = tokio::task::spawn_blocking(move || {
            drop(partition);
            drop(memory);
        });
        if closed.await.is_err() {
            tracing::error!("closing the machine panicked");
        }
    }
}

fn lay_foundation<H: Hypervisor>(
    hypervisor: &H,
    config: MachineConfig,
    output: Arc<dyn SerialOutput>,
    cancelled: &dyn Fn() -> bool,
) -> Result<Foundation<H::Binder>, MachineError> {
    let go_on = || if cancelled() { Err(MachineError::Cancelled) } else { Ok(()) };
    let memory =
        Arc::new(GuestMemory::new(config.memory_bytes, config.memory).map_err(MachineError::Memory)?);
    go_on()?;
    let partition_config = PartitionConfig { vp_count: config.vps, memory: memory.view().clone() };
    let partition = hypervisor.build(&partition_config).map_err(MachineError::Partition)?;
    go_on()?;
    let board = Board::new(partition.partition.clone(), output);
    let mut devices = board.devices();
    let bus = build_bus(&board, &devices)?;
    let nodes = devices.iter_mut().filter_map(|placed| placed.acpi.take()).collect();
    let image = BootImage { files: config.boot, vps: config.vps, devices: nodes };
    let loaded = image.load(&memory).map_err(MachineError::Boot)?;
    go_on()?;
    Ok(Foundation { memory, image, loaded, partition, board, devices, bus })
}

fn build_bus(board: &Board, devices: &[Placed]) -> Result<Bus, MachineError> {
    let mut builder = BusBuilder::new(board.ioapic.clone());
    for Placed { name, window, device, .. } in devices {
        match *window {
            Window::Ports(base, count) => builder.ports(name, base, count, device.clone()),
            Window::Bus => Ok(()),
        }
        .map_err(MachineError::Overlap)?;
    }
    Ok(builder.build())
}

/// Units on their way into the set.
#[derive(Default)]
struct Assembly {
    units: StateUnits,
    handles: Vec<UnitHandle>,
    tasks: Vec<JoinHandle<()>>,
    places: HashMap<&'static str, usize>,
}

impl Assembly {
    fn add(&mut self, name: &'static str, part: impl Part, uses: &[&str]) -> Result<(), MachineError> {
        let dependencies = uses.iter().map(|name| self.places[name]);
        let builder =
            dependencies.fold(self.units.add(name), |builder, at| builder.depends_on(&self.handles[at]));
        let (handle, requests) = builder.build().map_err(MachineError::Unit)?;
        self.tasks.push(tokio::spawn(async move { drop(run_unit(PartUnit(part), requests).await) }));
        self.places.insert(name, self.handles.len());
        self.handles.push(handle);
        Ok(())
    }

    /// A unit that runs only while all the others do.
    fn add_after_all(&mut self, name: &'static str, part: impl Part) -> Result<(), MachineError> {
        let all: Vec<String> = self.handles.iter().map(|handle| handle.name().to_owned()).collect();
        let names: Vec<&str> = all.iter().map(String::as_str).collect();
        self.add(name, part, &names)
    }
}
