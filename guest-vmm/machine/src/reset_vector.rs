//! The code at the reset vector, which is all that this machine has of a BIOS: it resets the machine.
//!
//! Linux jumps there in real mode to reboot a machine that has hardware-reduced ACPI and no EFI, unless its command line names
//! another way with `reboot=`: it then takes EFI for required, and the BIOS for the next best.

use crate::layout::{ACPI_POWER_PORT, RESET_VECTOR};
use devices::AcpiPower;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Writes the code into guest memory.
pub(crate) fn write(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_slice(&code(), GuestAddress(RESET_VECTOR.start))
}

/// Real-mode code that writes the reset register of [`AcpiPower`], and halts should that be in vain.
fn code() -> [u8; 9] {
    const MOV_DX: u8 = 0xba;
    const MOV_AL: u8 = 0xb0;
    const OUT_DX_AL: u8 = 0xee;
    const HLT: u8 = 0xf4;
    const JMP: u8 = 0xeb;
    /// From the end of the jump to the halt.
    const BACK: u8 = 0xfd;
    let [low, high] = (ACPI_POWER_PORT + AcpiPower::RESET).to_le_bytes();
    [MOV_DX, low, high, MOV_AL, AcpiPower::RESET_VALUE, OUT_DX_AL, HLT, JMP, BACK]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_lies_where_a_pc_starts() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&memory).unwrap();
        let mut bytes = [0; 9];
        memory.read_slice(&mut bytes, GuestAddress(0xffff << 4)).unwrap();
        // mov $0x602, %dx; mov $1, %al; out %al, (%dx); hlt; jmp to the hlt
        assert_eq!(bytes, [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd]);
    }
}
