//! A guest of a few bytes of code, and a bus that keeps what it is told.

use futures::executor::block_on;
use kvm::KvmHypervisor;
use processor::{
    CpuIo, ErasedVpState, Hypervisor, NewPartition, Partition, PartitionConfig, PowerRequest, Registers,
    Segment, SystemRegisters, Table, VpFault, VpHaltReason, VpIndex, VpThread,
};
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where guests print.
pub const SERIAL: u16 = 0x3f8;
/// Where they power off, with 0x2000.
pub const ACPI: u16 = 0x604;
/// Where they reset, with 0xfe.
pub const KEYBOARD: u16 = 0x64;
/// Where their code lies.
pub const CODE: u64 = 0x1000;
/// Where a device's registers are.
pub const MMIO: u64 = 0xd000_0000;
/// A register that resets the guest: the last of a page, so that a write across its end has another access to follow.
pub const MMIO_RESET: u64 = MMIO + 0xffe;
/// How long anything may take before a test says that it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// KVM, or the reason why there is none.
pub fn hypervisor() -> &'static KvmHypervisor {
    static HYPERVISOR: OnceLock<KvmHypervisor> = OnceLock::new();
    HYPERVISOR.get_or_init(|| KvmHypervisor::open().unwrap_or_else(|error| panic!("no KVM: {error}")))
}

/// A bus with a serial port, the two ways to end, and registers in memory that give their address.
#[derive(Default)]
pub struct Bus {
    state: Mutex<BusState>,
    changed: Condvar,
}

/// What a guest did.
#[derive(Default)]
pub struct BusState {
    pub output: Vec<u8>,
    pub widths: Vec<usize>,
    pub input: VecDeque<u8>,
    pub mmio: Vec<(u64, Vec<u8>)>,
    pub ended: Vec<u8>,
}

impl Bus {
    /// Looks at what the guest did.
    pub fn look<R>(&self, look: impl FnOnce(&mut BusState) -> R) -> R {
        look(&mut self.state.lock().unwrap())
    }

    fn change(&self, change: impl FnOnce(&mut BusState)) {
        self.look(change);
        self.changed.notify_all();
    }

    /// Waits until the guest has printed so many bytes, and takes them.
    pub fn expect_bytes(&self, count: usize) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let few = |state: &mut BusState| state.output.len() < count;
        let (mut state, _) = self.changed.wait_timeout_while(state, PATIENCE, few).unwrap();
        assert!(state.output.len() >= count, "{count} bytes expected, {:?} printed", state.output);
        state.output.drain(..count).collect()
    }

    /// Waits until the guest has printed the text.
    pub fn expect(&self, text: &str) {
        assert_eq!(String::from_utf8_lossy(&self.expect_bytes(text.len())), text);
    }
}

impl CpuIo for Bus {
    fn read_io(&self, _: VpIndex, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port == SERIAL {
            self.change(|state| data[0] = state.input.pop_front().unwrap_or(0));
        }
    }

    fn write_io(&self, _: VpIndex, port: u16, data: &[u8]) -> ControlFlow<PowerRequest> {
        match (port, data) {
            (ACPI, [0x00, 0x20]) => return ControlFlow::Break(PowerRequest::PowerOff),
            (KEYBOARD, [0xfe]) => return ControlFlow::Break(PowerRequest::Reset),
            (SERIAL, _) => self.change(|state| {
                state.output.extend(data);
                state.widths.push(data.len());
            }),
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn read_mmio(&self, _: VpIndex, address: u64, data: &mut [u8]) {
        data.copy_from_slice(&address.to_le_bytes()[..data.len()]);
    }

    fn write_mmio(&self, _: VpIndex, address: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        self.change(|state| state.mmio.push((address, data.to_vec())));
        if address == MMIO_RESET {
            ControlFlow::Break(PowerRequest::Reset)
        } else {
            ControlFlow::Continue(())
        }
    }

    fn handle_eoi(&self, vector: u8) {
        self.change(|state| state.ended.push(vector));
    }
}

/// How a guest's first VP starts.
#[derive(Clone, Copy)]
pub enum Mode {
    /// 16 bits, all segments at 0.
    Real,
    /// 32 bits, flat, with descriptors for interrupts.
    Flat,
}

/// Where descriptors are.
const GDT: u64 = 0x500;
/// Where interrupt gates are.
pub const IDT: u64 = 0x4000;
/// The size of the table of interrupt gates.
const IDT_SIZE: u16 = 256 * 8;

/// A guest, its VPs bound and none started.
pub struct Guest {
    pub bus: Arc<Bus>,
    pub partition: Arc<dyn Partition>,
    pub vps: Vec<VpThread>,
    pub memory: GuestMemoryMmap,
    mode: Mode,
    halts: Receiver<(VpIndex, VpHaltReason)>,
}

impl Guest {
    /// A guest of one VP.
    pub fn new(mode: Mode, code: &[u8]) -> Self {
        Self::with(mode, code, 1)
    }

    /// A guest of several.
    pub fn with(mode: Mode, code: &[u8], vp_count: u32) -> Self {
        Self::configured(mode, code, |memory| PartitionConfig::new(vp_count, memory))
    }

    /// A guest whose partition is made as this says.
    pub fn configured(
        mode: Mode,
        code: &[u8],
        config: impl FnOnce(GuestMemoryMmap) -> PartitionConfig,
    ) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        memory.write_slice(code, GuestAddress(CODE)).unwrap();
        let descriptors = [0, 0x00cf_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff];
        memory.write_slice(&descriptors.map(u64::to_le_bytes).concat(), GuestAddress(GDT)).unwrap();
        let NewPartition { partition, processors } = hypervisor().build(&config(memory.clone())).unwrap();
        let bus = Arc::new(Bus::default());
        let (halted, halts) = channel();
        let spawn = |(n, binder)| {
            let halted = halted.clone();
            // The receiver is gone when a test has ended.
            let on_halt = move |vp, reason| drop(halted.send((vp, reason)));
            VpThread::spawn(VpIndex(n), None, binder, partition.clone(), bus.clone(), on_halt)
        };
        let vps = (0..).zip(processors).map(|new| block_on(spawn(new)).unwrap()).collect();
        let guest = Self { bus, partition, vps, memory, mode, halts };
        guest.boot();
        guest
    }

    /// Sets the first VP to the code.
    pub fn boot(&self) {
        let mode = self.mode;
        block_on(self.vps[0].access(move |state| boot(state, mode))).unwrap();
    }

    /// Starts every VP.
    pub fn start(&self) {
        self.vps.iter().for_each(|vp| block_on(vp.start()).unwrap());
    }

    /// Stops every VP.
    pub fn stop(&self) {
        self.vps.iter().for_each(|vp| block_on(vp.stop()).unwrap());
    }

    /// Resets the stopped guest, its memory excepted, and sets its first VP to the code.
    pub fn reset(&self) {
        self.partition.reset().unwrap();
        self.vps.iter().for_each(|vp| block_on(vp.reset()).unwrap());
        self.boot();
    }

    /// Looks at the first VP's state.
    pub fn access<R: Send + 'static>(
        &self,
        access: impl FnOnce(&mut dyn ErasedVpState) -> R + Send + 'static,
    ) -> R {
        block_on(self.vps[0].access(access)).unwrap()
    }

    /// The first VP's instruction pointer.
    pub fn rip(&self) -> u64 {
        self.access(|state| state.registers().unwrap().rip)
    }

    /// The next halt of a VP.
    pub fn halt(&self) -> VpHaltReason {
        self.halts.recv_timeout(PATIENCE).expect("no VP halted").1
    }

    /// The next halt, which has to be a fault.
    pub fn fault(&self) -> VpFault {
        match self.halt() {
            VpHaltReason::Fault(fault) | VpHaltReason::TripleFault(fault) => *fault,
            other => panic!("{other:?}"),
        }
    }

    /// Asserts that no VP has halted that was not asked for yet.
    pub fn assert_no_halt(&self) {
        assert!(self.halts.try_recv().is_err());
    }
}

fn boot(state: &mut dyn ErasedVpState, mode: Mode) {
    let before = state.system_registers().unwrap();
    let system = match mode {
        Mode::Real => SystemRegisters { cs: Segment { base: 0, selector: 0, ..before.cs }, ..before },
        Mode::Flat => flat(before),
    };
    state.set_system_registers(&system).unwrap();
    let registers = Registers { rip: CODE, rsp: 0x8000, rflags: 2, ..Registers::default() };
    state.set_registers(&registers).unwrap();
}

fn flat(before: SystemRegisters) -> SystemRegisters {
    let segment = |selector, attributes| Segment { base: 0, limit: u32::MAX, selector, attributes };
    let data = segment(16, 0xc093);
    SystemRegisters {
        cs: segment(8, 0xc09b),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        gdtr: Table { base: GDT, limit: 23 },
        idtr: Table { base: IDT, limit: IDT_SIZE - 1 },
        cr0: before.cr0 | 1,
        ..before
    }
}

/// A number of rounds, times GUESTD_TEST_SCALE.
pub fn rounds(number: u32) -> u32 {
    let scale = std::env::var("GUESTD_TEST_SCALE").ok();
    let scale: f64 = scale.map_or(1.0, |text| text.parse().expect("GUESTD_TEST_SCALE is a number"));
    let scaled = (1..).take_while(|n| f64::from(*n) <= f64::from(number) * scale).last();
    scaled.unwrap_or(1)
}
