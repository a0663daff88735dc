//! The places of virtio devices: a window, a pin of the IOAPIC's, and a doorbell for each queue.

use crate::acpi;
use crate::board::{Placed, Window};
use crate::layout::{DEVICE_PINS, DEVICE_WINDOWS};
use crate::machine::MachineError;
use crate::memory::GuestMemory;
use devices::virtio::{
    EdgeLine, EventFd, IoThread, MmioPlace, NOTIFY_OFFSET, VirtioHost, VirtioSpec, WINDOW_BYTES,
};
use devices::{IoApic, IrqLine};
use processor::{Partition, PartitionError};
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};

/// What a device lacks.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// There are more devices than windows, or than pins of the IOAPIC.
    #[error("there is no {what} left")]
    Exhausted {
        /// Of what there is no more.
        what: &'static str,
        /// What the allocator says.
        #[source]
        source: vm_allocator::Error,
    },
    /// The host gives no descriptor or thread.
    #[error("the host gives no {what}")]
    Host {
        /// What it does not give.
        what: &'static str,
        /// What it says.
        #[source]
        source: io::Error,
    },
    /// The hypervisor does not connect it.
    #[error(transparent)]
    Partition(#[from] PartitionError),
}

/// What is left for devices.
struct Places {
    windows: AddressAllocator,
    pins: IdAllocator,
}

impl Places {
    fn new() -> Result<Self, PlaceError> {
        let bytes = DEVICE_WINDOWS.end - DEVICE_WINDOWS.start;
        let windows = AddressAllocator::new(DEVICE_WINDOWS.start, bytes).map_err(exhausted("window"))?;
        let pins = IdAllocator::new((*DEVICE_PINS.start()).into(), (*DEVICE_PINS.end()).into());
        Ok(Self { windows, pins: pins.map_err(exhausted("interrupt"))? })
    }

    fn window(&mut self) -> Result<u64, PlaceError> {
        let window = self.windows.allocate(WINDOW_BYTES, WINDOW_BYTES, AllocPolicy::FirstMatch);
        Ok(window.map_err(exhausted("window"))?.start())
    }

    fn pin(&mut self) -> Result<u8, PlaceError> {
        let pin = self.pins.allocate_id().map_err(exhausted("interrupt"))?;
        Ok(u8::try_from(pin).expect("the pins are numbered by bytes"))
    }
}

fn exhausted(what: &'static str) -> impl FnOnce(vm_allocator::Error) -> PlaceError {
    move |source| PlaceError::Exhausted { what, source }
}

/// Adds the devices behind those that are there, and gives the thread on which they work, if there are any.
pub(crate) fn add(
    specs: Vec<VirtioSpec>,
    memory: &Arc<GuestMemory>,
    partition: &dyn Partition,
    ioapic: &Arc<Mutex<IoApic>>,
    devices: &mut Vec<Placed>,
) -> Result<Option<IoThread>, MachineError> {
    let Some(first) = specs.first() else { return Ok(None) };
    let failed = |name: &str| {
        let name = name.to_owned();
        move |source| MachineError::Device { name, source }
    };
    let no_thread = |source| PlaceError::Host { what: "thread", source };
    let io = IoThread::start().map_err(no_thread).map_err(failed(&first.name))?;
    let mut places = Places::new().map_err(failed(&first.name))?;
    let host = VirtioHost { ram: memory.clone(), io: io.handle() };
    for (index, spec) in (0..).zip(specs) {
        let name = spec.name.clone();
        let placed = place(index, spec, &host, partition, ioapic, &mut places);
        devices.push(placed.map_err(failed(&name))?);
    }
    Ok(Some(io))
}

fn place(
    index: u8,
    spec: VirtioSpec,
    host: &VirtioHost,
    partition: &dyn Partition,
    ioapic: &Arc<Mutex<IoApic>>,
    places: &mut Places,
) -> Result<Placed, PlaceError> {
    if spec.shares_memory() {
        let unshared = |source| PlaceError::Host { what: "memory that can be shared", source };
        host.ram.share().map_err(unshared)?;
    }
    let (base, pin) = (places.window()?, places.pin()?);
    let doorbells = doorbells(base, spec.queue_count(), partition)?;
    let place = MmioPlace { line: line(pin, partition, ioapic)?, doorbells };
    Ok(Placed {
        name: spec.name.clone(),
        window: Window::Memory(base, WINDOW_BYTES),
        device: spec.build(host.clone(), place),
        uses: &["ioapic"],
        acpi: Some(acpi::virtio_mmio(index, base, WINDOW_BYTES, pin)),
    })
}

fn event_fd() -> Result<EventFd, PlaceError> {
    EventFd::new().map_err(|source| PlaceError::Host { what: "eventfd", source })
}

/// A doorbell for each queue, rung by the hypervisor where it can, otherwise by the device's register.
fn doorbells(base: u64, count: usize, partition: &dyn Partition) -> Result<Vec<Arc<EventFd>>, PlaceError> {
    let mut bells = Vec::with_capacity(count);
    for queue in (0..).take(count) {
        let bell = event_fd()?;
        if let Some(event_fds) = partition.event_fds() {
            event_fds.add_doorbell(base + NOTIFY_OFFSET, queue, bell.as_fd())?;
        }
        bells.push(Arc::new(bell));
    }
    Ok(bells)
}

/// The line of a pin: an irqfd where the hypervisor has them, otherwise by the IOAPIC.
fn line(
    pin: u8,
    partition: &dyn Partition,
    ioapic: &Arc<Mutex<IoApic>>,
) -> Result<Box<dyn EdgeLine>, PlaceError> {
    if let Some(event_fds) = partition.event_fds() {
        let trigger = event_fd()?;
        event_fds.add_irqfd(pin, trigger.as_fd())?;
        return Ok(Box::new(trigger));
    }
    Ok(Box::new(IrqLine::new(ioapic.clone(), pin).expect("the pins are the IOAPIC's")))
}
