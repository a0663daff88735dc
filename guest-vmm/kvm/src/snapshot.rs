//! All of a VP's state, as the host lists it, to put the VP back into.

// UNSAFETY: the extended state is handed over in a buffer whose size the call cannot know.
#![expect(
    unsafe_code,
    reason = "the extended state is handed over in a buffer whose size the call cannot know"
)]

use crate::error::{KvmError, Named};
use crate::hypervisor::Host;
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

/// All of a VP's state.
pub(crate) struct Snapshot {
    sregs: kvm_sregs,
    regs: kvm_regs,
    xcrs: kvm_xcrs,
    xsave: Box<kvm_xsave>,
    debug_regs: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

impl Snapshot {
    /// The VP's state now.
    pub(crate) fn capture(vcpu: &VcpuFd, host: &Host) -> Result<Self, KvmError> {
        Ok(Self {
            // First, since KVM handles an INIT or a SIPI that is pending when it is asked for this.
            mp_state: vcpu.get_mp_state().named("KVM_GET_MP_STATE")?,
            sregs: vcpu.get_sregs().named("KVM_GET_SREGS")?,
            regs: vcpu.get_regs().named("KVM_GET_REGS")?,
            xcrs: vcpu.get_xcrs().named("KVM_GET_XCRS")?,
            xsave: Box::new(vcpu.get_xsave().named("KVM_GET_XSAVE")?),
            debug_regs: vcpu.get_debug_regs().named("KVM_GET_DEBUGREGS")?,
            lapic: Box::new(vcpu.get_lapic().named("KVM_GET_LAPIC")?),
            msrs: msrs(vcpu, host)?,
            events: vcpu.get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?,
        })
    }

    /// Puts the VP into this state.
    ///
    /// The order matters: an INIT that is pending is handled first, or it would come after the new state; the mode of the
    /// local APIC (in the system registers) comes before its registers, those before the MSRs, of which one is its timer's;
    /// what is pending and whether the VP runs come last.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        vcpu.get_mp_state().named("KVM_GET_MP_STATE")?;
        vcpu.set_sregs(&self.sregs).named("KVM_SET_SREGS")?;
        vcpu.set_regs(&self.regs).named("KVM_SET_REGS")?;
        vcpu.set_xcrs(&self.xcrs).named("KVM_SET_XCRS")?;
        // SAFETY: a VP's extended state is larger than this type only if the process may use tile registers, for which this crate
        // does not ask; this very buffer was filled by the same VP's KVM_GET_XSAVE.
        unsafe { vcpu.set_xsave(&self.xsave) }.named("KVM_SET_XSAVE")?;
        vcpu.set_debug_regs(&self.debug_regs).named("KVM_SET_DEBUGREGS")?;
        vcpu.set_lapic(&self.lapic).named("KVM_SET_LAPIC")?;
        self.restore_msrs(vcpu)?;
        vcpu.set_vcpu_events(&self.events).named("KVM_SET_VCPU_EVENTS")?;
        vcpu.set_mp_state(self.mp_state).named("KVM_SET_MP_STATE")
    }

    /// Sets the MSRs that have changed, since some take no value at all, not even the one they have.
    fn restore_msrs(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let now = read_msrs(vcpu, self.msrs.iter().map(|msr| msr.index))?;
        let same = |msr: &&kvm_msr_entry| !now.iter().any(|n| n.index == msr.index && n.data == msr.data);
        let changed: Vec<_> = self.msrs.iter().filter(same).copied().collect();
        write_msrs(vcpu, &changed)
    }
}

/// The MSRs that the host lists and the VP has. Which these are is found out with the first VP.
fn msrs(vcpu: &VcpuFd, host: &Host) -> Result<Vec<kvm_msr_entry>, KvmError> {
    if let Some(known) = host.msrs.get() {
        return read_msrs(vcpu, known.iter().copied());
    }
    let listed = host.kvm.get_msr_index_list().named("KVM_GET_MSR_INDEX_LIST")?;
    let msrs = read_msrs(vcpu, listed.as_slice().iter().copied())?;
    // Another VP may have been first; it has found the same.
    let _ = host.msrs.set(msrs.iter().map(|msr| msr.index).collect());
    Ok(msrs)
}

/// The values of those MSRs that can be read.
fn read_msrs(vcpu: &VcpuFd, indices: impl Iterator<Item = u32>) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut wanted: Vec<_> = indices.map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut read = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let some = wanted.len().min(KVM_MAX_MSR_ENTRIES);
        let mut msrs = Msrs::from_entries(&wanted[..some]).expect("no more than fit");
        let done = vcpu.get_msrs(&mut msrs).named("KVM_GET_MSRS")?;
        read.extend_from_slice(&msrs.as_slice()[..done]);
        // KVM stops at the first that it cannot read.
        wanted.drain(..if done < some { done + 1 } else { done });
    }
    Ok(read)
}

/// Sets MSRs. KVM stops at the first that it cannot set.
pub(crate) fn write_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), KvmError> {
    for some in msrs.chunks(KVM_MAX_MSR_ENTRIES) {
        let entries = Msrs::from_entries(some).expect("no more than fit");
        let done = vcpu.set_msrs(&entries).named("KVM_SET_MSRS")?;
        if let Some(refused) = some.get(done) {
            return Err(KvmError::Msr { index: refused.index, value: refused.data });
        }
    }
    Ok(())
}
