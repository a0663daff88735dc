//! pvpanic (QEMU, docs/specs/pvpanic.rst, the ISA device): a guest's kernel tells that it has panicked.
//!
//! One port. It reads as the events that the host understands; a bit written is an event. A panic goes to a [`PanicSink`]; a
//! shutdown that "should be processed by the host" powers the guest off. Bits that are not defined are ignored.

use crate::ByteRegisters;
use inspect::{Inspect, Request};
use processor::PowerRequest;
use save_restore::{NoSavedState, RestoreError, SaveError, SaveRestore};
use std::ops::ControlFlow;
use std::sync::Arc;

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;
const SHUTDOWN: u8 = 1 << 2;

/// What a guest reports of its own kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestPanic {
    /// It has panicked.
    Panicked,
    /// It has panicked, and goes on with a crash kernel.
    CrashLoaded,
}

/// Who hears of a guest's panics.
///
/// Called on VP threads with the device's lock held, as often as the guest likes: must never block, and must keep no more for many
/// calls than for one.
pub trait PanicSink: Send + Sync {
    /// The guest has reported a panic.
    fn panicked(&self, panic: GuestPanic);
}

impl<F: Fn(GuestPanic) + Send + Sync> PanicSink for F {
    fn panicked(&self, panic: GuestPanic) {
        self(panic);
    }
}

/// The port. It keeps nothing of the guest's.
pub struct Pvpanic {
    sink: Arc<dyn PanicSink>,
    panicked: u64,
    crash_loaded: u64,
}

impl Pvpanic {
    /// How many ports the window takes.
    pub const PORTS: u16 = 1;

    /// A port whose panics go to this sink.
    pub fn new(sink: Arc<dyn PanicSink>) -> Self {
        Self { sink, panicked: 0, crash_loaded: 0 }
    }
}

impl ByteRegisters for Pvpanic {
    fn read_byte(&mut self, offset: u64) -> u8 {
        if offset < u64::from(Self::PORTS) { PANICKED | CRASH_LOADED | SHUTDOWN } else { 0xff }
    }

    fn write_byte(&mut self, offset: u64, value: u8) -> ControlFlow<PowerRequest> {
        if offset >= u64::from(Self::PORTS) {
            return ControlFlow::Continue(());
        }
        if value & PANICKED != 0 {
            self.panicked += 1;
            self.sink.panicked(GuestPanic::Panicked);
        }
        if value & CRASH_LOADED != 0 {
            self.crash_loaded += 1;
            self.sink.panicked(GuestPanic::CrashLoaded);
        }
        match value & SHUTDOWN {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(PowerRequest::PowerOff),
        }
    }

    /// What was reported stays reported.
    fn reset(&mut self) {}
}

/// The port keeps nothing.
impl SaveRestore for Pvpanic {
    type SavedState = NoSavedState;

    fn save(&mut self) -> Result<NoSavedState, SaveError> {
        Ok(NoSavedState {})
    }

    fn restore(&mut self, NoSavedState {}: NoSavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Shows how often the guest has reported what in this machine, resets included.
impl Inspect for Pvpanic {
    fn inspect(&self, request: Request<'_>) {
        request.respond().field("panicked", &self.panicked).field("crash_loaded", &self.crash_loaded);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IoDevice;
    use crate::inspected::observed;
    use std::sync::Mutex;

    type Heard = Arc<Mutex<Vec<GuestPanic>>>;

    fn device() -> (Pvpanic, Heard) {
        let heard = Heard::default();
        let sink = heard.clone();
        (Pvpanic::new(Arc::new(move |panic| sink.lock().unwrap().push(panic))), heard)
    }

    #[test]
    fn a_driver_finds_every_event() {
        let mut data = [0; 2];
        device().0.read(0, &mut data);
        assert_eq!(data, [7, 0xff]);
    }

    #[test]
    fn each_bit_is_a_report_and_bits_that_are_not_defined_are_none() {
        let (mut device, heard) = device();
        for value in [1, 2, 3, 0, 0xf8] {
            assert_eq!(device.write(0, &[value]), ControlFlow::Continue(()));
        }
        let expected = [GuestPanic::Panicked, GuestPanic::CrashLoaded];
        assert_eq!(*heard.lock().unwrap(), [expected, expected].concat());
        assert_eq!(observed(&mut device).to_string(), "panicked: 2\ncrash_loaded: 2\n");
    }

    #[test]
    fn a_shutdown_powers_off_after_what_came_with_it() {
        let (mut device, heard) = device();
        assert_eq!(device.write(0, &[5]), ControlFlow::Break(PowerRequest::PowerOff));
        assert_eq!(*heard.lock().unwrap(), [GuestPanic::Panicked]);
    }

    #[test]
    fn beside_the_port_there_is_nothing() {
        let (mut device, heard) = device();
        assert_eq!(device.write(1, &[1]), ControlFlow::Continue(()));
        assert_eq!(*heard.lock().unwrap(), []);
    }
}
