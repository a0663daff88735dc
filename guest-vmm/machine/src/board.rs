//! The devices that every guest has, each with its place in the machine. A new device is one more entry in [`Board::devices`].

use crate::acpi::{self, DeviceNode};
use crate::layout;
use crate::memory::GuestMemory;
use devices::{
    AcpiPower, ByteSink, DebugExit, Device, GenerationId, GenerationIdHost, GenericEvent, GenericEventDevice,
    GenericEventLine, I8042, IoApic, IoApicRouting, IrqLine, PanicSink, Pvpanic, Rtc, SerialPort,
    SystemClock,
};
use processor::{MsiRequest, Partition};
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

/// Where a device's registers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    /// From this I/O port, so many.
    Ports(u16, u16),
    /// From this guest physical address, so many bytes.
    Memory(u64, u64),
    /// Part of every bus: the IOAPIC, which the bus tells of the ends of interrupts.
    Bus,
    /// It has none: what it shows the guest is in memory.
    None,
}

/// A device and its place.
pub(crate) struct Placed {
    pub name: String,
    pub window: Window,
    pub device: Arc<Mutex<dyn Device>>,
    /// The devices that this one uses: they run whenever it does.
    pub uses: &'static [&'static str],
    /// What the guest's firmware tables say of it, unless it is found without.
    pub acpi: Option<DeviceNode>,
}

/// Who hears of what the devices tell.
#[derive(Clone)]
pub(crate) struct Listeners {
    pub serial: Arc<dyn ByteSink>,
    pub panics: Arc<dyn PanicSink>,
}

/// The devices of one machine.
pub(crate) struct Board {
    pub ioapic: Arc<Mutex<IoApic>>,
    pub serial: Arc<Mutex<SerialPort>>,
    events: Arc<Mutex<GenericEventDevice>>,
    panics: Arc<dyn PanicSink>,
    debug_exit: bool,
}

impl Board {
    pub fn new(partition: Arc<dyn Partition>, listeners: Listeners, debug_exit: bool) -> Self {
        let Listeners { serial: output, panics } = listeners;
        let ioapic = Arc::new(Mutex::new(IoApic::new(Box::new(ToPartition(partition)))));
        let line = |pin| IrqLine::new(ioapic.clone(), pin).expect("the board's pins are the IOAPIC's");
        let serial = Arc::new(Mutex::new(SerialPort::new(line(layout::COM1_IRQ), output)));
        let events = Arc::new(Mutex::new(GenericEventDevice::new(line(layout::GENERIC_EVENT_IRQ))));
        Self { ioapic, serial, events, panics, debug_exit }
    }

    /// The power button: raised, it is pressed.
    pub fn power_button(&self) -> GenericEventLine {
        GenericEventLine::new(&self.events, GenericEvent::PowerButton)
    }

    /// Every device with its place. The generation ID is written into the memory.
    pub fn devices(&self, memory: &Arc<GuestMemory>) -> Vec<Placed> {
        let place =
            |name: &str, window, device, uses, acpi| Placed { name: name.into(), window, device, uses, acpi };
        let (ports, uart) = (Window::Ports, Some(acpi::serial_port()));
        let (rtc, clock) = (Rtc::new(Box::new(SystemClock)), Some(acpi::real_time_clock()));
        let mut devices = vec![
            place("ioapic", Window::Bus, self.ioapic.clone(), &[], None),
            place(
                "serial",
                ports(layout::COM1_PORT, SerialPort::PORTS),
                self.serial.clone(),
                &["ioapic"],
                uart,
            ),
            place("rtc", ports(layout::RTC_PORT, Rtc::PORTS), own(rtc), &[], clock),
            place("i8042", ports(layout::I8042_PORT, I8042::PORTS), own(I8042::new()), &[], None),
            place("acpi-power", ports(layout::ACPI_POWER_PORT, AcpiPower::PORTS), own(AcpiPower), &[], None),
            self.generic_event_device(),
            self.generation_id(memory),
            self.pvpanic(),
        ];
        if self.debug_exit {
            let window = ports(layout::DEBUG_EXIT_PORT, DebugExit::PORTS);
            devices.push(place("debug-exit", window, own(DebugExit), &[], None));
        }
        devices
    }

    fn generic_event_device(&self) -> Placed {
        Placed {
            name: "generic-events".into(),
            window: Window::Ports(layout::GENERIC_EVENT_PORT, GenericEventDevice::PORTS),
            device: self.events.clone(),
            uses: &["ioapic"],
            acpi: Some(acpi::events::generic_event_device()),
        }
    }

    fn generation_id(&self, memory: &Arc<GuestMemory>) -> Placed {
        let event = GenericEventLine::new(&self.events, GenericEvent::GenerationId);
        Placed {
            name: "generation-id".into(),
            window: Window::None,
            device: own(GenerationId::new(Box::new(InMemory(memory.clone())), event)),
            uses: &["generic-events"],
            acpi: Some(acpi::events::generation_id()),
        }
    }

    fn pvpanic(&self) -> Placed {
        Placed {
            name: "pvpanic".into(),
            window: Window::Ports(layout::PVPANIC_PORT, Pvpanic::PORTS),
            device: own(Pvpanic::new(self.panics.clone())),
            uses: &[],
            acpi: Some(acpi::events::pvpanic()),
        }
    }
}

fn own(device: impl Device + 'static) -> Arc<Mutex<dyn Device>> {
    Arc::new(Mutex::new(device))
}

/// The generation ID's place in guest memory.
struct InMemory(Arc<GuestMemory>);

impl GenerationIdHost for InMemory {
    fn fresh(&self) -> [u8; 16] {
        let mut id = [0; 16];
        // getrandom(2) gives up to 256 bytes at once and cannot be interrupted, once the kernel has gathered enough at its boot.
        while getrandom(&mut id, GetRandomFlags::empty()) == Err(rustix::io::Errno::INTR) {}
        id
    }

    fn publish(&self, id: [u8; 16]) {
        let address = GuestAddress(layout::GENERATION_ID.start);
        if let Err(error) = self.0.view().write_slice(&id, address) {
            tracing::error!(error = &error as &dyn std::error::Error, "the generation ID cannot be written");
        }
    }
}

/// The IOAPIC's messages on their way to the local APICs.
struct ToPartition(Arc<dyn Partition>);

impl IoApicRouting for ToPartition {
    fn set_irq_route(&self, pin: u8, request: Option<MsiRequest>) {
        if let Err(error) = self.0.set_irq_route(pin, request) {
            tracing::error!(pin, error = &error as &dyn std::error::Error, "an interrupt cannot be routed");
        }
    }

    fn assert_irq(&self, _pin: u8, request: MsiRequest) {
        if let Err(error) = self.0.signal_msi(request) {
            // The guest decides where its interrupts go: a message that nobody takes is its own affair.
            tracing::debug!(error = &error as &dyn std::error::Error, "an interrupt was not delivered");
        }
    }
}
