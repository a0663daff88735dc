//! The Generic Event Device (ACPI 6.5, 5.6.9): tells a guest in hardware-reduced ACPI of what happens to its machine.
//!
//! One port: the events that the guest has not read yet, a bit each. Reading it takes them. The guest's `_EVT` method does that when
//! the interrupt comes, an edge, and notifies the devices that the bits stand for.
//!
//! An event is raised with one interrupt, whether or not an earlier one of its kind was read: an edge at a pin that the guest has not
//! set up yet is lost, and then the next one tells of both. Stopped, the device keeps its events, and interrupts when it starts.

use crate::device::{Stopping, stopped};
use crate::saved::register;
use crate::{ByteRegisters, Device, IrqLine};
use guest_saved_state::devices::generic_event::GenericEventState;
use inspect::{Inspect, Request};
use processor::PowerRequest;
use save_restore::{RestoreError, SaveError, SaveRestore};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What a guest is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenericEvent {
    /// Its power button was pressed.
    PowerButton,
    /// Its generation ID has changed.
    GenerationId,
}

impl GenericEvent {
    /// The event's bit in the register.
    pub const fn bit(self) -> u8 {
        match self {
            Self::PowerButton => 1 << 0,
            Self::GenerationId => 1 << 1,
        }
    }
}

const ALL_EVENTS: u8 = GenericEvent::PowerButton.bit() | GenericEvent::GenerationId.bit();

/// How often the host has raised what. No part of the guest's state.
#[derive(Debug, Default)]
struct Raised {
    power_button: u64,
    generation_id: u64,
}

/// The register of pending events, and the interrupt. Built stopped.
#[derive(Debug)]
pub struct GenericEventDevice {
    pending: u8,
    running: bool,
    interrupt: IrqLine,
    raised: Raised,
}

impl GenericEventDevice {
    /// How many ports the window takes.
    pub const PORTS: u16 = 1;

    /// A device without events, whose interrupt is an edge on the given line.
    pub fn new(interrupt: IrqLine) -> Self {
        Self { pending: 0, running: false, interrupt, raised: Raised::default() }
    }

    fn raise(&mut self, event: GenericEvent) {
        let count = match event {
            GenericEvent::PowerButton => &mut self.raised.power_button,
            GenericEvent::GenerationId => &mut self.raised.generation_id,
        };
        *count += 1;
        self.pending |= event.bit();
        self.interrupt_if_due();
    }

    fn interrupt_if_due(&self) {
        if self.running && self.pending != 0 {
            self.interrupt.pulse();
        }
    }
}

impl Device for GenericEventDevice {
    /// Interrupts if there is an event that the guest has not read.
    fn start(&mut self) {
        self.running = true;
        self.interrupt_if_due();
    }

    fn stop(&mut self) -> Stopping {
        self.running = false;
        stopped()
    }

    fn post_restore(&mut self) {}
}

impl ByteRegisters for GenericEventDevice {
    fn read_byte(&mut self, offset: u64) -> u8 {
        if offset < u64::from(Self::PORTS) { std::mem::take(&mut self.pending) } else { 0xff }
    }

    fn write_byte(&mut self, _: u64, _: u8) -> ControlFlow<PowerRequest> {
        ControlFlow::Continue(())
    }

    /// Events are for the guest as it was: they are forgotten.
    fn reset(&mut self) {
        self.pending = 0;
    }
}

impl SaveRestore for GenericEventDevice {
    type SavedState = GenericEventState;

    fn save(&mut self) -> Result<GenericEventState, SaveError> {
        Ok(GenericEventState { pending: self.pending.into() })
    }

    fn restore(&mut self, state: GenericEventState) -> Result<(), RestoreError> {
        let GenericEventState { pending } = state;
        self.pending = register("pending", pending, ALL_EVENTS.into())?;
        Ok(())
    }
}

/// Shows how often the host has raised which event, and the register as the guest would read it next.
impl Inspect for GenericEventDevice {
    fn inspect(&self, request: Request<'_>) {
        let Raised { power_button, generation_id } = &self.raised;
        request
            .respond()
            .child("raised", |request| {
                request.respond().field("power_button", power_button).field("generation_id", generation_id);
            })
            .sensitive(|response| {
                response.hex("pending", self.pending);
            });
    }
}

/// The host's end of one kind of event. Does not keep the device.
#[derive(Debug, Clone)]
pub struct GenericEventLine {
    device: Weak<Mutex<GenericEventDevice>>,
    event: GenericEvent,
}

impl GenericEventLine {
    /// The end of this event at a device.
    pub fn new(device: &Arc<Mutex<GenericEventDevice>>, event: GenericEvent) -> Self {
        Self { device: Arc::downgrade(device), event }
    }

    /// Tells the guest of the event; one that is stopped is told when it goes on. Locks the device, then the IOAPIC. Nothing once
    /// the device is gone.
    pub fn raise(&self) {
        if let Some(device) = self.device.upgrade() {
            device.lock().unwrap_or_else(PoisonError::into_inner).raise(self.event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IoDevice;
    use crate::inspected::{hex, inspected, observed};
    use crate::ioapic::tests::{Driver, Recorder, ioapic};
    use inspect::Value;

    const PIN: u8 = 9;
    const VECTOR: u8 = 0x41;

    struct Bench {
        device: Arc<Mutex<GenericEventDevice>>,
        routing: Recorder,
    }

    impl Bench {
        /// A device that runs, whose interrupt the guest has set up.
        fn running() -> Self {
            let (ioapic, routing) = ioapic();
            Driver(ioapic.clone()).set_entry(PIN, VECTOR.into());
            let device = GenericEventDevice::new(IrqLine::new(ioapic, PIN).unwrap());
            let bench = Self { device: Arc::new(Mutex::new(device)), routing };
            bench.device.lock().unwrap().start();
            bench.routing.take();
            bench
        }

        fn raise(&self, event: GenericEvent) {
            GenericEventLine::new(&self.device, event).raise();
        }

        fn interrupts(&self) -> usize {
            self.routing.take().len()
        }

        fn read(&self) -> u8 {
            let mut data = [0x55];
            self.device.lock().unwrap().read(0, &mut data);
            data[0]
        }
    }

    #[test]
    fn an_event_interrupts_and_is_taken_by_reading() {
        let bench = Bench::running();
        assert_eq!((bench.interrupts(), bench.read()), (0, 0));
        bench.raise(GenericEvent::PowerButton);
        assert_eq!((bench.interrupts(), bench.read(), bench.read()), (1, 1, 0));
        bench.raise(GenericEvent::GenerationId);
        assert_eq!((bench.interrupts(), bench.read(), bench.read()), (1, 2, 0));
    }

    #[test]
    fn events_that_were_not_read_come_together_and_each_interrupts() {
        let bench = Bench::running();
        bench.raise(GenericEvent::PowerButton);
        bench.raise(GenericEvent::GenerationId);
        bench.raise(GenericEvent::PowerButton);
        assert_eq!((bench.interrupts(), bench.read()), (3, 3));
    }

    #[test]
    fn a_stopped_guest_is_told_when_it_goes_on() {
        let bench = Bench::running();
        drop(bench.device.lock().unwrap().stop());
        bench.raise(GenericEvent::PowerButton);
        assert_eq!(bench.interrupts(), 0);
        bench.device.lock().unwrap().start();
        assert_eq!((bench.interrupts(), bench.read()), (1, 1));
        drop(bench.device.lock().unwrap().stop());
        bench.device.lock().unwrap().start();
        assert_eq!(bench.interrupts(), 0, "it was read");
    }

    #[test]
    fn a_reset_forgets_events_and_no_write_does() {
        let bench = Bench::running();
        bench.raise(GenericEvent::PowerButton);
        assert_eq!(bench.device.lock().unwrap().write(0, &[0xff]), ControlFlow::Continue(()));
        assert_eq!(inspected(&mut *bench.device.lock().unwrap(), "pending"), hex(1u8));
        IoDevice::reset(&mut *bench.device.lock().unwrap());
        assert_eq!(bench.read(), 0);
    }

    #[test]
    fn it_shows_what_was_raised_and_takes_nothing() {
        let bench = Bench::running();
        bench.raise(GenericEvent::PowerButton);
        let mut device = bench.device.lock().unwrap();
        for _ in 0..2 {
            assert_eq!(
                inspected(&mut *device, "raised/power_button"),
                inspect::Node::Value(Value::Unsigned(1))
            );
            assert_eq!(inspected(&mut *device, "pending"), hex(1u8));
        }
        assert_eq!(observed(&mut *device).to_string(), "raised:\n  power_button: 1\n  generation_id: 0\n");
    }

    #[test]
    fn a_line_outlives_its_device() {
        let bench = Bench::running();
        let line = GenericEventLine::new(&bench.device, GenericEvent::PowerButton);
        drop(bench.device);
        line.raise();
        assert_eq!(bench.routing.take(), []);
    }
}
