//! A VP's state by bare ioctls: each that there is for it once, on buffers that are there already.
//!
//! Limits: the ioctls alone, in the order of the table of states. The time-stamp counter, where a VP has one of its own, is read
//! and set as an MSR, in the same ioctl as the others.

// UNSAFETY: the extended state is handed over in a buffer whose size the call cannot know.
#![expect(unsafe_code, reason = "the extended state is handed over in a buffer")]

use std::time::{Duration, Instant};

use anyhow::ensure;
use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, Xsave, kvm_msr_entry, kvm_xsave};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

/// How often a VP's state is read and set for one sample.
pub(super) const REPEATS: u32 = 8;

/// The MSRs that are set to another value than they have, as those of a VP that is restored: where system calls enter the
/// kernel, and its GS (Intel SDM volume 4). Any address will do.
const CHANGED: [u32; 6] = [0x175, 0x176, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0102];

/// IA32_TIME_STAMP_COUNTER and IA32_TSC_ADJUST.
const TSC: [u32; 2] = [0x10, 0x3b];

/// What an MSR that has a value is set to.
pub(super) fn other_value(index: u32, value: u64) -> u64 {
    if CHANGED.contains(&index) { value ^ 0x1000 } else { value }
}

/// How long reading and setting a VP's state took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Times {
    pub(super) save: Duration,
    pub(super) restore: Duration,
}

impl Times {
    /// The mean of [`REPEATS`].
    pub(super) fn of_one(self) -> Self {
        Self { save: self.save / REPEATS, restore: self.restore / REPEATS }
    }
}

/// What the ioctls need.
pub(super) struct StateIoctls {
    /// The registers that can be read.
    readable: Msrs,
    /// Those of them that take their own value.
    settable: Vec<usize>,
    xsave: ExtendedState,
    tsc: bool,
}

/// The extended state, in the buffer that the host's size takes.
enum ExtendedState {
    /// What every host has.
    Small(Box<kvm_xsave>),
    /// What KVM_CAP_XSAVE2 is for.
    Sized(Xsave),
}

impl ExtendedState {
    fn new(kvm: &Kvm) -> anyhow::Result<Self> {
        let size = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(match size.checked_sub(size_of::<kvm_xsave>()) {
            None | Some(0) => Self::Small(Box::default()),
            Some(more) => Self::Sized(Xsave::new(more.div_ceil(size_of::<u32>()))?),
        })
    }

    fn read(&mut self, vcpu: &VcpuFd) -> anyhow::Result<()> {
        match self {
            Self::Small(state) => **state = vcpu.get_xsave()?,
            // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 says, and this process asks for no larger states.
            Self::Sized(state) => unsafe { vcpu.get_xsave2(state) }?,
        }
        Ok(())
    }

    fn set(&self, vcpu: &VcpuFd) -> anyhow::Result<()> {
        match self {
            // SAFETY: the host's size is that of the type.
            Self::Small(state) => unsafe { vcpu.set_xsave(state) }?,
            // SAFETY: the buffer has the size that KVM reads.
            Self::Sized(state) => unsafe { vcpu.set_xsave2(state) }?,
        }
        Ok(())
    }
}

impl StateIoctls {
    /// Finds out which registers the VP has. `tsc` says whether its time-stamp counter is part of its state.
    pub(super) fn prepare(vcpu: &VcpuFd, tsc: bool) -> anyhow::Result<Self> {
        let kvm = Kvm::new()?;
        let (mut readable, mut settable) = (Vec::new(), Vec::new());
        let listed = kvm.get_msr_index_list()?;
        for &index in listed.as_slice().iter().filter(|index| tsc || !TSC.contains(index)) {
            let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }])?;
            if vcpu.get_msrs(&mut one)? == 1 {
                if vcpu.set_msrs(&one)? == 1 {
                    settable.push(readable.len());
                }
                readable.extend_from_slice(one.as_slice());
            }
        }
        ensure!(readable.len() <= KVM_MAX_MSR_ENTRIES, "{} MSRs do not fit into one call", readable.len());
        let xsave = ExtendedState::new(&kvm)?;
        Ok(Self { readable: Msrs::from_entries(&readable)?, settable, xsave, tsc })
    }

    /// Reads everything, and sets everything with other values for [`CHANGED`].
    pub(super) fn save_and_restore(mut self, vcpu: &VcpuFd) -> anyhow::Result<Times> {
        let mut values: Vec<_> = self.settable.iter().map(|&at| self.readable.as_slice()[at]).collect();
        values.iter_mut().for_each(|msr| msr.data = other_value(msr.index, msr.data));
        let mut settable = Msrs::from_entries(&values)?;
        let mut times = Times::default();
        for _ in 0..REPEATS {
            self.once(vcpu, &settable, &mut times)?;
            let msrs = settable.as_mut_slice();
            msrs.iter_mut().for_each(|msr| msr.data = other_value(msr.index, msr.data));
        }
        Ok(times.of_one())
    }

    fn once(&mut self, vcpu: &VcpuFd, settable: &Msrs, times: &mut Times) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mp_state = vcpu.get_mp_state()?;
        let events = vcpu.get_vcpu_events()?;
        let read = vcpu.get_msrs(&mut self.readable)?;
        let lapic = vcpu.get_lapic()?;
        let khz = if self.tsc { Some(vcpu.get_tsc_khz()?) } else { None };
        let debug = vcpu.get_debug_regs()?;
        self.xsave.read(vcpu)?;
        let xcrs = vcpu.get_xcrs()?;
        let registers = vcpu.get_regs()?;
        let system = vcpu.get_sregs()?;
        times.save += begin.elapsed();
        ensure!(read == self.readable.as_slice().len(), "only {read} MSRs were read");
        let begin = Instant::now();
        vcpu.set_sregs(&system)?;
        vcpu.set_regs(&registers)?;
        vcpu.set_xcrs(&xcrs)?;
        self.xsave.set(vcpu)?;
        vcpu.set_debug_regs(&debug)?;
        khz.map_or(Ok(()), |khz| vcpu.set_tsc_khz(khz))?;
        vcpu.set_lapic(&lapic)?;
        let set = vcpu.set_msrs(settable)?;
        vcpu.set_vcpu_events(&events)?;
        vcpu.set_mp_state(mp_state)?;
        times.restore += begin.elapsed();
        ensure!(set == settable.as_slice().len(), "only {set} MSRs were set");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_registers_are_set_to_another_value_and_back() {
        let msr = CHANGED[0];
        assert_ne!(other_value(msr, 7), 7);
        assert_eq!(other_value(msr, other_value(msr, 7)), 7);
        assert_eq!(other_value(0x10, 7), 7);
    }
}
