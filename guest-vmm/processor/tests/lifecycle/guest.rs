//! A scripted guest with a bus that keeps what it is told.

use futures::executor::block_on;
use processor::scripted::{SCRIPT_BASE, Script, ScriptedHypervisor, ScriptedOptions};
use processor::{
    CpuIo, Hypervisor, NewPartition, Partition, PartitionConfig, PowerRequest, Registers, VpHaltReason,
    VpIndex, VpThread,
};
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where guests print.
pub const SERIAL: u16 = 0x3f8;
/// Where they power off, with 0x2000.
pub const ACPI: u16 = 0x604;
/// Where they reset, with 0xfe.
pub const KEYBOARD: u16 = 0x64;
/// How much memory they have.
pub const MEMORY_SIZE: usize = 4 << 20;
/// How long anything may take before a test says that it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A bus with a serial port, the two ways to end, and one register at every other address.
#[derive(Default)]
pub struct Bus {
    state: Mutex<BusState>,
    changed: Condvar,
}

#[derive(Default)]
struct BusState {
    output: Vec<u8>,
    input: VecDeque<u8>,
    mmio: Vec<(u64, Vec<u8>)>,
    ended: Vec<u8>,
    port_reads: u64,
}

impl Bus {
    fn change<R>(&self, change: impl FnOnce(&mut BusState) -> R) -> R {
        let result = change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
        result
    }

    fn wait<R>(&self, what: &str, mut found: impl FnMut(&mut BusState) -> Option<R>) -> R {
        let mut result = None;
        let state = self.state.lock().unwrap();
        let waited = self.changed.wait_timeout_while(state, PATIENCE, |state| {
            result = found(state);
            result.is_none()
        });
        drop(waited.unwrap());
        result.unwrap_or_else(|| panic!("{what} did not come; the guest printed {:?}", self.output()))
    }

    /// What the guest has printed.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.state.lock().unwrap().output).into_owned()
    }

    /// Waits until the guest has printed the text, and takes everything up to its end away.
    pub fn expect(&self, text: &str) {
        self.wait(text, |state| {
            let at = state.output.windows(text.len()).position(|window| window == text.as_bytes())?;
            state.output.drain(..at + text.len());
            Some(())
        });
    }

    /// Waits until the guest has read ports so many times more.
    pub fn wait_for_port_reads(&self, more: u64) {
        let before = self.state.lock().unwrap().port_reads;
        self.wait("a read of a port", |state| (state.port_reads >= before + more).then_some(()));
    }

    /// Gives the guest serial input.
    pub fn type_in(&self, text: &str) {
        self.change(|state| state.input.extend(text.bytes()));
    }

    /// What was written to registers in memory, in order.
    pub fn mmio(&self) -> Vec<(u64, Vec<u8>)> {
        self.state.lock().unwrap().mmio.clone()
    }

    /// The vectors of the interrupts that the guest has ended.
    pub fn ended(&self) -> Vec<u8> {
        self.state.lock().unwrap().ended.clone()
    }
}

impl CpuIo for Bus {
    fn read_io(&self, _: VpIndex, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        self.change(|state| {
            state.port_reads += 1;
            match port {
                SERIAL => data[0] = state.input.pop_front().unwrap_or(0),
                0x3fd => data[0] = (!state.input.is_empty()).into(),
                _ => {}
            }
        });
    }

    fn write_io(&self, _: VpIndex, port: u16, data: &[u8]) -> ControlFlow<PowerRequest> {
        match (port, data) {
            (SERIAL, _) => self.change(|state| state.output.extend(data)),
            (ACPI, [0x00, 0x20]) => return ControlFlow::Break(PowerRequest::PowerOff),
            (KEYBOARD, [0xfe]) => return ControlFlow::Break(PowerRequest::Reset),
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn read_mmio(&self, _: VpIndex, address: u64, data: &mut [u8]) {
        data.copy_from_slice(&address.to_le_bytes()[..data.len()]);
    }

    fn write_mmio(&self, _: VpIndex, address: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        self.change(|state| state.mmio.push((address, data.to_vec())));
        ControlFlow::Continue(())
    }

    fn handle_eoi(&self, vector: u8) {
        self.change(|state| state.ended.push(vector));
    }
}

/// A guest, its VPs bound and none started.
pub struct Guest {
    pub bus: Arc<Bus>,
    pub partition: Arc<dyn Partition>,
    pub vps: Vec<VpThread>,
    pub memory: GuestMemoryMmap,
    halts: Receiver<(VpIndex, VpHaltReason)>,
}

impl Guest {
    /// A guest of one VP.
    pub fn new(script: &Script) -> Self {
        Self::with(script, 1, ScriptedOptions::default())
    }

    /// A guest whose first VP is set to the script's first instruction, if its registers can be set.
    pub fn with(script: &Script, vp_count: u32, options: ScriptedOptions) -> Self {
        let memory = memory(script);
        let config = PartitionConfig::new(vp_count, memory.clone());
        let NewPartition { partition, processors } = ScriptedHypervisor { options }.build(&config).unwrap();
        let bus = Arc::new(Bus::default());
        let (halted, halts) = channel();
        let spawn = |(n, binder)| {
            let halted = halted.clone();
            let on_halt = move |vp, reason| halted.send((vp, reason)).unwrap();
            VpThread::spawn(VpIndex(n), None, binder, partition.clone(), bus.clone(), on_halt)
        };
        let vps = (0..).zip(processors).map(|new| block_on(spawn(new)).unwrap()).collect();
        let guest = Self { bus, partition, vps, memory, halts };
        guest.boot();
        guest
    }

    /// Sets the first VP to the script's first instruction.
    pub fn boot(&self) {
        let registers = Registers { rip: SCRIPT_BASE.into(), rflags: 2, ..Registers::default() };
        let set = self.vps[0].access(move |state| state.set_registers(&registers));
        block_on(set).unwrap().unwrap();
    }

    /// Starts every VP.
    pub fn start(&self) {
        self.vps.iter().for_each(|vp| block_on(vp.start()).unwrap());
    }

    /// The next halt of a VP.
    pub fn halt(&self) -> (VpIndex, VpHaltReason) {
        self.halts.recv_timeout(PATIENCE).expect("no VP halted")
    }

    /// The next halt, which has to be a fault of the first VP.
    pub fn fault(&self) -> processor::VpFault {
        match self.halt() {
            (VpIndex(0), VpHaltReason::Fault(fault)) => *fault,
            other => panic!("{other:?}"),
        }
    }

    /// Asserts that no VP has halted that was not asked for yet.
    pub fn assert_no_halt(&self) {
        assert!(self.halts.try_recv().is_err());
    }
}

/// Guest memory with the script in it.
pub fn memory(script: &Script) -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
    memory.write_slice(script.code(), GuestAddress(SCRIPT_BASE.into())).unwrap();
    memory
}

/// A script that prints READY and spins.
pub fn ready_and_spin() -> Script {
    let mut script = Script::new();
    script.out(SERIAL, b"READY\n").spin();
    script
}
