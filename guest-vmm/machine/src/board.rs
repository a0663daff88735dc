//! The devices that every guest has, each with its place in the machine. A new device is one more entry in [`Board::devices`].

use crate::acpi::{self, DeviceNode};
use crate::layout;
use devices::{
    AcpiPower, ByteSink, Device, I8042, IoApic, IoApicRouting, IrqLine, Rtc, SerialPort, SystemClock,
};
use processor::{MsiRequest, Partition};
use std::sync::{Arc, Mutex};

/// Where a device's registers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    /// From this I/O port, so many.
    Ports(u16, u16),
    /// From this guest physical address, so many bytes.
    Memory(u64, u64),
    /// Part of every bus: the IOAPIC, which the bus tells of the ends of interrupts.
    Bus,
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

/// The devices of one machine.
pub(crate) struct Board {
    pub ioapic: Arc<Mutex<IoApic>>,
    pub serial: Arc<Mutex<SerialPort>>,
}

impl Board {
    pub fn new(partition: Arc<dyn Partition>, output: Arc<dyn ByteSink>) -> Self {
        let ioapic = Arc::new(Mutex::new(IoApic::new(Box::new(ToPartition(partition)))));
        let line = IrqLine::new(ioapic.clone(), layout::COM1_IRQ).expect("COM1's pin is one of the IOAPIC's");
        Self { ioapic, serial: Arc::new(Mutex::new(SerialPort::new(line, output))) }
    }

    /// Every device with its place.
    pub fn devices(&self) -> Vec<Placed> {
        let place =
            |name: &str, window, device, uses, acpi| Placed { name: name.into(), window, device, uses, acpi };
        let (ports, uart) = (Window::Ports, Some(acpi::serial_port()));
        let (rtc, clock) = (Rtc::new(Box::new(SystemClock)), Some(acpi::real_time_clock()));
        vec![
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
        ]
    }
}

fn own(device: impl Device + 'static) -> Arc<Mutex<dyn Device>> {
    Arc::new(Mutex::new(device))
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
