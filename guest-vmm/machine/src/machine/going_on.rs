//! Guests that are stopped in the middle of something, and go on in another machine.
//!
//! Where no more than a unit's state is looked at, a machine that was built anew takes memory and states over.

use super::*;
use devices::GenericEvent;
use guest_saved_state::devices::generic_event::GenericEventState;
use guest_saved_state::machine::memory::MemoryState;
use guest_saved_state::processor::partition::{IrqRoute, IrqRoutes, PartitionState, Time};
use guest_saved_state::processor::{partition, vp};
use kvm::KvmHypervisor;
use processor::scripted::{Script, ScriptedHypervisor};
use processor::{MsiRequest, VpIndex};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use save_restore::{SavedStateBlob, SavedStateRoot};
use state_unit::SavedStateUnit;
use std::error::Error;
use std::fs::File;
use std::io::Write;

pub(super) const COM1: u16 = crate::layout::COM1_PORT;
/// For a guest that goes on.
const PATIENT: Duration = Duration::from_secs(60);
const MEMORY: u64 = 4 << 20;

/// A machine, and what its guest has written.
pub(super) struct Bench {
    pub machine: Machine,
    output: mpsc::UnboundedReceiver<Vec<u8>>,
    /// What was written and not looked at.
    written: Vec<u8>,
}

impl Bench {
    async fn new<H>(hypervisor: H, vps: u32, kernel: &[u8], image: Option<MemoryImage>) -> Self
    where
        H: Hypervisor + Send + 'static,
        H::Binder: Send + 'static,
    {
        let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(kernel).unwrap();
        let boot = BootFiles { kernel: file, initrd: None, cmdline: String::new() };
        let config = MachineConfig { image, ..MachineConfig::new(vps, MEMORY, boot) };
        let (send, output) = mpsc::unbounded_channel();
        let sink: Arc<dyn ByteSink> = Arc::new(move |bytes: &[u8]| drop(send.send(bytes.to_vec())));
        let (halts, _) = mpsc::unbounded_channel();
        let machine = Machine::build(hypervisor, config, sink, halts, || false).await.unwrap();
        Self { machine, output, written: Vec::new() }
    }

    pub async fn scripted(vps: u32, script: &Script) -> Self {
        Self::new(ScriptedHypervisor::default(), vps, &script.to_elf(), None).await
    }

    async fn builtin(vps: u32) -> Self {
        Self::builtin_with(vps, None).await
    }

    async fn builtin_with(vps: u32, image: Option<MemoryImage>) -> Self {
        let kvm = KvmHypervisor::open().unwrap_or_else(|error| panic!("no KVM: {error}"));
        Self::new(kvm, vps, builtin_guest::IMAGE, image).await
    }

    /// Another guest that goes on from where this one is.
    async fn fork(&self) -> Self {
        let MachineSnapshot { states, memory } = self.machine.snapshot().await.unwrap();
        let image = memory.seal().unwrap().image;
        let fork = Self::builtin_with(1, Some(image)).await;
        fork.machine.restore(states).await.unwrap();
        fork
    }

    pub async fn start(&self) {
        self.machine.start().await.unwrap();
    }

    pub async fn stop(&self) {
        self.machine.pause().await.unwrap();
    }

    pub async fn save(&self) -> Vec<SavedStateUnit> {
        self.machine.units.save().await.unwrap()
    }

    async fn try_restore(&self, states: Vec<SavedStateUnit>) -> Result<(), StateTransitionError> {
        self.machine.units.restore(states).await
    }

    /// Takes over from a machine that is stopped.
    pub async fn take_over(&self, from: &Self, states: Vec<SavedStateUnit>) {
        let frozen = from.machine.memory.freeze().unwrap().seal().unwrap();
        self.machine.memory.remap(&frozen.image).unwrap();
        self.try_restore(states).await.unwrap();
    }

    fn type_in(&self, text: &str) {
        assert_eq!(self.machine.serial_input().push(text.as_bytes()), Some(text.len()));
    }

    /// Waits for more output.
    async fn more(&mut self) {
        let next = tokio::time::timeout(PATIENT, self.output.recv()).await;
        let written = String::from_utf8_lossy(&self.written).into_owned();
        self.written.extend(next.unwrap_or_else(|_| panic!("after {written:?}")).expect("the port is there"));
    }

    /// What the guest has written, up to the text.
    async fn expect(&mut self, text: &str) -> String {
        loop {
            let found = self.written.windows(text.len()).position(|window| window == text.as_bytes());
            if let Some(at) = found {
                let rest = self.written.split_off(at + text.len());
                return String::from_utf8(std::mem::replace(&mut self.written, rest)).unwrap();
            }
            self.more().await;
        }
    }

    /// The next bytes that the guest writes, in order of their values: VPs write at the same time.
    pub async fn bytes(&mut self, count: usize) -> Vec<u8> {
        while self.written.len() < count {
            self.more().await;
        }
        let mut bytes: Vec<u8> = self.written.drain(..count).collect();
        bytes.sort_unstable();
        bytes
    }

    /// What a stopped machine's guest has written and nobody has looked at.
    fn rest(&mut self) -> Vec<u8> {
        while let Ok(bytes) = self.output.try_recv() {
            self.written.extend(bytes);
        }
        std::mem::take(&mut self.written)
    }

    async fn activities(&self) -> Vec<VpActivity> {
        self.machine.view().vp_states(PATIENT).await
    }

    pub async fn end(self) {
        self.machine.destroy().await;
    }
}

/// A line of a burst as the guest writes it.
fn burst_line(number: usize) -> String {
    let alphabet = (b'a'..=b'z').map(char::from).cycle();
    let rest: String = alphabet.skip(23).take(40).collect();
    format!("burst {number:016} {rest}\n")
}

fn state_of<T: SavedStateRoot>(states: &[SavedStateUnit], unit: &str) -> T {
    let unit = states.iter().find(|state| state.name == unit).unwrap();
    unit.state.as_ref().unwrap().parse().unwrap()
}

fn put<T: SavedStateRoot>(states: &mut [SavedStateUnit], unit: &str, state: &T) {
    let unit = states.iter_mut().find(|state| state.name == unit).unwrap();
    unit.state = Some(SavedStateBlob::new(state));
}

/// What a machine is saved as that goes on from these states: its guest is to be told of its new generation ID.
pub(super) fn with_new_generation(mut states: Vec<SavedStateUnit>) -> Vec<SavedStateUnit> {
    let mut events: GenericEventState = state_of(&states, "generic-events");
    events.pending |= u32::from(GenericEvent::GenerationId.bit());
    put(&mut states, "generic-events", &events);
    states
}

/// Three VPs that stop in three ways: the first polls for input, the second halts, the third waits to be started by the first.
fn three_ways() -> Script {
    let mut script = Script::new();
    let (mut second, mut third) = (Script::at(0x20_0000), Script::at(0x20_1000));
    let (second_entry, third_entry) = (second.here(), third.here());
    second.out(COM1, b"1").hlt().out_vector(COM1).spin();
    third.out(COM1, b"2").spin();
    script.write(second_entry.address(), second.code()).write(third_entry.address(), third.code());
    script.start_vp(VpIndex(1), second_entry).out(COM1, b"0").serial_input(COM1, COM1);
    script.start_vp(VpIndex(2), third_entry).out(COM1, b"0").spin();
    script
}

/// The script, stopped where the first VP polls and the second has halted, with an interrupt for that on its way.
async fn stopped_in_three_ways() -> Bench {
    let mut bench = Bench::scripted(3, &three_ways()).await;
    bench.start().await;
    assert_eq!(bench.bytes(2).await, b"01");
    let wanted = [VpActivity::Running, VpActivity::Halted, VpActivity::WaitForSipi];
    while bench.activities().await != wanted {}
    bench.stop().await;
    let interrupt = MsiRequest { address: 0xfee0_1000, data: b'!'.into() };
    bench.machine.partition.signal_msi(interrupt).unwrap();
    bench
}

/// What the script has left to do.
async fn goes_on(mut bench: Bench) {
    bench.start().await;
    assert_eq!(bench.bytes(1).await, b"!", "the interrupt that was pending");
    bench.type_in("i");
    assert_eq!(bench.bytes(3).await, b"02i");
    bench.stop().await;
    assert_eq!(bench.rest(), b"");
    bench.end().await;
}

#[tokio::test]
async fn several_vps_go_on_in_another_machine_as_in_their_own() {
    let original = stopped_in_three_ways().await;
    let states = original.save().await;
    assert_eq!(original.save().await, states, "to be saved changes nothing");
    let new = Bench::scripted(3, &three_ways()).await;
    new.take_over(&original, states.clone()).await;
    assert_eq!(new.save().await, with_new_generation(states));
    goes_on(new).await;
    goes_on(original).await;
}

#[tokio::test]
async fn a_machine_that_has_run_forgets_what_it_did() {
    let original = stopped_in_three_ways().await;
    let mut used = Bench::scripted(3, &three_ways()).await;
    used.start().await;
    used.type_in("x");
    assert_eq!(used.bytes(5).await, b"0012x");
    used.stop().await;
    used.type_in("left over");
    let interrupt = MsiRequest { address: 0xfeef_f000, data: b'?'.into() };
    used.machine.partition.signal_msi(interrupt).unwrap();
    let states = original.save().await;
    used.take_over(&original, states).await;
    goes_on(used).await;
    original.end().await;
}

#[tokio::test]
async fn a_guest_that_is_yet_to_start_is_saved_as_it_is_to_start() {
    let original = Bench::scripted(3, &three_ways()).await;
    let states = original.save().await;
    let mut spinning = Script::new();
    spinning.spin();
    let mut new = Bench::scripted(3, &spinning).await;
    new.take_over(&original, states.clone()).await;
    assert_eq!(new.save().await, with_new_generation(states));
    new.start().await;
    assert_eq!(new.bytes(2).await, b"01");
    new.end().await;
    original.end().await;
}

#[tokio::test]
async fn a_reset_after_a_restore_starts_anew() {
    let original = stopped_in_three_ways().await;
    let mut new = Bench::scripted(3, &three_ways()).await;
    let states = original.save().await;
    new.take_over(&original, states).await;
    new.machine.reset().await.unwrap();
    new.start().await;
    assert_eq!(new.bytes(2).await, b"01");
    new.end().await;
    original.end().await;
}

#[tokio::test]
async fn vps_that_run_are_neither_saved_nor_restored() {
    let bench = stopped_in_three_ways().await;
    let state: vp::VpSetState = state_of(&bench.save().await, VPS);
    bench.start().await;
    let vps = &bench.machine.view.vps;
    let saved = vps.save().await.unwrap_err();
    assert_eq!(saved.to_string(), "saving is not supported: the VPs are running");
    let restored = vps.restore(state).await.unwrap_err();
    assert_eq!(restored.to_string(), "restoring is not supported: the VPs are running");
    assert!(matches!(bench.machine.units.save().await, Err(StateTransitionError::Illegal(_))));
    bench.end().await;
}

/// A failed unit's name and what it says, causes included.
fn refusal(error: &StateTransitionError) -> (String, String) {
    let StateTransitionError::Units(failures) = error else { panic!("{error}") };
    let [failed] = &failures.failed[..] else { panic!("{failures:?}") };
    let mut cause: &(dyn Error + 'static) = &**failed.cause.as_ref().expect("a unit says why");
    let mut text = cause.to_string();
    while let Some(next) = cause.source() {
        text = format!("{text}: {next}");
        cause = next;
    }
    (failed.name.to_string(), text)
}

type Spoil = fn(&mut Vec<SavedStateUnit>);

fn spoil_vps(states: &mut [SavedStateUnit], spoil: impl FnOnce(&mut Vec<vp::VpState>)) {
    let mut state: vp::VpSetState = state_of(states, VPS);
    spoil(&mut state.vps);
    put(states, VPS, &state);
}

fn spoil_partition(states: &mut [SavedStateUnit], spoil: impl FnOnce(&mut PartitionState)) {
    let mut state = state_of(states, "partition");
    spoil(&mut state);
    put(states, "partition", &state);
}

/// States that are refused, the unit that does, and what it says.
const REFUSED: [(Spoil, &str, &str); 9] = [
    (
        |states| spoil_vps(states, |vps| drop(vps.pop())),
        VPS,
        "vps is 2 VPs where the machine has 3, which is not valid",
    ),
    (
        |states| spoil_vps(states, |vps| vps.push(vps[0].clone())),
        VPS,
        "vps is 4 VPs where the machine has 3, which is not valid",
    ),
    (
        |states| spoil_vps(states, |vps| vps[1].mp_state = Some(9)),
        VPS,
        "VP 1 could not be restored: mp_state is 9, which is not valid",
    ),
    (
        |states| spoil_vps(states, |vps| vps[2].registers = None),
        VPS,
        "VP 2 could not be restored: registers is absent, which is not valid",
    ),
    (
        |states| {
            spoil_vps(states, |vps| {
                (vps[1].tsc, vps[1].xsave) = (Some(vp::Tsc::default()), Some(vec![0; 576]));
            });
        },
        VPS,
        "VP 1 could not be restored: restoring is not supported: this host lacks the state xsave, tsc",
    ),
    (
        |states| spoil_partition(states, |state| state.clock = Some(clock())),
        "partition",
        "restoring is not supported: this host lacks the state clock",
    ),
    (
        |states| {
            let route = IrqRoute { pin: 96, address: 0, data: 0 };
            spoil_partition(states, |state| state.irq_routes = Some(IrqRoutes { routes: vec![route] }));
        },
        "partition",
        "irq_routes.routes.pin is 96, which is not valid",
    ),
    (
        |states| put(states, VPS, &PartitionState::default()),
        VPS,
        "the saved state is of type processor.partition.PartitionState, not processor.vp.VpSetState",
    ),
    (
        |states| put(states, "partition", &vp::VpSetState::default()),
        "partition",
        "the saved state is of type processor.vp.VpSetState, not processor.partition.PartitionState",
    ),
];

fn clock() -> partition::Clock {
    let second = Some(Time { seconds: 1, nanoseconds: 0 });
    partition::Clock { elapsed: second, host_time: second }
}

#[tokio::test]
async fn what_is_refused_names_its_unit_and_faults_the_set() {
    let original = stopped_in_three_ways().await;
    let states = original.save().await;
    for (spoil, unit, expected) in REFUSED {
        let new = Bench::scripted(3, &three_ways()).await;
        let mut spoiled = states.clone();
        spoil(&mut spoiled);
        let error = new.try_restore(spoiled).await.unwrap_err();
        assert_eq!(refusal(&error), (unit.to_owned(), expected.to_owned()));
        assert!(new.machine.is_faulted());
        let again = [new.machine.start().await, new.try_restore(states.clone()).await];
        let illegal = again.iter().all(|result| matches!(result, Err(StateTransitionError::Illegal(_))));
        assert!(illegal, "{again:?}");
        new.machine.stop().await.unwrap();
        new.end().await;
    }
    goes_on(original).await;
}

#[tokio::test]
async fn a_state_without_the_vps_or_the_partition_is_not_begun_with() {
    let original = stopped_in_three_ways().await;
    for unit in ["partition", VPS] {
        let mut states = original.save().await;
        states.retain(|state| state.name != unit);
        let error = original.try_restore(states).await.unwrap_err();
        let StateTransitionError::SavedState(mismatch) = &error else { panic!("{error}") };
        assert_eq!(mismatch.missing, [unit]);
    }
    goes_on(original).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    /// Entries come in any order; the units are restored in theirs.
    #[test]
    fn the_order_of_the_entries_does_not_matter(order in Just((0..11usize).collect::<Vec<_>>()).prop_shuffle()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let original = stopped_in_three_ways().await;
            let states = original.save().await;
            let new = Bench::scripted(3, &three_ways()).await;
            new.take_over(&original, order.iter().map(|at| states[*at].clone()).collect()).await;
            goes_on(new).await;
            original.end().await;
        });
    }
}

/// How many times the guest moves.
const MOVES: usize = 6;
const BURST_LINES: usize = 16 * 16;

/// The same on KVM, whose state is whole. Without /dev/kvm every test here fails, saying why there is none.
mod on_kvm {
    use super::*;

    /// A burst of output that is cut at any byte has every byte once, whichever machine wrote it.
    #[tokio::test]
    async fn a_burst_goes_on_from_machine_to_machine_to_the_byte() {
        let mut bench = Bench::builtin(1).await;
        bench.start().await;
        bench.expect("READY\n").await;
        bench.type_in("burst 16\n");
        let mut burst = Vec::new();
        for moves in 1..=MOVES {
            // A part of the burst later than before, wherever the guest stands in it then.
            while burst.len() + bench.written.len() < BURST_LINES * 64 / (MOVES + 1) * moves {
                bench.more().await;
            }
            bench.stop().await;
            burst.extend(bench.rest());
            let new = Bench::builtin(1).await;
            let states = bench.save().await;
            new.take_over(&bench, states).await;
            new.start().await;
            std::mem::replace(&mut bench, new).end().await;
        }
        burst.extend(bench.expect("burst done\n").await.into_bytes());
        let lines: String = (0..BURST_LINES).map(burst_line).collect();
        assert_eq!(String::from_utf8(burst).unwrap(), lines + "burst done\n");
        bench.end().await;
    }

    /// The first by remapping the original's memory, the later ones by layers, while the guest writes. A reset gives a fork memory of
    /// its own.
    #[tokio::test]
    async fn a_guest_and_its_forks_each_go_on_from_where_it_stood() {
        const FORKS: usize = 4;
        let mut original = Bench::builtin(1).await;
        original.start().await;
        original.expect("READY\n").await;
        original.type_in("burst 16\n");
        let (mut burst, mut guests) = (Vec::new(), Vec::new());
        for fork in 1..=FORKS {
            while burst.len() + original.written.len() < BURST_LINES * 64 / (FORKS + 1) * fork {
                original.more().await;
            }
            original.stop().await;
            burst.extend(original.rest());
            guests.push((burst.clone(), original.fork().await));
            original.start().await;
        }
        for (_, fork) in &guests {
            fork.start().await;
        }
        guests.push((burst, original));
        let lines: String = (0..BURST_LINES).map(burst_line).collect();
        for (mut burst, mut guest) in guests {
            burst.extend(guest.expect("burst done\n").await.into_bytes());
            assert_eq!(String::from_utf8(burst).unwrap(), lines.clone() + "burst done\n");
            guest.stop().await;
            guest.machine.reset().await.unwrap();
            guest.start().await;
            guest.expect("READY\n").await;
            guest.end().await;
        }
    }

    #[tokio::test]
    async fn a_guest_that_runs_goes_on_by_itself_after_its_snapshot() {
        let mut original = Bench::builtin(1).await;
        original.start().await;
        original.expect("READY\n").await;
        let mut fork = original.fork().await;
        assert!(original.machine.units.is_running() && !fork.machine.units.is_running());
        fork.start().await;
        let mut grandchild = fork.fork().await;
        grandchild.start().await;
        for guest in [&mut original, &mut fork, &mut grandchild] {
            guest.type_in("vps\n");
            guest.expect("vps 1\n").await;
        }
        for bench in [original, fork, grandchild] {
            bench.end().await;
        }
    }

    #[tokio::test]
    async fn memory_of_another_size_is_refused_by_name() {
        let (original, other) = (Bench::builtin(1).await, Bench::builtin(1).await);
        let mut states = original.save().await;
        let memory = states.iter_mut().find(|state| state.name == "memory").unwrap();
        let state = MemoryState { bytes: MEMORY - 4096, hotplug_start: 0, hotplug_end: 0 };
        memory.state = Some(SavedStateBlob::new(&state));
        let refused = format!("{:?}", other.machine.restore(states).await.unwrap_err());
        assert!(refused.contains("memory") && refused.contains("bytes"), "{refused}");
        original.end().await;
        other.end().await;
    }

    /// One VP halted by an idle guest, one waiting for SIPI, and a line of input with its interrupt on the way. Later one
    /// in a loop, one halted.
    #[tokio::test]
    async fn vps_that_wait_for_sipi_halt_or_run_go_on_in_another_machine() {
        let mut original = Bench::builtin(2).await;
        original.start().await;
        original.expect("READY\n").await;
        while original.activities().await != [VpActivity::Halted, VpActivity::WaitForSipi] {}
        original.stop().await;
        original.type_in("vps\n");
        let mut second = Bench::builtin(2).await;
        let states = original.save().await;
        second.take_over(&original, states).await;
        second.start().await;
        second.expect("vps 2\n").await;
        second.type_in("spin\n");
        second.expect("spinning\n").await;
        while second.activities().await != [VpActivity::Running, VpActivity::Halted] {}
        second.stop().await;
        let states = second.save().await;
        let third = Bench::builtin(2).await;
        third.take_over(&second, states.clone()).await;
        third.start().await;
        assert_eq!(third.activities().await, [VpActivity::Running, VpActivity::Halted]);
        third.stop().await;
        let before: vp::VpSetState = state_of(&states, VPS);
        let now: vp::VpSetState = state_of(&third.save().await, VPS);
        assert_eq!(before.vps[1].registers, now.vps[1].registers, "it has halted, and nothing wakes it");
        // The first machine's guest goes on as if nothing had been taken from it.
        original.start().await;
        original.expect("vps 2\n").await;
        original.type_in("count\n");
        original.expect("count 1000\n").await;
        for bench in [original, second, third] {
            bench.end().await;
        }
    }

    /// What was sent to a VP while it was stopped, and KVM was not told yet.
    #[tokio::test]
    async fn an_nmi_that_was_sent_to_a_stopped_vp_is_saved() {
        let original = Bench::builtin(1).await;
        let pending = |states: &[SavedStateUnit]| {
            let state: vp::VpSetState = state_of(states, VPS);
            state.vps[0].events.expect("KVM has them").nmis_pending
        };
        assert_eq!(pending(&original.save().await), 0);
        original.machine.partition.inject_nmi(VpIndex(0));
        let states = original.save().await;
        assert_eq!(pending(&states), 1);
        let new = Bench::builtin(1).await;
        new.machine.partition.inject_nmi(VpIndex(0));
        new.take_over(&original, states).await;
        assert_eq!(pending(&new.save().await), 1, "the one that was saved, and none of its own");
        new.end().await;
        original.end().await;
    }

    /// The clock stands where it stood, and the routes are those that the guest has set up.
    #[tokio::test]
    async fn a_partition_is_as_the_one_before_was() {
        let mut original = Bench::builtin(1).await;
        original.start().await;
        original.expect("READY\n").await;
        original.stop().await;
        let states = original.save().await;
        let before: PartitionState = state_of(&states, "partition");
        assert!(before.clock.is_some(), "{before:?}");
        let new = Bench::builtin(1).await;
        new.take_over(&original, states).await;
        let now: PartitionState = state_of(&new.save().await, "partition");
        assert_eq!(now, before);
        new.end().await;
        original.end().await;
    }

    /// The VP starts where the boot loader said, though the machine that it starts in has loaded nothing.
    #[tokio::test]
    async fn a_kvm_guest_that_is_yet_to_start_starts_in_another_machine() {
        let original = Bench::builtin(1).await;
        let mut new = Bench::builtin(1).await;
        let states = original.save().await;
        new.take_over(&original, states).await;
        new.start().await;
        new.expect("READY\n").await;
        new.type_in("echo here\n");
        new.expect("here\n").await;
        new.end().await;
        original.end().await;
    }
}
