//! A VP's local APIC.

use inspect::{Inspect, Request};
use std::fmt;

/// How many bytes the registers of a local APIC take.
pub const LOCAL_APIC_BYTES: usize = 1024;

/// A VP's local APIC (Intel SDM volume 3, chapter 11).
#[derive(Clone, PartialEq, Eq)]
pub struct LocalApic {
    /// IA32_APIC_BASE: where it is, and its mode.
    pub base: u64,
    /// Its registers as they lie in memory, each in the first 4 of 16 bytes.
    pub registers: Box<[u8; LOCAL_APIC_BYTES]>,
}

/// Registers that are looked for by name.
const NAMED: [(&str, usize); 14] = [
    ("id", 0x20),
    ("version", 0x30),
    ("task_priority", 0x80),
    ("logical_destination", 0xd0),
    ("destination_format", 0xe0),
    ("spurious_vector", 0xf0),
    ("error_status", 0x280),
    ("lvt_timer", 0x320),
    ("lvt_lint0", 0x350),
    ("lvt_lint1", 0x360),
    ("lvt_error", 0x370),
    ("timer_initial_count", 0x380),
    ("timer_current_count", TIMER_CURRENT_COUNT),
    ("timer_divide", 0x3e0),
];

const PROCESSOR_PRIORITY: usize = 0xa0;
const TIMER_CURRENT_COUNT: usize = 0x390;
/// Bitmaps of 256 vectors.
const IN_SERVICE: usize = 0x100;
const REQUESTED: usize = 0x200;
const BITMAP_REGISTERS: usize = 8;

impl LocalApic {
    /// The register at this offset, a multiple of 16 below 1024.
    pub fn register(&self, offset: usize) -> u32 {
        let bytes = self.registers[offset..].first_chunk().expect("an offset below the end");
        u32::from_le_bytes(*bytes)
    }

    /// What does not change by itself while the VP is stopped: a timer may run on, and request an interrupt, and one register
    /// is derived from others.
    pub(super) fn settled(&self) -> Self {
        let mut settled = self.clone();
        settled.registers[PROCESSOR_PRIORITY..][..4].fill(0);
        settled.registers[TIMER_CURRENT_COUNT..][..4].fill(0);
        settled.registers[REQUESTED..][..BITMAP_REGISTERS * 16].fill(0);
        settled
    }

    /// The vectors that are set in a bitmap.
    fn vectors(&self, bitmap: usize) -> Vec<String> {
        let set = |vector: &usize| {
            let register = self.register(bitmap + vector / 32 * 16);
            register >> (vector % 32) & 1 == 1
        };
        (0..BITMAP_REGISTERS * 32).filter(set).map(|vector| format!("{vector:#x}")).collect()
    }
}

impl fmt::Debug for LocalApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalApic {{ base: {:#x}, id: {:#x}, .. }}", self.base, self.register(0x20))
    }
}

impl Inspect for LocalApic {
    fn inspect(&self, request: Request<'_>) {
        let mut response = request.respond();
        response.hex("base", self.base);
        for (name, offset) in NAMED {
            response.hex(name, self.register(offset));
        }
        response.field_with("in_service", || self.vectors(IN_SERVICE).join(" "));
        response.field_with("requested", || self.vectors(REQUESTED).join(" "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_read_from_bitmaps_and_leave_the_settled_state() {
        let mut apic = LocalApic { base: 0xfee0_0900, registers: Box::new([0; LOCAL_APIC_BYTES]) };
        apic.registers[REQUESTED + 0x10] = 1 << 3;
        apic.registers[REQUESTED + 0x73] = 1 << 7;
        apic.registers[IN_SERVICE + 0x10] = 1;
        assert_eq!(apic.vectors(REQUESTED), ["0x23", "0xff"]);
        assert_eq!(apic.settled().vectors(REQUESTED), Vec::<String>::new());
        assert_eq!(apic.settled().vectors(IN_SERVICE), ["0x20"]);
    }
}
