//! What scripts can do.

use crate::guest::{ACPI, Guest, KEYBOARD, MEMORY_SIZE, SERIAL};
use futures::executor::block_on;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use processor::scripted::{SCRIPT_BASE, Script};
use processor::{MpState, MsiRequest, VpHaltReason, VpIndex};
use std::io::Cursor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

fn mp_state(guest: &Guest, vp: usize) -> MpState {
    block_on(guest.vps[vp].access(|state| state.mp_state().unwrap())).unwrap()
}

/// Waits until a VP is in the state.
fn wait_for(guest: &Guest, vp: usize, wanted: MpState) {
    let deadline = std::time::Instant::now() + crate::guest::PATIENCE;
    while mp_state(guest, vp) != wanted {
        assert!(std::time::Instant::now() < deadline, "VP {vp} is not {wanted:?}");
    }
}

fn run_to_fault(script: &Script) -> processor::VpFault {
    let guest = Guest::new(script);
    guest.start();
    guest.fault()
}

#[test]
fn a_guest_prints_and_powers_off() {
    let mut script = Script::new();
    script.out(SERIAL, b"READY\n").out_word(ACPI, 0x2000);
    let guest = Guest::new(&script);
    guest.start();
    assert!(matches!(guest.halt(), (VpIndex(0), VpHaltReason::PowerOff)));
    assert_eq!(guest.bus.output(), "READY\n");
}

#[test]
fn a_guest_resets_itself() {
    let mut script = Script::new();
    script.out(KEYBOARD, &[0xfe]);
    let guest = Guest::new(&script);
    guest.start();
    assert!(matches!(guest.halt(), (VpIndex(0), VpHaltReason::Reset)));
}

#[test]
fn memory_and_registers_are_told_apart() {
    let mut script = Script::new();
    let end = MEMORY_SIZE as u64;
    script.write(0x2000, b"in memory").write(end, b"OUT").read_quad(0x2000, SERIAL);
    script.read_long(0x4433_2211, SERIAL).fault();
    let guest = Guest::new(&script);
    guest.start();
    guest.fault();
    assert_eq!(guest.bus.output(), "in memor\u{11}\"3D");
    assert_eq!(guest.bus.mmio(), [(end, b"OUT".to_vec())]);
    let mut kept = [0; 9];
    guest.memory.read_slice(&mut kept, GuestAddress(0x2000)).unwrap();
    assert_eq!(&kept, b"in memory");
}

#[test]
fn a_guest_waits_for_input() {
    let mut script = Script::new();
    script.out(SERIAL, b"?");
    let again = script.here();
    script.serial_input(SERIAL, SERIAL).jump(again);
    let guest = Guest::new(&script);
    guest.start();
    guest.bus.expect("?");
    guest.bus.wait_for_port_reads(3);
    guest.bus.type_in("echo");
    guest.bus.expect("echo");
}

#[test]
fn a_counter_repeats() {
    let mut script = Script::new();
    script.counter(5);
    let again = script.here();
    script.out(SERIAL, b".").repeat(again).out(SERIAL, b"!").spin();
    let guest = Guest::new(&script);
    guest.start();
    guest.bus.expect("!");
    assert_eq!(guest.bus.output(), "");
}

#[test]
fn interrupts_end_a_halt_and_levels_are_acknowledged() {
    let mut script = Script::new();
    let again = script.here();
    script.hlt().out_vector(SERIAL).jump(again);
    let guest = Guest::new(&script);
    let level = MsiRequest { address: 0xfee0_0000, data: 0x8000 | u32::from(b'L') };
    let edge = MsiRequest { address: 0xfee0_0000, data: b'E'.into() };
    guest.partition.set_irq_route(4, Some(level)).unwrap();
    guest.partition.set_irq_route(5, Some(edge)).unwrap();
    assert!(guest.partition.set_irq_route(96, None).is_err());
    guest.start();
    wait_for(&guest, 0, MpState::Halted);
    guest.partition.signal_msi(edge).unwrap();
    guest.bus.expect("E");
    guest.partition.signal_msi(level).unwrap();
    guest.bus.expect("L");
    guest.partition.signal_msi(MsiRequest { address: 0xfee0_1000, ..edge }).unwrap();
    wait_for(&guest, 0, MpState::Halted);
    assert_eq!(guest.bus.ended(), b"L");
    assert_eq!(guest.bus.output(), "");
    guest.assert_no_halt();
}

#[test]
fn a_vp_starts_another() {
    let mut other = Script::at(0x8000);
    other.out(SERIAL, b"second").spin();
    let entry = Script::at(0x8000).here();
    let mut script = Script::new();
    script.start_vp(VpIndex(7), entry).start_vp(VpIndex(1), entry).spin();
    let guest = Guest::with(&script, 2, Default::default());
    guest.memory.write_slice(other.code(), GuestAddress(0x8000)).unwrap();
    assert_eq!(mp_state(&guest, 1), MpState::WaitForSipi);
    guest.start();
    guest.bus.expect("second");
    assert_eq!(mp_state(&guest, 1), MpState::Runnable);
}

#[test]
fn a_triple_fault_halts_with_the_registers() {
    let mut script = Script::new();
    script.triple_fault();
    let guest = Guest::new(&script);
    guest.start();
    match guest.halt() {
        (VpIndex(0), VpHaltReason::TripleFault(fault)) => {
            assert_eq!(fault.to_string(), "VP 0: triple fault");
            assert_eq!(fault.registers.unwrap().rip, u64::from(SCRIPT_BASE));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn faults_name_what_is_wrong() {
    let mut script = Script::new();
    script.fault();
    let fault = run_to_fault(&script);
    assert_eq!(fault.to_string(), "VP 0: the script asked for a fault at 0x100000");
    assert_eq!(fault.registers.unwrap().rip, u64::from(SCRIPT_BASE));

    let mut script = Script::new();
    script.out(SERIAL, b"!").fault_named("KVM_EXIT_HYPERCALL");
    let fault = run_to_fault(&script);
    assert_eq!(fault.to_string(), "VP 0: KVM_EXIT_HYPERCALL");
    assert_eq!(fault.registers.unwrap().rip, u64::from(SCRIPT_BASE) + 6);

    let mut script = Script::new();
    script.raw(&[0xcc]);
    assert_eq!(run_to_fault(&script).reason, "bad opcode 0xcc at 0x100000");

    let mut script = Script::new();
    script.raw(&[2, 0, 0, 3, 0, 0, 0, 0]);
    assert_eq!(run_to_fault(&script).reason, "an access of 3 bytes at 0x100000");

    let mut script = Script::new();
    script.jump(Script::at(0xffff_0000).here());
    let fault = run_to_fault(&script);
    assert_eq!(fault.reason, "the instruction at 0xffff0000 is outside memory");
    assert_eq!(fault.registers.unwrap().rip, 0xffff_0000);

    let mut script = Script::new();
    let end = u32::try_from(MEMORY_SIZE).unwrap() - 1;
    script.write(end.into(), &[8]).jump(Script::at(end).here());
    assert_eq!(run_to_fault(&script).reason, "the instruction at 0x3fffff reaches outside memory");
}

#[test]
fn data_longer_than_one_instruction_arrives_whole() {
    let text = "0123456789abcdef".repeat(5000);
    let mut script = Script::new();
    script.out(SERIAL, text.as_bytes()).fault();
    let guest = Guest::new(&script);
    guest.start();
    guest.fault();
    assert_eq!(guest.bus.output(), text);
}

#[test]
fn a_boot_loader_takes_the_elf_file() {
    let mut script = Script::new();
    script.out(SERIAL, b"READY\n").spin();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
    let loaded = Elf::load(&memory, None, &mut Cursor::new(script.to_elf()), None).unwrap();
    assert_eq!(loaded.kernel_load, GuestAddress(SCRIPT_BASE.into()));
    assert_eq!(loaded.kernel_end, u64::from(SCRIPT_BASE) + script.code().len() as u64);
    let entry = PvhBootCapability::PvhEntryPresent(GuestAddress(SCRIPT_BASE.into()));
    assert_eq!(loaded.pvh_boot_cap, entry);
    let mut code = vec![0; script.code().len()];
    memory.read_slice(&mut code, GuestAddress(SCRIPT_BASE.into())).unwrap();
    assert_eq!(code, script.code());
}
