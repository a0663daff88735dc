//! A debugger of a whole machine, on the scripted processor: what it stops, steps and sees, and what becomes of that when the
//! machine is paused, reset or taken down, or the debugger goes away.

use devices::ByteSink;
use inspect::{Inspect, Inspection, Node, View};
use machine::debug::{DebugError, DebugHalt, DebugHaltReason, Debugger, MAX_ACCESS_BYTES, MemoryAccessError};
use machine::{BootFiles, Halt, Machine, MachineConfig, VpActivity};
use processor::scripted::{Label, Script, ScriptedHypervisor, ScriptedOptions};
use processor::{AccessKind, HardwareBreakpoint, Registers, SystemRegisters, VpHaltReason, VpIndex};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

const COM1: u16 = 0x3f8;
const MEMORY_BYTES: u64 = 4 << 20;
const FREE: u64 = 0x30_0000;
/// For what comes; a test that waits for it in vain fails.
const PATIENT: Duration = Duration::from_secs(60);
/// For what does not come.
const IMPATIENT: Duration = Duration::from_millis(10);
const VP0: VpIndex = VpIndex(0);
const VP1: VpIndex = VpIndex(1);

/// VP 0 writes `a`, starts VP 1, and writes `0` for ever; VP 1 writes `1` for ever.
struct Places {
    start: u64,
    /// VP 0 is about to write its `0`, then to jump back.
    write_0: u64,
    jump_0: u64,
    write_1: u64,
    image: Vec<u8>,
}

fn places() -> Places {
    // A jump forward needs a place that only the whole shows.
    let main = lay(Script::new().here()).1[1];
    let (script, [second, _, write_0, jump_0]) = lay(main);
    let [write_0, jump_0, write_1] = [write_0, jump_0, second].map(Label::address);
    Places { start: Script::new().here().address(), write_0, jump_0, write_1, image: script.to_elf() }
}

/// The script, and where VP 1 starts, the part after it, and what VP 0 does for ever.
fn lay(main: Label) -> (Script, [Label; 4]) {
    let mut script = Script::new();
    script.out(COM1, b"a").jump(main);
    let second = script.here();
    script.out(COM1, b"1").jump(second);
    let main = script.here();
    script.start_vp(VP1, second);
    let write_0 = script.here();
    script.out(COM1, b"0");
    let jump_0 = script.here();
    script.jump(write_0);
    (script, [second, main, write_0, jump_0])
}

struct Bench {
    machine: Machine,
    places: Places,
    output: mpsc::UnboundedReceiver<u8>,
    halts: mpsc::UnboundedReceiver<Halt>,
}

impl Bench {
    async fn new() -> Self {
        let places = places();
        let mut kernel = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
        kernel.write_all(&places.image).unwrap();
        let boot = BootFiles { kernel, initrd: None, cmdline: String::new() };
        let config = MachineConfig::new(2, MEMORY_BYTES, boot);
        let (send, output) = mpsc::unbounded_channel();
        let sink: Arc<dyn ByteSink> =
            Arc::new(move |bytes: &[u8]| bytes.iter().for_each(|byte| _ = send.send(*byte)));
        let (halted, halts) = mpsc::unbounded_channel();
        let hypervisor = ScriptedHypervisor { options: ScriptedOptions::default() };
        let machine = Machine::build(hypervisor, config, sink, halted, || false).await.unwrap();
        Self { machine, places, output, halts }
    }

    async fn attach(&self) -> (Debugger, mpsc::Receiver<DebugHalt>) {
        self.machine.view().debug(PATIENT).await.unwrap()
    }

    /// A machine whose VPs are held at their start.
    async fn held() -> (Self, Debugger, mpsc::Receiver<DebugHalt>) {
        let bench = Self::new().await;
        let (debugger, halts) = bench.attach().await;
        debugger.stop().await.unwrap();
        bench.machine.start().await.unwrap();
        (bench, debugger, halts)
    }

    async fn activities(&self) -> Vec<VpActivity> {
        self.machine.view().vp_states(PATIENT).await
    }

    /// Waits until the guest has written this byte.
    async fn wrote(&mut self, byte: u8) {
        let found = async { while self.output.recv().await.expect("a guest that writes") != byte {} };
        tokio::time::timeout(PATIENT, found).await.expect("the byte comes");
    }

    /// Whether the guest has written anything that was not looked at.
    fn has_written(&mut self) -> bool {
        let mut any = false;
        while self.output.try_recv().is_ok() {
            any = true;
        }
        any
    }
}

async fn halt(halts: &mut mpsc::Receiver<DebugHalt>) -> DebugHalt {
    tokio::time::timeout(PATIENT, halts.recv()).await.expect("a halt").expect("a session")
}

fn execute(address: u64) -> HardwareBreakpoint {
    HardwareBreakpoint { address, length: 1, access: AccessKind::Execute }
}

async fn rip(debugger: &Debugger, vp: VpIndex) -> u64 {
    debugger.registers(vp).await.unwrap().0.rip
}

const BOTH: [VpIndex; 2] = [VP0, VP1];

#[tokio::test]
async fn a_guest_is_held_from_its_first_instruction_on() {
    let (mut bench, debugger, _halts) = Bench::held().await;
    assert_eq!(bench.activities().await, [VpActivity::Debugged; 2]);
    assert_eq!(rip(&debugger, VP0).await, bench.places.start);
    assert!(!bench.has_written());
    assert!(debugger.vps().await.unwrap().iter().all(|vp| vp.held));
    debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap();
    bench.wrote(b'1').await;
    assert!(debugger.vps().await.unwrap().iter().all(|vp| !vp.held));
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_breakpoint_stops_all_vps_and_is_passed_when_they_go_on() {
    let (mut bench, debugger, mut halts) = Bench::held().await;
    let breakpoint = execute(bench.places.jump_0);
    debugger.set_breakpoints(vec![breakpoint]).await.unwrap();
    for resumption in 1..=3 {
        assert_eq!(debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap(), resumption);
        let expected = DebugHalt { vp: VP0, reason: DebugHaltReason::Breakpoint(breakpoint), resumption };
        assert_eq!(halt(&mut halts).await, expected);
        assert_eq!(bench.activities().await, [VpActivity::Debugged; 2]);
        assert_eq!(rip(&debugger, VP0).await, breakpoint.address);
        // Each time round, it has written once more.
        bench.wrote(b'0').await;
    }
    // Without the breakpoint there is nothing to pass.
    debugger.set_breakpoints(Vec::new()).await.unwrap();
    debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap();
    for byte in [b'0', b'0', b'1', b'0'] {
        bench.wrote(byte).await;
    }
    assert!(halts.try_recv().is_err());
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_running_guest_takes_a_breakpoint() {
    let mut bench = Bench::new().await;
    bench.machine.start().await.unwrap();
    bench.wrote(b'1').await;
    let (debugger, mut halts) = bench.attach().await;
    let breakpoint = execute(bench.places.write_1);
    debugger.set_breakpoints(vec![breakpoint]).await.unwrap();
    let expected = DebugHalt { vp: VP1, reason: DebugHaltReason::Breakpoint(breakpoint), resumption: 0 };
    assert_eq!(halt(&mut halts).await, expected);
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_step_is_one_instruction_of_one_vp() {
    let (mut bench, debugger, mut halts) = Bench::held().await;
    debugger.set_breakpoints(vec![execute(bench.places.write_1)]).await.unwrap();
    debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap();
    assert_eq!(halt(&mut halts).await.vp, VP1);
    let other = rip(&debugger, VP0).await;
    bench.has_written();
    // Off the breakpoint, with that still set.
    debugger.resume(Vec::new(), vec![VP1]).await.unwrap();
    assert_eq!(halt(&mut halts).await, DebugHalt { vp: VP1, reason: DebugHaltReason::Step, resumption: 2 });
    bench.wrote(b'1').await;
    // The jump back, to where the breakpoint is: that is hit when the VP goes on.
    debugger.resume(Vec::new(), vec![VP1]).await.unwrap();
    assert_eq!(halt(&mut halts).await.reason, DebugHaltReason::Step);
    assert_eq!(rip(&debugger, VP1).await, bench.places.write_1);
    debugger.resume(vec![VP1], Vec::new()).await.unwrap();
    let hit = DebugHaltReason::Breakpoint(execute(bench.places.write_1));
    assert_eq!(halt(&mut halts).await.reason, hit);
    assert!(!bench.has_written());
    assert_eq!(rip(&debugger, VP0).await, other);
    bench.machine.destroy().await;
}

#[tokio::test]
async fn every_vp_that_stops_at_a_breakpoint_is_told_in_time() {
    let (bench, debugger, mut halts) = Bench::held().await;
    let breakpoints = vec![execute(bench.places.jump_0), execute(bench.places.write_1)];
    debugger.set_breakpoints(breakpoints).await.unwrap();
    let mut told = [0; 2];
    while told.contains(&0) {
        debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap();
        let DebugHalt { vp, reason: DebugHaltReason::Breakpoint(breakpoint), .. } = halt(&mut halts).await
        else {
            panic!("a step that nobody asked for");
        };
        assert_eq!(rip(&debugger, vp).await, breakpoint.address);
        told[vp.0 as usize] += 1;
    }
    bench.machine.destroy().await;
}

#[tokio::test]
async fn registers_and_memory_are_read_and_written() {
    let (mut bench, debugger, _halts) = Bench::held().await;
    let (registers, system) = debugger.registers(VP0).await.unwrap();
    // Past the first write, and with a mark.
    let changed = Registers { rip: bench.places.write_0, rbx: 0x1234_5678_9abc_def0, ..registers };
    debugger.set_registers(VP0, changed, SystemRegisters { cr2: 5, ..system }).await.unwrap();
    let (read, system) = debugger.registers(VP0).await.unwrap();
    assert_eq!((read, system.cr2), (changed, 5));
    // Without paging a linear address is a physical one.
    debugger.write(Some(VP0), FREE, b"words".to_vec()).await.unwrap();
    assert_eq!(debugger.read(None, FREE, 5).await.unwrap(), (b"words".to_vec(), None));
    let (bytes, error) = debugger.read(None, MEMORY_BYTES - 2, 4).await.unwrap();
    let end = MemoryAccessError::NoMemory { address: MEMORY_BYTES };
    assert_eq!((bytes.len(), error), (2, Some(end)));
    let refused = debugger.write(Some(VP1), MEMORY_BYTES - 2, vec![1; 4]).await.unwrap_err();
    assert!(matches!(refused, DebugError::Memory(error) if error == end), "{refused}");
    debugger.resume(vec![VP0], Vec::new()).await.unwrap();
    bench.wrote(b'0').await;
    assert_eq!(bench.activities().await[1], VpActivity::Debugged);
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_pause_neither_holds_nor_lets_go() {
    let (mut bench, debugger, mut halts) = Bench::held().await;
    bench.machine.pause().await.unwrap();
    assert_eq!(bench.activities().await, [VpActivity::Stopped; 2]);
    // A step in a paused guest waits for it to go on.
    debugger.resume(Vec::new(), vec![VP0]).await.unwrap();
    assert_eq!(rip(&debugger, VP0).await, bench.places.start);
    assert!(halts.try_recv().is_err());
    bench.machine.start().await.unwrap();
    assert_eq!(halt(&mut halts).await.reason, DebugHaltReason::Step);
    bench.wrote(b'a').await;
    // And the one that is held stays so.
    bench.machine.pause().await.unwrap();
    bench.machine.start().await.unwrap();
    assert_eq!(bench.activities().await, [VpActivity::Debugged; 2]);
    assert!(!bench.has_written());
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_reset_puts_held_vps_back_and_leaves_them_held() {
    let (mut bench, debugger, mut halts) = Bench::held().await;
    debugger.set_breakpoints(vec![execute(bench.places.jump_0)]).await.unwrap();
    debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap();
    halt(&mut halts).await;
    bench.machine.stop().await.unwrap();
    bench.machine.reset().await.unwrap();
    bench.machine.start().await.unwrap();
    bench.has_written();
    assert_eq!(bench.activities().await, [VpActivity::Debugged; 2]);
    assert_eq!(rip(&debugger, VP0).await, bench.places.start);
    // The breakpoint is still there, and no instruction is passed that was not stopped at.
    debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap();
    halt(&mut halts).await;
    assert_eq!(rip(&debugger, VP0).await, bench.places.jump_0);
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_debugger_that_goes_away_leaves_nothing_behind() {
    let (mut bench, debugger, mut halts) = Bench::held().await;
    debugger.set_breakpoints(vec![execute(bench.places.jump_0)]).await.unwrap();
    debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap();
    halt(&mut halts).await;
    bench.has_written();
    // In the middle of a step.
    debugger.resume(Vec::new(), vec![VP0]).await.unwrap();
    drop((debugger, halts));
    for byte in [b'0', b'1', b'0', b'0', b'1'] {
        bench.wrote(byte).await;
    }
    assert!(bench.halts.try_recv().is_err());
    // The next one finds a guest that runs and no breakpoint.
    let (debugger, mut halts) = bench.attach().await;
    assert!(debugger.vps().await.unwrap().iter().all(|vp| !vp.held));
    debugger.stop().await.unwrap();
    debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap();
    for byte in [b'0', b'0', b'1'] {
        bench.wrote(byte).await;
    }
    assert!(halts.try_recv().is_err());
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_call_that_nobody_waits_for_takes_effect_whole() {
    let (mut bench, debugger, mut halts) = Bench::held().await;
    {
        let mut abandoned = Box::pin(debugger.resume(BOTH.to_vec(), Vec::new()));
        assert!(futures::poll!(&mut abandoned).is_pending());
    }
    bench.wrote(b'1').await;
    {
        let mut abandoned = Box::pin(debugger.stop());
        assert!(futures::poll!(&mut abandoned).is_pending());
    }
    assert!(debugger.vps().await.unwrap().iter().all(|vp| vp.held));
    assert!(halts.try_recv().is_err());
    bench.machine.destroy().await;
}

#[tokio::test]
async fn there_is_one_debugger_at_a_time() {
    let (bench, debugger, _halts) = Bench::held().await;
    let second = bench.machine.view().debug(IMPATIENT).await;
    assert!(matches!(second, Err(DebugError::Taken)));
    // The refusal has not harmed the first.
    assert_eq!(rip(&debugger, VP0).await, bench.places.start);
    assert!(matches!(bench.machine.view().debug(IMPATIENT).await, Err(DebugError::Taken)));
    drop(debugger);
    bench.attach().await;
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_machine_may_be_taken_down_under_its_debugger() {
    let (bench, debugger, mut halts) = Bench::held().await;
    let view = bench.machine.view().clone();
    bench.machine.destroy().await;
    assert!(matches!(debugger.registers(VP0).await, Err(DebugError::Ended)));
    assert!(matches!(debugger.read(None, 0, 1).await, Err(DebugError::Ended)));
    assert!(matches!(debugger.write(None, 0, vec![0]).await, Err(DebugError::Ended)));
    assert!(matches!(debugger.stop().await, Err(DebugError::Ended)));
    assert!(matches!(debugger.set_breakpoints(Vec::new()).await, Err(DebugError::Ended)));
    assert!(matches!(debugger.resume(BOTH.to_vec(), Vec::new()).await, Err(DebugError::Ended)));
    drop(debugger);
    assert!(halts.recv().await.is_none(), "its session ends");
    drop(view);
}

#[tokio::test]
async fn a_guest_that_ends_itself_under_its_debugger_is_told_to_the_driver() {
    let (mut bench, debugger, mut halts) = Bench::held().await;
    // An opcode that is none.
    debugger.write(None, bench.places.write_0, vec![0xff; 8]).await.unwrap();
    debugger.resume(BOTH.to_vec(), Vec::new()).await.unwrap();
    let (vp, reason) = tokio::time::timeout(PATIENT, bench.halts.recv()).await.unwrap().unwrap();
    assert!(vp == VP0 && matches!(reason, VpHaltReason::Fault(_)), "{reason:?}");
    assert!(halts.try_recv().is_err());
    assert_eq!(bench.activities().await[0], VpActivity::Failed);
    bench.machine.destroy().await;
}

#[tokio::test]
async fn what_cannot_be_is_refused_and_changes_nothing() {
    let (bench, debugger, _halts) = Bench::held().await;
    let nobody = VpIndex(2);
    let no_vp = |error: DebugError| assert!(matches!(error, DebugError::NoVp { count: 2, .. }), "{error}");
    no_vp(debugger.registers(nobody).await.unwrap_err());
    no_vp(
        debugger.set_registers(nobody, Registers::default(), SystemRegisters::default()).await.unwrap_err(),
    );
    no_vp(debugger.read(Some(VpIndex(u32::MAX)), 0, 1).await.unwrap_err());
    no_vp(debugger.write(Some(nobody), 0, vec![0]).await.unwrap_err());
    no_vp(debugger.resume(vec![VP0, nobody], Vec::new()).await.unwrap_err());
    let twice = debugger.resume(vec![VP0], vec![VP0]).await.unwrap_err();
    assert!(matches!(twice, DebugError::Twice { vp: VP0 }), "{twice}");
    let too_long = (MAX_ACCESS_BYTES + 1) as u64;
    for bytes in [too_long, u64::MAX] {
        let error = debugger.read(None, 0, bytes).await.unwrap_err();
        assert!(matches!(error, DebugError::TooLong { bytes: told } if told == bytes), "{error}");
    }
    let error = debugger.write(None, 0, vec![0; MAX_ACCESS_BYTES + 1]).await.unwrap_err();
    assert!(matches!(error, DebugError::TooLong { .. }), "{error}");
    let many = (0..5).map(execute).collect();
    let error = debugger.set_breakpoints(many).await.unwrap_err();
    assert!(matches!(error, DebugError::TooManyBreakpoints { count: 5, available: 4 }), "{error}");
    for odd in [execute(1 << 60), HardwareBreakpoint { length: 2, ..execute(0) }] {
        let error = debugger.set_breakpoints(vec![odd]).await.unwrap_err();
        assert!(matches!(error, DebugError::NoSuchBreakpoint(told) if told == odd), "{error}");
    }
    let watch = HardwareBreakpoint { access: AccessKind::Write, ..execute(FREE) };
    let error = debugger.set_breakpoints(vec![watch]).await.unwrap_err();
    assert!(matches!(error, DebugError::NotSupported("watchpoints")), "{error}");
    assert_eq!(bench.activities().await, [VpActivity::Debugged; 2]);

    debugger.resume(vec![VP1], Vec::new()).await.unwrap();
    let running = |error: DebugError| assert!(matches!(error, DebugError::Running { vp: VP1 }), "{error}");
    running(debugger.resume(vec![VP1], Vec::new()).await.unwrap_err());
    running(debugger.set_registers(VP1, Registers::default(), SystemRegisters::default()).await.unwrap_err());
    bench.machine.destroy().await;
}

#[tokio::test]
async fn stops_that_nobody_listens_to_are_bounded() {
    let (bench, debugger, halts) = Bench::held().await;
    debugger.set_breakpoints(vec![execute(bench.places.jump_0)]).await.unwrap();
    let mut resumed = 0;
    let error = loop {
        match debugger.resume(vec![VP0], Vec::new()).await {
            Ok(_) => resumed += 1,
            Err(DebugError::Running { .. }) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, DebugError::Unheard), "{error}");
    assert_eq!(halts.len(), resumed);
    bench.machine.destroy().await;
}

#[tokio::test]
async fn an_inspection_shows_who_is_held() {
    async fn shown(bench: &Bench) -> String {
        let view = bench.machine.view();
        let inspection =
            Inspection::start("debugger", 1, View::WithoutSensitive, |request| view.inspect(request));
        let node: Node = inspection.finish(PATIENT).await;
        node.to_string()
    }
    let (bench, debugger, _halts) = Bench::held().await;
    assert_eq!(shown(&bench).await, "attached: true\nheld_vps: 0, 1\n");
    debugger.resume(vec![VP0], Vec::new()).await.unwrap();
    assert_eq!(shown(&bench).await, "attached: true\nheld_vps: 1\n");
    drop(debugger);
    let (next, _) = { bench.attach().await };
    assert_eq!(shown(&bench).await, "attached: true\nheld_vps: \n");
    drop(next);
    let gone = async {
        while shown(&bench).await != "attached: false\nheld_vps: \n" {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENT, gone).await.expect("it lets go");
    bench.machine.destroy().await;
}
