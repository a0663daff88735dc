//! What the boot protocol passes: hvm_start_info, version 0 or 1 (Xen, `xen/include/public/arch-x86/hvm/start_info.h`).
//!
//! Everything is copied, so that the guest's RAM is free afterwards. What lies beyond the mapped 4 GiB is left out.

use core::ptr::with_exposed_provenance;

use crate::address_space;

const MAGIC: u32 = 0x336e_c578;
const MODULE_ENTRY_BYTES: u64 = 32;
const MAP_ENTRY_BYTES: u64 = 24;

/// The longest command line that is kept, in bytes.
const COMMAND_LINE_BYTES: usize = 4096;
const RANGES: usize = 128;
const MODULES: usize = 16;

/// Addresses from `start` up to, and without, `end`.
#[derive(Clone, Copy)]
pub struct Range {
    /// The first address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
    /// E820 type; 1 is RAM.
    pub kind: u32,
}

impl Range {
    const EMPTY: Self = Self { start: 0, end: 0, kind: 0 };

    /// A range without a type.
    pub fn of(start: u64, bytes: u64) -> Self {
        Self { start, end: start.saturating_add(bytes), kind: 0 }
    }

    /// Whether it is RAM.
    pub fn is_ram(&self) -> bool {
        self.kind == 1
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// At most `N` ranges; those beyond are left out.
pub struct Ranges<const N: usize> {
    ranges: [Range; N],
    used: usize,
}

impl<const N: usize> Ranges<N> {
    /// None yet.
    pub const fn new() -> Self {
        Self { ranges: [Range::EMPTY; N], used: 0 }
    }

    /// Adds one.
    pub fn push(&mut self, range: Range) {
        if let Some(place) = self.ranges.get_mut(self.used) {
            *place = range;
            self.used += 1;
        }
    }

    /// All, in the order they were added.
    pub fn all(&self) -> &[Range] {
        &self.ranges[..self.used]
    }
}

/// A copy of what the boot protocol passed.
pub struct StartInfo {
    /// The memory map; empty if none was passed.
    pub memory_map: Ranges<RANGES>,
    /// Where the modules are.
    pub modules: Ranges<MODULES>,
    /// Where the start_info and what it refers to lie.
    pub origin: Ranges<6>,
    /// The address of ACPI's root pointer, 0 if there is none.
    pub rsdp: u64,
    command_line: [u8; COMMAND_LINE_BYTES],
    command_line_bytes: usize,
}

impl StartInfo {
    /// Copies it; without the magic number it is empty.
    ///
    /// # Safety
    /// `address` is what the boot protocol passed.
    pub unsafe fn read(address: u64) -> Self {
        let mut info = Self {
            memory_map: Ranges::new(),
            modules: Ranges::new(),
            origin: Ranges::new(),
            rsdp: 0,
            command_line: [0; COMMAND_LINE_BYTES],
            command_line_bytes: 0,
        };
        if load::<u32>(address) == Some(MAGIC) {
            info.copy(address);
        }
        info
    }

    /// The command line's bytes, without the final zero.
    pub fn command_line(&self) -> &[u8] {
        &self.command_line[..self.command_line_bytes]
    }

    fn copy(&mut self, at: u64) {
        self.origin.push(Range::of(at, 56));
        self.copy_modules(field(at + 16), load::<u32>(at + 12).unwrap_or(0));
        self.copy_command_line(field(at + 24));
        self.rsdp = field(at + 32);
        self.origin.push(Range::of(self.rsdp, 36));
        if load::<u32>(at + 4).is_some_and(|version| version >= 1) {
            self.copy_memory_map(field(at + 40), load::<u32>(at + 48).unwrap_or(0));
        }
    }

    fn copy_modules(&mut self, list: u64, count: u32) {
        self.origin.push(Range::of(list, u64::from(count) * MODULE_ENTRY_BYTES));
        for index in 0..u64::from(count).min(MODULES as u64) {
            let entry = list + index * MODULE_ENTRY_BYTES;
            self.modules.push(Range::of(field(entry), field(entry + 8)));
        }
    }

    fn copy_command_line(&mut self, at: u64) {
        if at == 0 {
            return;
        }
        while let Some(byte) = load::<u8>(at + self.command_line_bytes as u64).filter(|byte| *byte != 0) {
            let Some(place) = self.command_line.get_mut(self.command_line_bytes) else { break };
            *place = byte;
            self.command_line_bytes += 1;
        }
        self.origin.push(Range::of(at, self.command_line_bytes as u64 + 1));
    }

    fn copy_memory_map(&mut self, table: u64, count: u32) {
        self.origin.push(Range::of(table, u64::from(count) * MAP_ENTRY_BYTES));
        for index in 0..u64::from(count).min(RANGES as u64) {
            let entry = table + index * MAP_ENTRY_BYTES;
            let range = Range::of(field(entry), field(entry + 8));
            self.memory_map.push(Range { kind: load(entry + 16).unwrap_or(0), ..range });
        }
    }
}

fn field(address: u64) -> u64 {
    load(address).unwrap_or(0)
}

/// Reads a number from memory that the VMM has written; `None` if it is not mapped.
pub fn load<T: Number>(address: u64) -> Option<T> {
    let last = address.checked_add(size_of::<T>() as u64 - 1)?;
    if !address_space::is_mapped(address) || !address_space::is_mapped(last) {
        return None;
    }
    // SAFETY: mapped; any bytes are a number; nothing writes to it meanwhile.
    Some(unsafe { with_exposed_provenance::<T>(address as usize).read_unaligned() })
}

/// A number of which any bytes are a value.
pub trait Number: Copy {}
impl Number for u8 {}
impl Number for u16 {}
impl Number for u32 {}
impl Number for u64 {}
