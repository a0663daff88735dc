//! The devices: those of the board (IOAPIC, serial port, RTC, keyboard controller, ACPI power registers and events, VM generation
//! ID, pvpanic, a port for test guests), and virtio devices.
//!
//! A device implements [`IoDevice`], or [`ByteRegisters`] if all of its registers are one byte wide. It is told offsets, never
//! addresses, and owns nothing but its registers: interrupts leave through an [`IrqLine`] into the [`IoApic`], whose messages
//! leave through [`IoApicRouting`]; bytes leave through a [`ByteSink`].
//!
//! A device shows itself in the inspection tree. What its registers hold is the guest's own and marked as sensitive. They are
//! shown as a guest would read them next, and never read on the guest's way: looking at a device changes nothing.
//!
//! A device is saved into its message of the crate `guest-saved-state`. A restore looks at every field before it changes
//! anything. What is saved is what the guest could tell apart; bytes that the guest has sent are gone, and the time is the host's.
//!
//! Limits: one IOAPIC with 24 pins, whose messages reach the local APICs 0 to 254; one serial port; no interrupt from the RTC.

mod absent;
mod acpi_power;
mod byte_sink;
mod debug_exit;
mod device;
mod generation_id;
mod generic_event;
#[cfg(test)]
mod hostile_access;
mod i8042;
#[cfg(test)]
mod inspected;
mod ioapic;
mod pvpanic;
#[cfg(test)]
mod restored;
mod rtc;
mod saved;
mod serial;
pub mod virtio;

pub use absent::Absent;
pub use acpi_power::AcpiPower;
pub use byte_sink::ByteSink;
pub use debug_exit::DebugExit;
pub use device::{ByteRegisters, Device, IoDevice, Stopping};
pub use generation_id::{GenerationId, GenerationIdHost};
pub use generic_event::{GenericEvent, GenericEventDevice, GenericEventLine};
pub use i8042::I8042;
pub use ioapic::{IoApic, IoApicRouting, IrqLine, PIN_COUNT};
pub use pvpanic::{GuestPanic, PanicSink, Pvpanic};
pub use rtc::{HostClock, Rtc, SystemClock};
pub use serial::{INPUT_CAPACITY, SerialInput, SerialPort};
