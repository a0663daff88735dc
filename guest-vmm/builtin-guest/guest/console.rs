//! The serial port: a 16550 at 0x3f8, read by interrupt, written without waiting.

use core::fmt;

use crate::{apic, gate, port};

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const MODEM_CONTROL: u16 = DATA + 4;
const LINE_STATUS: u16 = DATA + 5;

/// The longest line that is kept, in bytes; what follows it is dropped.
pub const LINE_BYTES: usize = 1024;

/// The serial port. It has no state here, so that a fault can print whatever else goes on.
pub struct Console;

impl Console {
    /// 8 bits, no parity, FIFOs on, an interrupt per received byte, routed to the boot VP.
    pub fn open() -> Self {
        apic::enable_local();
        apic::route_serial();
        port::write_u8(LINE_CONTROL, 0x03);
        port::write_u8(FIFO_CONTROL, 0x07);
        port::write_u8(MODEM_CONTROL, 0x0b);
        port::write_u8(INTERRUPT_ENABLE, 0x01);
        Self
    }

    /// Prints text as it is.
    pub fn print(&mut self, text: &str) {
        self.print_bytes(text.as_bytes());
    }

    /// Prints bytes as they are, without waiting for the transmitter.
    pub fn print_bytes(&mut self, bytes: &[u8]) {
        gate::print(bytes);
    }

    /// Reads a line up to CR or LF, without it; uses no processor time while there is no input.
    pub fn read_line<'b>(&mut self, buffer: &'b mut [u8; LINE_BYTES]) -> &'b [u8] {
        let mut used = 0;
        loop {
            let byte = read_byte();
            if byte == b'\r' || byte == b'\n' {
                return &buffer[..used];
            }
            if let Some(place) = buffer.get_mut(used) {
                *place = byte;
                used += 1;
            }
        }
    }
}

/// Waits for a byte. Interrupts are off between the look and the wait (see `gates.s`).
fn read_byte() -> u8 {
    while port::read_u8(LINE_STATUS) & 1 == 0 {
        gate::wait();
    }
    port::read_u8(DATA)
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.print(text);
        Ok(())
    }
}
