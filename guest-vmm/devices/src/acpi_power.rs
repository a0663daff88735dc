//! The registers with which a guest powers itself off, hibernates or resets itself in hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 sleep control
//! and status registers, 4.8.3.6 reset register).
//!
//! One window of three ports: sleep control, sleep status, reset. S4 and S5 are offered, both of which end the guest, so the
//! status register never reports a wake: a guest that has hibernated finds its image on its disk when it boots.

use crate::ByteRegisters;
use inspect::{Inspect, Request};
use processor::PowerRequest;
use save_restore::{NoSavedState, RestoreError, SaveError, SaveRestore};
use std::ops::ControlFlow;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// The sleep control, sleep status and reset registers.
#[derive(Debug, Default)]
pub struct AcpiPower;

impl AcpiPower {
    /// The offset of the sleep control register.
    pub const SLEEP_CONTROL: u16 = 0;
    /// The offset of the sleep status register.
    pub const SLEEP_STATUS: u16 = 1;
    /// The offset of the reset register.
    pub const RESET: u16 = 2;
    /// How many ports the registers take.
    pub const PORTS: u16 = 3;
    /// The sleep type that stands for S4, hibernation: what the `\_S4` package says.
    pub const SLEEP_TYPE_S4: u8 = 4;
    /// The sleep type that stands for S5, soft off: what the `\_S5` package says.
    pub const SLEEP_TYPE_S5: u8 = 5;
    /// What resets the guest when it is written to the reset register.
    pub const RESET_VALUE: u8 = 1;

    fn sleep(value: u8) -> ControlFlow<PowerRequest> {
        if value & SLEEP_ENABLE == 0 {
            return ControlFlow::Continue(());
        }
        match value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK {
            Self::SLEEP_TYPE_S4 => ControlFlow::Break(PowerRequest::Hibernate),
            Self::SLEEP_TYPE_S5 => ControlFlow::Break(PowerRequest::PowerOff),
            _ => ControlFlow::Continue(()),
        }
    }
}

impl ByteRegisters for AcpiPower {
    fn read_byte(&mut self, offset: u64) -> u8 {
        if offset < u64::from(Self::PORTS) { 0 } else { 0xff }
    }

    fn write_byte(&mut self, offset: u64, value: u8) -> ControlFlow<PowerRequest> {
        match u16::try_from(offset) {
            Ok(Self::SLEEP_CONTROL) => Self::sleep(value),
            Ok(Self::RESET) if value == Self::RESET_VALUE => ControlFlow::Break(PowerRequest::Reset),
            _ => ControlFlow::Continue(()),
        }
    }

    fn reset(&mut self) {}
}

/// The registers keep nothing.
impl SaveRestore for AcpiPower {
    type SavedState = NoSavedState;

    fn save(&mut self) -> Result<NoSavedState, SaveError> {
        Ok(NoSavedState {})
    }

    fn restore(&mut self, NoSavedState {}: NoSavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Shows what is built into the registers: they keep nothing.
impl Inspect for AcpiPower {
    fn inspect(&self, request: Request<'_>) {
        request
            .respond()
            .field("ports", &Self::PORTS)
            .hex("sleep_type_s4", Self::SLEEP_TYPE_S4)
            .hex("sleep_type_s5", Self::SLEEP_TYPE_S5)
            .hex("reset_value", Self::RESET_VALUE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IoDevice;
    use crate::inspected::observed;

    #[test]
    fn s5_with_sleep_enable_powers_off() {
        // What Linux writes: the type first, then the type with SLP_EN.
        assert_eq!(AcpiPower.write(0, &[0x14]), ControlFlow::Continue(()));
        assert_eq!(AcpiPower.write(0, &[0x34]), ControlFlow::Break(PowerRequest::PowerOff));
    }

    #[test]
    fn s4_with_sleep_enable_hibernates() {
        assert_eq!(AcpiPower.write(0, &[0x10]), ControlFlow::Continue(()));
        assert_eq!(AcpiPower.write(0, &[0x30]), ControlFlow::Break(PowerRequest::Hibernate));
    }

    #[test]
    fn nothing_of_it_is_the_guests() {
        let shown = "ports: 3\nsleep_type_s4: 0x4\nsleep_type_s5: 0x5\nreset_value: 0x1\n";
        assert_eq!(observed(&mut AcpiPower).to_string(), shown);
    }

    #[test]
    fn other_sleep_types_do_nothing() {
        for sleep_type in [0, 1, 2, 3, 6, 7] {
            let value = SLEEP_ENABLE | (sleep_type << SLEEP_TYPE_SHIFT);
            assert_eq!(AcpiPower.write(0, &[value]), ControlFlow::Continue(()), "type {sleep_type}");
        }
    }

    #[test]
    fn only_the_reset_value_resets() {
        assert_eq!(AcpiPower.write(2, &[0]), ControlFlow::Continue(()));
        assert_eq!(AcpiPower.write(2, &[1]), ControlFlow::Break(PowerRequest::Reset));
    }

    #[test]
    fn the_status_register_reports_no_wake_and_ignores_its_clearing() {
        let mut data = [0xaa];
        AcpiPower.read(1, &mut data);
        assert_eq!(data, [0]);
        assert_eq!(AcpiPower.write(1, &[0x80]), ControlFlow::Continue(()));
    }
}
