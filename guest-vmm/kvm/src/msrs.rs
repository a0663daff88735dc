//! A VP's model-specific registers, by the host's list.

use crate::error::{KvmError, Named};
use crate::hypervisor::Host;
use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use processor::NumberedRegisters;

/// IA32_TIME_STAMP_COUNTER.
const IA32_TSC: u32 = 0x10;
/// IA32_TSC_ADJUST.
pub(crate) const IA32_TSC_ADJUST: u32 = 0x3b;

/// Those of the time-stamp counter are a state of their own.
const ELSEWHERE: [u32; 2] = [IA32_TSC, IA32_TSC_ADJUST];

/// The registers that the host lists and the VP has. Which these are is found out with the first VP.
pub(crate) fn read_all(vcpu: &VcpuFd, host: &Host) -> Result<NumberedRegisters, KvmError> {
    if let Some(known) = host.msrs.get() {
        return read(vcpu, known.iter().copied());
    }
    let listed = host.kvm.get_msr_index_list().named("KVM_GET_MSR_INDEX_LIST")?;
    let listed = listed.as_slice().iter().copied().filter(|index| !ELSEWHERE.contains(index));
    let msrs = read(vcpu, listed)?;
    // Another VP may have been first; it has found the same.
    let _ = host.msrs.set(msrs.0.iter().map(|(index, _)| *index).collect());
    Ok(msrs)
}

/// Sets those whose values differ, since some take no value at all, not even the one they have.
///
/// One that the VP lacks is as good as one that is zero, and refused if it was not.
pub(crate) fn write_changed(vcpu: &VcpuFd, registers: &NumberedRegisters) -> Result<(), KvmError> {
    let now = read(vcpu, registers.0.iter().map(|(index, _)| *index))?;
    let mut changed = Vec::new();
    // Read in the same order, with those left out that the VP lacks.
    let mut now = now.0.iter().peekable();
    for &(index, data) in &registers.0 {
        match now.next_if(|(there, _)| *there == index) {
            Some((_, current)) if *current == data => {}
            None if data == 0 => {}
            Some(_) => changed.push(kvm_msr_entry { index, data, ..Default::default() }),
            None => return Err(KvmError::NoMsr { index, value: data }),
        }
    }
    write(vcpu, &changed)
}

/// The values of those registers that can be read, in the same order.
pub(crate) fn read(vcpu: &VcpuFd, indices: impl Iterator<Item = u32>) -> Result<NumberedRegisters, KvmError> {
    let wanted: Vec<_> = indices.map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut wanted = &wanted[..];
    let mut values = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let some = wanted.len().min(KVM_MAX_MSR_ENTRIES);
        let mut msrs = Msrs::from_entries(&wanted[..some]).expect("no more than fit");
        let done = vcpu.get_msrs(&mut msrs).named("KVM_GET_MSRS")?;
        values.extend(msrs.as_slice()[..done].iter().map(|msr| (msr.index, msr.data)));
        // KVM stops at the first that it cannot read.
        wanted = &wanted[if done < some { done + 1 } else { done }..];
    }
    Ok(NumberedRegisters(values))
}

/// Sets registers. KVM stops at the first that it cannot set.
pub(crate) fn write(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), KvmError> {
    for some in msrs.chunks(KVM_MAX_MSR_ENTRIES) {
        let entries = Msrs::from_entries(some).expect("no more than fit");
        let done = vcpu.set_msrs(&entries).named("KVM_SET_MSRS")?;
        if let Some(refused) = some.get(done) {
            return Err(KvmError::Msr { index: refused.index, value: refused.data });
        }
    }
    Ok(())
}
