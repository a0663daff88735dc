//! The registers as gdb wants them: which there are, in which order and how wide, from one table.

use gdbstub::arch::{Arch, RegId, Registers};
use guest_client::{SegmentRegister, VpRegisters};
use std::fmt::Write;
use std::num::NonZeroUsize;
use std::sync::LazyLock;

/// Where a register's value is.
#[derive(Clone, Copy)]
enum Place {
    /// It is this value, or the lower part of it.
    Value(fn(&mut VpRegisters) -> &mut u64),
    /// It is this segment's selector. Read only: the segment's hidden part would not follow.
    Selector(fn(&mut VpRegisters) -> &mut SegmentRegister),
    /// It is this segment's base.
    Base(fn(&mut VpRegisters) -> &mut SegmentRegister),
    /// gdb wants it to be there, and the debugger does not have it.
    Unavailable,
}

struct Register {
    name: &'static str,
    bytes: usize,
    kind: &'static str,
    place: Place,
}

struct Feature {
    name: &'static str,
    registers: &'static [Register],
}

macro_rules! value {
    ($name:ident, $bytes:literal, $kind:literal) => {
        value!($name, $name, $bytes, $kind)
    };
    ($name:ident, $field:ident, $bytes:literal, $kind:literal) => {
        Register {
            name: stringify!($name),
            bytes: $bytes,
            kind: $kind,
            place: Place::Value(|registers| &mut registers.$field),
        }
    };
}

macro_rules! selector {
    ($name:ident) => {
        Register {
            name: stringify!($name),
            bytes: 4,
            kind: "int32",
            place: Place::Selector(|registers| &mut registers.$name),
        }
    };
}

macro_rules! base {
    ($name:ident, $segment:ident) => {
        Register {
            name: stringify!($name),
            bytes: 8,
            kind: "data_ptr",
            place: Place::Base(|registers| &mut registers.$segment),
        }
    };
}

const fn x87(name: &'static str, bytes: usize, kind: &'static str) -> Register {
    Register { name, bytes, kind, place: Place::Unavailable }
}

/// In the order of gdb's numbers (GDB manual, appendix G.5.5). The x87 registers belong to the first feature.
const FEATURES: &[Feature] = &[
    Feature {
        name: "org.gnu.gdb.i386.core",
        registers: &[
            value!(rax, 8, "int64"),
            value!(rbx, 8, "int64"),
            value!(rcx, 8, "int64"),
            value!(rdx, 8, "int64"),
            value!(rsi, 8, "int64"),
            value!(rdi, 8, "int64"),
            value!(rbp, 8, "data_ptr"),
            value!(rsp, 8, "data_ptr"),
            value!(r8, 8, "int64"),
            value!(r9, 8, "int64"),
            value!(r10, 8, "int64"),
            value!(r11, 8, "int64"),
            value!(r12, 8, "int64"),
            value!(r13, 8, "int64"),
            value!(r14, 8, "int64"),
            value!(r15, 8, "int64"),
            value!(rip, 8, "code_ptr"),
            value!(eflags, rflags, 4, "int32"),
            selector!(cs),
            selector!(ss),
            selector!(ds),
            selector!(es),
            selector!(fs),
            selector!(gs),
            x87("st0", 10, "i387_ext"),
            x87("st1", 10, "i387_ext"),
            x87("st2", 10, "i387_ext"),
            x87("st3", 10, "i387_ext"),
            x87("st4", 10, "i387_ext"),
            x87("st5", 10, "i387_ext"),
            x87("st6", 10, "i387_ext"),
            x87("st7", 10, "i387_ext"),
            x87("fctrl", 4, "int"),
            x87("fstat", 4, "int"),
            x87("ftag", 4, "int"),
            x87("fiseg", 4, "int"),
            x87("fioff", 4, "int"),
            x87("foseg", 4, "int"),
            x87("fooff", 4, "int"),
            x87("fop", 4, "int"),
        ],
    },
    Feature { name: "org.gnu.gdb.i386.segments", registers: &[base!(fs_base, fs), base!(gs_base, gs)] },
    Feature {
        name: "guestd.control",
        registers: &[
            value!(cr0, 8, "int64"),
            value!(cr2, 8, "int64"),
            value!(cr3, 8, "int64"),
            value!(cr4, 8, "int64"),
            value!(efer, 8, "int64"),
        ],
    },
];

fn registers() -> impl Iterator<Item = &'static Register> {
    FEATURES.iter().flat_map(|feature| feature.registers)
}

impl Register {
    /// Its bytes, unless it is unavailable.
    fn read(&self, from: &VpRegisters) -> Option<Vec<u8>> {
        let mut from = *from;
        let value = match self.place {
            Place::Value(of) => *of(&mut from),
            Place::Selector(of) => of(&mut from).selector.into(),
            Place::Base(of) => of(&mut from).base,
            Place::Unavailable => return None,
        };
        Some(value.to_le_bytes()[..self.bytes].to_vec())
    }

    /// Sets it; false if it cannot be.
    fn write(&self, to: &mut VpRegisters, bytes: &[u8]) -> bool {
        let mut wide = [0; 8];
        match (self.place, wide.get_mut(..bytes.len())) {
            (Place::Unavailable, _) | (_, None) => return false,
            (_, Some(part)) => part.copy_from_slice(bytes),
        }
        let value = u64::from_le_bytes(wide);
        match self.place {
            Place::Value(of) if bytes.len() == self.bytes => *of(to) = value,
            Place::Base(of) if bytes.len() == self.bytes => of(to).base = value,
            Place::Selector(of) => return u64::from(of(to).selector) == value,
            _ => return false,
        }
        true
    }
}

/// The number of a register, as gdb counts.
#[derive(Debug, Clone, Copy)]
pub struct RegisterNumber(usize);

impl RegisterNumber {
    fn register(self) -> Option<&'static Register> {
        registers().nth(self.0)
    }

    /// The register's bytes, unless it is unavailable.
    pub fn read(self, from: &VpRegisters) -> Option<Vec<u8>> {
        self.register()?.read(from)
    }

    /// Sets the register; false if it cannot be.
    pub fn write(self, to: &mut VpRegisters, bytes: &[u8]) -> bool {
        self.register().is_some_and(|register| register.write(to, bytes))
    }
}

impl RegId for RegisterNumber {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let register = registers().nth(id)?;
        Some((Self(id), NonZeroUsize::new(register.bytes)))
    }
}

/// All registers of a VP in gdb's form.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AllRegisters(pub VpRegisters);

impl AllRegisters {
    /// Takes over what can be set; false if something else differs.
    pub fn write_into(&self, to: &mut VpRegisters) -> bool {
        registers().fold(true, |all, register| match register.read(&self.0) {
            Some(bytes) => register.write(to, &bytes) && all,
            None => all,
        })
    }
}

impl Registers for AllRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.0.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for register in registers() {
            match register.read(&self.0) {
                Some(bytes) => bytes.into_iter().for_each(|byte| write_byte(Some(byte))),
                None => (0..register.bytes).for_each(|_| write_byte(None)),
            }
        }
    }

    fn gdb_deserialize(&mut self, mut bytes: &[u8]) -> Result<(), ()> {
        for register in registers() {
            let (own, rest) = bytes.split_at_checked(register.bytes).ok_or(())?;
            bytes = rest;
            match register.place {
                Place::Selector(of) => of(&mut self.0).selector = u16::from_le_bytes([own[0], own[1]]),
                _ => drop(register.write(&mut self.0, own)),
            }
        }
        Ok(())
    }
}

/// x86-64 with the registers that the debugger has.
pub enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = AllRegisters;
    type BreakpointKind = usize;
    type RegId = RegisterNumber;

    fn target_description_xml() -> Option<&'static str> {
        static DESCRIPTION: LazyLock<String> = LazyLock::new(describe);
        Some(&DESCRIPTION)
    }
}

fn describe() -> String {
    let mut xml = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\">\
         <target version=\"1.0\"><architecture>i386:x86-64</architecture>",
    );
    for Feature { name, registers } in FEATURES {
        let _ = write!(xml, "<feature name=\"{name}\">");
        for Register { name, bytes, kind, .. } in *registers {
            let bits = bytes * 8;
            let _ = write!(xml, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"/>");
        }
        xml.push_str("</feature>");
    }
    xml.push_str("</target>");
    xml
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> VpRegisters {
        VpRegisters {
            rax: 0x1122_3344_5566_7788,
            rip: 0xffff_ffff_8000_0000,
            rflags: 0x202,
            cs: SegmentRegister { selector: 0x10, ..SegmentRegister::default() },
            fs: SegmentRegister { base: 0x7000, selector: 0x2b, ..SegmentRegister::default() },
            efer: 0x500,
            ..VpRegisters::default()
        }
    }

    fn number(name: &str) -> RegisterNumber {
        RegisterNumber(registers().position(|register| register.name == name).expect("a register"))
    }

    #[test]
    fn the_first_numbers_are_gdbs() {
        // amd64-tdep.h: AMD64_RIP_REGNUM is 16, AMD64_GS_REGNUM 23, AMD64_ST0_REGNUM 24.
        assert_eq!([number("rip").0, number("gs").0, number("st0").0, number("fop").0], [16, 23, 24, 39]);
    }

    #[test]
    fn registers_are_little_endian_and_as_wide_as_described() {
        let mut bytes = Vec::new();
        AllRegisters(some()).gdb_serialize(|byte| bytes.push(byte));
        assert_eq!(bytes.len(), registers().map(|register| register.bytes).sum::<usize>());
        assert_eq!(bytes[..2], [Some(0x88), Some(0x77)]);
        let eflags = 17 * 8;
        assert_eq!(bytes[eflags..eflags + 5], [Some(2), Some(2), Some(0), Some(0), Some(0x10)]);
        let st0 = eflags + 7 * 4;
        assert_eq!((bytes[st0], bytes[st0 - 1]), (None, Some(0)));
        let described = describe();
        assert!(described.contains("<reg name=\"st0\" bitsize=\"80\" type=\"i387_ext\"/>"), "{described}");
    }

    #[test]
    fn what_gdb_writes_back_changes_what_can_be_changed() {
        let mut bytes = Vec::new();
        AllRegisters(some()).gdb_serialize(|byte| bytes.push(byte.unwrap_or(0)));
        bytes[0] = 0;
        let mut back = AllRegisters::default();
        back.gdb_deserialize(&bytes).expect("long enough");
        let mut registers = some();
        assert!(back.write_into(&mut registers));
        assert_eq!(registers, VpRegisters { rax: 0x1122_3344_5566_7700, ..some() });
        assert!(back.gdb_deserialize(&bytes[1..]).is_err());
        let cs = 17 * 8 + 4;
        bytes[cs] = 0x33;
        back.gdb_deserialize(&bytes).expect("long enough");
        assert!(!back.write_into(&mut registers), "a selector stays what it is");
    }

    #[test]
    fn single_registers_are_set_or_refused() {
        let mut registers = some();
        assert!(number("fs_base").write(&mut registers, &0x9000u64.to_le_bytes()));
        assert_eq!(registers.fs, SegmentRegister { base: 0x9000, ..some().fs });
        assert!(number("cs").write(&mut registers, &[0x10, 0, 0, 0]));
        assert!(!number("cs").write(&mut registers, &[0x33, 0, 0, 0]));
        assert!(!number("st0").write(&mut registers, &[0; 10]));
        assert!(!number("rax").write(&mut registers, &[0; 4]));
        assert!(!number("rax").write(&mut registers, &[0; 9]));
        assert_eq!(number("efer").read(&registers), Some(vec![0, 5, 0, 0, 0, 0, 0, 0]));
        assert_eq!(number("fctrl").read(&registers), None);
    }
}
