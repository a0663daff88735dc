//! Models of a VP's thread and of what wakes it, on `loom`: each is run once for every order in which its threads can meet, up
//! to a bound on how often they interrupt each other. A wake-up or a kick that is lost shows as a deadlock.
//!
//! The guest is a script that spins: it stays where it is until it is asked to yield.

use super::VpThread;
use super::executor::{Wakeup, block_on as run_task};
use crate::scripted::{Script, ScriptedHypervisor};
use crate::sync::{oneshot, thread};
use crate::{
    BindProcessor, CpuIo, Hypervisor, NewPartition, Partition, PartitionConfig, PowerRequest, Processor,
    StopVpSource, VpHaltReason, VpIndex,
};
use futures::FutureExt;
use loom::future::block_on;
use loom::model::Builder;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, OnceLock};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Runs `model` in every order with at most this many interruptions of a thread that could have gone on.
const MAX_PREEMPTIONS: usize = 2;

const VP: VpIndex = VpIndex(0);
/// Where the first VP of a scripted partition begins.
const ENTRY: u32 = 0xfff0;
/// Where there is a device, if the bus has one.
const DEVICE: u16 = 0x80;

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound.get_or_insert(MAX_PREEMPTIONS);
    builder.max_branches = 50_000;
    builder.check(model);
}

/// A bus with one device: it does something when it is written to for the first time.
#[derive(Default)]
struct Bus(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl CpuIo for Bus {
    fn read_io(&self, _: VpIndex, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_io(&self, _: VpIndex, _: u16, _: &[u8]) -> ControlFlow<PowerRequest> {
        let act = self.0.lock().unwrap().take();
        if let Some(act) = act {
            act();
        }
        ControlFlow::Continue(())
    }

    fn read_mmio(&self, _: VpIndex, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_mmio(&self, _: VpIndex, _: u64, _: &[u8]) -> ControlFlow<PowerRequest> {
        ControlFlow::Continue(())
    }

    fn handle_eoi(&self, _: u8) {}
}

/// Guest memory with the script in it.
fn memory(script: &Script) -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
    memory.write_slice(script.code(), GuestAddress(ENTRY.into())).unwrap();
    memory
}

fn spinning() -> GuestMemoryMmap {
    memory(Script::at(ENTRY).spin())
}

/// A partition of one VP.
fn partition(memory: &GuestMemoryMmap) -> NewPartition<impl BindProcessor> {
    ScriptedHypervisor::default().build(&PartitionConfig::new(1, memory.clone())).unwrap()
}

/// A VP on its thread, which never halts by itself.
fn spawn(memory: &GuestMemoryMmap, bus: Arc<Bus>) -> (VpThread, Arc<dyn Partition>) {
    let NewPartition { partition, mut processors } = partition(memory);
    let binder = processors.remove(0);
    let on_halt = |_, reason| panic!("the VP has halted: {reason:?}");
    let vp = block_on(VpThread::spawn(VP, None, binder, partition.clone(), bus, on_halt)).unwrap();
    (vp, partition)
}

/// Explores what becomes of a VP that spins once it is started.
fn explore_spinning(model: impl Fn(VpThread, Arc<dyn Partition>) + Sync + Send + 'static) {
    let memory = spinning();
    explore(move || {
        let (vp, partition) = spawn(&memory, Arc::default());
        model(vp, partition);
    });
}

#[test]
fn a_vp_in_the_guest_answers_and_stops() {
    explore_spinning(|vp, _| {
        block_on(vp.start()).unwrap();
        block_on(vp.access(|_| ())).unwrap();
        block_on(vp.stop()).unwrap();
        block_on(vp.shutdown());
    });
}

#[test]
fn a_vp_in_the_guest_is_shut_down() {
    explore_spinning(|vp, _| {
        block_on(vp.start()).unwrap();
        block_on(vp.shutdown());
    });
}

#[test]
fn callers_that_meet_are_all_answered() {
    explore_spinning(|vp, _| {
        let vp = Arc::new(vp);
        let other = vp.clone();
        let other = thread::spawn(move || block_on(other.access(|_| ())).unwrap());
        block_on(vp.start()).unwrap();
        other.join().unwrap();
    });
}

#[test]
fn a_kick_out_of_the_blue_takes_none_away() {
    explore_spinning(|vp, partition| {
        let kicks = thread::spawn(move || partition.request_yield(VP));
        block_on(vp.start()).unwrap();
        block_on(vp.stop()).unwrap();
        kicks.join().unwrap();
        block_on(vp.shutdown());
    });
}

#[test]
fn a_call_from_inside_a_device_is_answered() {
    let mut script = Script::at(ENTRY);
    let memory = memory(script.out(DEVICE, b"!").spin());
    explore(move || {
        let bus = Arc::new(Bus::default());
        let (vp, _) = spawn(&memory, bus.clone());
        let vp = Arc::new(vp);
        let (answer, answered) = oneshot::channel();
        let device = Arc::downgrade(&vp);
        *bus.0.lock().unwrap() = Some(Box::new(move || {
            let vp = device.upgrade().expect("kept until it has answered");
            // Asked, and not waited for: it is this thread that answers.
            let asked = vp.access(move |_| answer.send(()).unwrap()).now_or_never();
            assert!(asked.is_none());
        }));
        block_on(vp.start()).unwrap();
        block_on(answered).unwrap();
    });
}

/// Runs the processor by itself, without the thread's commands, until its stop is asked for by each of the calls.
fn stopped_by(memory: &GuestMemoryMmap, calls: [fn(&StopVpSource); 2]) -> VpHaltReason {
    let NewPartition { partition, mut processors } = partition(memory);
    let (binder, (source, mut stop)) = (processors.remove(0), StopVpSource::new());
    let reason = Arc::new(OnceLock::new());
    let halted = reason.clone();
    let run = thread::spawn(move || {
        let mut processor = binder.bind().unwrap();
        let wakeup = Wakeup::new(VP, partition);
        let bus = Bus::default();
        let Err::<Infallible, _>(reason) = run_task(&wakeup, processor.run_vp(&mut stop, &bus));
        halted.set(reason).expect("set once");
    });
    let source = Arc::new(source);
    let other = source.clone();
    let other = thread::spawn(move || calls[0](&other));
    calls[1](&source);
    other.join().unwrap();
    run.join().unwrap();
    Arc::into_inner(reason).and_then(OnceLock::into_inner).expect("the thread has set it and is gone")
}

#[test]
fn a_run_ends_by_its_stop() {
    let memory = spinning();
    explore(move || {
        let reason = stopped_by(&memory, [StopVpSource::stop, |_| ()]);
        assert!(matches!(reason, VpHaltReason::Stop), "{reason:?}");
    });
}

#[test]
fn a_run_that_is_called_off_and_stopped_ends_once() {
    let memory = spinning();
    explore(move || {
        let reason = stopped_by(&memory, [StopVpSource::stop, StopVpSource::cancel]);
        assert!(matches!(reason, VpHaltReason::Stop | VpHaltReason::Cancel), "{reason:?}");
    });
}
