//! A VP's registers, from KVM's types and to them.

use crate::error::{KvmError, Named};
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use processor::{AccessVpState, MpState, Registers, Segment, SystemRegisters, Table};

/// The state of a stopped VP.
pub struct KvmState<'a>(pub(crate) &'a VcpuFd);

impl AccessVpState for KvmState<'_> {
    type Error = KvmError;

    fn registers(&mut self) -> Result<Registers, KvmError> {
        Ok(from_regs(&self.0.get_regs().named("KVM_GET_REGS")?))
    }

    fn set_registers(&mut self, value: &Registers) -> Result<(), KvmError> {
        self.0.set_regs(&to_regs(value)).named("KVM_SET_REGS")
    }

    fn system_registers(&mut self) -> Result<SystemRegisters, KvmError> {
        Ok(from_sregs(&self.0.get_sregs().named("KVM_GET_SREGS")?))
    }

    fn set_system_registers(&mut self, value: &SystemRegisters) -> Result<(), KvmError> {
        let mut sregs = self.0.get_sregs().named("KVM_GET_SREGS")?;
        put_sregs(&mut sregs, value);
        self.0.set_sregs(&sregs).named("KVM_SET_SREGS")
    }

    fn mp_state(&mut self) -> Result<MpState, KvmError> {
        let state = self.0.get_mp_state().named("KVM_GET_MP_STATE")?.mp_state;
        match state {
            KVM_MP_STATE_RUNNABLE => Ok(MpState::Runnable),
            KVM_MP_STATE_HALTED => Ok(MpState::Halted),
            KVM_MP_STATE_UNINITIALIZED
            | KVM_MP_STATE_INIT_RECEIVED
            | KVM_MP_STATE_SIPI_RECEIVED
            | KVM_MP_STATE_AP_RESET_HOLD => Ok(MpState::WaitForSipi),
            other => Err(KvmError::MpState(other)),
        }
    }
}

/// The general registers, from KVM's type.
pub(crate) fn from_regs(regs: &kvm_regs) -> Registers {
    let &kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, .. } = regs;
    let &kvm_regs { r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags, .. } = regs;
    Registers { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn to_regs(registers: &Registers) -> kvm_regs {
    let &Registers {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = registers;
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn from_sregs(sregs: &kvm_sregs) -> SystemRegisters {
    SystemRegisters {
        cs: from_segment(&sregs.cs),
        ds: from_segment(&sregs.ds),
        es: from_segment(&sregs.es),
        fs: from_segment(&sregs.fs),
        gs: from_segment(&sregs.gs),
        ss: from_segment(&sregs.ss),
        tr: from_segment(&sregs.tr),
        ldtr: from_segment(&sregs.ldt),
        gdtr: Table { base: sregs.gdt.base, limit: sregs.gdt.limit },
        idtr: Table { base: sregs.idt.base, limit: sregs.idt.limit },
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
    }
}

fn put_sregs(sregs: &mut kvm_sregs, value: &SystemRegisters) {
    let SystemRegisters { cs, ds, es, fs, gs, ss, tr, ldtr, gdtr, idtr, cr0, cr2, cr3, cr4, efer } = value;
    sregs.cs = to_segment(cs);
    sregs.ds = to_segment(ds);
    sregs.es = to_segment(es);
    sregs.fs = to_segment(fs);
    sregs.gs = to_segment(gs);
    sregs.ss = to_segment(ss);
    sregs.tr = to_segment(tr);
    sregs.ldt = to_segment(ldtr);
    sregs.gdt = kvm_dtable { base: gdtr.base, limit: gdtr.limit, ..Default::default() };
    sregs.idt = kvm_dtable { base: idtr.base, limit: idtr.limit, ..Default::default() };
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer) = (*cr0, *cr2, *cr3, *cr4, *efer);
}

fn from_segment(segment: &kvm_segment) -> Segment {
    let bits = [
        (segment.type_, 0),
        (segment.s, 4),
        (segment.dpl, 5),
        (segment.present, 7),
        (segment.avl, 12),
        (segment.l, 13),
        (segment.db, 14),
        (segment.g, 15),
    ];
    let attributes = bits.iter().fold(0, |all, &(value, shift)| all | u16::from(value) << shift);
    Segment { base: segment.base, limit: segment.limit, selector: segment.selector, attributes }
}

fn to_segment(segment: &Segment) -> kvm_segment {
    let field = |shift: u32, mask: u16| (segment.attributes >> shift & mask).to_le_bytes()[0];
    let present = field(7, 1);
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: field(0, 15),
        s: field(4, 1),
        dpl: field(5, 3),
        present,
        avl: field(12, 1),
        l: field(13, 1),
        db: field(14, 1),
        g: field(15, 1),
        unusable: 1 - present,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_keep_their_attributes() {
        // A 32-bit and a 64-bit code segment, a data segment of ring 3, a busy TSS, none.
        for attributes in [0xc09b, 0xa09b, 0xd0f3, 0x008b, 0] {
            let segment = Segment { base: 0x1000, limit: 0xffff, selector: 8, attributes };
            let kvm = to_segment(&segment);
            assert_eq!(from_segment(&kvm), segment);
            assert_eq!(kvm.unusable == 1, attributes == 0);
        }
        let code = to_segment(&Segment { attributes: 0xc09b, ..Default::default() });
        assert_eq!((code.type_, code.s, code.present, code.db, code.g, code.l), (11, 1, 1, 1, 1, 0));
    }
}
