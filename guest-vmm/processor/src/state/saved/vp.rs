//! A VP's state.

use super::{narrow, present, same_fields};
use crate::{
    Cpuid, CpuidLeaf, DebugRegisters, Events, Exception, InjectedInterrupt, LocalApic, MpState,
    NumberedRegisters, Registers, Segment, SystemManagement, SystemRegisters, Table, Tsc, VpState, Xsave,
};
use guest_saved_state::processor::vp as message;
use save_restore::RestoreError;

/// The smallest XSAVE area: the legacy region and the header (Intel SDM volume 1, section 13.4).
const XSAVE_LEAST: usize = 576;
/// Every component of the area is made of words of so many bytes.
const XSAVE_WORD: usize = 4;

/// As many NMIs can be pending.
const NMIS_MOST: u8 = 2;

impl From<&VpState> for message::VpState {
    fn from(state: &VpState) -> Self {
        let VpState {
            cpuid,
            system_registers,
            registers,
            xcrs,
            xsave,
            debug_registers,
            tsc,
            local_apic,
            msrs,
            events,
            mp_state,
        } = state;
        Self {
            cpuid: cpuid.as_ref().map(Into::into),
            system_registers: system_registers.as_ref().map(Into::into),
            registers: registers.as_ref().map(Into::into),
            xcrs: xcrs.as_ref().map(Into::into),
            xsave: xsave.as_ref().map(|Xsave(bytes)| bytes.clone()),
            debug_registers: debug_registers.as_ref().map(Into::into),
            tsc: tsc.as_ref().map(Into::into),
            local_apic: local_apic.as_ref().map(Into::into),
            msrs: msrs.as_ref().map(Into::into),
            events: events.as_ref().map(Into::into),
            mp_state: mp_state.map(|state| message::MpState::from(state).into()),
        }
    }
}

impl TryFrom<message::VpState> for VpState {
    type Error = RestoreError;

    fn try_from(state: message::VpState) -> Result<Self, RestoreError> {
        let message::VpState {
            cpuid,
            system_registers,
            registers,
            xcrs,
            xsave,
            debug_registers,
            tsc,
            local_apic,
            msrs,
            events,
            mp_state,
        } = state;
        Ok(Self {
            cpuid: cpuid.map(Into::into),
            system_registers: Some(present("system_registers", system_registers)?.try_into()?),
            registers: Some(present("registers", registers)?.into()),
            xcrs: xcrs.map(Into::into),
            xsave: xsave.map(checked_xsave).transpose()?,
            debug_registers: debug_registers.map(TryInto::try_into).transpose()?,
            tsc: tsc.map(Into::into),
            local_apic: local_apic.map(TryInto::try_into).transpose()?,
            msrs: msrs.map(Into::into),
            events: events.map(TryInto::try_into).transpose()?,
            mp_state: Some(checked_mp_state(present("mp_state", mp_state)?)?),
        })
    }
}

fn checked_xsave(bytes: Vec<u8>) -> Result<Xsave, RestoreError> {
    match bytes.len() {
        len if len >= XSAVE_LEAST && len.is_multiple_of(XSAVE_WORD) => Ok(Xsave(bytes)),
        len => Err(RestoreError::invalid("xsave", format!("{len} bytes long"))),
    }
}

fn checked_mp_state(number: i32) -> Result<MpState, RestoreError> {
    match message::MpState::try_from(number) {
        Ok(message::MpState::Runnable) => Ok(MpState::Runnable),
        Ok(message::MpState::Halted) => Ok(MpState::Halted),
        Ok(message::MpState::WaitForSipi) => Ok(MpState::WaitForSipi),
        Ok(message::MpState::Unspecified) | Err(_) => Err(RestoreError::invalid("mp_state", number)),
    }
}

impl From<MpState> for message::MpState {
    fn from(state: MpState) -> Self {
        match state {
            MpState::Runnable => Self::Runnable,
            MpState::Halted => Self::Halted,
            MpState::WaitForSipi => Self::WaitForSipi,
        }
    }
}

same_fields!(CpuidLeaf: function, index, eax, ebx, ecx, edx);

same_fields!(
    Registers: rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
);

same_fields!(Tsc: value, adjust, frequency_khz);

same_fields!(SystemManagement: active, pending, inside_nmi, latched_init);

impl From<&Cpuid> for message::Cpuid {
    fn from(Cpuid(leaves): &Cpuid) -> Self {
        Self { leaves: leaves.iter().map(Into::into).collect() }
    }
}

impl From<message::Cpuid> for Cpuid {
    fn from(message::Cpuid { leaves }: message::Cpuid) -> Self {
        Self(leaves.into_iter().map(Into::into).collect())
    }
}

impl From<&NumberedRegisters> for message::NumberedRegisters {
    fn from(NumberedRegisters(registers): &NumberedRegisters) -> Self {
        let registers = registers.iter().map(|&(number, value)| message::NumberedRegister { number, value });
        Self { registers: registers.collect() }
    }
}

impl From<message::NumberedRegisters> for NumberedRegisters {
    fn from(message::NumberedRegisters { registers }: message::NumberedRegisters) -> Self {
        Self(
            registers
                .into_iter()
                .map(|message::NumberedRegister { number, value }| (number, value))
                .collect(),
        )
    }
}

impl From<&Segment> for message::Segment {
    fn from(&Segment { base, limit, selector, attributes }: &Segment) -> Self {
        Self { base, limit, selector: selector.into(), attributes: attributes.into() }
    }
}

fn segment(name: &str, segment: Option<message::Segment>) -> Result<Segment, RestoreError> {
    let field = format!("system_registers.{name}");
    let message::Segment { base, limit, selector, attributes } = present(&field, segment)?;
    Ok(Segment {
        base,
        limit,
        selector: narrow(&format!("{field}.selector"), selector)?,
        attributes: narrow(&format!("{field}.attributes"), attributes)?,
    })
}

impl From<&Table> for message::Table {
    fn from(&Table { base, limit }: &Table) -> Self {
        Self { base, limit: limit.into() }
    }
}

fn table(name: &str, table: Option<message::Table>) -> Result<Table, RestoreError> {
    let field = format!("system_registers.{name}");
    let message::Table { base, limit } = present(&field, table)?;
    Ok(Table { base, limit: narrow(&format!("{field}.limit"), limit)? })
}

impl From<&SystemRegisters> for message::SystemRegisters {
    fn from(registers: &SystemRegisters) -> Self {
        let SystemRegisters { cs, ds, es, fs, gs, ss, tr, ldtr, gdtr, idtr, cr0, cr2, cr3, cr4, efer } =
            registers;
        let [cs, ds, es, fs, gs, ss, tr, ldtr] =
            [cs, ds, es, fs, gs, ss, tr, ldtr].map(|segment| Some(segment.into()));
        let [gdtr, idtr] = [gdtr, idtr].map(|table| Some(table.into()));
        let [cr0, cr2, cr3, cr4, efer] = [cr0, cr2, cr3, cr4, efer].map(|register| *register);
        Self { cs, ds, es, fs, gs, ss, tr, ldtr, gdtr, idtr, cr0, cr2, cr3, cr4, efer }
    }
}

impl TryFrom<message::SystemRegisters> for SystemRegisters {
    type Error = RestoreError;

    fn try_from(registers: message::SystemRegisters) -> Result<Self, RestoreError> {
        let message::SystemRegisters {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldtr,
            gdtr,
            idtr,
            cr0,
            cr2,
            cr3,
            cr4,
            efer,
        } = registers;
        Ok(Self {
            cs: segment("cs", cs)?,
            ds: segment("ds", ds)?,
            es: segment("es", es)?,
            fs: segment("fs", fs)?,
            gs: segment("gs", gs)?,
            ss: segment("ss", ss)?,
            tr: segment("tr", tr)?,
            ldtr: segment("ldtr", ldtr)?,
            gdtr: table("gdtr", gdtr)?,
            idtr: table("idtr", idtr)?,
            cr0,
            cr2,
            cr3,
            cr4,
            efer,
        })
    }
}

impl From<&DebugRegisters> for message::DebugRegisters {
    fn from(&DebugRegisters { breakpoints, status, control }: &DebugRegisters) -> Self {
        Self { breakpoints: breakpoints.to_vec(), status, control }
    }
}

impl TryFrom<message::DebugRegisters> for DebugRegisters {
    type Error = RestoreError;

    fn try_from(registers: message::DebugRegisters) -> Result<Self, RestoreError> {
        let message::DebugRegisters { breakpoints, status, control } = registers;
        let of_them = |registers: Vec<u64>| {
            RestoreError::invalid("debug_registers.breakpoints", format!("{} registers", registers.len()))
        };
        Ok(Self { breakpoints: breakpoints.try_into().map_err(of_them)?, status, control })
    }
}

impl From<&LocalApic> for message::LocalApic {
    fn from(LocalApic { base, registers }: &LocalApic) -> Self {
        Self { base: *base, registers: registers.to_vec() }
    }
}

impl TryFrom<message::LocalApic> for LocalApic {
    type Error = RestoreError;

    fn try_from(message::LocalApic { base, registers }: message::LocalApic) -> Result<Self, RestoreError> {
        let other_size = |bytes: Vec<u8>| {
            RestoreError::invalid("local_apic.registers", format!("{} bytes long", bytes.len()))
        };
        Ok(Self { base, registers: registers.try_into().map_err(other_size)? })
    }
}

impl From<&Exception> for message::Exception {
    fn from(&Exception { vector, error_code, payload, injected }: &Exception) -> Self {
        Self { vector: vector.into(), error_code, payload, injected }
    }
}

impl TryFrom<message::Exception> for Exception {
    type Error = RestoreError;

    fn try_from(exception: message::Exception) -> Result<Self, RestoreError> {
        let message::Exception { vector, error_code, payload, injected } = exception;
        Ok(Self { vector: narrow("events.exception.vector", vector)?, error_code, payload, injected })
    }
}

impl From<&InjectedInterrupt> for message::InjectedInterrupt {
    fn from(&InjectedInterrupt { vector, soft }: &InjectedInterrupt) -> Self {
        Self { vector: vector.into(), soft }
    }
}

impl TryFrom<message::InjectedInterrupt> for InjectedInterrupt {
    type Error = RestoreError;

    fn try_from(interrupt: message::InjectedInterrupt) -> Result<Self, RestoreError> {
        let message::InjectedInterrupt { vector, soft } = interrupt;
        Ok(Self { vector: narrow("events.interrupt.vector", vector)?, soft })
    }
}

impl From<&Events> for message::Events {
    fn from(events: &Events) -> Self {
        let Events {
            exception,
            interrupt,
            shadow_of_sti,
            shadow_of_mov_ss,
            nmi_injected,
            nmis_pending,
            nmi_masked,
            system_management,
            triple_fault_pending,
        } = events;
        Self {
            exception: exception.as_ref().map(Into::into),
            interrupt: interrupt.as_ref().map(Into::into),
            shadow_of_sti: *shadow_of_sti,
            shadow_of_mov_ss: *shadow_of_mov_ss,
            nmi_injected: *nmi_injected,
            nmis_pending: (*nmis_pending).into(),
            nmi_masked: *nmi_masked,
            system_management: Some(system_management.into()),
            triple_fault_pending: *triple_fault_pending,
        }
    }
}

impl TryFrom<message::Events> for Events {
    type Error = RestoreError;

    fn try_from(events: message::Events) -> Result<Self, RestoreError> {
        let message::Events {
            exception,
            interrupt,
            shadow_of_sti,
            shadow_of_mov_ss,
            nmi_injected,
            nmis_pending,
            nmi_masked,
            system_management,
            triple_fault_pending,
        } = events;
        Ok(Self {
            exception: exception.map(TryInto::try_into).transpose()?,
            interrupt: interrupt.map(TryInto::try_into).transpose()?,
            shadow_of_sti,
            shadow_of_mov_ss,
            nmi_injected,
            nmis_pending: checked_nmis(nmis_pending)?,
            nmi_masked,
            system_management: present("events.system_management", system_management)?.into(),
            triple_fault_pending,
        })
    }
}

fn checked_nmis(pending: u32) -> Result<u8, RestoreError> {
    match narrow("events.nmis_pending", pending)? {
        few @ ..=NMIS_MOST => Ok(few),
        many => Err(RestoreError::invalid("events.nmis_pending", many)),
    }
}
