//! The state of a stopped VP: the ioctls behind each entry of the table.

use crate::convert::*;
use crate::cpuid::lacking;
use crate::error::{KvmError, Named};
use crate::msrs;
use crate::tsc;
use crate::vp::KvmProcessor;
use crate::xsave;
use kvm_bindings::{kvm_debugregs, kvm_lapic_state, kvm_sregs};
use processor::{
    AccessVpState, Cpuid, DebugRegisters, Events, LOCAL_APIC_BYTES, LocalApic, MpState, NumberedRegisters,
    Registers, SystemRegisters, Tsc, VpStateKind, Xsave,
};

/// The state of a stopped VP. KVM has all of the table, but for the time-stamp counter where the host has no other than its own.
pub struct KvmState<'a> {
    vp: &'a mut KvmProcessor,
    /// As KVM has them, once they were read: two entries of the table come from them.
    sregs: Option<kvm_sregs>,
}

impl<'a> KvmState<'a> {
    pub(crate) fn new(vp: &'a mut KvmProcessor) -> Self {
        Self { vp, sregs: None }
    }

    fn sregs(&mut self) -> Result<kvm_sregs, KvmError> {
        if let Some(sregs) = self.sregs {
            return Ok(sregs);
        }
        let sregs = self.vp.vcpu.get_sregs().named("KVM_GET_SREGS")?;
        self.sregs = Some(sregs);
        Ok(sregs)
    }

    fn set_sregs(&mut self, sregs: kvm_sregs) -> Result<(), KvmError> {
        self.sregs = None;
        self.vp.vcpu.set_sregs(&sregs).named("KVM_SET_SREGS")?;
        self.sregs = Some(sregs);
        Ok(())
    }
}

impl AccessVpState for KvmState<'_> {
    type Error = KvmError;

    fn supports(&self, kind: VpStateKind) -> bool {
        kind != VpStateKind::Tsc || self.vp.partition.host.has_virtual_tsc()
    }

    fn cpuid(&mut self) -> Result<Cpuid, KvmError> {
        Ok(from_cpuid(&self.vp.cpuid))
    }

    /// KVM is told only of answers that differ: once a VP has run it takes no others. It would take features that it does not have.
    fn set_cpuid(&mut self, value: &Cpuid) -> Result<(), KvmError> {
        let cpuid = to_cpuid(value)?;
        if cpuid != self.vp.cpuid {
            lacking(self.vp.cpuid.as_slice(), value).map_or(Ok(()), Err)?;
            self.vp.vcpu.set_cpuid2(&cpuid).named("KVM_SET_CPUID2")?;
            self.vp.cpuid = cpuid;
        }
        Ok(())
    }

    fn system_registers(&mut self) -> Result<SystemRegisters, KvmError> {
        Ok(from_sregs(&self.sregs()?))
    }

    fn set_system_registers(&mut self, value: &SystemRegisters) -> Result<(), KvmError> {
        let mut sregs = self.sregs()?;
        put_sregs(&mut sregs, value);
        self.set_sregs(sregs)
    }

    fn registers(&mut self) -> Result<Registers, KvmError> {
        Ok(from_regs(&self.vp.vcpu.get_regs().named("KVM_GET_REGS")?))
    }

    fn set_registers(&mut self, value: &Registers) -> Result<(), KvmError> {
        self.vp.vcpu.set_regs(&to_regs(value)).named("KVM_SET_REGS")
    }

    fn xcrs(&mut self) -> Result<NumberedRegisters, KvmError> {
        Ok(from_xcrs(&self.vp.vcpu.get_xcrs().named("KVM_GET_XCRS")?))
    }

    fn set_xcrs(&mut self, value: &NumberedRegisters) -> Result<(), KvmError> {
        self.vp.vcpu.set_xcrs(&to_xcrs(value)?).named("KVM_SET_XCRS")
    }

    fn xsave(&mut self) -> Result<Xsave, KvmError> {
        xsave::get(&self.vp.vcpu, &self.vp.partition.host)
    }

    fn set_xsave(&mut self, value: &Xsave) -> Result<(), KvmError> {
        xsave::set(&self.vp.vcpu, &self.vp.partition.host, value)
    }

    fn debug_registers(&mut self) -> Result<DebugRegisters, KvmError> {
        let kvm_debugregs { db, dr6, dr7, .. } = self.vp.vcpu.get_debug_regs().named("KVM_GET_DEBUGREGS")?;
        Ok(DebugRegisters { breakpoints: db, status: dr6, control: dr7 })
    }

    fn set_debug_registers(&mut self, value: &DebugRegisters) -> Result<(), KvmError> {
        let &DebugRegisters { breakpoints: db, status: dr6, control: dr7 } = value;
        let registers = kvm_debugregs { db, dr6, dr7, ..Default::default() };
        self.vp.vcpu.set_debug_regs(&registers).named("KVM_SET_DEBUGREGS")
    }

    fn tsc(&mut self) -> Result<Tsc, KvmError> {
        tsc::get(self.vp)
    }

    fn set_tsc(&mut self, value: &Tsc) -> Result<(), KvmError> {
        tsc::set(self.vp, value)
    }

    fn local_apic(&mut self) -> Result<LocalApic, KvmError> {
        let base = self.sregs()?.apic_base;
        let lapic = self.vp.vcpu.get_lapic().named("KVM_GET_LAPIC")?;
        Ok(LocalApic { base, registers: Box::new(lapic.regs.map(i8::cast_unsigned)) })
    }

    fn set_local_apic(&mut self, value: &LocalApic) -> Result<(), KvmError> {
        let mut sregs = self.sregs()?;
        if sregs.apic_base != value.base {
            sregs.apic_base = value.base;
            self.set_sregs(sregs)?;
        }
        let regs: [i8; LOCAL_APIC_BYTES] = value.registers.map(u8::cast_signed);
        self.vp.vcpu.set_lapic(&kvm_lapic_state { regs }).named("KVM_SET_LAPIC")
    }

    fn msrs(&mut self) -> Result<NumberedRegisters, KvmError> {
        msrs::read_all(&self.vp.vcpu, &self.vp.partition.host)
    }

    /// Some of them are seen in the special registers too.
    fn set_msrs(&mut self, value: &NumberedRegisters) -> Result<(), KvmError> {
        self.sregs = None;
        msrs::write_changed(&self.vp.vcpu, value)
    }

    fn events(&mut self) -> Result<Events, KvmError> {
        let events = self.vp.vcpu.get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?;
        // The same for every VP of a host: whoever asks first says so.
        let _ = self.vp.partition.host.event_flags.set(events.flags);
        Ok(from_events(&events))
    }

    fn set_events(&mut self, value: &Events) -> Result<(), KvmError> {
        let flags = self.vp.partition.host.event_flags.get().copied().unwrap_or(0);
        let events = to_events(value, flags)?;
        self.vp.vcpu.set_vcpu_events(&events).named("KVM_SET_VCPU_EVENTS")
    }

    /// An INIT or a SIPI that is pending is taken by the VP first.
    fn mp_state(&mut self) -> Result<MpState, KvmError> {
        let state = self.vp.vcpu.get_mp_state().named("KVM_GET_MP_STATE")?;
        self.sregs = None;
        from_mp_state(state)
    }

    fn set_mp_state(&mut self, value: &MpState) -> Result<(), KvmError> {
        self.vp.vcpu.set_mp_state(to_mp_state(*value)).named("KVM_SET_MP_STATE")
    }
}
