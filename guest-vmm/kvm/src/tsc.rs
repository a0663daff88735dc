//! A VP's time-stamp counter.
//!
//! KVM shows a guest the host's counter, scaled if the guest's is to have another frequency, plus an offset. The offset says
//! exactly where the counter stood at any moment, where reading the counter of one VP after the other would set them apart. On
//! a host that shows guests its own counter as it is, VPs have no such state.

// UNSAFETY: an ioctl that kvm-ioctls has for other architectures only.
#![expect(unsafe_code, reason = "an ioctl that kvm-ioctls has for other architectures only")]

use crate::error::{KvmError, Named};
use crate::msrs::{self, IA32_TSC_ADJUST};
use crate::time::Pace;
use crate::vp::KvmProcessor;
use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuFd};
use processor::{TimePolicy, Tsc};
use std::io;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// How far two frequencies may differ, in millionths, before a guest has to be told: what Linux's NTP can correct, halved.
const TOLERANCE_PPM: u64 = 250;

/// Whether the host gives a VP a counter of its own: one that began with the VP is never at one with the host's.
pub(crate) fn is_virtual(vcpu: &VcpuFd) -> bool {
    offset(vcpu).is_ok_and(|offset| offset != 0)
}

pub(crate) fn get(vp: &KvmProcessor) -> Result<Tsc, KvmError> {
    // Where the counter would stand had it followed the time already.
    let behind = vp.partition.time.pace().lag.wrapping_sub(vp.pace.lag);
    let moment = vp.partition.time.moment().wrapping_sub(behind);
    let value = scale(vp, moment)?.wrapping_add(offset(&vp.vcpu)?);
    Ok(Tsc { value, adjust: adjustment(&vp.vcpu)?, frequency_khz: frequency(&vp.vcpu)? })
}

pub(crate) fn set(vp: &mut KvmProcessor, value: &Tsc) -> Result<(), KvmError> {
    let &Tsc { value, adjust, frequency_khz } = value;
    set_frequency(vp, frequency_khz)?;
    set_offset(&vp.vcpu, value.wrapping_sub(scale(vp, vp.partition.time.moment())?))?;
    vp.pace = vp.partition.time.pace();
    if adjustment(&vp.vcpu)? != adjust {
        let msr = kvm_msr_entry { index: IA32_TSC_ADJUST, data: adjust, ..Default::default() };
        msrs::write(&vp.vcpu, &[msr])?;
    }
    Ok(())
}

/// Has the counter follow the partition's time, before the VP enters the guest.
pub(crate) fn follow(vp: &mut KvmProcessor, pace: Pace) -> Result<(), KvmError> {
    let behind = pace.lag.wrapping_sub(vp.pace.lag);
    if behind != 0 && vp.partition.host.has_virtual_tsc() {
        // It may lag behind by less than nothing: then it is to be ahead.
        let back = match behind.cast_signed() {
            ahead if ahead < 0 => scale(vp, ahead.unsigned_abs())?.wrapping_neg(),
            _ => scale(vp, behind)?,
        };
        set_offset(&vp.vcpu, offset(&vp.vcpu)?.wrapping_sub(back))?;
    }
    if vp.partition.time.policy == TimePolicy::CatchUp {
        // Linux then knows that it was stopped, and does not take the jump for a lockup. Refused if it does not use the clock.
        let _ = vp.vcpu.kvmclock_ctrl();
    }
    vp.pace = pace;
    Ok(())
}

/// Ticks of the host's counter in ticks of the guest's.
fn scale(vp: &KvmProcessor, ticks: u64) -> Result<u64, KvmError> {
    let (guest, host) = (frequency(&vp.vcpu)?, vp.partition.host.tsc_khz());
    if guest == host || host == 0 {
        return Ok(ticks);
    }
    let scaled = u128::from(ticks) * u128::from(guest) / u128::from(host);
    // The counter wraps as registers do.
    Ok(u64::try_from(scaled & u128::from(u64::MAX)).expect("masked"))
}

/// In kHz.
pub(crate) fn frequency(vcpu: &VcpuFd) -> Result<u32, KvmError> {
    vcpu.get_tsc_khz().named("KVM_GET_TSC_KHZ")
}

fn set_frequency(vp: &KvmProcessor, wanted: u32) -> Result<(), KvmError> {
    let now = frequency(&vp.vcpu)?;
    let apart = u64::from(now.abs_diff(wanted)) * 1_000_000;
    if wanted == 0 || apart <= u64::from(now) * TOLERANCE_PPM {
        return Ok(());
    }
    if !vp.partition.host.kvm.check_extension(Cap::TscControl) {
        return Err(KvmError::TscFrequency { wanted, host: now });
    }
    vp.vcpu.set_tsc_khz(wanted).named("KVM_SET_TSC_KHZ")
}

/// IA32_TSC_ADJUST. A VP that lacks it has never adjusted anything.
fn adjustment(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    Ok(msrs::read(vcpu, [IA32_TSC_ADJUST].into_iter())?.get(IA32_TSC_ADJUST).unwrap_or(0))
}

fn offset(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let mut offset = 0u64;
    let attribute = attribute(&raw mut offset);
    // SAFETY: the call writes 8 bytes to the address in the attribute, which is that of `offset`.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    check(result, "KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)")?;
    Ok(offset)
}

fn set_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), KvmError> {
    let attribute = attribute(&raw mut offset);
    // SAFETY: the call reads 8 bytes from the address in the attribute, which is that of `offset`.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    check(result, "KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)")
}

fn check(result: i32, call: &'static str) -> Result<(), KvmError> {
    if result == 0 { Ok(()) } else { Err(KvmError::Call { call, source: io::Error::last_os_error() }) }
}

fn attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset.expose_provenance() as u64,
        flags: 0,
    }
}
