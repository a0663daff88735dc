//! What a debugger sends and is told, as plain Rust.

use crate::Exit;
use crate::guest_capnp::{
    address_space, breakpoint, debug_halt, debugged_vp, vp_registers,
    vp_registers::{segment, table},
};
use crate::state::{length, mirrored};
use capnp::struct_list;

mirrored! {
    /// What of the guest's a breakpoint stops at.
    BreakpointAccess = breakpoint::Access { Execute "execute", Write "write", ReadOrWrite "readOrWrite", }
}

/// A hardware breakpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breakpoint {
    /// Linear; a multiple of the length.
    pub address: u64,
    /// In bytes: 1, 2, 4 or 8; 1 for execution.
    pub length: u8,
    /// What it stops at.
    pub access: BreakpointAccess,
}

impl Breakpoint {
    /// One that stops before the instruction at an address.
    pub const fn execute(address: u64) -> Self {
        Self { address, length: 1, access: BreakpointAccess::Execute }
    }

    fn write(&self, mut builder: breakpoint::Builder<'_>) {
        builder.set_address(self.address);
        builder.set_length(self.length);
        builder.set_access(self.access.into());
    }

    fn read(reader: breakpoint::Reader<'_>) -> capnp::Result<Self> {
        let access = reader.get_access()?.into();
        Ok(Self { address: reader.get_address(), length: reader.get_length(), access })
    }

    /// Writes several into a message: `init` makes a list of a length.
    pub fn write_all<'a>(
        breakpoints: &[Self],
        init: impl FnOnce(u32) -> struct_list::Builder<'a, breakpoint::Owned>,
    ) {
        let mut list = init(length(breakpoints));
        for (index, breakpoint) in (0u32..).zip(breakpoints) {
            breakpoint.write(list.reborrow().get(index));
        }
    }

    /// Reads several from a message.
    pub fn read_all(list: struct_list::Reader<'_, breakpoint::Owned>) -> capnp::Result<Vec<Self>> {
        list.iter().map(Self::read).collect()
    }
}

/// How addresses are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressSpace {
    /// Linear, as this VP sees them.
    Linear(u32),
    /// Guest physical.
    Physical,
}

impl AddressSpace {
    /// Writes it into a message.
    pub fn write(self, mut builder: address_space::Builder<'_>) {
        match self {
            Self::Linear(vp) => builder.set_linear(vp),
            Self::Physical => builder.set_physical(()),
        }
    }

    /// Reads it from a message.
    pub fn read(reader: address_space::Reader<'_>) -> capnp::Result<Self> {
        Ok(match reader.which()? {
            address_space::Linear(vp) => Self::Linear(vp),
            address_space::Physical(()) => Self::Physical,
        })
    }
}

/// The VPs of a debugged guest, and what its hypervisor can do for a debugger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebuggedVps {
    /// Of each VP, in order, whether the debugger holds it.
    pub held: Vec<bool>,
    /// How many breakpoints there may be.
    pub breakpoints: u32,
    /// Whether a VP can make single steps.
    pub single_step: bool,
    /// Whether breakpoints may be for data.
    pub watchpoints: bool,
}

impl DebuggedVps {
    /// Writes the VPs into a message: `init` makes a list of a length.
    pub fn write_held<'a>(
        held: &[bool],
        init: impl FnOnce(u32) -> struct_list::Builder<'a, debugged_vp::Owned>,
    ) {
        let mut list = init(length(held));
        for (index, held) in (0u32..).zip(held) {
            let mut vp = list.reborrow().get(index);
            vp.set_index(index);
            vp.set_held(*held);
        }
    }
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SegmentRegister {
    /// The base address.
    pub base: u64,
    /// The limit in bytes, granularity applied.
    pub limit: u32,
    /// The selector.
    pub selector: u16,
    /// As in the descriptor's bits 40 to 55.
    pub attributes: u16,
}

impl SegmentRegister {
    fn write(self, mut builder: segment::Builder<'_>) {
        builder.set_base(self.base);
        builder.set_limit(self.limit);
        builder.set_selector(self.selector);
        builder.set_attributes(self.attributes);
    }

    fn read(reader: segment::Reader<'_>) -> Self {
        Self {
            base: reader.get_base(),
            limit: reader.get_limit(),
            selector: reader.get_selector(),
            attributes: reader.get_attributes(),
        }
    }
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TableRegister {
    /// The linear address of the table.
    pub base: u64,
    /// Its size in bytes, less one.
    pub limit: u16,
}

impl TableRegister {
    fn write(self, mut builder: table::Builder<'_>) {
        builder.set_base(self.base);
        builder.set_limit(self.limit);
    }

    fn read(reader: table::Reader<'_>) -> Self {
        Self { base: reader.get_base(), limit: reader.get_limit() }
    }
}

macro_rules! vp_registers {
    (
        values: $($value:ident $get_value:ident $set_value:ident,)*;
        segments: $($segment:ident $get_segment:ident $init_segment:ident,)*;
        tables: $($table:ident $get_table:ident $init_table:ident,)*;
    ) => {
        /// A VP's general, segment and control registers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        #[expect(missing_docs, reason = "the names are the architecture's")]
        pub struct VpRegisters {
            $(pub $value: u64,)*
            $(pub $segment: SegmentRegister,)*
            $(pub $table: TableRegister,)*
        }

        impl VpRegisters {
            /// Writes them into a message.
            pub fn write(&self, mut builder: vp_registers::Builder<'_>) {
                $(builder.$set_value(self.$value);)*
                $(self.$segment.write(builder.reborrow().$init_segment());)*
                $(self.$table.write(builder.reborrow().$init_table());)*
            }

            /// Reads them from a message.
            pub fn read(reader: vp_registers::Reader<'_>) -> capnp::Result<Self> {
                Ok(Self {
                    $($value: reader.$get_value(),)*
                    $($segment: SegmentRegister::read(reader.$get_segment()?),)*
                    $($table: TableRegister::read(reader.$get_table()?),)*
                })
            }
        }
    };
}

vp_registers! {
    values:
        rax get_rax set_rax, rbx get_rbx set_rbx, rcx get_rcx set_rcx, rdx get_rdx set_rdx,
        rsi get_rsi set_rsi, rdi get_rdi set_rdi, rsp get_rsp set_rsp, rbp get_rbp set_rbp,
        r8 get_r8 set_r8, r9 get_r9 set_r9, r10 get_r10 set_r10, r11 get_r11 set_r11,
        r12 get_r12 set_r12, r13 get_r13 set_r13, r14 get_r14 set_r14, r15 get_r15 set_r15,
        rip get_rip set_rip, rflags get_rflags set_rflags,
        cr0 get_cr0 set_cr0, cr2 get_cr2 set_cr2, cr3 get_cr3 set_cr3, cr4 get_cr4 set_cr4,
        efer get_efer set_efer,;
    segments:
        cs get_cs init_cs, ds get_ds init_ds, es get_es init_es, fs get_fs init_fs, gs get_gs init_gs,
        ss get_ss init_ss, tr get_tr init_tr, ldtr get_ldtr init_ldtr,;
    tables:
        gdtr get_gdtr init_gdtr, idtr get_idtr init_idtr,;
}

/// Why a VP has stopped for its debugger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HaltReason {
    /// It has made its step.
    Step,
    /// It has hit a breakpoint.
    Breakpoint(Breakpoint),
}

/// What a debugger hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DebugHalt {
    /// A VP has stopped; all others were held first.
    Vp {
        /// Which.
        index: u32,
        /// After which resumption.
        resumption: u64,
        /// Why.
        reason: HaltReason,
    },
    /// The guest has ended; nothing follows.
    Terminated(Exit),
}

impl DebugHalt {
    /// Writes it into a message.
    pub fn write(&self, mut builder: debug_halt::Builder<'_>) {
        match self {
            Self::Vp { index, resumption, reason } => {
                let mut vp = builder.init_vp();
                vp.set_index(*index);
                vp.set_resumption(*resumption);
                let mut wire = vp.init_reason();
                match reason {
                    HaltReason::Step => wire.set_step(()),
                    HaltReason::Breakpoint(breakpoint) => breakpoint.write(wire.init_breakpoint()),
                }
            }
            Self::Terminated(exit) => exit.write(builder.reborrow().init_terminated()),
        }
    }

    /// Reads it from a message.
    pub fn read(reader: debug_halt::Reader<'_>) -> capnp::Result<Self> {
        Ok(match reader.which()? {
            debug_halt::Vp(vp) => {
                let reason = match vp.get_reason().which()? {
                    debug_halt::vp::reason::Step(()) => HaltReason::Step,
                    debug_halt::vp::reason::Breakpoint(hit) => {
                        HaltReason::Breakpoint(Breakpoint::read(hit?)?)
                    }
                };
                Self::Vp { index: vp.get_index(), resumption: vp.get_resumption(), reason }
            }
            debug_halt::Terminated(exit) => Self::Terminated(Exit::read(exit?)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_the_wire() {
        let segment = |base| SegmentRegister { base, limit: 2, selector: 3, attributes: 4 };
        let registers = VpRegisters {
            rax: 1,
            rip: 17,
            rflags: 18,
            efer: 0x500,
            cs: segment(5),
            ldtr: segment(6),
            idtr: TableRegister { base: 7, limit: 8 },
            ..VpRegisters::default()
        };
        let mut message = capnp::message::Builder::new_default();
        registers.write(message.init_root());
        let read = VpRegisters::read(message.get_root_as_reader().expect("registers")).expect("readable");
        assert_eq!(read, registers);
    }

    #[test]
    fn halts_survive_the_wire() {
        let breakpoint = Breakpoint { address: 1 << 63, length: 8, access: BreakpointAccess::ReadOrWrite };
        let halts = [
            DebugHalt::Vp { index: 1, resumption: 2, reason: HaltReason::Step },
            DebugHalt::Vp { index: 0, resumption: 0, reason: HaltReason::Breakpoint(breakpoint) },
            DebugHalt::Terminated(Exit::clean("done")),
        ];
        for halt in halts {
            let mut message = capnp::message::Builder::new_default();
            halt.write(message.init_root());
            let read = DebugHalt::read(message.get_root_as_reader().expect("a halt")).expect("readable");
            assert_eq!(read, halt);
        }
    }
}
