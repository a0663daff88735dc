//! Where a linear address lies in guest physical memory: the walk that a processor makes (Intel SDM volume 3, chapter 4).
//!
//! All modes of x86: no paging, 32-bit, PAE, 4-level and 5-level, with large pages. Limits: nothing is marked as accessed or
//! dirty, and permissions and protection keys are not asked for, since a debugger may read what the guest may not. In the PAE mode
//! the top table is read from memory; a processor may still use an older one.

use processor::SystemRegisters;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;

/// Bits 12 to 51 of an entry of 8 bytes.
const FRAME: u64 = ((1 << 52) - 1) & !0xfff;

/// Without long mode a linear address has 32 bits.
const NARROW_END: u64 = 1 << 32;

/// Why a linear address leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unmapped {
    /// The upper bits are not all alike, or there are more than the mode has.
    #[error("{address:#x} is no linear address in the VP's mode of {bits} bits")]
    NotLinear {
        /// The address.
        address: u64,
        /// How many bits a linear address has.
        bits: u32,
    },
    /// An entry on the way is not present.
    #[error("{address:#x} is not mapped: the entry of level {level} at {entry:#x} is not present")]
    NotPresent {
        /// The linear address.
        address: u64,
        /// Which table, 1 being the last.
        level: u32,
        /// The entry's guest physical address.
        entry: u64,
    },
    /// A table is where there is no memory.
    #[error(
        "{address:#x} is not mapped: the table of level {level} is at {entry:#x}, where there is no memory"
    )]
    NoTable {
        /// The linear address.
        address: u64,
        /// Which table, 1 being the last.
        level: u32,
        /// The entry's guest physical address.
        entry: u64,
    },
}

/// The guest physical address of a linear one, as a VP with these registers sees it.
///
/// # Errors
/// When it is not mapped.
pub fn translate(
    memory: &impl GuestMemoryBackend,
    registers: &SystemRegisters,
    address: u64,
) -> Result<u64, Unmapped> {
    let Some(mode) = Mode::of(registers) else { return narrow(address) };
    mode.check(address)?;
    let mut table = registers.cr3 & mode.top_mask();
    for level in (1..=mode.levels()).rev() {
        let entry_at = table + mode.index(address, level) * mode.entry_bytes();
        let read = match mode {
            Mode::Bits32 { .. } => read::<u32>(memory, entry_at).map(u64::from),
            _ => read::<u64>(memory, entry_at),
        };
        let entry = read.ok_or(Unmapped::NoTable { address, level, entry: entry_at })?;
        if entry & PRESENT == 0 {
            return Err(Unmapped::NotPresent { address, level, entry: entry_at });
        }
        let offset = (1 << mode.shift(level)) - 1;
        if level == 1 || (entry & LARGE != 0 && mode.may_be_large(level)) {
            return Ok(mode.frame(entry, level) & !offset | address & offset);
        }
        table = mode.frame(entry, 1);
    }
    unreachable!("the last level ends the walk")
}

fn narrow(address: u64) -> Result<u64, Unmapped> {
    if address < NARROW_END { Ok(address) } else { Err(Unmapped::NotLinear { address, bits: 32 }) }
}

fn read<T: ByteValued>(memory: &impl GuestMemoryBackend, at: u64) -> Option<T> {
    memory.read_obj(GuestAddress(at)).ok()
}

/// How a VP translates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Bits32 { large_pages: bool },
    Pae,
    FourLevel,
    FiveLevel,
}

impl Mode {
    /// None without paging.
    fn of(registers: &SystemRegisters) -> Option<Self> {
        let &SystemRegisters { cr0, cr4, efer, .. } = registers;
        if cr0 & CR0_PG == 0 {
            return None;
        }
        Some(match (efer & EFER_LMA != 0, cr4 & CR4_PAE != 0) {
            (true, _) if cr4 & CR4_LA57 != 0 => Self::FiveLevel,
            (true, _) => Self::FourLevel,
            (false, true) => Self::Pae,
            (false, false) => Self::Bits32 { large_pages: cr4 & CR4_PSE != 0 },
        })
    }

    fn check(self, address: u64) -> Result<(), Unmapped> {
        let bits = match self {
            Self::Bits32 { .. } | Self::Pae => return narrow(address).map(drop),
            Self::FourLevel => 48,
            Self::FiveLevel => 57,
        };
        let unused = 64 - bits;
        let extended = (address.cast_signed() << unused >> unused).cast_unsigned();
        if extended == address { Ok(()) } else { Err(Unmapped::NotLinear { address, bits }) }
    }

    fn levels(self) -> u32 {
        match self {
            Self::Bits32 { .. } => 2,
            Self::Pae => 3,
            Self::FourLevel => 4,
            Self::FiveLevel => 5,
        }
    }

    fn entry_bytes(self) -> u64 {
        if matches!(self, Self::Bits32 { .. }) { 4 } else { 8 }
    }

    /// Where the top table is in CR3.
    fn top_mask(self) -> u64 {
        match self {
            Self::Bits32 { .. } => 0xffff_f000,
            Self::Pae => 0xffff_ffe0,
            Self::FourLevel | Self::FiveLevel => FRAME,
        }
    }

    /// The lowest bit of an address that a level's index holds.
    fn shift(self, level: u32) -> u32 {
        let index_bits = if matches!(self, Self::Bits32 { .. }) { 10 } else { 9 };
        12 + index_bits * (level - 1)
    }

    fn index(self, address: u64, level: u32) -> u64 {
        let entries = match (self, level) {
            (Self::Bits32 { .. }, _) => 1024,
            (Self::Pae, 3) => 4,
            _ => 512,
        };
        address >> self.shift(level) & (entries - 1)
    }

    fn may_be_large(self, level: u32) -> bool {
        match self {
            Self::Bits32 { large_pages } => large_pages && level == 2,
            Self::Pae => level == 2,
            Self::FourLevel | Self::FiveLevel => level == 2 || level == 3,
        }
    }

    /// Where an entry's page or table is. The caller clears what is below the page.
    fn frame(self, entry: u64, level: u32) -> u64 {
        match (self, level) {
            // PSE-36: bits 32 to 39 of the address are in the entry's bits 13 to 20.
            (Self::Bits32 { .. }, 2) => entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32,
            _ => entry & FRAME,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::GuestMemoryMmap;

    const MEMORY_BYTES: usize = 4 << 20;
    const WRITABLE: u64 = 1 << 1;
    const EFER_LME: u64 = 1 << 8;
    const PAGE: u64 = 4096;
    const ALL: [Mode; 5] = [
        Mode::Bits32 { large_pages: false },
        Mode::Bits32 { large_pages: true },
        Mode::Pae,
        Mode::FourLevel,
        Mode::FiveLevel,
    ];

    /// Builds tables entry by entry, with the sizes of the manual's tables 4-2 to 4-20 in its own words.
    struct Builder {
        memory: GuestMemoryMmap,
        mode: Mode,
        next_table: u64,
        root: u64,
    }

    impl Builder {
        fn new(mode: Mode) -> Self {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
            // A PAE root need not be on a page's boundary.
            let root = if mode == Mode::Pae { 0x1020 } else { 0x1000 };
            Self { memory, mode, next_table: 0x2000, root }
        }

        fn registers(&self) -> SystemRegisters {
            let (cr4, efer) = match self.mode {
                Mode::Bits32 { large_pages } => (if large_pages { CR4_PSE } else { 0 }, 0),
                Mode::Pae => (CR4_PAE, 0),
                Mode::FourLevel => (CR4_PAE, EFER_LME | EFER_LMA),
                Mode::FiveLevel => (CR4_PAE | CR4_LA57, EFER_LME | EFER_LMA),
            };
            // Bits 3 and 4 of CR3 are no part of the address.
            SystemRegisters {
                cr0: CR0_PG | 1,
                cr3: self.root | 0x18,
                cr4,
                efer,
                ..SystemRegisters::default()
            }
        }

        /// The shifts of the tables' indices, the top one first, and how wide an entry is.
        fn plan(&self) -> (&'static [u32], u64, u64) {
            match self.mode {
                Mode::Bits32 { .. } => (&[22, 12], 4, 0x3ff),
                Mode::Pae => (&[30, 21, 12], 8, 0x1ff),
                Mode::FourLevel => (&[39, 30, 21, 12], 8, 0x1ff),
                Mode::FiveLevel => (&[48, 39, 30, 21, 12], 8, 0x1ff),
            }
        }

        fn entry(&self, at: u64) -> u64 {
            match self.plan().1 {
                4 => self.memory.read_obj::<u32>(GuestAddress(at)).unwrap().into(),
                _ => self.memory.read_obj(GuestAddress(at)).unwrap(),
            }
        }

        fn set(&self, at: u64, entry: u64) {
            match u32::try_from(entry) {
                Ok(entry) if self.plan().1 == 4 => self.memory.write_obj(entry, GuestAddress(at)).unwrap(),
                _ => self.memory.write_obj(entry, GuestAddress(at)).unwrap(),
            }
        }

        /// Maps the page of `1 << shift` bytes that holds the address. False if something is in the way.
        fn map(&mut self, address: u64, frame: u64, shift: u32) -> bool {
            let (shifts, entry_bytes, index_mask) = self.plan();
            let mut table = self.root;
            for &level in shifts {
                let index_mask = if self.mode == Mode::Pae && level == 30 { 3 } else { index_mask };
                let at = table + (address >> level & index_mask) * entry_bytes;
                let entry = self.entry(at);
                if level == shift {
                    let large = if level > 12 { LARGE } else { 0 };
                    let free = entry == 0;
                    if free {
                        self.set(at, self.encode(frame, level) | PRESENT | WRITABLE | large);
                    }
                    return free;
                }
                if entry & LARGE != 0 {
                    return false;
                }
                if entry == 0 {
                    self.set(at, self.next_table | PRESENT | if level == 30 { 0 } else { WRITABLE });
                    table = self.next_table;
                    self.next_table += PAGE;
                } else {
                    table = entry & !0xfff;
                }
            }
            unreachable!("every shift is one of the plan")
        }

        fn encode(&self, frame: u64, shift: u32) -> u64 {
            match (self.mode, shift) {
                (Mode::Bits32 { .. }, 22) => frame & 0xffff_ffff | (frame >> 32) << 13,
                _ => frame,
            }
        }

        fn walk(&self, address: u64) -> Result<u64, Unmapped> {
            translate(&self.memory, &self.registers(), address)
        }

        /// The shifts of the pages that the mode has.
        fn page_shifts(&self) -> &'static [u32] {
            match self.mode {
                Mode::Bits32 { large_pages: false } => &[12],
                Mode::Bits32 { large_pages: true } => &[12, 22],
                Mode::Pae => &[12, 21],
                Mode::FourLevel | Mode::FiveLevel => &[12, 21, 30],
            }
        }

        /// An address of the mode, made of any bits.
        fn linear(&self, bits: u64) -> u64 {
            let signed = bits.cast_signed();
            match self.mode {
                Mode::Bits32 { .. } | Mode::Pae => bits & 0xffff_ffff,
                Mode::FourLevel => (signed << 16 >> 16).cast_unsigned(),
                Mode::FiveLevel => (signed << 7 >> 7).cast_unsigned(),
            }
        }

        /// The widest physical address, of a page of this size.
        fn physical(&self, bits: u64, shift: u32) -> u64 {
            let width = match (self.mode, shift) {
                (Mode::Bits32 { .. }, 22) => 40,
                (Mode::Bits32 { .. }, _) => 32,
                _ => 52,
            };
            bits & ((1 << width) - 1) >> shift << shift
        }
    }

    proptest! {
        #[test]
        fn what_was_mapped_is_found_and_nothing_else_is(
            mode in 0..ALL.len(),
            pages in prop::collection::vec((any::<u64>(), any::<u64>(), any::<usize>()), 1..30),
            probes in prop::collection::vec(any::<u64>(), 30),
        ) {
            let mut builder = Builder::new(ALL[mode]);
            let mut mapped: Vec<(u64, u64, u32)> = Vec::new();
            for (address, frame, size) in pages {
                let sizes = builder.page_shifts();
                let shift = sizes[size % sizes.len()];
                let address = builder.linear(address) >> shift << shift;
                let frame = builder.physical(frame, shift);
                if builder.map(address, frame, shift) {
                    mapped.push((address, frame, shift));
                }
            }
            prop_assert!(!mapped.is_empty());
            for &(address, frame, shift) in &mapped {
                for offset in [0, 1, (1 << shift) - 1] {
                    prop_assert_eq!(builder.walk(address + offset), Ok(frame + offset));
                }
            }
            let near = mapped.iter().flat_map(|&(address, _, shift)| {
                [address.wrapping_sub(1), address.wrapping_add(1 << shift)]
            });
            let probes: Vec<u64> = near.chain(probes).map(|probe| builder.linear(probe)).collect();
            for probe in probes {
                let page = mapped.iter().find(|&&(address, _, shift)| probe >> shift == address >> shift);
                match page {
                    Some(&(address, frame, _)) => prop_assert_eq!(builder.walk(probe), Ok(frame + (probe - address))),
                    None => {
                        let absent = matches!(builder.walk(probe), Err(Unmapped::NotPresent { .. }));
                        prop_assert!(absent, "{probe:#x}");
                    }
                }
            }
        }

        #[test]
        fn no_registers_and_no_tables_make_it_panic(
            cr in prop::array::uniform3(any::<u64>()), efer in any::<u64>(), address in any::<u64>(), filling in any::<u64>(),
        ) {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
            for at in (0..0x4000).step_by(8) {
                memory.write_obj(filling, GuestAddress(at)).unwrap();
            }
            let [cr0, cr3, cr4] = cr;
            let registers = SystemRegisters { cr0, cr3, cr4, efer, ..SystemRegisters::default() };
            let _ = translate(&memory, &registers, address);
        }
    }

    #[test]
    fn without_paging_an_address_is_its_own_and_has_32_bits() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let real_mode = SystemRegisters { cr0: 0x10, cr3: 0x1000, ..SystemRegisters::default() };
        for address in [0, 0x7c00, 0xffff_ffff] {
            assert_eq!(translate(&memory, &real_mode, address), Ok(address));
        }
        let beyond = Err(Unmapped::NotLinear { address: 1 << 32, bits: 32 });
        assert_eq!(translate(&memory, &real_mode, 1 << 32), beyond);
    }

    #[test]
    fn an_address_that_the_mode_does_not_have_is_refused() {
        let cases = [
            (Mode::Bits32 { large_pages: true }, 1 << 32, 32),
            (Mode::Pae, u64::MAX, 32),
            (Mode::FourLevel, 0x8000_0000_0000, 48),
            (Mode::FourLevel, 0xffff_7fff_ffff_ffff, 48),
            (Mode::FiveLevel, 0x0100_0000_0000_0000, 57),
        ];
        for (mode, address, bits) in cases {
            assert_eq!(
                Builder::new(mode).walk(address),
                Err(Unmapped::NotLinear { address, bits }),
                "{mode:?}"
            );
        }
    }

    #[test]
    fn a_bit_that_makes_no_large_page_is_left_alone() {
        // Bit 7 is the PAT in the last level, and means nothing in 32-bit directories without PSE.
        let mut builder = Builder::new(Mode::Bits32 { large_pages: false });
        assert!(builder.map(0x40_0000, 0x5000, 12));
        let directory_entry = builder.root + 4;
        builder.set(directory_entry, builder.entry(directory_entry) | LARGE);
        assert_eq!(builder.walk(0x40_0123), Ok(0x5123));
    }

    #[test]
    fn a_table_outside_memory_is_named() {
        let builder = Builder::new(Mode::FourLevel);
        builder.set(builder.root, 0x7000_0000 | PRESENT);
        let error = builder.walk(0x1000).unwrap_err();
        assert_eq!(error, Unmapped::NoTable { address: 0x1000, level: 3, entry: 0x7000_0000 });
        let text = "0x1000 is not mapped: the table of level 3 is at 0x70000000, where there is no memory";
        assert_eq!(error.to_string(), text);
    }
}
