//! The VM as the driver has it: made from a config, moved between its states, taken down.

use crate::client_units::ClientUnits;
use crate::config::{HostLimits, RequestedGuest, requested_shape};
use crate::devices::{self, RequestedDevices};
use crate::files;
use crate::guest::{Guest, Told};
use crate::log::LogFilter;
use crate::platform::Host;
use crate::ports::GuestPort;
use crate::settings::Settings;
use crate::snapshot::{Origin, TakenSnapshot};
use guest_schema::{Failure, GuestError, GuestShape, UnitConfig, chain};
use machine::{BootFiles, Halt, Machine, MachineConfig, MachineError, SnapshotError, VPS, host_memory_bytes};
use processor::{HostCpus, VpHaltReason, VpIndex};
use state_unit::{SavedStateUnit, StateTransitionError};
use std::error::Error;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tokio::sync::{Notify, mpsc};
use tokio::task::spawn_local;

/// Cancels a create: waits in it end at once, blocking work ends between two of its steps.
#[derive(Clone, Default)]
pub(crate) struct Cancel(Arc<CancelState>);

#[derive(Default)]
struct CancelState {
    cancelled: AtomicBool,
    changed: Notify,
}

impl Cancel {
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        self.0.changed.notify_one();
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Waits until it is. One waits at a time.
    pub async fn cancelled(&self) {
        while !self.is_cancelled() {
            self.0.changed.notified().await;
        }
    }
}

/// A machine and the guest in it.
pub(crate) struct Vm {
    machine: Machine,
    client_units: ClientUnits,
    halts: mpsc::UnboundedReceiver<Halt>,
    guest: Rc<Guest>,
    origin: Origin,
    shape: Option<GuestShape>,
}

impl Vm {
    /// Makes a VM, stopped. On an error nothing is left.
    pub async fn create(
        host: &Host,
        log_filter: Option<LogFilter>,
        mut requested: RequestedGuest,
        cancel: &Cancel,
    ) -> Result<Self, Failure> {
        let max_vps = host.max_vps().await.map_err(|error| initialization(&error))?;
        let limits = HostLimits { max_vps, memory_bytes: host_memory_bytes(), cpus: own_cpus()? };
        if let Some(saved) = requested.saved.take() {
            let opened = tokio::select! {
                opened = saved.open(limits.memory_bytes) => opened?,
                () = cancel.cancelled() => return Err(cancelled()),
            };
            requested = requested.going_on_from(opened);
        }
        requested.check(&limits)?;
        let units = std::mem::take(&mut requested.config.units);
        let settings = Settings::new(requested.on_reset(), log_filter);
        let backends = std::mem::take(&mut requested.backends);
        let RequestedDevices { specs, ends, hotplug, errors, outputs, .. } =
            devices::requested(&requested.config, backends, cancel).await?;
        let mut told = Told { outputs, ..Told::default() };
        let serial = told.outputs.add(GuestPort::Serial);
        let restored = requested.restored.take();
        let guest_config = requested.config.clone();
        let config = tokio::select! {
            config = machine_config(requested, hotplug.clone(), &told) => {
                MachineConfig { devices: specs, ..config? }
            }
            () = cancel.cancelled() => return Err(cancelled()),
        };
        let BootFiles { kernel, initrd, .. } = &config.boot;
        let origin = Origin::new(guest_config.clone(), kernel, initrd.as_ref());
        let origin = origin.map_err(|error| initialization(&error))?;
        let (states, image) = restored.map(|restored| (restored.units, restored.image)).unzip();
        let shape = GuestShape::of(&guest_config, hotplug);
        let config = MachineConfig { image, ..config };
        let (sender, halts) = mpsc::unbounded_channel();
        let flag = cancel.clone();
        let built = host.build(config, serial, sender, move || flag.is_cancelled()).await;
        let machine = built.map_err(|error| build_failure(&error))?;
        let client_units = match go_on(&machine, units, states).await {
            Ok(joined) => joined,
            Err(failure) => {
                machine.destroy().await;
                return Err(failure);
            }
        };
        let guest = Rc::new(Guest::new(told, machine.serial_input(), machine.view().clone(), ends, settings));
        let telling = guest.clone();
        spawn_local(async move { telling.tell_of_panics().await });
        let events = guest.events().clone();
        spawn_local(async move { events.device_errors(errors).await });
        Ok(Self { machine, client_units, halts, guest, origin, shape })
    }

    /// What another guest of its kind needs, if that can be made ahead.
    pub fn shape(&self) -> Option<&GuestShape> {
        self.shape.as_ref()
    }

    pub fn guest(&self) -> &Rc<Guest> {
        &self.guest
    }

    /// The next VP that halts by itself.
    pub async fn halted(&mut self) -> (VpIndex, VpHaltReason) {
        match self.halts.recv().await {
            Some(halt) => halt,
            // The VPs' threads hold the other end, and end only with the machine.
            None => std::future::pending().await,
        }
    }

    pub async fn start(&self) -> Result<(), Failure> {
        told(&self.guest, "start", async {
            self.machine.start().await.map_err(|error| start_failure(&error))
        })
        .await?;
        self.guest.was_started();
        Ok(())
    }

    pub async fn pause(&self) -> Result<(), Failure> {
        let failed = |error| transition_failure("pause", &error, self.is_faulted());
        told(&self.guest, "pause", async { self.machine.pause().await.map_err(failed) }).await
    }

    pub async fn resume(&self) -> Result<(), Failure> {
        let failed = |error| transition_failure("resume", &error, self.is_faulted());
        told(&self.guest, "resume", async { self.machine.start().await.map_err(failed) }).await
    }

    /// Takes a snapshot. The guest goes on if it runs, also if there is none. One that cannot go on is left paused.
    pub async fn snapshot(&self) -> Result<TakenSnapshot, Failure> {
        let failed = |error: SnapshotError| snapshot_failure(&error, self.is_faulted());
        told(&self.guest, "snapshot", async {
            self.machine.snapshot().await.map(|snapshot| self.origin.taken(snapshot)).map_err(failed)
        })
        .await
    }

    /// Adds a client's unit, stopped.
    pub fn add_unit(&mut self, unit: UnitConfig) -> Result<(), Failure> {
        self.client_units.join_one(&self.machine, unit)
    }

    /// Starts the unit that was added last, while the others run. If it cannot start, it is taken out again.
    pub async fn start_added_unit(&mut self) -> Result<(), Failure> {
        let start = async { self.machine.start_stopped_units().await.map_err(|error| start_failure(&error)) };
        let started = told(&self.guest, "start", start).await;
        if started.is_err() {
            self.client_units.drop_last();
        }
        started
    }

    /// Stops the units if they run, resets them, and starts them again if they ran.
    pub async fn reset(&mut self, running: bool) -> Result<(), Failure> {
        let Self { machine, halts, guest, .. } = self;
        let failed = |error: StateTransitionError| transition_failure("reset", &error, true);
        let reset = async {
            if running {
                machine.stop().await.map_err(failed)?;
            }
            // What the former life of the guest still had to say is said.
            while halts.try_recv().is_ok() {}
            guest.is_to_be_reset();
            machine.reset().await.map_err(failed)?;
            if running {
                machine.start().await.map_err(failed)?;
            }
            Ok(())
        };
        told(guest, "reset", reset).await
    }

    pub fn guest_was_reset(&self) {
        self.guest.was_reset();
    }

    pub fn is_running(&self) -> bool {
        self.machine.is_running()
    }

    pub fn is_faulted(&self) -> bool {
        self.machine.is_faulted()
    }

    /// Stops what runs and takes everything down, also if something cannot be stopped.
    pub async fn stop_and_destroy(self) -> Result<(), Failure> {
        let failed = |error| transition_failure("stop", &error, false);
        let stopped = told(&self.guest, "stop", async { self.machine.stop().await.map_err(failed) }).await;
        self.destroy().await;
        stopped
    }

    pub async fn destroy(self) {
        let Self { machine, client_units, halts: _, guest: _, origin: _, shape: _ } = self;
        drop(client_units);
        machine.destroy().await;
    }
}

/// Lets clients' units join the machine, and gives all units their states, if it goes on from some.
async fn go_on(
    machine: &Machine,
    units: Vec<UnitConfig>,
    states: Option<Vec<SavedStateUnit>>,
) -> Result<ClientUnits, Failure> {
    let joined = ClientUnits::join(machine, units)?;
    if let Some(states) = states {
        machine.restore(states).await.map_err(|error| incompatible(&error))?;
    }
    Ok(joined)
}

/// The units that are here are not those of the snapshot, or cannot be in their states.
fn incompatible(error: &StateTransitionError) -> Failure {
    let (units, _) = units_of(error);
    Failure::new(GuestError::SnapshotIncompatible, chain(error)).of_units(units)
}

fn snapshot_failure(error: &SnapshotError, faulted: bool) -> Failure {
    match error {
        SnapshotError::Refused(units) => {
            let names = units.iter().map(|(unit, _)| unit.clone()).collect();
            Failure::new(GuestError::SnapshotNotSupported, error.to_string()).of_units(names)
        }
        SnapshotError::Transition(error) => transition_failure("snapshot", error, faulted),
        SnapshotError::Freeze(_) | SnapshotError::Panicked => {
            Failure::new(GuestError::InternalError, chain(error))
        }
    }
}

/// Carries out a transition, and tells the guest's subscribers of its end.
async fn told<T>(
    guest: &Guest,
    operation: &str,
    transition: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let begun = Instant::now();
    let result = transition.await;
    guest.events().transition(operation, begun.elapsed(), result.as_ref().err());
    result
}

/// A machine without virtio devices.
async fn machine_config(
    requested: RequestedGuest,
    hotplug: Option<Range<u64>>,
    told: &Told,
) -> Result<MachineConfig, Failure> {
    let RequestedGuest { config, kernel, ramdisk, .. } = requested;
    let limit = config.memory.bytes;
    let kernel = kernel.ok_or_else(|| Failure::new(GuestError::InternalError, "a kernel was checked for"))?;
    let kernel = files::obtain(kernel, "source.boot.kernel", limit).await?;
    let initrd = match ramdisk {
        Some(ramdisk) => {
            let rest = limit.saturating_sub(kernel.metadata().map_or(0, |kernel| kernel.len()));
            Some(files::obtain(ramdisk, "source.boot.ramdisk", rest).await?)
        }
        None => None,
    };
    Ok(MachineConfig {
        shape: requested_shape(&config, hotplug),
        image: None,
        devices: Vec::new(),
        boot: BootFiles { kernel, initrd, cmdline: config.cmdline },
        panics: told.panics.clone(),
        debug_exit: config.debug_exit,
        inject: None,
    })
}

/// What a create answers that a stop has cancelled.
pub(crate) fn cancelled() -> Failure {
    Failure::new(GuestError::ControllerForcedHalt, "stop came before create had finished")
}

/// The CPUs of the thread that the VPs' threads come from.
fn own_cpus() -> Result<HostCpus, Failure> {
    HostCpus::of_this_thread().map_err(|error| {
        let detail = format!("the host's CPUs are not to be had: {error}");
        Failure::new(GuestError::GuestInitializationFailure, detail)
    })
}

fn initialization(error: &dyn Error) -> Failure {
    Failure::new(GuestError::GuestInitializationFailure, chain(error))
}

fn build_failure(error: &MachineError) -> Failure {
    let code = match error {
        MachineError::Memory(_) | MachineError::Partition(_) | MachineError::Vp(_) => {
            GuestError::GuestInitializationFailure
        }
        MachineError::Boot(_) => GuestError::KernelLoadFailure,
        MachineError::Image(_) => GuestError::SnapshotCorrupt,
        MachineError::Overlap(_) => GuestError::DeviceMemoryOverlap,
        MachineError::Unit(_) | MachineError::Device { .. } => GuestError::DeviceInitializationFailure,
        MachineError::Cancelled => return cancelled(),
        MachineError::Panicked => GuestError::InternalError,
    };
    Failure::new(code, chain(error))
}

fn units_of(error: &StateTransitionError) -> (Vec<String>, bool) {
    let Some(failures) = error.units() else { return (Vec::new(), false) };
    let failed = failures.failed.iter().map(|unit| unit.name.to_string());
    let late = failures.late.iter().map(|unit| unit.name.to_string());
    (failed.chain(late).collect(), !failures.late.is_empty())
}

fn start_failure(error: &StateTransitionError) -> Failure {
    let (units, late) = units_of(error);
    let code = match &units[..] {
        _ if late => GuestError::TransitionTimedOut,
        [unit] if unit == VPS => GuestError::VcpuStartFailure,
        _ => GuestError::DeviceStartFailure,
    };
    Failure::new(code, chain(error)).of_units(units)
}

/// Why a transition failed; `faulted` says that it could not be undone.
fn transition_failure(what: &str, error: &StateTransitionError, faulted: bool) -> Failure {
    let (units, late) = units_of(error);
    let code = match (late, faulted) {
        (true, _) => GuestError::TransitionTimedOut,
        (false, true) => GuestError::Faulted,
        (false, false) => GuestError::InternalError,
    };
    Failure::new(code, format!("{what}: {}", chain(error))).of_units(units)
}
