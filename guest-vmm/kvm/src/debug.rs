//! What KVM is told of a debugger's wishes, and what it says of their fulfilment (Intel SDM volume 3, section 18.2).

use crate::error::{KvmError, Named};
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
};
use kvm_ioctls::VcpuFd;
use processor::{AccessKind, DebugState, HardwareBreakpoint, NotSupported, VpHaltReason};

/// DR6: a single step was made.
const SINGLE_STEP: u64 = 1 << 14;

/// Bits of DR7 that are always set, and that make breakpoints exact on old processors.
const CONTROL: u64 = 1 << 10 | 1 << 9;

/// Tells KVM. Nothing changes if a breakpoint is none that the architecture has.
pub(crate) fn set(
    vcpu: &VcpuFd,
    state: Option<&DebugState>,
    blocks_interrupts: bool,
) -> Result<(), KvmError> {
    let debug = guest_debug(state, blocks_interrupts)?;
    vcpu.set_guest_debug(&debug).named("KVM_SET_GUEST_DEBUG")
}

/// Gives a VP that is debugged a debug exception of its own: a breakpoint or a step that nobody but the guest has asked for.
pub(crate) fn reinject(
    vcpu: &VcpuFd,
    state: Option<&DebugState>,
    blocks_interrupts: bool,
    dr6: u64,
) -> Result<(), KvmError> {
    let mut registers = vcpu.get_debug_regs().named("KVM_GET_DEBUGREGS")?;
    registers.dr6 = dr6;
    vcpu.set_debug_regs(&registers).named("KVM_SET_DEBUGREGS")?;
    let mut debug = guest_debug(state, blocks_interrupts)?;
    debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_DB;
    vcpu.set_guest_debug(&debug).named("KVM_SET_GUEST_DEBUG")
}

fn guest_debug(state: Option<&DebugState>, blocks_interrupts: bool) -> Result<kvm_guest_debug, NotSupported> {
    let mut debug = kvm_guest_debug::default();
    if let Some(DebugState { single_step, breakpoints }) = state {
        debug.control = KVM_GUESTDBG_ENABLE;
        if *single_step {
            debug.control |= KVM_GUESTDBG_SINGLESTEP;
            // A step would else be the first instruction of an interrupt's handler, and the trap flag by which KVM steps would be
            // saved on the guest's stack and trap it later. So a VP in HLT makes no step before it is let go on.
            debug.control |= if blocks_interrupts { KVM_GUESTDBG_BLOCKIRQ } else { 0 };
        }
        let mut control = CONTROL;
        for (number, breakpoint) in breakpoints.iter().enumerate() {
            let Some(breakpoint) = breakpoint else { continue };
            control |= control_bits(number, breakpoint)?;
            debug.arch.debugreg[number] = breakpoint.address;
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
        }
        debug.arch.debugreg[7] = control;
    }
    Ok(debug)
}

/// What a breakpoint is in DR7: enabled for all tasks, its kind and length.
fn control_bits(number: usize, breakpoint: &HardwareBreakpoint) -> Result<u64, NotSupported> {
    if !breakpoint.is_valid() {
        return Err(NotSupported(format!("a breakpoint for {breakpoint}").into()));
    }
    let kind = match breakpoint.access {
        AccessKind::Execute => 0,
        AccessKind::Write => 1,
        AccessKind::ReadOrWrite => 3,
    };
    let length = match breakpoint.length {
        1 => 0,
        2 => 1,
        8 => 2,
        _ => 3,
    };
    Ok(2 << (2 * number) | (length << 2 | kind) << (16 + 4 * number))
}

/// Why a VP that is debugged has left the guest, by the DR6 that the exit reports.
pub(crate) fn reason(state: Option<&DebugState>, dr6: u64) -> Option<VpHaltReason> {
    let DebugState { single_step, breakpoints } = state?;
    // A bit may be set for a register that is not in use, if its address and kind fit (volume 3, section 18.2.3).
    let hit = |number: usize| dr6 >> number & 1 == 1;
    let mut in_use = breakpoints.iter().enumerate().filter_map(|(number, b)| b.map(|b| (number, b)));
    match in_use.find(|(number, _)| hit(*number)) {
        Some((_, breakpoint)) => Some(VpHaltReason::HwBreak(breakpoint)),
        None if *single_step && dr6 & SINGLE_STEP != 0 => Some(VpHaltReason::SingleStep),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn breakpoint(address: u64, length: u8, access: AccessKind) -> HardwareBreakpoint {
        HardwareBreakpoint { address, length, access }
    }

    #[test]
    fn breakpoints_are_encoded_as_the_architecture_has_them() {
        let execute = breakpoint(0x1001, 1, AccessKind::Execute);
        assert_eq!(control_bits(0, &execute).unwrap(), 0x2);
        let write = breakpoint(0x1000, 4, AccessKind::Write);
        assert_eq!(control_bits(1, &write).unwrap(), 0x8 | 0b1101 << 20);
        let access = breakpoint(0x1000, 8, AccessKind::ReadOrWrite);
        assert_eq!(control_bits(3, &access).unwrap(), 0x80 | 0b1011 << 28);
        let error = control_bits(0, &breakpoint(0x1001, 2, AccessKind::Write)).unwrap_err();
        assert!(error.to_string().contains("a write of 2 bytes at 0x1001"), "{error}");
    }

    #[test]
    fn an_exit_is_what_its_dr6_says() {
        let watched = breakpoint(0x2000, 8, AccessKind::Write);
        let state = DebugState { single_step: true, breakpoints: [None, Some(watched), None, None] };
        assert!(matches!(reason(Some(&state), 0xffff_0ff2), Some(VpHaltReason::HwBreak(b)) if b == watched));
        assert!(matches!(reason(Some(&state), 0xffff_0ff3), Some(VpHaltReason::HwBreak(b)) if b == watched));
        assert!(matches!(reason(Some(&state), 0xffff_4ff1), Some(VpHaltReason::SingleStep)));
        assert!(matches!(reason(Some(&state), 0xffff_4ff0), Some(VpHaltReason::SingleStep)));
        assert!(reason(Some(&state), 0xffff_0ff0).is_none());
        assert!(reason(None, 0xffff_4ff1).is_none());
    }
}
