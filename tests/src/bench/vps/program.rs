//! What the guests do: loops of a few bytes, in real mode, at the beginning of their memory.

use anyhow::Context;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::service::PATIENCE;
use crate::wait;

/// A guest's memory, in bytes.
pub(in crate::bench) const MEMORY_BYTES: usize = 2 << 20;
/// Where its code begins.
pub(in crate::bench) const CODE: u64 = 0x1000;
/// The port that [`Program::Write`] writes to.
pub(in crate::bench) const PORT: u16 = 0x80;
/// The byte in memory that [`Program::Spin`] counts up.
const COUNTER: GuestAddress = GuestAddress(0x2000);

/// What all VPs of a guest do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum Program {
    /// HLT, with interrupts masked.
    Halt,
    /// Count up a byte in memory.
    Spin,
    /// Write a byte to [`PORT`].
    Write,
}

impl Program {
    fn code(self) -> &'static [u8] {
        match self {
            // hlt; jmp to it
            Self::Halt => &[0xf4, 0xeb, 0xfd],
            // inc byte [0x2000]; jmp to it
            Self::Spin => &[0xfe, 0x06, 0x00, 0x20, 0xeb, 0xfa],
            // mov dx, 0x80; out dx, al; jmp to that
            Self::Write => &[0xba, 0x80, 0x00, 0xee, 0xeb, 0xfd],
        }
    }

    /// A guest's memory with the program in it.
    pub(in crate::bench) fn load(self) -> anyhow::Result<GuestMemoryMmap> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])?;
        memory.write_slice(self.code(), GuestAddress(CODE))?;
        Ok(memory)
    }
}

/// Waits until a guest that runs [`Program::Spin`] is seen to count.
pub(in crate::bench) fn counts(memory: &GuestMemoryMmap) -> anyhow::Result<()> {
    let read = || memory.read_obj::<u8>(COUNTER).context("the guest's counter");
    let begin = read()?;
    wait::until("a guest that counts", PATIENCE, || read().is_ok_and(|now| now != begin))?;
    Ok(())
}
