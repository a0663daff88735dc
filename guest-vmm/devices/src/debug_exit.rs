//! A port with which test guests end themselves and leave a value (QEMU's isa-debug-exit). No guest has it unless asked for.
//!
//! A write of one, two or four bytes at the window's base ends the guest with the value; all else is ignored, and reads are zero.

use crate::IoDevice;
use inspect::{Inspect, Request};
use processor::PowerRequest;
use save_restore::{NoSavedState, RestoreError, SaveError, SaveRestore};
use std::ops::ControlFlow;

/// The port. It keeps nothing.
#[derive(Debug, Default)]
pub struct DebugExit;

impl DebugExit {
    /// How many ports the window takes.
    pub const PORTS: u16 = 4;
}

impl IoDevice for DebugExit {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        let value = match (offset, data) {
            (0, &[a]) => a.into(),
            (0, &[a, b]) => u16::from_le_bytes([a, b]).into(),
            (0, &[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
            _ => return ControlFlow::Continue(()),
        };
        ControlFlow::Break(PowerRequest::DebugExit(value))
    }

    fn reset(&mut self) {}
}

/// The port keeps nothing.
impl SaveRestore for DebugExit {
    type SavedState = NoSavedState;

    fn save(&mut self) -> Result<NoSavedState, SaveError> {
        Ok(NoSavedState {})
    }

    fn restore(&mut self, NoSavedState {}: NoSavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Shows how large it is.
impl Inspect for DebugExit {
    fn inspect(&self, request: Request<'_>) {
        request.respond().field("ports", &Self::PORTS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspected::observed;

    #[test]
    fn a_value_of_any_width_ends_the_guest() {
        let mut written = [0x11, 0x22, 0x33, 0x44];
        for (width, value) in [(1, 0x11), (2, 0x2211), (4, 0x4433_2211)] {
            let ends = DebugExit.write(0, &written[..width]);
            assert_eq!(ends, ControlFlow::Break(PowerRequest::DebugExit(value)));
        }
        DebugExit.read(0, &mut written);
        assert_eq!(written, [0; 4]);
    }

    #[test]
    fn what_is_not_written_to_the_base_ends_nothing() {
        for offset in 1..4 {
            assert_eq!(DebugExit.write(offset, &[1]), ControlFlow::Continue(()));
        }
        assert_eq!(DebugExit.write(0, &[1; 8]), ControlFlow::Continue(()));
    }

    #[test]
    fn nothing_of_it_is_the_guests() {
        assert_eq!(observed(&mut DebugExit).to_string(), "ports: 4\n");
    }
}
