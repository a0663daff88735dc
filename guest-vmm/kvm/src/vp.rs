//! A VP: made and bound on its thread, run, and put back to how it was made.

use crate::convert::from_regs;
use crate::cpuid;
use crate::debug;
use crate::error::{KvmError, Named, io_error};
use crate::exit::{Data, Exit};
use crate::fault;
use crate::hypervisor::HostTsc;
use crate::kick::Kick;
use crate::msrs;
use crate::partition::KvmPartition;
use crate::run_page::{RunMapping, RunPage};
use crate::run_thread::RunThread;
use crate::state::KvmState;
use crate::time::Pace;
use crate::tsc;
use inspect::{InspectMut, Request};
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use processor::{
    BindProcessor, CpuIo, DebugState, NotSupported, PartitionError, PowerRequest, Processor, StopVp, Tsc,
    VpFault, VpHaltReason, VpIndex, VpState, VpStateKind, Vtl, run_guest,
};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Makes and binds a VP. It is made on its thread, since KVM keeps what belongs to it there, and so that many are made at
/// once. It takes about 0.2 ms, of which 0.05 ms go into the state that a reset comes back to.
pub struct KvmBinder {
    vp: VpIndex,
    partition: Arc<KvmPartition>,
}

impl KvmBinder {
    pub(crate) fn new(vp: VpIndex, partition: Arc<KvmPartition>) -> Self {
        Self { vp, partition }
    }
}

impl BindProcessor for KvmBinder {
    type Processor = KvmProcessor;

    fn bind(self) -> Result<KvmProcessor, PartitionError> {
        let Self { vp, partition } = self;
        let host = &partition.host;
        let vcpu = partition.vm.create_vcpu(vp.0.into()).for_partition("KVM_CREATE_VCPU")?;
        let count = u32::try_from(partition.vps.len()).expect("as many as were asked for in 32 bits");
        let leaves = cpuid::for_vp(&partition.cpuid, vp, count);
        vcpu.set_cpuid2(&leaves).for_partition("KVM_SET_CPUID2")?;
        msrs::write(&vcpu, &initial_msrs())?;
        if vp.0 == 0 {
            connect_local_interrupts(&vcpu)?;
        }
        let failed = |call| move |source| PartitionError::Call { call, source };
        let mapping = RunMapping::new(&vcpu, host.run_size).map_err(failed("mapping kvm_run"))?;
        let mapping = Arc::new(mapping);
        let page = RunPage::new(mapping.clone());
        let thread = RunThread::current(mapping).map_err(failed("setting up the kick signal"))?;
        let mut processor = KvmProcessor {
            vcpu,
            page,
            kick: Kick::new(thread),
            vp,
            cpuid: leaves,
            initial: VpState::default(),
            is_pristine: true,
            pending: Pending::Nothing,
            debug: None,
            pace: partition.time.pace(),
            partition,
        };
        processor.initial = processor.first_state()?;
        let slot = &processor.partition.vps[vp.0 as usize];
        slot.bind(processor.kick.clone());
        Ok(processor)
    }
}

/// What firmware would have set: fast string operations (Linux gives up on them otherwise) and memory that is write-back
/// where nothing says otherwise.
fn initial_msrs() -> [kvm_msr_entry; 2] {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRRS_ENABLED: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [msr(IA32_MISC_ENABLE, FAST_STRINGS), msr(IA32_MTRR_DEF_TYPE, MTRRS_ENABLED | WRITE_BACK)]
}

/// LINT0 takes interrupts of a PIC, LINT1 is NMI, as firmware leaves them (Intel SDM volume 3, section 11.5.1).
fn connect_local_interrupts(vcpu: &VcpuFd) -> Result<(), KvmError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXTINT: u8 = 7;
    const NMI: u8 = 4;
    let mut lapic = vcpu.get_lapic().named("KVM_GET_LAPIC")?;
    for (register, mode) in [(LVT_LINT0, EXTINT), (LVT_LINT1, NMI)] {
        // The delivery mode is in bits 8 to 10, the mask is bit 16.
        let bytes = [0, mode, 0, 0].map(u8::cast_signed);
        lapic.regs[register..register + 4].copy_from_slice(&bytes);
    }
    vcpu.set_lapic(&lapic).named("KVM_SET_LAPIC")
}

/// What the last exit has left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Nothing,
    /// KVM has yet to take the result of an exit that was handled.
    Completion,
    /// An exit that came when one before it was completed is to be handled.
    Exit,
}

/// A VP, bound to its thread.
pub struct KvmProcessor {
    // In this order: the VP is closed before the partition may be.
    pub(crate) vcpu: VcpuFd,
    page: RunPage,
    kick: Arc<Kick>,
    vp: VpIndex,
    /// What CPUID answers it.
    pub(crate) cpuid: CpuId,
    /// What a reset comes back to.
    initial: VpState,
    /// Whether it is in that state still, as far as it is its own doing: nobody has asked for access to its state.
    is_pristine: bool,
    pending: Pending,
    debug: Option<DebugState>,
    /// How far its time-stamp counter has followed the partition's time.
    pub(crate) pace: Pace,
    pub(crate) partition: Arc<KvmPartition>,
}

/// Goes on, or halts.
type Step = ControlFlow<VpHaltReason>;

impl KvmProcessor {
    /// The state of a VP that has just been made. What its time-stamp counter shows is known: it begins at zero.
    fn first_state(&mut self) -> Result<VpState, KvmError> {
        let HostTsc { khz: frequency_khz, is_virtual } = self.partition.host.learn_tsc(&self.vcpu)?;
        let state = VpState::save_some(&mut KvmState::new(self), |kind| kind != VpStateKind::Tsc)?;
        Ok(VpState { tsc: is_virtual.then_some(Tsc { frequency_khz, ..Tsc::default() }), ..state })
    }

    /// Runs the guest until the VP is kicked out of it or halts.
    fn enter(&mut self, io: &impl CpuIo) -> Step {
        if self.pending == Pending::Exit {
            self.handle(io)?;
        }
        if let Err(error) = self.take_nmi() {
            return Step::Break(self.failed(error.chain()));
        }
        loop {
            let run = self.kick.in_run(|| self.vcpu.run().map(drop));
            match run.map_err(|error| error.errno()) {
                Ok(()) => self.handle(io)?,
                Err(libc::EINTR) => break,
                // KVM's answer when an INIT or a SIPI has come to a VP that waited for it.
                Err(libc::EAGAIN) => {}
                // The one exit that comes with an error.
                Err(libc::EFAULT | libc::EHWPOISON) if self.page.exit() == MEMORY_FAULT => {
                    return Step::Break(self.halt(MEMORY_FAULT));
                }
                Err(errno) => {
                    let error = io_error(kvm_ioctls::Error::new(errno));
                    return Step::Break(self.failed(format!("KVM_RUN failed: {error}")));
                }
            }
        }
        // Whatever was begun before is complete: KVM does that first.
        self.pending = Pending::Nothing;
        self.kick.answer();
        Step::Continue(())
    }

    /// Has KVM deliver a non-maskable interrupt that was sent to the VP.
    fn take_nmi(&self) -> Result<(), KvmError> {
        match self.partition.vps[self.vp.0 as usize].take_nmi() {
            true => self.vcpu.nmi().named("KVM_NMI"),
            false => Ok(()),
        }
    }

    /// Handles the exit with which KVM_RUN came back.
    fn handle(&mut self, io: &impl CpuIo) -> Step {
        self.pending = Pending::Completion;
        match self.page.exit() {
            Exit::IoIn { port, size, data } => {
                let vp = self.vp;
                self.elements(data, size).for_each(|element| io.read_io(vp, port, element));
            }
            Exit::IoOut { port, size, data } => {
                let vp = self.vp;
                let written = self.elements(data, size).try_for_each(|e| io.write_io(vp, port, e));
                return written.map_break(power);
            }
            Exit::MmioRead { address, data } => io.read_mmio(self.vp, address, self.page.data(data)),
            Exit::MmioWrite { address, data } => {
                return io.write_mmio(self.vp, address, self.page.data(data)).map_break(power);
            }
            Exit::IoapicEoi { vector } => io.handle_eoi(vector),
            Exit::SystemEvent { kind: KVM_SYSTEM_EVENT_SHUTDOWN } => {
                return Step::Break(VpHaltReason::PowerOff);
            }
            Exit::SystemEvent { kind: KVM_SYSTEM_EVENT_RESET } => return Step::Break(VpHaltReason::Reset),
            Exit::Debug { dr6 } if self.debug.is_some() => {
                self.pending = Pending::Nothing;
                return self.debug_exit(dr6);
            }
            exit => {
                self.pending = Pending::Nothing;
                return Step::Break(self.halt(exit));
            }
        }
        Step::Continue(())
    }

    /// What the debugger has asked for halts the VP; what the guest has asked for is the guest's.
    fn debug_exit(&self, dr6: u64) -> Step {
        if let Some(reason) = debug::reason(self.debug.as_ref(), dr6) {
            return Step::Break(reason);
        }
        let blocks_interrupts = self.partition.host.debug_blocks_interrupts;
        match debug::reinject(&self.vcpu, self.debug.as_ref(), blocks_interrupts, dr6) {
            Ok(()) => Step::Continue(()),
            Err(error) => {
                let reason = format!("a debug exception of the guest's is lost: {}", error.chain());
                Step::Break(self.failed(reason))
            }
        }
    }

    /// Why the VP halts, by the exit that makes it.
    fn halt(&self, exit: Exit) -> VpHaltReason {
        match exit {
            Exit::Shutdown => {
                let reset = self.partition.host.resets_on_triple_fault();
                let note = reset.then(|| fault::AFTER_INIT.to_owned());
                VpHaltReason::TripleFault(self.fault(fault::reason(exit), note))
            }
            _ => self.failed(fault::reason(exit)),
        }
    }

    /// The elements of a port's data: string instructions have several.
    fn elements(&mut self, data: Data, size: u8) -> impl Iterator<Item = &mut [u8]> {
        self.page.data(data).chunks_exact_mut(usize::from(size.max(1)))
    }

    fn failed(&self, reason: String) -> VpHaltReason {
        VpHaltReason::Fault(self.fault(reason, None))
    }

    fn fault(&self, reason: String, note: Option<String>) -> Box<VpFault> {
        let registers = self.vcpu.get_regs().ok().map(|regs| Box::new(from_regs(&regs)));
        Box::new(VpFault { vp: self.vp, reason, registers, note })
    }

    /// Has the time-stamp counter follow the partition's time, if that was stopped since the VP ran.
    fn follow_time(&mut self) -> Result<(), VpHaltReason> {
        let pace = self.partition.time.pace();
        if pace == self.pace {
            return Ok(());
        }
        tsc::follow(self, pace)
            .map_err(|error| self.failed(format!("the time-stamp counter cannot be set: {}", error.chain())))
    }

    /// Puts the VP into a state, whatever it had begun in the one that it has.
    fn put_back(&mut self, state: &VpState) -> Result<(), KvmError> {
        // Or what is pending would be completed in the new state: every access of the instruction, whatever devices would say.
        self.flush_async_requests()?;
        while self.pending == Pending::Exit {
            self.pending = Pending::Completion;
            self.flush_async_requests()?;
        }
        // An INIT that is pending is taken now, or it would come after the new state.
        self.vcpu.get_mp_state().named("KVM_GET_MP_STATE")?;
        Ok(state.restore(&mut KvmState::new(self))?)
    }
}

const MEMORY_FAULT: Exit = Exit::Other { reason: KVM_EXIT_MEMORY_FAULT };

fn power(request: PowerRequest) -> VpHaltReason {
    match request {
        PowerRequest::PowerOff => VpHaltReason::PowerOff,
        PowerRequest::Hibernate => VpHaltReason::Hibernate,
        PowerRequest::Reset => VpHaltReason::Reset,
        PowerRequest::DebugExit(value) => VpHaltReason::DebugExit(value),
    }
}

/// What KVM keeps for it beside its state.
impl InspectMut for KvmProcessor {
    fn inspect_mut(&mut self, request: Request<'_>) {
        let debug = self.debug.unwrap_or_default();
        let breakpoints: Vec<_> = debug.breakpoints.iter().flatten().map(ToString::to_string).collect();
        let mut response = request.respond();
        response.field_with("pending", || format!("{:?}", self.pending));
        response.field("debugged", &self.debug.is_some()).field("single_step", &debug.single_step);
        response.field("breakpoints", breakpoints.join("; ").as_str());
    }
}

impl Processor for KvmProcessor {
    type Error = KvmError;
    type StateAccess<'a> = KvmState<'a>;

    fn set_debug_state(&mut self, vtl: Vtl, state: Option<&DebugState>) -> Result<(), KvmError> {
        vtl.only_vtl0()?;
        debug::set(&self.vcpu, state, self.partition.host.debug_blocks_interrupts)?;
        self.debug = state.copied();
        Ok(())
    }

    async fn run_vp(&mut self, stop: &mut StopVp, io: &impl CpuIo) -> Result<Infallible, VpHaltReason> {
        self.partition.touch();
        self.follow_time()?;
        run_guest(stop, || self.enter(io)).await
    }

    fn flush_async_requests(&mut self) -> Result<(), KvmError> {
        self.take_nmi()?;
        if self.pending != Pending::Completion {
            return Ok(());
        }
        let run = self.kick.without_entering(|| self.vcpu.run().map(drop));
        match run {
            // An instruction of several accesses: the next one is there, and waits until the VP runs again.
            Ok(()) => self.pending = Pending::Exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                self.pending = Pending::Nothing;
            }
            Err(error) => return Err(error).named("KVM_RUN"),
        }
        Ok(())
    }

    fn access_state(&mut self, vtl: Vtl) -> Result<KvmState<'_>, NotSupported> {
        vtl.only_vtl0()?;
        // It may be written.
        self.is_pristine = false;
        Ok(KvmState::new(self))
    }

    fn reset(&mut self) -> Result<(), KvmError> {
        if self.is_pristine && !self.partition.is_touched() {
            return Ok(());
        }
        let initial = self.initial.clone();
        self.put_back(&initial)
    }

    fn scrub(&mut self, vtl: Vtl) -> Result<(), KvmError> {
        vtl.only_vtl0()?;
        let initial = VpState { tsc: None, cpuid: None, ..self.initial.clone() };
        self.put_back(&initial)
    }
}

impl Drop for KvmProcessor {
    fn drop(&mut self) {
        self.partition.vps[self.vp.0 as usize].unbind();
    }
}
