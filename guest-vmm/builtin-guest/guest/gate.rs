//! The gate to ring 0; `gates.s` is its other side.

use core::arch::asm;

const MAGIC: u32 = 0x6761_7465;
const WAIT: u32 = 0;
const HALT: u32 = 1;
const CRASH: u32 = 2;
const BREAKPOINT: u32 = 3;
const WRITE_MSR: u32 = 4;
const PRINT: u32 = 5;

/// Waits for an interrupt; one that has come since it was last waited for ends the wait at once.
pub fn wait() {
    pass(WAIT, 0, 0);
}

/// Halts this VP for ever, interrupts off.
pub fn halt() -> ! {
    loop {
        pass(HALT, 0, 0);
    }
}

/// Ends in a triple fault.
pub fn crash() -> ! {
    loop {
        pass(CRASH, 0, 0);
    }
}

/// Executes `int3` in ring 0.
pub fn breakpoint() {
    pass(BREAKPOINT, 0, 0);
}

/// Writes a model-specific register.
pub fn write_msr(register: u32, value: u64) {
    pass(WRITE_MSR, u64::from(register), value);
}

/// Writes bytes to the serial port.
pub fn print(bytes: &[u8]) {
    pass(PRINT, bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64);
}

fn pass(wish: u32, operand: u64, value: u64) {
    // SAFETY: gates.s answers this exception by what `wish` says and returns behind the ud2.
    unsafe {
        asm!("ud2", inout("eax") MAGIC => _, in("edi") wish, inout("rsi") operand => _, inout("rdx") value => _, out("rcx") _);
    }
}
