//! One VP, and each way in which it leaves the guest.

use crate::guest::{CODE, Guest, IDT, MMIO, Mode, PATIENCE, rounds};
use futures::executor::block_on;
use processor::{DebugState, MpState, MsiRequest, Registers, VpHaltReason};
use rustix::event::{EventfdFlags, eventfd};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};

/// mov dx, 0x3f8
const TO_SERIAL: [u8; 3] = [0xba, 0xf8, 0x03];
/// jmp to itself
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// mov dx, 0x604; mov ax, 0x2000; out dx, ax
const POWER_OFF: [u8; 7] = [0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef];
/// mov al, 0xfe; out 0x64, al
const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];

fn code(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn wait_until(guest: &Guest, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        guest.assert_no_halt();
        assert!(Instant::now() < deadline, "{what}");
    }
}

#[test]
fn ports_are_read_and_written() {
    // in al, dx; inc ax; out dx, al; in ax, dx (0xff00); out dx, ax
    let guest = Guest::new(Mode::Real, &code(&[&TO_SERIAL, &[0xec, 0x40, 0xee, 0xed, 0xef], &POWER_OFF]));
    guest.bus.look(|state| state.input.extend(b"ab"));
    guest.start();
    assert!(matches!(guest.halt(), VpHaltReason::PowerOff));
    guest.bus.look(|state| {
        assert_eq!(state.output, [b'b', b'b', 0xff]);
        assert_eq!(state.widths, [1, 2]);
    });
}

#[test]
fn a_power_off_is_complete_before_the_state_is_seen() {
    // Behind it: mov al, '!'; mov dx, 0x3f8; out dx, al
    let guest = Guest::new(Mode::Real, &code(&[&POWER_OFF, &[0xb0, b'!'], &TO_SERIAL, &[0xee], &SPIN]));
    guest.start();
    assert!(matches!(guest.halt(), VpHaltReason::PowerOff));
    assert_eq!(guest.rip(), CODE + POWER_OFF.len() as u64);
    assert_eq!(guest.rip(), CODE + POWER_OFF.len() as u64);
    guest.start();
    guest.bus.expect("!");
}

#[test]
fn a_guest_resets_through_the_keyboard_controller() {
    let guest = Guest::new(Mode::Real, &RESET);
    guest.start();
    assert!(matches!(guest.halt(), VpHaltReason::Reset));
}

#[test]
fn registers_in_memory_are_read_and_written() {
    // mov eax, [MMIO + 4]; mov [MMIO + 8], eax; mov [MMIO], al; mov [MMIO + 2], ax
    let guest = Guest::new(
        Mode::Flat,
        &[
            &[0xa1, 4, 0, 0, 0xd0, 0xa3, 8, 0, 0, 0xd0, 0xa2, 0, 0, 0, 0xd0][..],
            &[0x66, 0xa3, 2, 0, 0, 0xd0],
            &RESET,
        ]
        .concat(),
    );
    guest.start();
    assert!(matches!(guest.halt(), VpHaltReason::Reset));
    let written = guest.bus.look(|state| state.mmio.clone());
    assert_eq!(written, [(MMIO + 8, vec![4, 0, 0, 0xd0]), (MMIO, vec![4]), (MMIO + 2, vec![4, 0])]);
}

#[test]
fn string_instructions_move_one_element_after_the_other() {
    // mov si, 0x2000; mov cx, 5; rep outsb; mov cx, 2; rep outsw
    let out = [0xbe, 0x00, 0x20, 0xb9, 5, 0, 0xf3, 0x6e, 0xb9, 2, 0, 0xf3, 0x6f];
    // mov di, 0x3000; mov cx, 3; rep insb; mov si, 0x3000; mov cx, 3; rep outsb
    let input = [0xbf, 0x00, 0x30, 0xb9, 3, 0, 0xf3, 0x6c, 0xbe, 0x00, 0x30, 0xb9, 3, 0, 0xf3, 0x6e];
    let guest = Guest::new(Mode::Real, &code(&[&TO_SERIAL, &out, &input, &POWER_OFF]));
    guest.memory.write_slice(b"hello, wor", GuestAddress(0x2000)).unwrap();
    guest.bus.look(|state| state.input.extend(b"xyz"));
    guest.start();
    assert!(matches!(guest.halt(), VpHaltReason::PowerOff));
    guest.bus.look(|state| {
        assert_eq!(String::from_utf8_lossy(&state.output), "hello, woxyz");
        assert_eq!(state.widths, [1, 1, 1, 1, 1, 2, 2, 1, 1, 1]);
    });
}

#[test]
fn a_vp_that_halts_stays_in_the_guest_and_says_so() {
    let guest = Guest::new(Mode::Real, &[0xfa, 0xf4, 0xeb, 0xfd]); // cli; hlt; jmp to the hlt
    assert_eq!(guest.access(|state| state.mp_state().unwrap()), MpState::Runnable);
    guest.start();
    let halted = || guest.access(|state| state.mp_state().unwrap()) == MpState::Halted;
    wait_until(&guest, "the VP does not halt", halted);
    assert_eq!(guest.rip(), CODE + 2);
    guest.stop();
    guest.assert_no_halt();
    assert!(halted());
}

#[test]
fn a_running_vp_shows_its_registers_and_goes_on() {
    let guest = Guest::new(Mode::Flat, &[0x40, 0xeb, 0xfd]); // inc eax; jmp to it
    guest.start();
    let rax = || guest.access(|state| state.registers().unwrap().rax);
    for _ in 0..3 {
        let before = rax();
        wait_until(&guest, "the counter stands still", || rax() != before);
    }
    guest.stop();
    assert_eq!(rax(), rax());
}

#[test]
fn what_is_set_is_read_back() {
    let guest = Guest::new(Mode::Flat, &SPIN);
    let registers = Registers {
        rax: 1,
        rbx: 2,
        rcx: 3,
        rdx: 4,
        rsi: 5,
        rdi: 6,
        rsp: 7,
        rbp: 8,
        r8: 9,
        r9: 10,
        r10: 11,
        r11: 12,
        r12: 13,
        r13: 14,
        r14: 15,
        r15: 16,
        rip: 17,
        rflags: 2,
    };
    let (read, system, again) = guest.access(move |state| {
        state.set_registers(&registers).unwrap();
        let system = state.system_registers().unwrap();
        state.set_system_registers(&system).unwrap();
        (state.registers().unwrap(), system, state.system_registers().unwrap())
    });
    assert_eq!(read, registers);
    assert_eq!(system, again);
    assert_eq!((system.cs.selector, system.cs.attributes), (8, 0xc09b));
    assert_eq!(system.gdtr.limit, 23);
}

#[test]
fn a_triple_fault_is_a_fault() {
    let guest = Guest::new(Mode::Flat, &[0x31, 0xc9, 0xf7, 0xf1]); // xor ecx, ecx; div ecx, without handlers
    guest.start();
    let fault = guest.fault();
    assert_eq!(fault.to_string(), "VP 0: triple fault (KVM_EXIT_SHUTDOWN)");
    assert!(fault.registers.is_some());
    let host = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let amd = host.contains("AuthenticAMD") || host.contains("HygonGenuine");
    assert_eq!(fault.note.is_some(), amd);
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_a_fault_that_names_it() {
    // int3 with a handler that resets: a host that runs it natively gets there, one that interprets it may give up.
    let guest = Guest::new(Mode::Real, &[0xcc]);
    guest.memory.write_slice(&[0x00, 0x20, 0, 0], GuestAddress(3 * 4)).unwrap();
    guest.memory.write_slice(&RESET, GuestAddress(0x2000)).unwrap();
    guest.start();
    match guest.halt() {
        VpHaltReason::Reset => {}
        VpHaltReason::Fault(fault) => {
            let reason = "KVM cannot go on (KVM_EXIT_INTERNAL_ERROR): suberror 1, EMULATION";
            assert!(fault.reason.starts_with(reason), "{fault}");
            assert!(fault.reason.ends_with(reason) || fault.reason.contains("bytes cc"), "{fault}");
            assert_eq!(fault.registers.unwrap().rip, CODE);
        }
        other => panic!("{other:?}"),
    }
}

/// A 32-bit guest with a local APIC, that prints `.`, then `I` for every interrupt with vector 0x40, and ends it.
fn interruptible(guest_memory: &dyn Fn(&[u8], u64)) -> Vec<u8> {
    let handler = 0x1800_u32;
    let [low, high] = [handler & 0xffff, handler & 0xffff_0000];
    let gate = [low | 8 << 16, high | 0x8e00].map(u32::to_le_bytes).concat();
    guest_memory(&gate, IDT + 0x40 * 8);
    // mov al, 'I'; mov dx, 0x3f8; out dx, al; mov eax, 0; mov [0xfee000b0], eax
    let print = [0xb0, b'I', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xb8, 0, 0, 0, 0, 0xa3, 0xb0, 0, 0xe0, 0xfe];
    // pop eax; add esp, 4; popf; jmp eax: what iret would do, which KVM's emulator cannot
    let back = [0x58, 0x83, 0xc4, 0x04, 0x9d, 0xff, 0xe0];
    guest_memory(&[&print[..], &back].concat(), handler.into());
    // mov eax, 0x1ff; mov [0xfee000f0], eax; mov al, '.'; mov dx, 0x3f8; out dx, al; sti; hlt; jmp to the hlt
    let enable = [0xb8, 0xff, 0x01, 0, 0, 0xa3, 0xf0, 0, 0xe0, 0xfe];
    [&enable[..], &[0xb0, b'.', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xfb, 0xf4, 0xeb, 0xfd]].concat()
}

fn interruptible_guest() -> Guest {
    let guest = Guest::new(Mode::Flat, &[]);
    let write = |data: &[u8], address| guest.memory.write_slice(data, GuestAddress(address)).unwrap();
    let code = interruptible(&write);
    write(&code, CODE);
    guest
}

const EDGE: MsiRequest = MsiRequest { address: 0xfee0_0000, data: 0x0040 };
const LEVEL: MsiRequest = MsiRequest { address: 0xfee0_0000, data: 0xc040 };

#[test]
fn interrupts_arrive_and_the_end_of_levels_is_reported() {
    let guest = interruptible_guest();
    guest.start();
    guest.bus.expect(".");
    guest.partition.signal_msi(EDGE).unwrap();
    guest.bus.expect("I");
    guest.partition.set_irq_route(5, Some(LEVEL)).unwrap();
    guest.partition.signal_msi(LEVEL).unwrap();
    guest.bus.expect("I");
    wait_until(&guest, "no end of the interrupt", || guest.bus.look(|state| state.ended == [0x40]));
    // Nobody has this local APIC: the interrupt is lost.
    guest.partition.signal_msi(MsiRequest { address: 0xfee0_7000, ..EDGE }).unwrap();
    assert!(guest.partition.set_irq_route(96, Some(LEVEL)).is_err());
    guest.stop();
    guest.assert_no_halt();
}

fn event_fd() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// An irqfd sends what its pin's route says at the time, and nothing while there is none.
#[test]
fn an_irqfd_interrupts_by_its_route() {
    let guest = interruptible_guest();
    let trigger = event_fd();
    let event_fds = guest.partition.event_fds().expect("KVM has eventfds");
    event_fds.add_irqfd(40, trigger.as_fd()).unwrap();
    assert!(event_fds.add_irqfd(96, trigger.as_fd()).is_err(), "there is no such pin");
    let mut trigger = File::from(trigger);
    guest.start();
    guest.bus.expect(".");
    trigger.write_all(&1u64.to_ne_bytes()).unwrap();
    guest.partition.set_irq_route(40, Some(EDGE)).unwrap();
    trigger.write_all(&1u64.to_ne_bytes()).unwrap();
    guest.bus.expect("I");
    guest.partition.set_irq_route(40, None).unwrap();
    trigger.write_all(&1u64.to_ne_bytes()).unwrap();
    guest.partition.signal_msi(EDGE).unwrap();
    guest.bus.expect("I");
    guest.stop();
    guest.assert_no_halt();
}

/// A doorbell rings for its own value alone; what it takes reaches no device.
#[test]
fn a_doorbell_rings_for_its_value() {
    const ADDRESS: u64 = 0xd000_0050;
    // mov eax, 7; mov [0xd0000050], eax; mov eax, 8; mov [0xd0000050], eax; mov al, '.'; mov dx, 0x3f8; out dx, al; hlt; jmp -3
    let write = |value| [0xb8, value, 0, 0, 0, 0xa3, 0x50, 0, 0, 0xd0];
    let print = [0xb0, b'.', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xf4, 0xeb, 0xfd];
    let guest = Guest::new(Mode::Flat, &[&write(7)[..], &write(8), &print].concat());
    let (bell, other) = (event_fd(), event_fd());
    let event_fds = guest.partition.event_fds().expect("KVM has eventfds");
    event_fds.add_doorbell(ADDRESS, 7, bell.as_fd()).unwrap();
    event_fds.add_doorbell(ADDRESS, 9, other.as_fd()).unwrap();
    guest.start();
    guest.bus.expect(".");
    let count = |bell: OwnedFd| {
        let mut count = [0; 8];
        File::from(bell).read_exact(&mut count).map(|()| u64::from_ne_bytes(count))
    };
    assert_eq!(count(bell).unwrap(), 1);
    assert_eq!(count(other).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    guest.stop();
}

#[test]
fn a_reset_guest_runs_as_a_new_one() {
    let guest = interruptible_guest();
    for _ in 0..5 {
        guest.start();
        guest.bus.expect(".");
        guest.partition.set_irq_route(5, Some(LEVEL)).unwrap();
        guest.partition.signal_msi(EDGE).unwrap();
        guest.bus.expect("I");
        guest.stop();
        // Pending when the guest is reset, and lost with it.
        guest.partition.signal_msi(EDGE).unwrap();
        guest.reset();
        guest.bus.look(|state| assert!(state.output.is_empty()));
        let system = guest.access(|state| state.system_registers().unwrap());
        assert_eq!(system.cs.selector, 8);
    }
    guest.start();
    guest.bus.expect(".");
    guest.stop();
    guest.bus.look(|state| assert!(state.output.is_empty(), "an interrupt outlived the reset"));
}

#[test]
fn a_guest_that_was_reset_after_a_fault_or_a_power_off_runs() {
    for ending in [&POWER_OFF[..], &[0x0f, 0x01, 0x1e, 0x00, 0x20, 0x31, 0xc9, 0xf7, 0xf1]] {
        // Once more, with: lidt [0x2000] (all zeroes); xor cx, cx; div cx
        let guest = Guest::new(Mode::Real, &code(&[&[0xb0, b'>'], &TO_SERIAL, &[0xee], ending]));
        for _ in 0..3 {
            guest.start();
            guest.bus.expect(">");
            assert!(!matches!(guest.halt(), VpHaltReason::Stop | VpHaltReason::Reset));
            guest.reset();
        }
    }
}

#[test]
fn a_reset_ends_an_instruction_that_was_in_the_middle_of_its_accesses() {
    // mov [MMIO_RESET], eax: two bytes on this page, which reset, and two on the next, that nobody asks for any more.
    let guest = Guest::new(Mode::Flat, &[&[0xa3, 0xfe, 0x0f, 0, 0xd0][..], &SPIN].concat());
    for round in 1..=3 {
        guest.start();
        assert!(matches!(guest.halt(), VpHaltReason::Reset));
        guest.reset();
        assert_eq!(guest.rip(), CODE);
        assert_eq!(guest.bus.look(|state| state.mmio.len()), round, "each life makes its first access anew");
    }
}

#[test]
fn rounds_of_start_and_stop_lose_no_kick() {
    let guest = Guest::new(Mode::Real, &SPIN);
    for _ in 0..rounds(10_000) {
        guest.start();
        guest.stop();
    }
    guest.assert_no_halt();
}

#[test]
fn rounds_of_start_and_stop_among_other_calls_lose_no_kick() {
    // The handler of non-maskable interrupts: iret. The code: jmp to itself.
    let guest = Guest::new(Mode::Real, &SPIN);
    guest.memory.write_obj(0x1800_u32, GuestAddress(2 * 4)).unwrap();
    guest.memory.write_slice(&[0xcf], GuestAddress(0x1800)).unwrap();
    let (vp, partition, over) = (&guest.vps[0], &*guest.partition, AtomicBool::new(false));
    let until_over = |call: &dyn Fn()| {
        while !over.load(Ordering::Relaxed) {
            call();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| until_over(&|| block_on(vp.access(|_| ())).unwrap()));
        scope.spawn(|| until_over(&|| block_on(vp.set_debug_state(Some(DebugState::default()))).unwrap()));
        scope.spawn(|| until_over(&|| partition.inject_nmi(vp.vp())));
        for _ in 0..rounds(10_000) {
            block_on(vp.start()).unwrap();
            block_on(vp.stop()).unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
    guest.assert_no_halt();
}

#[test]
fn rounds_of_access_to_a_guest_that_is_in_devices() {
    // in al, 0x80; out 0x80, al; jmp to it
    let guest = Guest::new(Mode::Real, &[0xe4, 0x80, 0xe6, 0x80, 0xeb, 0xfa]);
    guest.start();
    for _ in 0..rounds(10_000) {
        let rip = guest.rip();
        assert!((CODE..CODE + 6).contains(&rip), "{rip:#x}");
    }
}

#[test]
fn a_kick_of_a_vp_that_is_not_there_yet_or_any_more_is_harmless() {
    let guest = Guest::new(Mode::Real, &SPIN);
    let vp = processor::VpIndex(0);
    guest.partition.request_yield(vp);
    guest.partition.request_yield(processor::VpIndex(1));
    let Guest { vps, partition, .. } = guest;
    for vp in vps {
        block_on(vp.shutdown());
    }
    partition.request_yield(vp);
}
