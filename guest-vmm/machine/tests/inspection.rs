//! A whole machine in the inspection tree, on the scripted processor: running, in the middle of a transition, with parts that
//! are stuck, and through the eyes of somebody who may not see the guest's own.

use devices::ByteSink;
use inspect::{Inspect, Inspection, Node, Update, UpdateError, Value, View};
use machine::memory::MemoryOptions;
use machine::{
    BootFiles, Halt, InjectedFault, InjectedStep, Machine, MachineConfig, MachineShape, MachineView,
};
use processor::scripted::{Script, ScriptedHypervisor, ScriptedOptions};
use processor::{
    DebugCapabilities, ErasedPartitionState, HostCpus, Hypervisor, MsiRequest, NewPartition, Partition,
    PartitionConfig, PartitionError, VpIndex, Vtl,
};
use rustix::fs::{MemfdFlags, memfd_create};
use state_unit::UnitState;
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

const COM1: u16 = 0x3f8;
const MEMORY_BYTES: u64 = 4 << 20;
const COMMAND_LINE: &str = "console=ttyS0 secret=\"42\"";

/// For what answers.
const PATIENT: Duration = Duration::from_secs(60);
/// For trees with parts that never answer. What does answer has far more time than it needs.
const IMPATIENT: Duration = Duration::from_secs(1);

const UNITS: [&str; 11] = [
    "memory",
    "partition",
    "ioapic",
    "serial",
    "rtc",
    "i8042",
    "acpi-power",
    "generic-events",
    "generation-id",
    "pvpanic",
    "vps",
];

/// Says which VPs were asked to leave the guest. That is certain only for the first question to a VP that is there: one that
/// is still on its way in, or just back, answers without being asked to leave.
#[derive(Clone, Default)]
struct Recording {
    options: ScriptedOptions,
    yields: Arc<Mutex<Vec<VpIndex>>>,
}

impl Recording {
    fn take(&self) -> Vec<u32> {
        std::mem::take(&mut *self.yields.lock().unwrap()).into_iter().map(|vp| vp.0).collect()
    }
}

impl Hypervisor for Recording {
    type Binder = <ScriptedHypervisor as Hypervisor>::Binder;

    fn max_vps(&self) -> Result<u32, PartitionError> {
        ScriptedHypervisor { options: self.options }.max_vps()
    }

    fn build(&self, config: &PartitionConfig) -> Result<NewPartition<Self::Binder>, PartitionError> {
        let NewPartition { partition, processors } =
            ScriptedHypervisor { options: self.options }.build(config)?;
        Ok(NewPartition {
            partition: Arc::new(RecordingPartition { partition, yields: self.yields.clone() }),
            processors,
        })
    }
}

struct RecordingPartition {
    partition: Arc<dyn Partition>,
    yields: Arc<Mutex<Vec<VpIndex>>>,
}

impl Partition for RecordingPartition {
    fn request_yield(&self, vp: VpIndex) {
        self.yields.lock().unwrap().push(vp);
        self.partition.request_yield(vp);
    }

    fn signal_msi(&self, request: MsiRequest) -> Result<(), PartitionError> {
        self.partition.signal_msi(request)
    }

    fn set_irq_route(&self, pin: u8, request: Option<MsiRequest>) -> Result<(), PartitionError> {
        self.partition.set_irq_route(pin, request)
    }

    fn inject_nmi(&self, vp: VpIndex) {
        self.partition.inject_nmi(vp);
    }

    fn debug_capabilities(&self) -> DebugCapabilities {
        self.partition.debug_capabilities()
    }

    fn stop_time(&self) -> Result<(), PartitionError> {
        self.partition.stop_time()
    }

    fn start_time(&self) -> Result<(), PartitionError> {
        self.partition.start_time()
    }

    fn forget_stopped_time(&self) {
        self.partition.forget_stopped_time();
    }

    fn access_state(&self) -> Box<dyn ErasedPartitionState + '_> {
        self.partition.access_state()
    }

    fn reset(&self) -> Result<(), PartitionError> {
        self.partition.reset()
    }

    fn scrub(&self, vtl: Vtl) -> Result<(), PartitionError> {
        self.partition.scrub(vtl)
    }
}

/// The last of the CPUs on which this process may run.
fn last_cpu() -> HostCpus {
    HostCpus::of_this_thread().unwrap().iter().last().into_iter().collect()
}

/// A machine of two VPs, the second on the last of the CPUs, with what it sends.
struct Bench {
    machine: Machine,
    hypervisor: Recording,
    halts: mpsc::UnboundedReceiver<Halt>,
    output: mpsc::UnboundedReceiver<Vec<u8>>,
}

impl Bench {
    async fn new(script: &Script) -> Self {
        Self::with(script, None, ScriptedOptions::default(), |_| ()).await
    }

    /// `on_output` is called on the VP's thread, after the bytes have been reported.
    async fn with(
        script: &Script,
        inject: Option<InjectedFault>,
        options: ScriptedOptions,
        on_output: impl Fn(&[u8]) + Send + Sync + 'static,
    ) -> Self {
        let (send_output, output) = mpsc::unbounded_channel();
        let serial: Arc<dyn ByteSink> = Arc::new(move |bytes: &[u8]| {
            let _ = send_output.send(bytes.to_vec());
            on_output(bytes);
        });
        let (send_halts, halts) = mpsc::unbounded_channel();
        let hypervisor = Recording { options, ..Recording::default() };
        let boot =
            BootFiles { kernel: file(&script.to_elf()), initrd: None, cmdline: COMMAND_LINE.to_owned() };
        let memory = MemoryOptions { prefault: true, ..MemoryOptions::default() };
        let affinity = vec![None, Some(last_cpu())];
        let shape = MachineShape { affinity, memory, ..MachineShape::new(2, MEMORY_BYTES) };
        let config = MachineConfig { shape, inject, ..MachineConfig::new(2, MEMORY_BYTES, boot) };
        let machine = Machine::build(hypervisor.clone(), config, serial, send_halts, || false).await.unwrap();
        Self { machine, hypervisor, halts, output }
    }

    /// Starts the guest, and comes back once it has sent a byte.
    async fn start(&mut self) {
        self.machine.start().await.unwrap();
        self.output.recv().await.expect("the guest sends something");
    }

    async fn look(&self, path: &str) -> Node {
        begin(self.machine.view(), path, usize::MAX, View::Everything).finish(PATIENT).await
    }

    async fn observe(&self, path: &str) -> Node {
        begin(self.machine.view(), path, usize::MAX, View::WithoutSensitive).finish(PATIENT).await
    }

    async fn update(&self, path: &str, text: &str) -> Result<Value, UpdateError> {
        let view = self.machine.view();
        Update::start(path, text, |request| view.inspect(request)).finish(PATIENT).await
    }
}

fn begin(machine: &MachineView, path: &str, depth: usize, view: View) -> Inspection {
    Inspection::start(path, depth, view, |request| machine.inspect(request))
}

fn file(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file
}

/// Says that it is there and runs for ever, at the address.
fn spinning() -> (Script, u64) {
    let mut script = Script::new();
    script.out(COM1 + 7, &[0x5a]).out(COM1, b"x");
    let at = script.here().address();
    script.spin();
    (script, at)
}

fn at<'a>(tree: &'a Node, path: &str) -> &'a Node {
    path.split('/').fold(tree, |node, name| node.child(name).unwrap_or_else(|| panic!("no {path} in {tree}")))
}

fn names(node: &Node) -> Vec<&str> {
    let Node::Children(children) = node else { panic!("no children: {node}") };
    children.iter().map(|(name, _)| name.as_str()).collect()
}

fn text(text: &str) -> Node {
    Node::Value(text.into())
}

fn hex(value: u64) -> Node {
    Node::Value(Value::Hex(value))
}

/// The paths of all nodes that are not answered.
fn unanswered(node: &Node, path: &str) -> Vec<String> {
    match node {
        Node::Children(children) => {
            let inner = |(name, child): &(String, Node)| unanswered(child, &format!("{path}/{name}"));
            children.iter().flat_map(inner).collect()
        }
        Node::Value(_) => Vec::new(),
        Node::Unanswered | Node::Unevaluated | Node::NotFound => vec![path.to_owned()],
    }
}

#[tokio::test]
async fn every_unit_device_and_vp_of_a_running_machine_is_in_the_tree() {
    let (script, spin) = spinning();
    let mut bench = Bench::new(&script).await;
    bench.start().await;
    let tree = bench.look("").await;
    assert_eq!(unanswered(&tree, ""), [""; 0]);
    assert_eq!(names(&tree), ["state", "deadline", "units", "vps", "debugger"]);
    assert_eq!(names(at(&tree, "units")), UNITS);
    for unit in UNITS {
        let unit = at(at(&tree, "units"), unit);
        assert_eq!(names(unit), ["dependencies", "dependents", "unit_state", "unit"]);
        assert_eq!(at(unit, "unit_state"), &text("running"));
        assert!(!names(at(unit, "unit")).is_empty());
    }
    assert_eq!(at(&tree, "units/serial/dependencies"), &text("partition, ioapic"));

    assert_eq!(at(&tree, "units/serial/unit/registers/scr"), &hex(0x5a));
    let memory = at(&tree, "units/memory/unit");
    assert_eq!(at(memory, "bytes"), &Node::Value(MEMORY_BYTES.into()));
    assert_eq!(
        (at(memory, "prefault"), at(memory, "lock")),
        (&Node::Value(true.into()), &Node::Value(false.into()))
    );
    assert_eq!(at(memory, "ranges/0").to_string(), "start: 0x0\nend: 0x400000\n");
    assert_eq!(at(memory, "boot/protocol"), &text("PVH"));
    assert_eq!(at(memory, "boot/entry"), &hex(processor::scripted::SCRIPT_BASE.into()));
    assert_eq!(at(memory, "boot/command_line"), &text(COMMAND_LINE));
    assert_eq!(at(&tree, "units/vps/unit").to_string(), "count: 2\nrunning: true\n");

    assert_eq!(names(at(&tree, "vps")), ["0", "1"]);
    assert_eq!(at(&tree, "vps/0/activity"), &text("running"));
    assert_eq!(at(&tree, "vps/0/state/registers/rip"), &hex(spin));
    assert_eq!(at(&tree, "vps/0/state/system_registers/cr0"), &hex(0x11));
    let code = "base: 0x0\nlimit: 0xffffffff\nselector: 0x10\nattributes: 0xc09b\n";
    assert_eq!(at(&tree, "vps/0/state/system_registers/cs").to_string(), code);
    assert_eq!(at(&tree, "vps/1/activity"), &text("waiting for SIPI"));
    let everywhere = HostCpus::of_this_thread().unwrap().to_string();
    assert_eq!(at(&tree, "vps/0/affinity"), &text(&everywhere));
    assert_eq!(at(&tree, "vps/1/affinity"), &text(&last_cpu().to_string()));
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_machine_as_json_is_the_same_tree() {
    let (script, spin) = spinning();
    let mut bench = Bench::new(&script).await;
    bench.start().await;
    let json: serde_json::Value = serde_json::from_str(&bench.look("").await.to_json()).unwrap();
    let units: Vec<&str> = json["units"].as_object().unwrap().keys().map(String::as_str).collect();
    assert!(UNITS.iter().all(|unit| units.contains(unit)) && units.len() == UNITS.len(), "{units:?}");
    assert_eq!(json["units"]["memory"]["unit"]["boot"]["command_line"], COMMAND_LINE);
    assert_eq!(json["vps"]["0"]["state"]["registers"]["rip"], spin);
    assert_eq!(json["units"]["ioapic"]["unit"]["pins"]["4"]["redirection"]["masked"], true);
    bench.machine.destroy().await;
}

#[tokio::test]
async fn only_the_vps_on_the_path_are_asked() {
    let (script, _) = spinning();
    let mut bench = Bench::new(&script).await;
    bench.start().await;
    bench.hypervisor.take();
    for path in ["units", "units/serial/unit/registers", "state"] {
        assert!(matches!(bench.look(path).await, Node::Children(_) | Node::Value(_)), "{path}");
    }
    assert_eq!(bench.look("units/rtc/unit/registers/nothing").await, Node::NotFound);
    let shallow = begin(bench.machine.view(), "vps", 1, View::Everything).finish(PATIENT).await;
    assert_eq!(shallow.to_string(), "0: …\n1: …\n");
    assert_eq!(bench.hypervisor.take(), [0; 0], "nobody has left the guest");

    assert_eq!(bench.look("vps/0/state/system_registers/cr0").await, hex(0x11));
    assert_eq!(bench.hypervisor.take(), [0]);
    assert_eq!(bench.look("vps/1/activity").await, text("waiting for SIPI"));
    assert!(!bench.hypervisor.take().contains(&0));
    bench.machine.destroy().await;
}

#[tokio::test]
async fn an_observer_sees_states_and_sizes_and_nothing_of_the_guests() {
    let (script, _) = spinning();
    let mut bench = Bench::new(&script).await;
    bench.start().await;
    bench.hypervisor.take();
    let hidden = ["vps/0/state/registers/rip", "units/memory/unit/boot/command_line", "units/rtc/unit/ram"];
    for path in hidden {
        assert_eq!(bench.observe(path).await, Node::NotFound, "{path}");
    }
    assert_eq!(bench.hypervisor.take(), [0; 0], "VP 0 was not even asked");
    for path in hidden {
        assert!(matches!(bench.look(path).await, Node::Value(_)), "{path}");
    }
    let tree = bench.observe("").await;
    assert_eq!(unanswered(&tree, ""), [""; 0]);
    assert_eq!(names(at(&tree, "units")), UNITS);
    let (everywhere, last) = (HostCpus::of_this_thread().unwrap(), last_cpu());
    let vps = format!(
        "0:\n  activity: running\n  affinity: {everywhere}\n1:\n  activity: waiting for SIPI\n  affinity: {last}\n"
    );
    assert_eq!(at(&tree, "vps").to_string(), vps);
    assert_eq!(at(&tree, "units/memory/unit/bytes"), &Node::Value(MEMORY_BYTES.into()));
    let json = tree.to_json();
    for hidden in ["registers", "secret", "command_line", "pins", "offset_seconds", "rip", "ram\""] {
        assert!(!json.contains(hidden), "{hidden} is in {json}");
    }
    bench.machine.destroy().await;
}

#[tokio::test]
async fn an_update_reaches_units_devices_and_the_threads_of_vps() {
    let (script, _) = spinning();
    let mut bench = Bench::new(&script).await;
    bench.start().await;
    assert_eq!(bench.update("deadline", "3s").await, Ok(Value::Duration(Duration::from_secs(3))));
    assert_eq!(bench.look("deadline").await, Node::Value(Value::Duration(Duration::from_secs(3))));
    // Each of these is asked where it lives, and takes nothing.
    let shown = [
        "units/memory/unit/bytes",
        "units/serial/unit/registers/scr",
        "vps/0/state/registers/rip",
        "vps/1/activity",
    ];
    for path in shown {
        assert_eq!(bench.update(path, "1").await, Err(UpdateError::NotWritable), "{path}");
    }
    for path in [
        "units/serial/unit/registers/none",
        "vps/0/state/registers/rip/low",
        "vps/2",
        "units/memory/unit/bytes/0",
    ] {
        assert_eq!(bench.update(path, "1").await, Err(UpdateError::NotFound), "{path}");
    }
    assert_eq!(bench.look("units/serial/unit/registers/scr").await, hex(0x5a));
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_unit_that_hangs_in_a_transition_shows_as_such_and_the_others_answer() {
    let (script, _) = spinning();
    let fault = Some(InjectedFault::Holds(InjectedStep::Stop));
    let mut bench = Bench::with(&script, fault, ScriptedOptions::default(), |_| ()).await;
    bench.start().await;
    assert_eq!(bench.look("units/injected/unit/fault").await, text("Holds(Stop)"));
    let view = bench.machine.view().clone();
    let mut pause = Box::pin(bench.machine.pause());
    let state = |name| view.graph().into_iter().find(|unit| &*unit.name == name).unwrap().state;
    // The others that can stop before it, that is, all but those it depends on.
    let settled = || state("injected") == UnitState::Stopping && state("acpi-power") == UnitState::Stopped;
    while !settled() {
        assert!(futures::poll!(&mut pause).is_pending());
        tokio::task::yield_now().await;
    }
    let tree = begin(&view, "", usize::MAX, View::Everything).finish(IMPATIENT).await;
    assert_eq!(unanswered(&tree, ""), ["/units/injected/unit"]);
    assert_eq!(at(&tree, "units/injected/unit_state"), &text("stopping"));
    assert_eq!(at(&tree, "units/partition/unit_state"), &text("running"), "it waits");
    assert_eq!(at(&tree, "vps/0/activity"), &text("stopped"));
    let partition = view.graph().into_iter().find(|unit| &*unit.name == "partition").unwrap();
    assert_eq!(partition.waits_for.iter().map(|name| &**name).collect::<Vec<_>>(), ["injected"]);
    assert_eq!(view.timeline().last().unwrap().operation, state_unit::Operation::Stop);
    drop(pause);
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_stuck_vp_and_the_device_that_it_holds_delay_nobody() {
    let (script, _) = spinning();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Mutex::new(held);
    let stuck = move |_: &[u8]| {
        let _ = held.lock().unwrap().recv();
    };
    let mut bench = Bench::with(&script, None, ScriptedOptions::default(), stuck).await;
    bench.start().await;
    // VP 0 is in the middle of its access to the serial port.
    let view = bench.machine.view().clone();
    let tree = begin(&view, "", usize::MAX, View::Everything).finish(IMPATIENT).await;
    assert_eq!(
        unanswered(&tree, ""),
        ["/units/serial/unit", "/vps/0/activity", "/vps/0/processor", "/vps/0/state"]
    );
    assert_eq!(at(&tree, "vps/1/activity"), &text("waiting for SIPI"));
    assert_eq!(at(&tree, "units/serial/unit_state"), &text("running"));

    // An inspection that began meanwhile gets its answer after the access.
    let begun = begin(&view, "units/serial/unit/running", 0, View::Everything);
    tokio::task::yield_now().await;
    drop(release);
    assert_eq!(begun.finish(PATIENT).await, Node::Value(true.into()));
    assert_eq!(bench.look("vps/0/activity").await, text("running"));
    bench.machine.destroy().await;
}

#[tokio::test]
async fn a_vp_that_has_failed_still_shows_its_registers_unless_its_thread_is_gone() {
    let mut script = Script::new();
    script.fault();
    let panic = ScriptedOptions { panic_at_first_instruction: Some(VpIndex(0)), ..Default::default() };
    for (options, gone) in [(ScriptedOptions::default(), false), (panic, true)] {
        let mut bench = Bench::with(&script, None, options, |_| ()).await;
        bench.machine.start().await.unwrap();
        bench.halts.recv().await.expect("it halts");
        let vp = bench.look("vps/0").await;
        assert_eq!(at(&vp, "activity"), &text("failed"));
        assert_eq!(*at(&vp, "state") == Node::Unanswered, gone, "{vp}");
        bench.machine.destroy().await;
    }
}

#[tokio::test]
async fn of_a_destroyed_machine_nothing_is_left_to_see() {
    let bench = Bench::new(&spinning().0).await;
    let view = bench.machine.view().clone();
    assert_eq!(view.graph().len(), UNITS.len());
    bench.machine.destroy().await;
    assert_eq!((view.graph(), view.timeline()), (Vec::new(), Vec::new()));
    let tree = begin(&view, "", usize::MAX, View::Everything).finish(PATIENT).await;
    assert_eq!(tree.to_string(), "vps: (empty)\ndebugger: (empty)\n");
}
