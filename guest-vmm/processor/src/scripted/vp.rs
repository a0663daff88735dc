//! The interpreter: a VP that runs a script.

use super::ScriptedOptions;
use super::instruction::{DecodeError, Instruction};
use super::partition::{Mailbox, ScriptedPartition};
use crate::{
    AccessKind, AccessVpState, CpuIo, DebugState, HardwareBreakpoint, LOCAL_APIC_BYTES, LocalApic, MpState,
    NotSupported, PowerRequest, Processor, Registers, StopVp, SystemRegisters, VpFault, VpHaltReason,
    VpIndex, VpStateKind, Vtl, run_guest,
};
use inspect::{InspectMut, Request};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// The longest instruction: 64 KiB of data behind an opcode, a port and a length.
const LONGEST_INSTRUCTION: usize = 0x1_0004;

/// How much of an instruction is fetched at first.
const FIRST_FETCH: usize = 64;

/// How long a script that polls waits between two reads, so that it leaves the host some time.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// What can go wrong with a scripted VP's state.
#[derive(Debug, thiserror::Error)]
pub enum ScriptedError {
    /// The options say so.
    #[error("the options say that the registers of VP {vp} cannot be set")]
    SetRegisters {
        /// The VP.
        vp: VpIndex,
    },
    /// A scripted VP has no such thing.
    #[error(transparent)]
    NotSupported(#[from] NotSupported),
}

/// Why the interpreter comes back.
enum Leave {
    /// It was asked to yield.
    Yield,
    /// The VP halts.
    Halt(VpHaltReason),
}

/// Goes on, or leaves the guest.
type Step = ControlFlow<Leave>;

/// A VP that runs a script.
pub struct ScriptedProcessor {
    vp: VpIndex,
    partition: Arc<ScriptedPartition>,
    options: ScriptedOptions,
    registers: Registers,
    system: SystemRegisters,
    mp_state: MpState,
    debug: DebugState,
}

impl ScriptedProcessor {
    pub(super) fn new(vp: VpIndex, partition: Arc<ScriptedPartition>, options: ScriptedOptions) -> Self {
        let mp_state = if vp.0 == 0 { MpState::Runnable } else { MpState::WaitForSipi };
        // As an x86 processor after its reset (Intel SDM volume 3, table 11-1).
        let registers = Registers { rip: 0xfff0, rflags: 2, ..Registers::default() };
        let (system, debug) = (SystemRegisters::default(), DebugState::default());
        Self { vp, partition, options, registers, system, mp_state, debug }
    }

    fn mailbox(&self) -> &Mailbox {
        self.partition.mailbox(self.vp).expect("the partition made as many mailboxes as VPs")
    }

    /// Runs the script until the VP is asked to yield, or halts.
    fn enter(&mut self, io: &impl CpuIo) -> ControlFlow<VpHaltReason> {
        loop {
            let step = match self.mp_state {
                _ if self.mailbox().lock().yield_requested => Step::Break(Leave::Yield),
                MpState::Runnable => self.step(io),
                MpState::Halted => self.wait_for_interrupt(io),
                MpState::WaitForSipi => self.wait_for_start(),
            };
            match step {
                Step::Continue(()) => {}
                Step::Break(Leave::Yield) => {
                    self.mailbox().lock().yield_requested = false;
                    return ControlFlow::Continue(());
                }
                Step::Break(Leave::Halt(reason)) => return ControlFlow::Break(reason),
            }
        }
    }

    fn wait_for_interrupt(&mut self, io: &impl CpuIo) -> Step {
        let Some(vector) = self.mailbox().wait(|signals| signals.interrupts.pop_last()) else {
            return Step::Break(Leave::Yield);
        };
        self.registers.rdx = vector.into();
        self.mp_state = MpState::Runnable;
        if self.partition.is_level_triggered(vector) {
            io.handle_eoi(vector);
        }
        Step::Continue(())
    }

    fn wait_for_start(&mut self) -> Step {
        let Some(target) = self.mailbox().wait(|signals| signals.start.take()) else {
            return Step::Break(Leave::Yield);
        };
        self.registers.rip = target;
        self.mp_state = MpState::Runnable;
        Step::Continue(())
    }

    /// Runs one instruction.
    fn step(&mut self, io: &impl CpuIo) -> Step {
        if self.options.panic_at_first_instruction == Some(self.vp) {
            panic!("the options say that VP {} panics", self.vp);
        }
        let (instruction, len) = match self.fetch() {
            Ok(fetched) => fetched,
            Err(reason) => return self.fault(reason),
        };
        let rip = self.registers.rip;
        if let Some(breakpoint) = self.breakpoint_at(rip) {
            return Step::Break(Leave::Halt(VpHaltReason::HwBreak(breakpoint)));
        }
        self.registers.rip = rip.wrapping_add(len as u64);
        self.execute(instruction, rip, io)?;
        if self.debug.single_step {
            Step::Break(Leave::Halt(VpHaltReason::SingleStep))
        } else {
            Step::Continue(())
        }
    }

    fn breakpoint_at(&self, rip: u64) -> Option<HardwareBreakpoint> {
        self.debug.breakpoints.iter().flatten().find(|breakpoint| breakpoint.address == rip).copied()
    }

    fn fetch(&self) -> Result<(Instruction, usize), String> {
        let rip = self.registers.rip;
        let mut decoded = Err(DecodeError::Truncated);
        // Few instructions are long, so that a second fetch is rare.
        for longest in [FIRST_FETCH, LONGEST_INSTRUCTION] {
            decoded = Instruction::decode(&self.fetch_bytes(longest)?);
            if decoded != Err(DecodeError::Truncated) {
                break;
            }
        }
        decoded.map_err(|error| match error {
            DecodeError::Opcode(opcode) => format!("bad opcode {opcode:#x} at {rip:#x}"),
            DecodeError::Width(width) => format!("an access of {width} bytes at {rip:#x}"),
            DecodeError::Truncated => format!("the instruction at {rip:#x} reaches outside memory"),
        })
    }

    fn fetch_bytes(&self, longest: usize) -> Result<Vec<u8>, String> {
        let rip = self.registers.rip;
        let mut bytes = vec![0; longest];
        let outside = |_| format!("the instruction at {rip:#x} is outside memory");
        let len = self.partition.memory.read(&mut bytes, GuestAddress(rip)).map_err(outside)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    fn execute(&mut self, instruction: Instruction, rip: u64, io: &impl CpuIo) -> Step {
        match instruction {
            Instruction::Out { port, data } => return self.out(port, &data, io),
            Instruction::OutValue { port, width, value } => {
                return self.write_port(port, &value.to_le_bytes()[..width.into()], io);
            }
            Instruction::Echo { from, to } => {
                let byte = self.read_port(from, io);
                return self.write_port(to, &[byte], io);
            }
            Instruction::Write { address, data } => return self.write(address, &data, io),
            Instruction::Read { address, len, port } => {
                let value = self.read(address, len, io);
                return self.out(port, &value.to_le_bytes()[..len.into()], io);
            }
            Instruction::Halt => self.mp_state = MpState::Halted,
            Instruction::Spin => {
                self.registers.rip = rip;
                self.mailbox().wait(|_| None::<Infallible>);
                return Step::Break(Leave::Yield);
            }
            Instruction::Jump { target } => self.registers.rip = target,
            Instruction::Fault => {
                self.registers.rip = rip;
                return self.fault(format!("the script asked for a fault at {rip:#x}"));
            }
            Instruction::FaultNamed { reason } => {
                self.registers.rip = rip;
                return self.fault(String::from_utf8_lossy(&reason).into_owned());
            }
            Instruction::TripleFault => {
                self.registers.rip = rip;
                let fault = self.described("triple fault".to_owned());
                return Step::Break(Leave::Halt(VpHaltReason::TripleFault(fault)));
            }
            Instruction::StartVp { vp, target } => self.partition.start_vp(vp, target),
            Instruction::Poll { port, mask } => {
                if self.read_port(port, io) & mask == 0 {
                    self.registers.rip = rip;
                    self.mailbox().pause(POLL_INTERVAL);
                }
            }
            Instruction::SetCounter { value } => self.registers.rcx = value,
            Instruction::Repeat { target } => {
                self.registers.rcx = self.registers.rcx.wrapping_sub(1);
                if self.registers.rcx != 0 {
                    self.registers.rip = target;
                }
            }
            Instruction::OutVector { port } => {
                return self.write_port(port, &self.registers.rdx.to_le_bytes()[..1], io);
            }
        }
        Step::Continue(())
    }

    fn out(&self, port: u16, data: &[u8], io: &impl CpuIo) -> Step {
        data.chunks(1).try_for_each(|byte| self.write_port(port, byte, io))
    }

    fn write_port(&self, port: u16, data: &[u8], io: &impl CpuIo) -> Step {
        io.write_io(self.vp, port, data).map_break(power)
    }

    fn read_port(&mut self, port: u16, io: &impl CpuIo) -> u8 {
        let mut byte = [0];
        io.read_io(self.vp, port, &mut byte);
        self.registers.rax = byte[0].into();
        byte[0]
    }

    /// Writes to memory, or to a register where there is none.
    fn write(&self, address: u64, data: &[u8], io: &impl CpuIo) -> Step {
        if self.in_memory(address, data.len()) {
            let written = self.partition.memory.write_slice(data, GuestAddress(address));
            written.expect("the range was found to be in memory");
            return Step::Continue(());
        }
        io.write_mmio(self.vp, address, data).map_break(power)
    }

    /// Reads memory, or a register where there is none.
    fn read(&mut self, address: u64, len: u8, io: &impl CpuIo) -> u64 {
        let mut value = [0; 8];
        let data = &mut value[..len.into()];
        if self.in_memory(address, data.len()) {
            let read = self.partition.memory.read_slice(data, GuestAddress(address));
            read.expect("the range was found to be in memory");
        } else {
            io.read_mmio(self.vp, address, data);
        }
        self.registers.rax = u64::from_le_bytes(value);
        self.registers.rax
    }

    fn in_memory(&self, address: u64, len: usize) -> bool {
        self.partition.memory.check_range(GuestAddress(address), len)
    }

    fn fault(&self, reason: String) -> Step {
        Step::Break(Leave::Halt(VpHaltReason::Fault(self.described(reason))))
    }

    fn described(&self, reason: String) -> Box<VpFault> {
        let registers = Some(Box::new(self.registers));
        Box::new(VpFault { vp: self.vp, reason, registers, note: None })
    }
}

fn power(request: PowerRequest) -> Leave {
    Leave::Halt(match request {
        PowerRequest::PowerOff => VpHaltReason::PowerOff,
        PowerRequest::Hibernate => VpHaltReason::Hibernate,
        PowerRequest::Reset => VpHaltReason::Reset,
        PowerRequest::DebugExit(value) => VpHaltReason::DebugExit(value),
    })
}

/// What it shows beside its state: what it was told and has not looked at.
impl InspectMut for ScriptedProcessor {
    fn inspect_mut(&mut self, request: Request<'_>) {
        let signals = self.mailbox().lock();
        let interrupts: Vec<_> = signals.interrupts.iter().map(|vector| format!("{vector:#x}")).collect();
        let mut response = request.respond();
        response
            .field("yield_requested", &signals.yield_requested)
            .field("single_step", &self.debug.single_step);
        response.field("interrupts", interrupts.join(" ").as_str());
    }
}

impl Processor for ScriptedProcessor {
    type Error = ScriptedError;
    type StateAccess<'a> = ScriptedState<'a>;

    fn set_debug_state(&mut self, vtl: Vtl, state: Option<&DebugState>) -> Result<(), ScriptedError> {
        vtl.only_vtl0()?;
        let state = state.copied().unwrap_or_default();
        let watches = |b: &HardwareBreakpoint| b.access != AccessKind::Execute || !b.is_valid();
        if let Some(watch) = state.breakpoints.iter().flatten().find(|breakpoint| watches(breakpoint)) {
            return Err(NotSupported(format!("a breakpoint for {watch}").into()).into());
        }
        self.debug = state;
        Ok(())
    }

    async fn run_vp(&mut self, stop: &mut StopVp, io: &impl CpuIo) -> Result<Infallible, VpHaltReason> {
        run_guest(stop, || self.enter(io)).await
    }

    /// Nothing to do: an instruction is whole when the interpreter comes back.
    fn flush_async_requests(&mut self) -> Result<(), ScriptedError> {
        Ok(())
    }

    fn access_state(&mut self, vtl: Vtl) -> Result<ScriptedState<'_>, NotSupported> {
        vtl.only_vtl0()?;
        Ok(ScriptedState(self))
    }

    fn reset(&mut self) -> Result<(), ScriptedError> {
        self.scrub(Vtl::Vtl0)
    }

    fn scrub(&mut self, vtl: Vtl) -> Result<(), ScriptedError> {
        vtl.only_vtl0()?;
        let mut signals = self.mailbox().lock();
        signals.interrupts.clear();
        signals.start = None;
        drop(signals);
        let debug = self.debug;
        *self = Self { debug, ..Self::new(self.vp, self.partition.clone(), self.options) };
        Ok(())
    }
}

/// IA32_APIC_BASE: where local APICs are, and that they are switched on.
const APIC_BASE: u64 = 0xfee0_0800;
const APIC_ID: usize = 0x20;
/// A bitmap of vectors: 32 to a register, each in the first 4 of 16 bytes.
const APIC_REQUESTED: usize = 0x200;

/// Where in the local APIC's registers it is said that an interrupt is requested: the byte, and the bit in it.
fn request_bit(vector: u8) -> (usize, u8) {
    let vector = usize::from(vector);
    (APIC_REQUESTED + vector / 32 * 16 + vector % 32 / 8, 1 << (vector % 8))
}

/// The state of a stopped scripted VP.
pub struct ScriptedState<'a>(&'a mut ScriptedProcessor);

impl AccessVpState for ScriptedState<'_> {
    type Error = ScriptedError;

    fn supports(&self, kind: VpStateKind) -> bool {
        use VpStateKind::{LocalApic, MpState, Registers, SystemRegisters};
        matches!(kind, SystemRegisters | Registers | LocalApic | MpState)
    }

    fn registers(&mut self) -> Result<Registers, ScriptedError> {
        Ok(self.0.registers)
    }

    fn set_registers(&mut self, value: &Registers) -> Result<(), ScriptedError> {
        let vp = self.0.vp;
        if self.0.options.fail_set_registers == Some(vp) {
            return Err(ScriptedError::SetRegisters { vp });
        }
        self.0.registers = *value;
        Ok(())
    }

    fn system_registers(&mut self) -> Result<SystemRegisters, ScriptedError> {
        Ok(self.0.system)
    }

    fn set_system_registers(&mut self, value: &SystemRegisters) -> Result<(), ScriptedError> {
        self.0.system = *value;
        Ok(())
    }

    /// Of the registers there are its ID and the interrupts that are requested.
    fn local_apic(&mut self) -> Result<LocalApic, ScriptedError> {
        let mut registers = Box::new([0; LOCAL_APIC_BYTES]);
        registers[APIC_ID..][..4].copy_from_slice(&(self.0.vp.0 << 24).to_le_bytes());
        for &vector in &self.0.mailbox().lock().interrupts {
            let (byte, bit) = request_bit(vector);
            registers[byte] |= bit;
        }
        Ok(LocalApic { base: APIC_BASE, registers })
    }

    fn set_local_apic(&mut self, value: &LocalApic) -> Result<(), ScriptedError> {
        let requested = (0..=u8::MAX).filter(|vector| {
            let (byte, bit) = request_bit(*vector);
            value.registers[byte] & bit != 0
        });
        self.0.mailbox().lock().interrupts = requested.collect();
        Ok(())
    }

    /// A start that the VP was told and has not looked at is taken by it first.
    fn mp_state(&mut self) -> Result<MpState, ScriptedError> {
        let waits = self.0.mp_state == MpState::WaitForSipi;
        let start = if waits { self.0.mailbox().lock().start.take() } else { None };
        if let Some(target) = start {
            self.0.registers.rip = target;
            self.0.mp_state = MpState::Runnable;
        }
        Ok(self.0.mp_state)
    }

    fn set_mp_state(&mut self, value: &MpState) -> Result<(), ScriptedError> {
        self.0.mp_state = *value;
        Ok(())
    }
}
