//! A VP's state between KVM's types and the processor seam's.

use crate::error::KvmError;
use kvm_bindings::*;
use processor::{
    Cpuid, CpuidLeaf, Events, Exception, InjectedInterrupt, MpState, NotSupported, NumberedRegisters,
    Registers, Segment, SystemManagement, SystemRegisters, Table,
};

/// The general registers, from KVM's type.
pub(crate) fn from_regs(regs: &kvm_regs) -> Registers {
    let &kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, .. } = regs;
    let &kvm_regs { r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags, .. } = regs;
    Registers { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// As KVM takes them.
pub(crate) fn to_regs(registers: &Registers) -> kvm_regs {
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

/// The segment and control registers, from KVM's type.
pub(crate) fn from_sregs(sregs: &kvm_sregs) -> SystemRegisters {
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

/// Puts them among what else KVM counts to the special registers.
pub(crate) fn put_sregs(sregs: &mut kvm_sregs, value: &SystemRegisters) {
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

/// CPUID's answers, from KVM's type.
pub(crate) fn from_cpuid(leaves: &CpuId) -> Cpuid {
    let leaf = |leaf: &kvm_cpuid_entry2| {
        let &kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = leaf;
        let index = (flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(index);
        CpuidLeaf { function, index, eax, ebx, ecx, edx }
    };
    Cpuid(leaves.as_slice().iter().map(leaf).collect())
}

/// As KVM takes them; it has room for so many.
pub(crate) fn to_cpuid(cpuid: &Cpuid) -> Result<CpuId, NotSupported> {
    let entry = |leaf: &CpuidLeaf| {
        let &CpuidLeaf { function, index, eax, ebx, ecx, edx } = leaf;
        let flags = index.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
        let index = index.unwrap_or(0);
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    };
    let entries: Vec<_> = cpuid.0.iter().map(entry).collect();
    let too_many = |_| NotSupported(format!("{} answers of CPUID", entries.len()).into());
    CpuId::from_entries(&entries).map_err(too_many)
}

/// The extended control registers, from KVM's type.
pub(crate) fn from_xcrs(xcrs: &kvm_xcrs) -> NumberedRegisters {
    let count = usize::try_from(xcrs.nr_xcrs).map_or(0, |count| count.min(xcrs.xcrs.len()));
    NumberedRegisters(xcrs.xcrs[..count].iter().map(|xcr| (xcr.xcr, xcr.value)).collect())
}

/// As KVM takes them; it has room for so many.
pub(crate) fn to_xcrs(registers: &NumberedRegisters) -> Result<kvm_xcrs, NotSupported> {
    let count = registers.0.len();
    let mut xcrs = kvm_xcrs::default();
    if count > xcrs.xcrs.len() {
        return Err(NotSupported(format!("{count} extended control registers").into()));
    }
    xcrs.nr_xcrs = u32::try_from(count).expect("no more than fit");
    for (xcr, &(number, value)) in xcrs.xcrs.iter_mut().zip(&registers.0) {
        *xcr = kvm_xcr { xcr: number, value, reserved: 0 };
    }
    Ok(xcrs)
}

/// What a VP is doing, from KVM's type.
pub(crate) fn from_mp_state(state: kvm_mp_state) -> Result<MpState, KvmError> {
    match state.mp_state {
        KVM_MP_STATE_RUNNABLE => Ok(MpState::Runnable),
        KVM_MP_STATE_HALTED => Ok(MpState::Halted),
        KVM_MP_STATE_UNINITIALIZED
        | KVM_MP_STATE_INIT_RECEIVED
        | KVM_MP_STATE_SIPI_RECEIVED
        | KVM_MP_STATE_AP_RESET_HOLD => Ok(MpState::WaitForSipi),
        other => Err(KvmError::MpState(other)),
    }
}

/// As KVM takes it. A VP that has received INIT takes a SIPI, and another INIT before it.
pub(crate) fn to_mp_state(state: MpState) -> kvm_mp_state {
    let mp_state = match state {
        MpState::Runnable => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

/// What is on its way to a VP, from KVM's type.
pub(crate) fn from_events(events: &kvm_vcpu_events) -> Events {
    let kvm_vcpu_events { exception, interrupt, nmi, smi, flags, .. } = events;
    let payload = flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0 && events.exception_has_payload != 0;
    Events {
        exception: (exception.injected != 0 || exception.pending != 0).then(|| Exception {
            vector: exception.nr,
            error_code: (exception.has_error_code != 0).then_some(exception.error_code),
            payload: payload.then_some(events.exception_payload),
            injected: exception.injected != 0,
        }),
        interrupt: (interrupt.injected != 0)
            .then_some(InjectedInterrupt { vector: interrupt.nr, soft: interrupt.soft != 0 }),
        shadow_of_sti: interrupt.shadow & SHADOW_STI != 0,
        shadow_of_mov_ss: interrupt.shadow & SHADOW_MOV_SS != 0,
        nmi_injected: nmi.injected != 0,
        nmis_pending: nmi.pending,
        nmi_masked: nmi.masked != 0,
        system_management: SystemManagement {
            active: smi.smm != 0,
            pending: smi.pending != 0,
            inside_nmi: smi.smm_inside_nmi != 0,
            latched_init: smi.latched_init != 0,
        },
        triple_fault_pending: events.triple_fault.pending != 0,
    }
}

const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;

/// As KVM takes it. `valid` are the flags with which this host's KVM reports events: the parts that it knows.
pub(crate) fn to_events(events: &Events, valid: u32) -> Result<kvm_vcpu_events, NotSupported> {
    let &Events {
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
    let refuse = |there: bool, flag: u32, what: &'static str| match there && valid & flag == 0 {
        true => Err(NotSupported(what.into())),
        false => Ok(()),
    };
    let payload = exception.and_then(|exception| exception.payload);
    refuse(payload.is_some(), KVM_VCPUEVENT_VALID_PAYLOAD, "the payload of an exception that is pending")?;
    refuse(triple_fault_pending, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, "a triple fault that is pending")?;
    let management = system_management != SystemManagement::default();
    refuse(management, KVM_VCPUEVENT_VALID_SMM, "system management mode")?;
    let mut kvm = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | valid & OPTIONAL_PARTS,
        exception_has_payload: payload.is_some().into(),
        exception_payload: payload.unwrap_or_default(),
        ..Default::default()
    };
    if let Some(Exception { vector, error_code, payload: _, injected }) = exception {
        (kvm.exception.nr, kvm.exception.injected) = (vector, injected.into());
        kvm.exception.pending = (!injected && kvm.flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0).into();
        kvm.exception.has_error_code = error_code.is_some().into();
        kvm.exception.error_code = error_code.unwrap_or_default();
    }
    if let Some(InjectedInterrupt { vector, soft }) = interrupt {
        (kvm.interrupt.injected, kvm.interrupt.nr, kvm.interrupt.soft) = (1, vector, soft.into());
    }
    kvm.interrupt.shadow =
        if shadow_of_sti { SHADOW_STI } else { 0 } | if shadow_of_mov_ss { SHADOW_MOV_SS } else { 0 };
    (kvm.nmi.injected, kvm.nmi.pending, kvm.nmi.masked) =
        (nmi_injected.into(), nmis_pending, nmi_masked.into());
    let SystemManagement { active, pending, inside_nmi, latched_init } = system_management;
    (kvm.smi.smm, kvm.smi.pending) = (active.into(), pending.into());
    (kvm.smi.smm_inside_nmi, kvm.smi.latched_init) = (inside_nmi.into(), latched_init.into());
    kvm.triple_fault.pending = triple_fault_pending.into();
    Ok(kvm)
}

/// Parts of the events that not every host's KVM knows.
const OPTIONAL_PARTS: u32 =
    KVM_VCPUEVENT_VALID_SMM | KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

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
