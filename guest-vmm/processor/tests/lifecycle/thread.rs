//! The life of a VP's thread.

use crate::guest::{ACPI, Bus, Guest, SERIAL, memory, ready_and_spin};
use futures::FutureExt;
use futures::executor::block_on;
use futures::future::BoxFuture;
use processor::scripted::{SCRIPT_BASE, Script, ScriptedBinder, ScriptedHypervisor, ScriptedOptions};
use processor::{
    CpuIo, HostCpus, Hypervisor, MpState, MsiRequest, NewPartition, Partition, PartitionConfig, PowerRequest,
    Processor, Registers, SpawnVpError, StateAccessError, StopVpSource, Tsc, VpError, VpGone, VpHaltReason,
    VpIndex, VpState, VpStateKind, VpThread,
};
use save_restore::RestoreError;
use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};

const VP: VpIndex = VpIndex(0);

fn gone() -> VpGone {
    VpGone { vp: VP }
}

fn assert_gone(vp: &VpThread) {
    assert!(matches!(block_on(vp.start()), Err(VpError::Gone(g)) if g == gone()));
    assert!(matches!(block_on(vp.reset()), Err(VpError::Gone(_))));
    assert!(matches!(block_on(vp.save()), Err(VpError::Gone(_))));
    assert!(matches!(block_on(vp.restore(VpState::default())), Err(VpError::Gone(_))));
    assert!(matches!(block_on(vp.access(|_| ())), Err(VpError::Gone(_))));
    assert_eq!(block_on(vp.stop()), Err(gone()));
}

#[test]
fn a_vp_starts_stops_and_goes_on() {
    let mut script = Script::new();
    let again = script.here();
    script.serial_input(SERIAL, SERIAL).jump(again);
    let guest = Guest::new(&script);
    let vp = &guest.vps[0];
    guest.start();
    guest.bus.type_in("a");
    guest.bus.expect("a");
    assert!(matches!(block_on(vp.start()), Err(VpError::Running { vp: VP })));
    assert!(matches!(block_on(vp.reset()), Err(VpError::Running { vp: VP })));
    block_on(vp.stop()).unwrap();
    guest.bus.type_in("b");
    let rip = || block_on(vp.access(|state| state.registers().unwrap().rip)).unwrap();
    let stopped_at = rip();
    assert_eq!(rip(), stopped_at);
    assert_eq!(guest.bus.output(), "", "the VP ran on after its stop");
    block_on(vp.start()).unwrap();
    guest.bus.expect("b");
    guest.assert_no_halt();
}

#[test]
fn a_vp_is_saved_and_restored_with_what_it_was_told() {
    let mut script = Script::new();
    script.out(SERIAL, b"waiting").hlt().out_vector(SERIAL).spin();
    let guest = Guest::with(&script, 2, ScriptedOptions::default());
    guest.start();
    guest.bus.expect("waiting");
    while block_on(guest.vps[0].access(|s| s.mp_state().unwrap())).unwrap() != MpState::Halted {}
    for vp in &guest.vps {
        let running = [block_on(vp.save()).err(), block_on(vp.restore(VpState::default())).err()];
        assert!(running.iter().all(|error| matches!(error, Some(VpError::Running { .. }))), "{running:?}");
        block_on(vp.stop()).unwrap();
    }
    guest.partition.signal_msi(MsiRequest { address: 0xfee0_0000, data: b'!'.into() }).unwrap();
    let states = [0, 1].map(|n| block_on(guest.vps[n].save()).unwrap());
    assert_eq!(
        states.each_ref().map(|state| state.mp_state),
        [MpState::Halted, MpState::WaitForSipi].map(Some)
    );

    let other = Guest::with(&script, 2, ScriptedOptions::default());
    // Neither what a VP was told nor where it stood is left of what it was before.
    other.partition.signal_msi(MsiRequest { address: 0xfee0_0000, data: b'?'.into() }).unwrap();
    for (vp, state) in other.vps.iter().zip(&states) {
        block_on(vp.restore(state.clone())).unwrap();
        assert_eq!(&block_on(vp.save()).unwrap(), state);
    }
    other.start();
    other.bus.expect("!");
    assert_eq!(other.bus.output(), "");
}

#[test]
fn a_start_that_a_vp_was_told_is_saved() {
    let mut script = Script::new();
    let started = script.here();
    script.out(SERIAL, b"started").spin();
    let entry = script.here();
    script.start_vp(VpIndex(1), started).out(SERIAL, b"told").spin();
    let guest = Guest::with(&script, 2, ScriptedOptions::default());
    let at_entry = Registers { rip: entry.address(), ..Registers::default() };
    let set = guest.vps[0].start_from(move |state| state.set_registers(&at_entry));
    block_on(set).unwrap();
    guest.bus.expect("told");
    let state = block_on(guest.vps[1].save()).unwrap();
    assert_eq!(state.mp_state, Some(MpState::Runnable));
    let other = Guest::with(&script, 2, ScriptedOptions::default());
    block_on(other.vps[1].restore(state)).unwrap();
    block_on(other.vps[1].start()).unwrap();
    other.bus.expect("started");
}

#[test]
fn a_state_that_the_hypervisor_lacks_is_refused_by_name_and_so_is_one_that_cannot_be_set() {
    let guest = Guest::new(&ready_and_spin());
    let state = block_on(guest.vps[0].save()).unwrap();
    let lacking = VpState { tsc: Some(Tsc::default()), ..state.clone() };
    let refused = RestoreError::from(block_on(guest.vps[0].restore(lacking)).unwrap_err());
    assert_eq!(refused.to_string(), "VP 0 could not be restored");
    let source = std::error::Error::source(&refused).expect("why");
    assert_eq!(source.to_string(), "restoring is not supported: this host lacks the state tsc");

    let options = ScriptedOptions { fail_set_registers: Some(VP), ..ScriptedOptions::default() };
    let memory = memory(&ready_and_spin());
    let new = ScriptedHypervisor { options }.build(&PartitionConfig::new(1, memory)).unwrap();
    let NewPartition { partition, mut processors } = new;
    let bus = Arc::new(Bus::default());
    let vp = VpThread::spawn(VP, None, processors.remove(0), partition, bus, |_, _| ());
    let failed = block_on(block_on(vp).unwrap().restore(state)).unwrap_err();
    let VpError::States { source: StateAccessError::Set { kind: VpStateKind::Registers, .. }, .. } = failed
    else {
        panic!("{failed:?}")
    };
}

#[test]
fn a_vp_starts_from_a_prepared_state_or_not_at_all() {
    let mut script = Script::new();
    script.out(SERIAL, b"from the start").spin();
    let entry = script.here();
    script.out(SERIAL, b"prepared").spin();
    let guest = Guest::new(&script);
    let vp = &guest.vps[0];
    let refused = block_on(vp.start_from(|_| Err("not this one".into())));
    let told = |error: &VpError| matches!(error, VpError::State { vp: VP, source } if source.to_string() == "not this one");
    assert!(refused.as_ref().is_err_and(told), "{refused:?}");
    let prepared = block_on(vp.start_from(move |state| {
        let registers = state.registers()?;
        state.set_registers(&Registers { rip: entry.address(), ..registers })
    }));
    prepared.unwrap();
    guest.bus.expect("prepared");
    let again = block_on(vp.start_from(|_| panic!("a running VP must not be prepared")));
    assert!(matches!(again, Err(VpError::Running { vp: VP })));
    guest.assert_no_halt();
}

#[test]
fn a_stop_resolves_wherever_the_vp_is() {
    let mut script = Script::new();
    script.out_word(ACPI, 0x2000).hlt();
    let guest = Guest::new(&script);
    let vp = &guest.vps[0];
    block_on(vp.stop()).unwrap(); // never started
    guest.start();
    assert!(matches!(guest.halt(), (VP, VpHaltReason::PowerOff)));
    block_on(vp.stop()).unwrap(); // halted by itself
    block_on(vp.stop()).unwrap();
    guest.start(); // and goes on behind the power-off, into its hlt
    let halted = || block_on(vp.access(|state| state.mp_state().unwrap())).unwrap() == MpState::Halted;
    while !halted() {}
    block_on(vp.stop()).unwrap();
    guest.assert_no_halt();
}

#[test]
fn a_halt_is_reported_once_and_the_vp_waits() {
    let mut script = Script::new();
    script.out_word(ACPI, 0x2000).out(SERIAL, b"further").fault();
    let guest = Guest::new(&script);
    guest.start();
    assert!(matches!(guest.halt(), (VP, VpHaltReason::PowerOff)));
    block_on(guest.vps[0].access(|_| ())).unwrap();
    assert_eq!(guest.bus.output(), "");
    guest.assert_no_halt();
    guest.start();
    assert!(matches!(guest.halt(), (VP, VpHaltReason::Fault(_))));
    assert_eq!(guest.bus.output(), "further");
}

#[test]
fn access_leaves_the_vp_as_it_was() {
    let guest = Guest::new(&ready_and_spin());
    let set = |rax| {
        guest.vps[0].access(move |state| {
            let before = state.registers().unwrap();
            state.set_registers(&Registers { rax, ..before }).unwrap();
            before.rax
        })
    };
    assert_eq!(block_on(set(1)).unwrap(), 0);
    assert_eq!(guest.bus.output(), "", "access started the VP");
    guest.start();
    guest.bus.expect("READY\n");
    assert_eq!(block_on(set(2)).unwrap(), 1);
    assert!(matches!(block_on(guest.vps[0].start()), Err(VpError::Running { .. })));
    guest.assert_no_halt();
}

#[test]
fn a_reset_vp_is_as_new() {
    let guest = Guest::new(&ready_and_spin());
    for _ in 0..3 {
        guest.start();
        guest.bus.expect("READY\n");
        block_on(guest.vps[0].stop()).unwrap();
        guest.partition.reset().unwrap();
        block_on(guest.vps[0].reset()).unwrap();
        let rip = block_on(guest.vps[0].access(|state| state.registers().unwrap().rip)).unwrap();
        assert_eq!(rip, 0xfff0);
        guest.boot();
    }
}

#[test]
fn the_future_of_a_call_may_be_dropped() {
    let guest = Guest::new(&ready_and_spin());
    for _ in 0..100 {
        assert!(guest.vps[0].access(|_| ()).now_or_never().is_none_or(|done| done.is_ok()));
    }
    drop(guest.vps[0].start()); // never polled: nothing was asked
    block_on(guest.vps[0].start()).unwrap();
    guest.bus.expect("READY\n");
}

#[test]
fn threads_are_named_and_answer_a_tokio_task() {
    let guest = Guest::with(&ready_and_spin(), 3, ScriptedOptions::default());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let name = |vp: VpThread| async move {
        vp.start().await.unwrap();
        let name = vp.access(|_| std::thread::current().name().map(str::to_owned)).await.unwrap();
        vp.shutdown().await;
        name.unwrap()
    };
    let names: Vec<_> = guest.vps.into_iter().map(|vp| runtime.spawn(name(vp))).collect();
    for (n, name) in names.into_iter().enumerate() {
        assert_eq!(runtime.block_on(name).unwrap(), format!("vp-{n}"));
    }
}

/// A VP on its way to its thread, and the rest of what it needs.
fn unbound() -> (ScriptedBinder, Arc<dyn Partition>, Arc<Bus>) {
    let config = PartitionConfig::new(1, memory(&ready_and_spin()));
    let mut new = ScriptedHypervisor::default().build(&config).unwrap();
    (new.processors.remove(0), new.partition, Arc::new(Bus::default()))
}

#[test]
fn a_vp_is_kept_on_its_cpus() {
    let own = HostCpus::of_this_thread().unwrap();
    for cpus in own.iter().map(|cpu| HostCpus::from_iter([cpu])).chain([own.clone()]) {
        let (binder, partition, bus) = unbound();
        let vp = VpThread::spawn(VP, Some(cpus.clone()), binder, partition, bus, |_, _| ());
        let vp = block_on(vp).unwrap();
        assert_eq!(vp.affinity().unwrap(), cpus);
        assert_eq!(block_on(vp.access(|_| HostCpus::of_this_thread().unwrap())).unwrap(), cpus);
        block_on(vp.shutdown());
    }
    assert_eq!(HostCpus::of_this_thread().unwrap(), own, "it is the VP's thread that is kept");
    let (binder, partition, bus) = unbound();
    let vp = block_on(VpThread::spawn(VP, None, binder, partition, bus, |_, _| ())).unwrap();
    assert_eq!(vp.affinity().unwrap(), own);
}

#[test]
fn a_vp_that_may_run_nowhere_is_not_bound() {
    let (binder, partition, bus) = unbound();
    let nowhere = HostCpus::from_iter([1023]);
    let spawned = block_on(VpThread::spawn(VP, Some(nowhere.clone()), binder, partition, bus, |_, _| ()));
    let error = spawned.err().unwrap();
    assert_eq!(error.to_string(), "the thread of VP 0 cannot be kept on the host's CPUs 1023");
    assert!(matches!(error, SpawnVpError::Affinity { vp: VP, cpus, .. } if cpus == nowhere));
}

#[test]
fn the_affinity_of_a_thread_that_has_ended_is_not_another_threads() {
    let options = ScriptedOptions { panic_at_first_instruction: Some(VP), ..Default::default() };
    let guest = Guest::with(&ready_and_spin(), 1, options);
    guest.start();
    guest.fault();
    // The thread has a little way to go after its last words.
    while guest.vps[0].affinity().is_ok() {
        std::thread::yield_now();
    }
    assert_eq!(guest.vps[0].affinity().unwrap_err().to_string(), "the thread of VP 0 is gone");
}

#[test]
fn a_vp_that_cannot_be_bound_says_so() {
    let options = ScriptedOptions { fail_bind: Some(VP), ..Default::default() };
    let config = PartitionConfig::new(1, memory(&ready_and_spin()));
    let mut new = ScriptedHypervisor { options }.build(&config).unwrap();
    let binder = new.processors.remove(0);
    let bus = Arc::new(Bus::default());
    let spawned = block_on(VpThread::spawn(VP, None, binder, new.partition.clone(), bus, |_, _| ()));
    let error = spawned.err().unwrap();
    assert!(matches!(error, SpawnVpError::Bind { vp: VP, .. }));
    assert_eq!(error.to_string(), "VP 0 could not be bound to its thread");
}

#[test]
fn a_vp_whose_registers_cannot_be_set_says_so() {
    let options = ScriptedOptions { fail_set_registers: Some(VpIndex(1)), ..Default::default() };
    let guest = Guest::with(&ready_and_spin(), 2, options);
    let set = guest.vps[1].access(|state| state.set_registers(&Registers::default()));
    let error = block_on(set).unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the options say that the registers of VP 1 cannot be set");
}

#[test]
fn a_panic_ends_the_vp_and_nothing_else() {
    let options = ScriptedOptions { panic_at_first_instruction: Some(VP), ..Default::default() };
    let guest = Guest::with(&ready_and_spin(), 2, options);
    guest.start();
    let fault = guest.fault();
    assert_eq!(fault.reason, "the VP's thread panicked: the options say that VP 0 panics");
    assert_gone(&guest.vps[0]);
    guest.partition.request_yield(VP);
    block_on(guest.vps[1].stop()).unwrap();
    guest.assert_no_halt();
    for vp in guest.vps {
        block_on(vp.shutdown());
    }
}

#[test]
fn a_panic_answers_calls_that_wait() {
    let guest = Guest::new(&ready_and_spin());
    guest.start();
    let vp = &guest.vps[0];
    let (go, wait) = channel::<()>();
    let panicking = vp.access(move |_| {
        wait.recv().unwrap();
        panic!("on purpose");
    });
    let mut panicking = pin!(panicking.map(|answer| answer.map(drop)));
    let mut stop = pin!(vp.stop());
    assert!(panicking.as_mut().now_or_never().is_none());
    assert!(stop.as_mut().now_or_never().is_none());
    go.send(()).unwrap();
    assert!(matches!(block_on(panicking), Err(VpError::Gone(_))));
    assert_eq!(block_on(stop), Err(gone()));
    assert_eq!(guest.fault().reason, "the VP's thread panicked: on purpose");
}

#[test]
fn a_panic_in_the_report_of_a_halt_is_contained() {
    let mut script = Script::new();
    script.out_word(ACPI, 0x2000);
    let config = PartitionConfig::new(1, memory(&script));
    let mut new = ScriptedHypervisor::default().build(&config).unwrap();
    let binder = new.processors.remove(0);
    let on_halt = |_, _| panic!("on purpose");
    let bus = Arc::new(Bus::default());
    let vp = block_on(VpThread::spawn(VP, None, binder, new.partition.clone(), bus, on_halt)).unwrap();
    let boot = Registers { rip: SCRIPT_BASE.into(), ..Registers::default() };
    block_on(vp.access(move |state| state.set_registers(&boot))).unwrap().unwrap();
    block_on(vp.start()).unwrap();
    // Not by a stop: one that comes before the first instruction would keep the VP from ever halting.
    while block_on(vp.access(|_| ())).is_ok() {}
    assert_gone(&vp);
    block_on(vp.shutdown());
}

#[test]
fn shutdown_ends_the_thread_and_drops_all_it_held() {
    let guest = Guest::with(&ready_and_spin(), 2, ScriptedOptions::default());
    guest.start();
    guest.bus.expect("READY\n");
    let Guest { bus, partition, vps, .. } = guest;
    for vp in vps {
        block_on(vp.shutdown());
    }
    assert_eq!(Arc::strong_count(&partition), 1, "something of a VP is left");
    assert_eq!(Arc::strong_count(&bus), 1, "something of a VP is left");
}

#[test]
fn dropping_asks_the_thread_to_end() {
    let guest = Guest::new(&ready_and_spin());
    guest.start();
    guest.bus.expect("READY\n");
    let Guest { bus, partition, vps, .. } = guest;
    drop(vps);
    let deadline = std::time::Instant::now() + crate::guest::PATIENCE;
    while Arc::strong_count(&partition) > 1 || Arc::strong_count(&bus) > 1 {
        assert!(std::time::Instant::now() < deadline, "the thread goes on");
        std::thread::yield_now();
    }
}

/// A device that asks the VP's own thread to stop it, on that thread, from inside the guest's run.
struct Nested {
    bus: Bus,
    vp: OnceLock<Weak<VpThread>>,
    asked: Mutex<Sender<BoxFuture<'static, Result<(), VpGone>>>>,
}

impl CpuIo for Nested {
    fn read_io(&self, vp: VpIndex, port: u16, data: &mut [u8]) {
        self.bus.read_io(vp, port, data);
    }

    fn write_io(&self, vp: VpIndex, port: u16, data: &[u8]) -> ControlFlow<PowerRequest> {
        let thread = self.vp.get().unwrap().upgrade().unwrap();
        let mut stop = Box::pin(async move { thread.stop().await });
        assert!(stop.as_mut().now_or_never().is_none(), "answered from inside the guest's run");
        self.asked.lock().unwrap().send(stop).unwrap();
        self.bus.write_io(vp, port, data)
    }

    fn read_mmio(&self, vp: VpIndex, address: u64, data: &mut [u8]) {
        self.bus.read_mmio(vp, address, data);
    }

    fn write_mmio(&self, vp: VpIndex, address: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        self.bus.write_mmio(vp, address, data)
    }

    fn handle_eoi(&self, vector: u8) {
        self.bus.handle_eoi(vector);
    }
}

#[test]
fn a_wake_up_from_inside_a_device_is_not_lost() {
    let mut script = Script::new();
    script.out(SERIAL, b"!").spin();
    let config = PartitionConfig::new(1, memory(&script));
    let NewPartition { partition, mut processors } = ScriptedHypervisor::default().build(&config).unwrap();
    let (asked, stops) = channel();
    let io = Arc::new(Nested { bus: Bus::default(), vp: OnceLock::new(), asked: Mutex::new(asked) });
    let binder = processors.remove(0);
    let vp = block_on(VpThread::spawn(VP, None, binder, partition.clone(), io.clone(), |_, _| ())).unwrap();
    let vp = Arc::new(vp);
    io.vp.set(Arc::downgrade(&vp)).unwrap();
    let boot = Registers { rip: SCRIPT_BASE.into(), ..Registers::default() };
    block_on(vp.access(move |state| state.set_registers(&boot))).unwrap().unwrap();
    block_on(vp.start()).unwrap();
    // Nobody else wakes the VP's task, and yet the stop resolves.
    block_on(stops.recv().unwrap()).unwrap();
    assert_eq!(io.bus.output(), "!");
    block_on(vp.start()).unwrap();
}

#[test]
fn run_vp_ends_by_its_stop() {
    let config = PartitionConfig::new(1, memory(&ready_and_spin()));
    let NewPartition { partition, mut processors } = ScriptedHypervisor::default().build(&config).unwrap();
    let mut vp = processor::BindProcessor::bind(processors.remove(0)).unwrap();
    let (source, mut stop) = StopVpSource::new();
    let bus = Bus::default();
    assert!(stop.asked().now_or_never().is_none());
    source.stop();
    source.stop();
    assert!(matches!(stop.asked().now_or_never(), Some(VpHaltReason::Stop)));
    assert!(matches!(block_on(stop.asked()), VpHaltReason::Stop));
    let ended = vp.run_vp(&mut stop, &bus).now_or_never();
    assert!(matches!(ended, Some(Err(VpHaltReason::Stop))));
    assert_eq!(bus.output(), "", "a VP that was stopped before it ran has run");

    // A run that was asked to yield wakes its task, is pending, and enters the guest only when polled again.
    let (source, mut stop) = StopVpSource::new();
    partition.request_yield(VP);
    let mut run = pin!(vp.run_vp(&mut stop, &bus));
    assert!(run.as_mut().now_or_never().is_none());
    source.stop();
    assert!(matches!(block_on(run), Err(VpHaltReason::Stop)));
}
