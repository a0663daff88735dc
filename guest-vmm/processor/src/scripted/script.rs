//! The builder of scripts.

use super::elf;
use super::instruction::{Instruction, MAX_ACCESS};
use crate::VpIndex;

/// Where a script lies in guest memory unless it says otherwise, and starts: 1 MiB.
pub const SCRIPT_BASE: u32 = 0x10_0000;

/// A place in a script, to jump to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(u64);

impl Label {
    /// Its guest physical address.
    pub fn address(self) -> u64 {
        self.0
    }
}

/// A guest for [`super::ScriptedHypervisor`], assembled instruction by instruction.
///
/// ```
/// # use processor::scripted::Script;
/// let mut script = Script::new();
/// script.out(0x3f8, b"READY\n");
/// let ready = script.here();
/// script.hlt().jump(ready);
/// let kernel = script.to_elf();
/// # assert_eq!(&kernel[..4], b"\x7fELF");
/// ```
#[derive(Debug, Clone)]
pub struct Script {
    base: u32,
    code: Vec<u8>,
}

impl Default for Script {
    fn default() -> Self {
        Self::new()
    }
}

impl Script {
    /// An empty script at [`SCRIPT_BASE`].
    pub fn new() -> Self {
        Self::at(SCRIPT_BASE)
    }

    /// An empty script at a guest physical address.
    pub fn at(base: u32) -> Self {
        Self { base, code: Vec::new() }
    }

    /// The place of the next instruction.
    pub fn here(&self) -> Label {
        Label(u64::from(self.base) + self.code.len() as u64)
    }

    /// The script's bytes, which belong at its base.
    pub fn code(&self) -> &[u8] {
        &self.code
    }

    /// The script as an ELF64 executable with a PVH entry (Xen, PHYS32_ENTRY note), as an ordinary boot loader takes it.
    pub fn to_elf(&self) -> Vec<u8> {
        elf::executable(self.base, &self.code)
    }

    /// Writes the bytes to a port, one byte at a time.
    pub fn out(&mut self, port: u16, data: &[u8]) -> &mut Self {
        for data in data.chunks(u16::MAX.into()) {
            self.put(&Instruction::Out { port, data: data.to_vec() });
        }
        self
    }

    /// Writes two bytes to a port at once, as ACPI's power-off does.
    pub fn out_word(&mut self, port: u16, value: u16) -> &mut Self {
        self.put(&Instruction::OutValue { port, width: 2, value: value.into() })
    }

    /// Writes four bytes to a port at once.
    pub fn out_long(&mut self, port: u16, value: u32) -> &mut Self {
        self.put(&Instruction::OutValue { port, width: 4, value })
    }

    /// Reads a byte from a port and writes it to another.
    pub fn echo(&mut self, from: u16, to: u16) -> &mut Self {
        self.put(&Instruction::Echo { from, to })
    }

    /// Writes to guest physical addresses, memory or registers, eight bytes at once and the rest at once.
    pub fn write(&mut self, address: u64, data: &[u8]) -> &mut Self {
        for (chunk, address) in data.chunks(MAX_ACCESS.into()).zip((address..).step_by(MAX_ACCESS.into())) {
            self.put(&Instruction::Write { address, data: chunk.to_vec() });
        }
        self
    }

    /// Reads four bytes at a guest physical address, memory or register, at once, and writes them to a port, one at a time.
    pub fn read_long(&mut self, address: u64, port: u16) -> &mut Self {
        self.put(&Instruction::Read { address, len: 4, port })
    }

    /// Reads eight bytes as [`Script::read_long`] reads four.
    pub fn read_quad(&mut self, address: u64, port: u16) -> &mut Self {
        self.put(&Instruction::Read { address, len: 8, port })
    }

    /// Waits for an interrupt.
    pub fn hlt(&mut self) -> &mut Self {
        self.put(&Instruction::Halt)
    }

    /// Runs for ever and does nothing.
    pub fn spin(&mut self) -> &mut Self {
        self.put(&Instruction::Spin)
    }

    /// Goes on at the label.
    pub fn jump(&mut self, to: Label) -> &mut Self {
        self.put(&Instruction::Jump { target: to.0 })
    }

    /// Ends the VP with a fault.
    pub fn fault(&mut self) -> &mut Self {
        self.put(&Instruction::Fault)
    }

    /// Ends the VP with a fault for this reason, as a hypervisor would name it, of at most 64 KiB less one byte.
    pub fn fault_named(&mut self, reason: &str) -> &mut Self {
        let reason = &reason.as_bytes()[..reason.floor_char_boundary(u16::MAX.into())];
        self.put(&Instruction::FaultNamed { reason: reason.to_vec() })
    }

    /// Ends the VP with a triple fault.
    pub fn triple_fault(&mut self) -> &mut Self {
        self.put(&Instruction::TripleFault)
    }

    /// Starts another VP at the label, if it waits to be started.
    pub fn start_vp(&mut self, vp: VpIndex, at: Label) -> &mut Self {
        self.put(&Instruction::StartVp { vp, target: at.0 })
    }

    /// Reads a byte from a port again and again until one of the mask's bits is set in it.
    pub fn poll(&mut self, port: u16, mask: u8) -> &mut Self {
        self.put(&Instruction::Poll { port, mask })
    }

    /// Waits for a byte of serial input (16550 at `port`: line status at port + 5, bit 0) and writes it to `to`.
    pub fn serial_input(&mut self, port: u16, to: u16) -> &mut Self {
        self.poll(port.wrapping_add(5), 1).echo(port, to)
    }

    /// Sets the counter (RCX).
    pub fn counter(&mut self, value: u64) -> &mut Self {
        self.put(&Instruction::SetCounter { value })
    }

    /// Takes one from the counter, and goes on at the label unless it is zero now.
    pub fn repeat(&mut self, from: Label) -> &mut Self {
        self.put(&Instruction::Repeat { target: from.0 })
    }

    /// Writes the vector of the interrupt that ended the last `hlt` to a port.
    pub fn out_vector(&mut self, port: u16) -> &mut Self {
        self.put(&Instruction::OutVector { port })
    }

    /// Puts bytes into the code that no builder makes, to see what becomes of them.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.code.extend(bytes);
        self
    }

    fn put(&mut self, instruction: &Instruction) -> &mut Self {
        instruction.encode(&mut self.code);
        self
    }
}
