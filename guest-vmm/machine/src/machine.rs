//! The machine, assembled: memory, partition, devices and VPs as one set of state units.

mod snapshot;

pub use snapshot::{MachineSnapshot, SnapshotError};

use crate::board::{Board, Listeners, Placed, Window};
use crate::boot::{BootError, BootFiles, BootImage};
use crate::bus::{Bus, BusBuilder, BusError};
use crate::debug::{DebugError, DebugHalt, Debugger, Target};
use crate::injected::{InjectedFault, InjectedPart, run_injected_unit};
use crate::layout;
use crate::loader::LoadedGuest;
use crate::memory::{GuestMemory, MemoryError, MemoryImage, RestoreMemoryError};
use crate::prepared::{MachineShape, PreparedMachine, VpBindings};
use crate::units::{DevicePart, MemoryPart, Part, PartUnit, PartitionPart, VpsPart};
use crate::virtio::{self, PlaceError};
use crate::vp_set::{Halt, VpActivity, VpSet};
use devices::virtio::{IoThread, VirtioSpec};
use devices::{Absent, ByteSink, GenericEventLine, GuestPanic, PanicSink, SerialInput, SerialPort};
use futures::future::join_all;
use inspect::{Inspect, Request, Response};
use processor::{Hypervisor, Partition, PartitionError, SpawnVpError, VpIndex};
use state_unit::{
    BuildError as UnitBuildError, RequestReceiver, SetState, StateTransitionError, StateUnits,
    StateUnitsInspector, TransitionRecord, UnitBuilder, UnitHandle, UnitSaveSupport, UnitView, run_unit,
};
use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};

/// How long the state units' tasks may take to end once their machine is taken down.
const UNIT_END: Duration = Duration::from_secs(1);

/// The largest kernel that is loaded where nothing may block, in bytes: as much as is pumped at once.
const QUICK_BYTES: u64 = 64 << 10;

/// The name of the VPs' state unit.
pub const VPS: &str = "vps";

/// What a machine is made of.
pub struct MachineConfig {
    /// What its memory, partition and VPs depend on.
    pub shape: MachineShape,
    /// What it boots, now or after a reset.
    pub boot: BootFiles,
    /// What is in its memory, in place of what it boots: the memory of a guest that goes on here. The machine's units are to be
    /// restored ([`Machine::restore`]) before they are started.
    pub image: Option<MemoryImage>,
    /// Who hears of the panics that the guest reports.
    pub panics: Arc<dyn PanicSink>,
    /// Whether there is a port for test guests, a write to which ends the guest.
    pub debug_exit: bool,
    /// Its virtio devices, in the order in which a guest finds them. No two have the same name, nor one of the board's.
    pub devices: Vec<VirtioSpec>,
    /// A fault to inject, for tests.
    pub inject: Option<InjectedFault>,
}

impl MachineConfig {
    /// With the defaults of all that is optional.
    pub fn new(vps: u32, memory_bytes: u64, boot: BootFiles) -> Self {
        Self {
            shape: MachineShape::new(vps, memory_bytes),
            boot,
            image: None,
            panics: Arc::new(|_: GuestPanic| ()),
            debug_exit: false,
            devices: Vec::new(),
            inject: None,
        }
    }

    /// Whether a prepared machine becomes one of this config within some dozens of microseconds: it is booted from a small file, or
    /// goes on from memory that is mapped at once, and has no devices that have to be told to the hypervisor.
    fn is_quick(&self) -> bool {
        let is_small = |kernel: &File| kernel.metadata().is_ok_and(|kernel| kernel.len() <= QUICK_BYTES);
        let contents = match &self.image {
            Some(image) => image.layer.is_none(),
            None => self.boot.initrd.is_none() && is_small(&self.boot.kernel),
        };
        contents && self.devices.is_empty()
    }
}

/// Why a machine could not be made. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No memory.
    #[error("the guest's memory cannot be had")]
    Memory(#[source] MemoryError),
    /// The memory of the guest that is to go on cannot be had.
    #[error("the frozen memory cannot be used")]
    Image(#[source] RestoreMemoryError),
    /// No partition.
    #[error("the partition cannot be made")]
    Partition(#[source] PartitionError),
    /// The kernel or initrd cannot be loaded.
    #[error(transparent)]
    Boot(BootError),
    /// A virtio device has no place, or no thread to work on.
    #[error("the device {name} cannot be made")]
    Device {
        /// The device.
        name: String,
        /// What it lacks.
        #[source]
        source: PlaceError,
    },
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
    // In the order in which they are given back: no mapping goes away under a worker or a partition.
    io: Option<IoThread>,
    partition: Arc<dyn Partition>,
    memory: Arc<GuestMemory>,
}

/// A machine to look at, also while a transition is under way. Does not keep the machine.
pub struct MachineView {
    pub(crate) vps: Arc<VpSet>,
    partition: Weak<dyn Partition>,
    units: StateUnitsInspector,
    pub(crate) target: Arc<Target>,
    power_button: GenericEventLine,
}

impl MachineView {
    /// What each VP is doing, `Unanswered` for one that does not say in time.
    pub async fn vp_states(&self, within: Duration) -> Vec<VpActivity> {
        self.vps.activities(within).await
    }

    /// Sends every VP a non-maskable interrupt. VPs that are stopped take it when they run; once the machine is destroyed there is
    /// none.
    pub fn inject_nmi(&self) {
        let Some(partition) = self.partition.upgrade() else { return };
        (0..).map(VpIndex).take(self.vps.count()).for_each(|vp| partition.inject_nmi(vp));
    }

    /// Presses the power button. A guest that is stopped hears of it when it goes on; once the machine is destroyed there is none.
    pub fn press_power_button(&self) {
        self.power_button.raise();
    }

    /// Begins to debug the VPs: see [`Debugger`]. Another one is waited for this long. Has to be called in the
    /// machine's runtime.
    ///
    /// # Errors
    /// [`DebugError::Taken`] if it has not let go then.
    pub async fn debug(&self, within: Duration) -> Result<(Debugger, mpsc::Receiver<DebugHalt>), DebugError> {
        Debugger::attach(self.target.clone(), within).await
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
        response.child("debugger", |request| self.vps.inspect_debugger(request));
    }
}

/// The tree is the set's ([`StateUnitsInspector`]), with `vps/<number>` beside it (`activity`, `affinity`, `processor` and
/// `state`), and `debugger`, which says whether there is one and which VPs it holds. What is the guest's own (what registers
/// hold, its command line) is marked as sensitive. Units, VPs and devices that are stuck show as unanswered. To be asked in the
/// machine's runtime.
impl Inspect for MachineView {
    fn inspect(&self, request: Request<'_>) {
        self.respond_with(&mut request.respond());
    }
}

/// Memory with the guest in it, the partition around it, and the devices beside it.
struct Foundation {
    // In the order in which they are given back.
    vps: VpBindings,
    /// Where the workers of virtio devices run, if there are any.
    io: Option<IoThread>,
    loaded: Option<LoadedGuest>,
    image: BootImage,
    bus: Bus,
    devices: Vec<Placed>,
    board: Board,
    partition: Arc<dyn Partition>,
    memory: Arc<GuestMemory>,
}

impl Machine {
    /// Makes a machine, stopped. Halts of its VPs are sent to `halts`.
    ///
    /// Blocking work is done on the runtime's blocking pool. `cancelled` is asked between the steps.
    pub async fn build<H>(
        hypervisor: H,
        config: MachineConfig,
        output: Arc<dyn ByteSink>,
        halts: mpsc::UnboundedSender<Halt>,
        cancelled: impl Fn() -> bool + Send + 'static,
    ) -> Result<Self, MachineError>
    where
        H: Hypervisor + Send + 'static,
    {
        let inject = config.inject;
        let lay = move || {
            let go_on = || if cancelled() { Err(MachineError::Cancelled) } else { Ok(()) };
            let image = config.image.as_ref();
            let prepared = PreparedMachine::begin(&hypervisor, config.shape.clone(), image, &go_on)?;
            lay_foundation(prepared, config, output)
        };
        let foundation = tokio::task::spawn_blocking(lay).await.map_err(|_| MachineError::Panicked)??;
        Self::on_foundation(foundation, inject, halts).await
    }

    /// The same of what was made ahead, whose shape has to be the config's. The guest's time begins now. What takes microseconds, as
    /// long as asking the blocking pool, is done here.
    pub async fn build_on(
        prepared: PreparedMachine,
        config: MachineConfig,
        output: Arc<dyn ByteSink>,
        halts: mpsc::UnboundedSender<Halt>,
    ) -> Result<Self, MachineError> {
        debug_assert_eq!(prepared.shape, config.shape);
        let (inject, is_quick) = (config.inject, config.is_quick());
        prepared.partition.forget_stopped_time();
        let lay = move || {
            if let Some(image) = &config.image {
                prepared.memory.remap(image).map_err(MachineError::Image)?;
            }
            lay_foundation(prepared, config, output)
        };
        let foundation = match is_quick {
            true => lay(),
            false => tokio::task::spawn_blocking(lay).await.map_err(|_| MachineError::Panicked)?,
        };
        Self::on_foundation(foundation?, inject, halts).await
    }

    async fn on_foundation(
        foundation: Foundation,
        inject: Option<InjectedFault>,
        halts: mpsc::UnboundedSender<Halt>,
    ) -> Result<Self, MachineError> {
        let Foundation { memory, partition, board, devices, bus, image, loaded, io, vps } = foundation;
        let initial = loaded.as_ref().map(|guest| guest.vp);
        let vps = VpSet::serve(vps, Arc::new(bus), halts, initial).await;
        let vps = Arc::new(vps.map_err(MachineError::Vp)?);
        // Time stands until the first start: what is saved before it is the state of one moment.
        partition.stop_time().map_err(MachineError::Partition)?;
        let mut assembly = Assembly::default();
        let image = Arc::new(image);
        let count = image.vps;
        let memory_part = MemoryPart { memory: memory.clone(), image, loaded, vps: vps.clone() };
        assembly.add("memory", memory_part, &[])?;
        assembly.add("partition", PartitionPart { partition: partition.clone(), vps: count }, &["memory"])?;
        assembly.add_devices(&devices, &["partition"])?;
        if let Some(fault) = inject {
            assembly.add_injected(fault, &["partition"])?;
        }
        assembly.add_after_all(VPS, VpsPart(vps.clone()))?;
        let Assembly { units, handles, tasks, places: _ } = assembly;
        let target = Target {
            vps: vps.clone(),
            memory: Arc::downgrade(&memory),
            capabilities: partition.debug_capabilities(),
        };
        let (shared, units_view) = (Arc::downgrade(&partition), units.inspector());
        let (target, power_button) = (Arc::new(target), board.power_button());
        let view = Arc::new(MachineView { vps, partition: shared, units: units_view, target, power_button });
        let input = SerialInput::new(&board.serial);
        Ok(Self { units, handles, view, input, tasks, io, partition, memory })
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

    /// Asks every unit whether it can be saved, in the order of their addition.
    ///
    /// # Errors
    /// If a unit does not answer, or if the machine is faulted; nothing has changed then.
    pub async fn can_save(&self) -> Result<Vec<UnitSaveSupport>, StateTransitionError> {
        self.units.can_save().await
    }

    /// Whether its units run.
    pub fn is_running(&self) -> bool {
        self.units.is_running()
    }

    /// Whether a transition failed that could not be undone.
    pub fn is_faulted(&self) -> bool {
        self.units.state() == SetState::Faulted
    }

    /// Joins the VPs, removes the units and gives everything back.
    pub async fn destroy(self) {
        let Self { units, handles, view, input: _, tasks, io, partition, memory } = self;
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
            drop(io);
            drop(partition);
            drop(memory);
        });
        if closed.await.is_err() {
            tracing::error!("closing the machine panicked");
        }
    }
}

fn lay_foundation(
    prepared: PreparedMachine,
    config: MachineConfig,
    output: Arc<dyn ByteSink>,
) -> Result<Foundation, MachineError> {
    // What comes last is dropped first, should something fail: no mapping goes away under a partition.
    let PreparedMachine { shape, memory, partition, vps } = prepared;
    let listeners = Listeners { serial: output, panics: config.panics };
    let board = Board::new(partition.clone(), listeners, config.debug_exit);
    let mut devices = board.devices(&memory);
    let io = virtio::add(config.devices, &memory, &*partition, &board.ioapic, &mut devices)?;
    let bus = build_bus(&board, &devices)?;
    let nodes = devices.iter_mut().filter_map(|placed| placed.acpi.take()).collect();
    let image = BootImage { files: config.boot, vps: shape.vps, devices: nodes };
    let loaded = match config.image {
        None => Some(image.load(&memory).map_err(MachineError::Boot)?),
        Some(_) => None,
    };
    Ok(Foundation { vps, io, loaded, image, bus, devices, board, partition, memory })
}

fn build_bus(board: &Board, devices: &[Placed]) -> Result<Bus, MachineError> {
    let mut builder = BusBuilder::new(board.ioapic.clone());
    for Placed { name, window, device, .. } in devices {
        match *window {
            Window::Ports(base, count) => builder.ports(name, base, count, device.clone()),
            Window::Memory(base, bytes) => builder.mmio(name, base, bytes, device.clone()),
            Window::Bus | Window::None => Ok(()),
        }
        .map_err(MachineError::Overlap)?;
    }
    for (name, base) in layout::ABSENT_SERIAL_PORTS {
        let nothing = Arc::new(Mutex::new(Absent));
        builder.ports(name, base, SerialPort::PORTS, nothing).map_err(MachineError::Overlap)?;
    }
    Ok(builder.build())
}

/// Units on their way into the set.
#[derive(Default)]
struct Assembly {
    units: StateUnits,
    handles: Vec<UnitHandle>,
    tasks: Vec<JoinHandle<()>>,
    places: HashMap<String, usize>,
}

impl Assembly {
    fn add(&mut self, name: &str, part: impl Part, uses: &[&str]) -> Result<(), MachineError> {
        self.add_served(name, uses, |requests| async move { drop(run_unit(PartUnit(part), requests).await) })
    }

    fn add_injected(&mut self, fault: InjectedFault, uses: &[&str]) -> Result<(), MachineError> {
        self.add_served("injected", uses, |requests| run_injected_unit(InjectedPart::new(fault), requests))
    }

    /// A unit, and what serves it.
    fn add_served<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        name: &str,
        uses: &[&str],
        serve: impl FnOnce(RequestReceiver) -> F,
    ) -> Result<(), MachineError> {
        let dependencies = uses.iter().map(|name| self.places[*name]);
        let builder =
            dependencies.fold(self.units.add(name), |builder, at| builder.depends_on(&self.handles[at]));
        let (handle, requests) = builder.build().map_err(MachineError::Unit)?;
        self.tasks.push(tokio::spawn(serve(requests)));
        self.places.insert(name.to_owned(), self.handles.len());
        self.handles.push(handle);
        Ok(())
    }

    /// Devices, each of which uses what lies below, and other devices.
    fn add_devices(&mut self, devices: &[Placed], below: &[&str]) -> Result<(), MachineError> {
        devices.iter().try_for_each(|placed| {
            let uses: Vec<&str> = below.iter().chain(placed.uses).copied().collect();
            self.add(&placed.name, DevicePart(placed.device.clone()), &uses)
        })
    }

    /// A unit that runs only while all the others do.
    fn add_after_all(&mut self, name: &str, part: impl Part) -> Result<(), MachineError> {
        let all: Vec<String> = self.handles.iter().map(|handle| handle.name().to_owned()).collect();
        let names: Vec<&str> = all.iter().map(String::as_str).collect();
        self.add(name, part, &names)
    }
}

#[cfg(test)]
mod board_tests;
#[cfg(test)]
mod going_on;

#[cfg(test)]
mod tests {
    //! The devices' units, saved and restored around a scripted guest: alone, so that another guest finds them.

    use super::*;
    use crate::injected::InjectedStep;
    use processor::scripted::{Script, ScriptedHypervisor};
    use rustix::fs::{MemfdFlags, memfd_create};
    use save_restore::SavedStateBlob;
    use state_unit::SavedStateUnit;
    use std::io::Write;

    const COM1: u16 = crate::layout::COM1_PORT;
    const SCRATCH: u16 = COM1 + 7;
    const PORT_B: u16 = 0x61;
    const RTC: u16 = crate::layout::RTC_PORT;
    const IOAPIC: u64 = crate::layout::IOAPIC;
    /// For a guest that goes on.
    const PATIENT: Duration = Duration::from_secs(60);
    const DEVICES: [&str; 8] =
        ["ioapic", "serial", "rtc", "i8042", "acpi-power", "generic-events", "generation-id", "pvpanic"];

    /// The devices of a machine as a set, and the VP that uses them.
    struct Bench {
        units: StateUnits,
        _handles: Vec<UnitHandle>,
        vps: VpSet,
        input: SerialInput,
        output: mpsc::UnboundedReceiver<Vec<u8>>,
        _foundation: (Arc<GuestMemory>, Board),
    }

    fn config(script: &Script) -> MachineConfig {
        let mut kernel = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
        kernel.write_all(&script.to_elf()).unwrap();
        let boot = BootFiles { kernel, initrd: None, cmdline: String::new() };
        MachineConfig::new(1, 4 << 20, boot)
    }

    fn foundation(script: &Script, output: Arc<dyn ByteSink>) -> Foundation {
        let config = config(script);
        let hypervisor = ScriptedHypervisor::default();
        let prepared = PreparedMachine::begin(&hypervisor, config.shape.clone(), None, &|| Ok(()));
        lay_foundation(prepared.unwrap(), config, output).unwrap()
    }

    impl Bench {
        async fn new(script: &Script) -> Self {
            let (send, output) = mpsc::unbounded_channel();
            let sink: Arc<dyn ByteSink> = Arc::new(move |bytes: &[u8]| drop(send.send(bytes.to_vec())));
            let Foundation { memory, loaded, vps, board, devices, bus, .. } = foundation(script, sink);
            let (halts, _) = mpsc::unbounded_channel();
            let vps = VpSet::serve(vps, Arc::new(bus), halts, loaded.map(|guest| guest.vp)).await.unwrap();
            let mut assembly = Assembly::default();
            assembly.add_devices(&devices, &[]).unwrap();
            let Assembly { units, handles, .. } = assembly;
            let input = SerialInput::new(&board.serial);
            Self { units, _handles: handles, vps, input, output, _foundation: (memory, board) }
        }

        async fn start(&self) {
            self.units.start().await.unwrap();
            self.vps.start().await.unwrap();
        }

        async fn stop(&self) {
            self.vps.stop().await;
            self.units.stop().await.unwrap();
        }

        /// What the guest sends next.
        async fn sent(&mut self, count: usize) -> Vec<u8> {
            let mut sent = Vec::new();
            while sent.len() < count {
                let next = tokio::time::timeout(PATIENT, self.output.recv()).await;
                sent.extend(next.unwrap_or_else(|_| panic!("after {sent:x?}")).expect("the port is there"));
            }
            sent
        }
    }

    /// Uses all devices that keep something: an interrupt for serial input at vector 0x34, and a value each.
    fn using_devices() -> Script {
        let mut script = Script::new();
        for (register, value) in [(0x19u32, 0u32), (0x18, 0x34)] {
            script.write(IOAPIC, &register.to_le_bytes()).write(IOAPIC + 0x10, &value.to_le_bytes());
        }
        script.out(RTC, &[0x40]).out(RTC + 1, &[0x77]).out(PORT_B, &[0x03]);
        script.out(SCRATCH, &[0x5a]).out(COM1 + 1, &[0x01]).out(COM1, b"x");
        script.spin();
        script
    }

    /// Says what it finds in the devices, waits for an interrupt and says its vector, and sends input back.
    fn finding_devices() -> Script {
        let mut script = Script::new();
        script.echo(SCRATCH, COM1).echo(COM1 + 1, COM1).echo(RTC + 1, COM1).echo(PORT_B, COM1);
        script.read_long(IOAPIC + 0x10, COM1).hlt().out_vector(COM1);
        for _ in 0..5 {
            script.serial_input(COM1, COM1);
        }
        script.spin();
        script
    }

    /// What a guest has left in the devices, with input that it has not seen.
    async fn saved() -> Vec<SavedStateUnit> {
        let mut bench = Bench::new(&using_devices()).await;
        bench.start().await;
        assert_eq!(bench.sent(1).await, b"x");
        bench.stop().await;
        assert_eq!(bench.input.push(b"input"), Some(5));
        let states = bench.units.save().await.unwrap();
        bench.vps.shutdown().await;
        states
    }

    #[tokio::test]
    async fn another_guest_goes_on_with_restored_devices() {
        let states = saved().await;
        assert_eq!(states.iter().map(|state| state.name.as_str()).collect::<Vec<_>>(), DEVICES);
        let mut bench = Bench::new(&finding_devices()).await;
        bench.units.restore(states.clone()).await.unwrap();
        assert_eq!(bench.units.save().await.unwrap(), going_on::with_new_generation(states));
        bench.start().await;
        // The refresh bit of port B (0x10) toggles with each read, the first of which sets it; timer 2's output is 0x20.
        assert_eq!(bench.sent(4).await, [0x5a, 0x01, 0x77, 0x33]);
        assert_eq!(bench.sent(4).await, 0x34u32.to_le_bytes());
        // The input interrupts by the route that the guest before has set.
        assert_eq!(bench.sent(1).await, [0x34]);
        assert_eq!(bench.sent(5).await, b"input");
        bench.stop().await;
        bench.vps.shutdown().await;
    }

    #[tokio::test]
    async fn a_state_that_a_device_refuses_faults_the_set_and_is_named() {
        let mut states = saved().await;
        let serial = states.iter_mut().find(|state| state.name == "serial").unwrap();
        // Field 9, the receive FIFO, 65 bytes long: the last of a field counts.
        let mut bytes = serial.state.as_ref().unwrap().value().to_vec();
        bytes.extend([9 << 3 | 2, 65]);
        bytes.extend([0; 65]);
        serial.state = Some(SavedStateBlob::from_parts("devices.serial.SerialPortState", bytes));
        let bench = Bench::new(&using_devices()).await;
        let error = bench.units.restore(states).await.unwrap_err();
        let StateTransitionError::Units(failures) = &error else { panic!("{error}") };
        let [failed] = &failures.failed[..] else { panic!("{failures:?}") };
        let cause = failed.cause.as_ref().expect("a device says why").to_string();
        assert_eq!((&*failed.name, &*cause), ("serial", "receive_fifo is 65 bytes long, which is not valid"));
        assert_eq!(bench.units.state(), SetState::Faulted);
        bench.vps.shutdown().await;
    }

    #[tokio::test]
    async fn a_device_without_its_state_is_named_before_anything_is_restored() {
        let mut states = saved().await;
        states.retain(|state| state.name != "acpi-power");
        let bench = Bench::new(&using_devices()).await;
        let before = bench.units.save().await.unwrap();
        let error = bench.units.restore(states).await.unwrap_err();
        let StateTransitionError::SavedState(mismatch) = &error else { panic!("{error}") };
        assert_eq!(mismatch.missing, ["acpi-power"], "it has no state, and says so");
        assert_eq!(bench.units.save().await.unwrap(), before);
        bench.vps.shutdown().await;
    }

    #[tokio::test]
    async fn what_cannot_be_saved_says_why_and_the_guest_runs_on() {
        let sink: Arc<dyn ByteSink> = Arc::new(|_: &[u8]| ());
        let (halts, _) = mpsc::unbounded_channel();
        let inject = Some(InjectedFault::Fails(InjectedStep::CanSave));
        let config = MachineConfig { inject, ..config(&using_devices()) };
        let machine =
            Machine::build(ScriptedHypervisor::default(), config, sink, halts, || false).await.unwrap();
        machine.start().await.unwrap();
        let refused = machine.snapshot().await.unwrap_err();
        assert_eq!(refused.to_string(), "injected: an injected fault");
        assert!(machine.units.is_running());
        machine.destroy().await;
    }
}
