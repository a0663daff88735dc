//! Single steps and hardware breakpoints.
//!
//! Watchpoints are not tried here: a host without VT-x and SVM takes them and never hits one.

use crate::guest::*;
use futures::executor::block_on;
use processor::{AccessKind, DebugState, HardwareBreakpoint, Registers, VpError, VpHaltReason};
use vm_memory::{Bytes, GuestAddress};

/// `mov eax, 1; inc eax; mov [0x3000], eax; mov ebx, [0x3000]; jmp` to itself.
const CODE_BYTES: [u8; 19] = [
    0xb8, 1, 0, 0, 0,    // CODE
    0x40, // CODE + 5
    0xa3, 0, 0x30, 0, 0, // CODE + 6
    0x8b, 0x1d, 0, 0x30, 0, 0, // CODE + 11
    0xeb, 0xfe, // CODE + 17
];
const STORE: u64 = CODE + 6;
const LOAD: u64 = CODE + 11;
const SPIN: u64 = CODE + 17;

fn debug(guest: &Guest, state: DebugState) {
    block_on(guest.vps[0].set_debug_state(Some(state))).unwrap();
}

fn at(address: u64, length: u8, access: AccessKind) -> HardwareBreakpoint {
    HardwareBreakpoint { address, length, access }
}

fn stop_at(breakpoint: HardwareBreakpoint) -> DebugState {
    DebugState { breakpoints: [None, None, Some(breakpoint), None], ..DebugState::default() }
}

#[test]
fn a_single_step_is_one_instruction() {
    let guest = Guest::new(Mode::Flat, &CODE_BYTES);
    debug(&guest, DebugState { single_step: true, ..DebugState::default() });
    for (rip, rax) in [(CODE + 5, 1), (STORE, 2), (LOAD, 2), (SPIN, 2), (SPIN, 2)] {
        guest.start();
        assert!(matches!(guest.halt(), VpHaltReason::SingleStep));
        let Registers { rip: stopped, rax: value, .. } = guest.access(|state| state.registers().unwrap());
        assert_eq!((stopped, value), (rip, rax));
    }
    block_on(guest.vps[0].set_debug_state(None)).unwrap();
    guest.start();
    guest.stop();
    guest.assert_no_halt();
}

#[test]
fn a_breakpoint_stops_before_its_instruction() {
    let guest = Guest::new(Mode::Flat, &CODE_BYTES);
    for address in [STORE, LOAD, SPIN] {
        let breakpoint = at(address, 1, AccessKind::Execute);
        debug(&guest, stop_at(breakpoint));
        guest.start();
        assert!(matches!(guest.halt(), VpHaltReason::HwBreak(hit) if hit == breakpoint));
        assert_eq!(guest.rip(), address);
        let stored = guest.memory.read_obj::<u32>(GuestAddress(0x3000)).unwrap();
        assert_eq!(stored, if address == STORE { 0 } else { 2 });
    }
}

#[test]
fn a_running_vp_takes_a_breakpoint() {
    let guest = Guest::new(Mode::Flat, &[0xeb, 0xfe]);
    guest.start();
    let execute = at(CODE, 1, AccessKind::Execute);
    debug(&guest, stop_at(execute));
    assert!(matches!(guest.halt(), VpHaltReason::HwBreak(hit) if hit == execute));
}

#[test]
fn no_such_breakpoint_is_refused_and_changes_nothing() {
    let guest = Guest::new(Mode::Flat, &CODE_BYTES);
    let execute = at(STORE, 1, AccessKind::Execute);
    debug(&guest, stop_at(execute));
    let odd = stop_at(at(0x3001, 4, AccessKind::Write));
    match block_on(guest.vps[0].set_debug_state(Some(odd))) {
        Err(VpError::State { source, .. }) => {
            let text = "the hypervisor does not support a breakpoint for a write of 4 bytes at 0x3001";
            assert_eq!(source.to_string(), text);
        }
        other => panic!("{other:?}"),
    }
    guest.start();
    assert!(matches!(guest.halt(), VpHaltReason::HwBreak(hit) if hit == execute));
}

#[test]
fn a_guest_that_is_debugged_has_its_own_debug_exceptions() {
    // pushf; pop ax; or ah, 1; push ax; popf; nop; cli; hlt. The handler prints D.
    let code = [0x9c, 0x58, 0x80, 0xcc, 0x01, 0x50, 0x9d, 0x90, 0xfa, 0xf4];
    let guest = Guest::new(Mode::Real, &code);
    guest.memory.write_obj(0x1800_u32, GuestAddress(4)).unwrap();
    // mov dx, SERIAL; mov al, D; out dx, al; cli; hlt
    guest
        .memory
        .write_slice(&[0xba, 0xf8, 0x03, 0xb0, b'D', 0xee, 0xfa, 0xf4], GuestAddress(0x1800))
        .unwrap();
    debug(&guest, stop_at(at(0x2000, 1, AccessKind::Execute)));
    guest.start();
    guest.bus.expect("D");
    guest.stop();
    guest.assert_no_halt();
}
