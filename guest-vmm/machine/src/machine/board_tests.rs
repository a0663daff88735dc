//! The small devices of the board as a scripted guest finds them.

use super::going_on::{Bench, COM1};
use super::*;
use crate::board::Board;
use crate::boot::BootFiles;
use processor::VpHaltReason;
use processor::scripted::{Script, ScriptedHypervisor};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use vm_memory::{Bytes, GuestAddress};

const EVENTS: u16 = layout::GENERIC_EVENT_PORT;
const VECTOR: u8 = 0x41;
const PATIENT: Duration = Duration::from_secs(60);

/// Sets up the interrupt of events, says so, and says vector and register of each event that comes.
fn listening() -> Script {
    let mut script = Script::new();
    let entry = 0x10 + 2 * u32::from(layout::GENERIC_EVENT_IRQ);
    for (register, value) in [(entry + 1, 0u32), (entry, VECTOR.into())] {
        script
            .write(layout::IOAPIC, &register.to_le_bytes())
            .write(layout::IOAPIC + 0x10, &value.to_le_bytes());
    }
    script.out(COM1, b"!");
    let next = script.here();
    script.hlt().out_vector(COM1).echo(EVENTS, COM1).jump(next);
    script
}

async fn listens() -> Bench {
    let mut bench = Bench::scripted(1, &listening()).await;
    bench.start().await;
    assert_eq!(bench.bytes(1).await, b"!");
    bench
}

fn generation_id(bench: &Bench) -> [u8; 16] {
    bench.machine.memory.view().read_obj(GuestAddress(0xf_e000)).unwrap()
}

#[tokio::test]
async fn each_press_of_the_power_button_interrupts() {
    let mut bench = listens().await;
    for _ in 0..2 {
        bench.machine.view().press_power_button();
        assert_eq!(bench.bytes(2).await, [1, VECTOR]);
    }
    bench.end().await;
}

#[tokio::test]
async fn a_paused_guest_hears_of_the_power_button_when_it_goes_on() {
    let mut bench = listens().await;
    bench.stop().await;
    bench.machine.view().press_power_button();
    bench.start().await;
    assert_eq!(bench.bytes(2).await, [1, VECTOR]);
    bench.end().await;
}

#[tokio::test]
async fn a_reset_forgets_the_power_button() {
    let mut bench = Bench::scripted(1, &listening()).await;
    bench.machine.view().press_power_button();
    bench.machine.reset().await.unwrap();
    bench.start().await;
    assert_eq!(bench.bytes(1).await, b"!");
    bench.machine.view().press_power_button();
    assert_eq!(bench.bytes(2).await, [1, VECTOR], "and nothing before it");
    bench.end().await;
}

#[tokio::test]
async fn the_power_button_of_a_machine_that_is_gone_does_nothing() {
    let bench = listens().await;
    let view = bench.machine.view().clone();
    bench.end().await;
    view.press_power_button();
}

#[tokio::test]
async fn a_generation_id_is_each_guests_own_and_survives_a_reset() {
    let (one, other) = (listens().await, listens().await);
    let id = generation_id(&one);
    assert_ne!(id, [0; 16]);
    assert_ne!(id, generation_id(&other));
    one.stop().await;
    one.machine.reset().await.unwrap();
    assert_eq!(generation_id(&one), id, "memory is zeroed by a reset");
    one.end().await;
    other.end().await;
}

#[tokio::test]
async fn a_restored_guest_has_a_new_generation_id_and_is_told() {
    let mut original = listens().await;
    original.stop().await;
    let states = original.save().await;
    let mut new = Bench::scripted(1, &listening()).await;
    let before = generation_id(&new);
    new.take_over(&original, states).await;
    let id = generation_id(&new);
    assert!(![before, generation_id(&original), [0; 16]].contains(&id), "{id:x?}");
    new.start().await;
    assert_eq!(new.bytes(2).await, [2, VECTOR]);
    original.start().await;
    original.machine.view().press_power_button();
    assert_eq!(original.bytes(2).await, [1, VECTOR], "it is told of nothing else");
    new.end().await;
    original.end().await;
}

#[tokio::test]
async fn where_a_pc_has_more_serial_ports_there_are_none() {
    let mut script = Script::new();
    for port in [0x2f8, 0x2ff, 0x3e8, 0x3ef, 0x2e8, 0x2ef] {
        // A scratch register would keep what is written: that is how drivers look for a port.
        script.out(port, &[0x5a]).echo(port, COM1);
    }
    script.spin();
    let mut bench = Bench::scripted(1, &script).await;
    bench.start().await;
    assert_eq!(bench.bytes(6).await, [0xff; 6]);
    bench.end().await;
}

fn config(script: &Script) -> MachineConfig {
    let mut kernel = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
    kernel.write_all(&script.to_elf()).unwrap();
    MachineConfig::new(1, 4 << 20, BootFiles { kernel, initrd: None, cmdline: String::new() })
}

fn silence() -> Arc<dyn ByteSink> {
    Arc::new(|_: &[u8]| ())
}

#[test]
fn nothing_else_can_be_put_where_other_serial_ports_would_be() {
    let script = listening();
    let config = config(&script);
    let hypervisor = ScriptedHypervisor::default();
    let prepared = PreparedMachine::begin(&hypervisor, config.shape.clone(), None, &|| Ok(())).unwrap();
    let Foundation { memory, board, vps: _vps, .. } = lay_foundation(prepared, config, silence()).unwrap();
    for (base, name) in [(0x2f8, "com2"), (0x3e8, "com3"), (0x2ef, "com4")] {
        let mut devices: Vec<Placed> = Board::devices(&board, &memory);
        let keyboard = devices.iter_mut().find(|placed| placed.name == "i8042").unwrap();
        keyboard.window = Window::Ports(base, 1);
        let error = build_bus(&board, &devices).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("i8042"), "{error}");
    }
}

/// How the VP of a script halts.
async fn halt_of(script: &Script, debug_exit: bool) -> VpHaltReason {
    let config = MachineConfig { debug_exit, ..config(script) };
    let (halted, mut halts) = mpsc::unbounded_channel();
    let hypervisor = ScriptedHypervisor::default();
    let machine = Machine::build(hypervisor, config, silence(), halted, || false).await.unwrap();
    machine.start().await.unwrap();
    let (_, reason) = tokio::time::timeout(PATIENT, halts.recv()).await.expect("it halts").unwrap();
    machine.destroy().await;
    reason
}

#[tokio::test]
async fn a_test_guest_ends_itself_with_a_value_if_it_is_one() {
    let mut script = Script::new();
    script.out_long(0xf4, 0x1234_5678).fault();
    assert!(matches!(halt_of(&script, true).await, VpHaltReason::DebugExit(0x1234_5678)));
    assert!(matches!(halt_of(&script, false).await, VpHaltReason::Fault(_)), "the port is not there");
}

#[tokio::test]
async fn a_panic_is_heard_of_and_a_shutdown_powers_off() {
    let mut script = Script::new();
    script.out(layout::PVPANIC_PORT, &[1, 2, 4]).fault();
    let (told, mut heard) = mpsc::unbounded_channel();
    let panics = Arc::new(move |panic| told.send(panic).unwrap());
    let (halted, mut halts) = mpsc::unbounded_channel();
    let config = MachineConfig { panics, ..config(&script) };
    let hypervisor = ScriptedHypervisor::default();
    let machine = Machine::build(hypervisor, config, silence(), halted, || false).await.unwrap();
    machine.start().await.unwrap();
    let (_, reason) = tokio::time::timeout(PATIENT, halts.recv()).await.expect("it halts").unwrap();
    assert!(matches!(reason, VpHaltReason::PowerOff), "{reason:?}");
    assert_eq!(heard.try_recv(), Ok(GuestPanic::Panicked));
    assert_eq!(heard.try_recv(), Ok(GuestPanic::CrashLoaded));
    machine.destroy().await;
}
