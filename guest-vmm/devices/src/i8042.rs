//! As much of the PC's keyboard controller (Intel 8042) and of system control port B as a guest without a keyboard touches.
//!
//! One window of five ports from 0x60. Command 0xfe, which pulses the reset line of the processors, resets the guest: Linux
//! does it with `reboot=k`, and older systems know nothing else.
//!
//! There is no keyboard behind it. The status register says so in a way that ends every wait soon: the output buffer is full
//! for ever, which a driver that probes takes for a controller that is not there after reading a handful of bytes; the input
//! buffer is always empty, so that a driver that wants to send the reset command does so at once. With no bit set instead, a probe
//! runs into a time-out of half a second for each command.

use crate::ByteRegisters;
use crate::saved::register;
use guest_saved_state::devices::i8042::I8042State;
use inspect::{Inspect, Request};
use processor::PowerRequest;
use save_restore::{RestoreError, SaveError, SaveRestore};
use std::ops::ControlFlow;

const DATA: u64 = 0;
const PORT_B: u64 = 1;
const STATUS_COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const COMMAND_PULSE_RESET: u8 = 0xfe;

/// The bits of port B that keep what is written: timer 2's gate, the speaker, the two error enables.
const PORT_B_WRITABLE: u8 = 0x0f;
const PORT_B_REFRESH: u8 = 1 << 4;
/// Timer 2's output. There is no such timer; a guest that waits for it to end must not wait for ever.
const PORT_B_TIMER2_OUT: u8 = 1 << 5;

/// The keyboard controller's reset command, and system control port B.
#[derive(Debug, Default)]
pub struct I8042 {
    /// The writable bits, and the refresh bit as it was read last.
    port_b: u8,
}

impl I8042 {
    /// How many ports the window takes, from port 0x60.
    pub const PORTS: u16 = 5;

    /// A controller without a keyboard.
    pub fn new() -> Self {
        Self::default()
    }

    /// Port B, whose refresh bit toggles as memory refresh made it do: guests count it to wait.
    fn read_port_b(&mut self) -> u8 {
        let value = self.port_b();
        self.port_b ^= PORT_B_REFRESH;
        value
    }

    /// What port B reads next.
    fn port_b(&self) -> u8 {
        (self.port_b ^ PORT_B_REFRESH) | PORT_B_TIMER2_OUT
    }
}

impl SaveRestore for I8042 {
    type SavedState = I8042State;

    fn save(&mut self) -> Result<I8042State, SaveError> {
        let Self { port_b } = self;
        Ok(I8042State { port_b: (*port_b).into() })
    }

    fn restore(&mut self, state: I8042State) -> Result<(), RestoreError> {
        let I8042State { port_b } = state;
        self.port_b = register("port_b", port_b, (PORT_B_WRITABLE | PORT_B_REFRESH).into())?;
        Ok(())
    }
}

/// Shows the registers as the guest would read them next. There is no output: nobody types.
impl Inspect for I8042 {
    fn inspect(&self, request: Request<'_>) {
        request.respond().field("keyboard", &false).sensitive(|response| {
            response.child("registers", |request| {
                request.respond().hex("status", STATUS_OUTPUT_FULL).hex("port_b", self.port_b());
            });
        });
    }
}

impl ByteRegisters for I8042 {
    fn read_byte(&mut self, offset: u64) -> u8 {
        match offset {
            DATA => 0,
            PORT_B => self.read_port_b(),
            STATUS_COMMAND => STATUS_OUTPUT_FULL,
            _ => 0xff,
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8) -> ControlFlow<PowerRequest> {
        match offset {
            PORT_B => self.port_b = (self.port_b & !PORT_B_WRITABLE) | (value & PORT_B_WRITABLE),
            STATUS_COMMAND if value == COMMAND_PULSE_RESET => return ControlFlow::Break(PowerRequest::Reset),
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IoDevice;
    use crate::inspected::{hex, inspected, observed};

    fn read(device: &mut I8042, offset: u64) -> u8 {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn it_shows_what_a_guest_reads_next_and_does_not_tick() {
        let mut device = I8042::new();
        assert_eq!(device.write(1, &[0x03]), ControlFlow::Continue(()));
        for _ in 0..3 {
            let shown = [0, 1].map(|_| inspected(&mut device, "registers/port_b"));
            let next = read(&mut device, 1);
            assert_eq!(shown, [hex(next), hex(next)]);
        }
        assert_eq!(inspected(&mut device, "registers/status"), hex(read(&mut device, 4)));
        assert_eq!(observed(&mut device).to_string(), "keyboard: false\n");
    }

    #[test]
    fn a_guest_resets_itself_as_linux_does() {
        let mut device = I8042::new();
        // kb_wait: the input buffer must be empty.
        assert_eq!(read(&mut device, 4) & 0x02, 0);
        assert_eq!(device.write(4, &[0xfe]), ControlFlow::Break(PowerRequest::Reset));
    }

    #[test]
    fn other_commands_and_data_do_nothing() {
        let mut device = I8042::new();
        for command in 0..0xfe {
            assert_eq!(device.write(4, &[command]), ControlFlow::Continue(()));
            assert_eq!(device.write(0, &[command]), ControlFlow::Continue(()));
        }
    }

    #[test]
    fn a_probe_that_drains_the_output_buffer_gives_up() {
        let mut device = I8042::new();
        // i8042_flush reads at most 32 bytes before it calls the controller absent.
        for _ in 0..=32 {
            assert_ne!(read(&mut device, 4) & 0x01, 0);
            read(&mut device, 0);
        }
    }

    #[test]
    fn port_b_reports_no_error_and_lets_waits_end() {
        let mut device = I8042::new();
        assert_eq!(device.write(1, &[0xff]), ControlFlow::Continue(()));
        let (first, second) = (read(&mut device, 1), read(&mut device, 1));
        assert_eq!(first & 0xc0, 0, "neither a parity nor a channel error");
        assert_eq!(first & 0x2f, 0x2f);
        assert_eq!((first ^ second) & 0x10, 0x10, "the refresh bit toggles");
        IoDevice::reset(&mut device);
        assert_eq!(read(&mut device, 1) & 0x0f, 0);
    }
}
