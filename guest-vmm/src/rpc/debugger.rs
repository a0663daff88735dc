//! Debugger: stops VPs and looks into them.

use crate::guest::Guest;
use guest_schema::guest_capnp::{debug_sink, debugger};
use guest_schema::{
    AddressSpace, Breakpoint, BreakpointAccess, DebugHalt as ToldHalt, DebuggedVps, Failure, GuestError,
    HaltReason, SegmentRegister, TableRegister, VpRegisters, chain,
};
use machine::debug::{DebugError, DebugHalt, DebugHaltReason, Debugger};
use processor::{
    AccessKind, DebugCapabilities, HardwareBreakpoint, Registers, Segment, SystemRegisters, Table, VpError,
    VpIndex,
};
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, spawn_local};

/// How long another debugger, which may be about to let go, is waited for.
const LETTING_GO: Duration = Duration::from_millis(500);

/// Begins to debug the guest.
pub(super) async fn attach(guest: &Rc<Guest>, sink: debug_sink::Client) -> Result<debugger::Client, Failure> {
    let machine = guest.view().ok_or_else(|| failure(&DebugError::Ended))?;
    let (debugger, halts) = machine.debug(LETTING_GO).await.map_err(|error| failure(&error))?;
    let telling = spawn_local(tell(guest.clone(), halts, sink)).abort_handle();
    Ok(capnp_rpc::new_client(Debugging { debugger, telling }))
}

/// Tells of every stop, and of the guest's end. A slow sink holds up this task and nothing else.
async fn tell(guest: Rc<Guest>, mut halts: mpsc::Receiver<DebugHalt>, sink: debug_sink::Client) {
    loop {
        let halt = tokio::select! {
            biased;
            Some(halt) = halts.recv() => told(&halt),
            exit = guest.exit() => ToldHalt::Terminated(exit),
        };
        let is_last = matches!(halt, ToldHalt::Terminated(_));
        let mut request = sink.halted_request();
        halt.write(request.get().init_halt());
        if let Err(error) = request.send().await {
            return tracing::debug!(%error, "a debugger does not listen any more");
        }
        if is_last {
            return;
        }
    }
}

fn told(halt: &DebugHalt) -> ToldHalt {
    let reason = match halt.reason {
        DebugHaltReason::Step => HaltReason::Step,
        DebugHaltReason::Breakpoint(HardwareBreakpoint { address, length, access }) => {
            let access = match access {
                AccessKind::Execute => BreakpointAccess::Execute,
                AccessKind::Write => BreakpointAccess::Write,
                AccessKind::ReadOrWrite => BreakpointAccess::ReadOrWrite,
            };
            HaltReason::Breakpoint(Breakpoint { address, length, access })
        }
    };
    ToldHalt::Vp { index: halt.vp.0, resumption: halt.resumption, reason }
}

fn hardware(&Breakpoint { address, length, access }: &Breakpoint) -> HardwareBreakpoint {
    let access = match access {
        BreakpointAccess::Execute => AccessKind::Execute,
        BreakpointAccess::Write => AccessKind::Write,
        BreakpointAccess::ReadOrWrite => AccessKind::ReadOrWrite,
    };
    HardwareBreakpoint { address, length, access }
}

/// The protocol's failure for it.
fn failure(error: &DebugError) -> Failure {
    let code = match error {
        DebugError::Taken
        | DebugError::TooLong { .. }
        | DebugError::TooManyBreakpoints { .. }
        | DebugError::Unheard => GuestError::LimitExceeded,
        DebugError::Ended => GuestError::NotRunning,
        DebugError::Running { .. } | DebugError::Vp(VpError::Running { .. }) => GuestError::AlreadyRunning,
        DebugError::NotSupported(_) => GuestError::NotSupported,
        DebugError::NoVp { .. }
        | DebugError::Twice { .. }
        | DebugError::NoSuchBreakpoint(_)
        | DebugError::Memory(_)
        | DebugError::Vp(_) => GuestError::BadConfig,
    };
    Failure::new(code, chain(error))
}

/// A guest, debugged.
struct Debugging {
    debugger: Debugger,
    telling: AbortHandle,
}

impl Drop for Debugging {
    fn drop(&mut self) {
        self.telling.abort();
    }
}

fn vp_indices(list: capnp::primitive_list::Reader<'_, u32>) -> Vec<VpIndex> {
    list.iter().map(VpIndex).collect()
}

fn vp_of(space: AddressSpace) -> Option<VpIndex> {
    match space {
        AddressSpace::Linear(vp) => Some(VpIndex(vp)),
        AddressSpace::Physical => None,
    }
}

fn result(answer: Result<(), DebugError>) -> Result<(), Failure> {
    answer.map_err(|error| failure(&error))
}

impl debugger::Server for Debugging {
    async fn vps(
        self: Rc<Self>,
        _: debugger::VpsParams,
        mut results: debugger::VpsResults,
    ) -> capnp::Result<()> {
        match self.debugger.vps().await {
            Ok(vps) => {
                let held: Vec<bool> = vps.iter().map(|vp| vp.held).collect();
                DebuggedVps::write_held(&held, |count| results.get().init_vps(count));
                let DebugCapabilities { single_step, breakpoints, watchpoints } =
                    self.debugger.capabilities();
                results.get().set_breakpoints(u32::try_from(breakpoints).unwrap_or(u32::MAX));
                results.get().set_single_step(single_step);
                results.get().set_watchpoints(watchpoints);
            }
            Err(error) => failure(&error).write(results.get().init_error()),
        }
        Ok(())
    }

    async fn stop(
        self: Rc<Self>,
        _: debugger::StopParams,
        mut results: debugger::StopResults,
    ) -> capnp::Result<()> {
        Failure::write_result(&result(self.debugger.stop().await), results.get().init_result());
        Ok(())
    }

    async fn resume(
        self: Rc<Self>,
        params: debugger::ResumeParams,
        mut results: debugger::ResumeResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let (run, step) = (vp_indices(params.get_run()?), vp_indices(params.get_step()?));
        match self.debugger.resume(run, step).await {
            Ok(resumption) => results.get().set_resumption(resumption),
            Err(error) => failure(&error).write(results.get().init_error()),
        }
        Ok(())
    }

    async fn set_breakpoints(
        self: Rc<Self>,
        params: debugger::SetBreakpointsParams,
        mut results: debugger::SetBreakpointsResults,
    ) -> capnp::Result<()> {
        let breakpoints = Breakpoint::read_all(params.get()?.get_breakpoints()?)?;
        let set = self.debugger.set_breakpoints(breakpoints.iter().map(hardware).collect()).await;
        Failure::write_result(&result(set), results.get().init_result());
        Ok(())
    }

    async fn get_registers(
        self: Rc<Self>,
        params: debugger::GetRegistersParams,
        mut results: debugger::GetRegistersResults,
    ) -> capnp::Result<()> {
        match self.debugger.registers(VpIndex(params.get()?.get_vp())).await {
            Ok((general, system)) => shown(&general, &system).write(results.get().init_registers()),
            Err(error) => failure(&error).write(results.get().init_error()),
        }
        Ok(())
    }

    async fn set_registers(
        self: Rc<Self>,
        params: debugger::SetRegistersParams,
        mut results: debugger::SetRegistersResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let registers = VpRegisters::read(params.get_registers()?)?;
        let set =
            self.debugger.set_registers(VpIndex(params.get_vp()), general(&registers), system(&registers));
        Failure::write_result(&result(set.await), results.get().init_result());
        Ok(())
    }

    async fn read_memory(
        self: Rc<Self>,
        params: debugger::ReadMemoryParams,
        mut results: debugger::ReadMemoryResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let vp = vp_of(AddressSpace::read(params.get_space()?)?);
        let error = match self.debugger.read(vp, params.get_address(), params.get_bytes().into()).await {
            Ok((bytes, ended)) => {
                results.get().set_data(&bytes);
                ended.map(DebugError::Memory)
            }
            Err(error) => Some(error),
        };
        if let Some(error) = error {
            failure(&error).write(results.get().init_error());
        }
        Ok(())
    }

    async fn write_memory(
        self: Rc<Self>,
        params: debugger::WriteMemoryParams,
        mut results: debugger::WriteMemoryResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let vp = vp_of(AddressSpace::read(params.get_space()?)?);
        let written = self.debugger.write(vp, params.get_address(), params.get_data()?.to_vec()).await;
        Failure::write_result(&result(written), results.get().init_result());
        Ok(())
    }
}

fn general(registers: &VpRegisters) -> Registers {
    let &VpRegisters { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, rip, rflags, .. } = registers;
    let &VpRegisters { r8, r9, r10, r11, r12, r13, r14, r15, .. } = registers;
    Registers { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn system(registers: &VpRegisters) -> SystemRegisters {
    let segment =
        |SegmentRegister { base, limit, selector, attributes }| Segment { base, limit, selector, attributes };
    let table = |TableRegister { base, limit }| Table { base, limit };
    let &VpRegisters { cs, ds, es, fs, gs, ss, tr, ldtr, .. } = registers;
    let &VpRegisters { gdtr, idtr, cr0, cr2, cr3, cr4, efer, .. } = registers;
    let [cs, ds, es, fs, gs, ss, tr, ldtr] = [cs, ds, es, fs, gs, ss, tr, ldtr].map(segment);
    let [gdtr, idtr] = [gdtr, idtr].map(table);
    SystemRegisters { cs, ds, es, fs, gs, ss, tr, ldtr, gdtr, idtr, cr0, cr2, cr3, cr4, efer }
}

fn shown(general: &Registers, system: &SystemRegisters) -> VpRegisters {
    let segment =
        |Segment { base, limit, selector, attributes }| SegmentRegister { base, limit, selector, attributes };
    let table = |Table { base, limit }| TableRegister { base, limit };
    let &Registers { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, rip, rflags, .. } = general;
    let &Registers { r8, r9, r10, r11, r12, r13, r14, r15, .. } = general;
    let &SystemRegisters { cs, ds, es, fs, gs, ss, tr, ldtr, gdtr, idtr, cr0, cr2, cr3, cr4, efer } = system;
    let [cs, ds, es, fs, gs, ss, tr, ldtr] = [cs, ds, es, fs, gs, ss, tr, ldtr].map(segment);
    let [gdtr, idtr] = [gdtr, idtr].map(table);
    VpRegisters {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
        cr0,
        cr2,
        cr3,
        cr4,
        efer,
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldtr,
        gdtr,
        idtr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_keep_their_places() {
        let segment = SegmentRegister { base: 1, limit: 2, selector: 3, attributes: 4 };
        let registers = VpRegisters {
            rax: 10,
            r15: 11,
            rflags: 12,
            cr2: 13,
            efer: 14,
            gs: segment,
            ldtr: SegmentRegister { base: 5, ..segment },
            gdtr: TableRegister { base: 6, limit: 7 },
            ..VpRegisters::default()
        };
        assert_eq!(shown(&general(&registers), &system(&registers)), registers);
        assert_eq!(general(&registers).r15, 11);
        assert_eq!(system(&registers).gs, Segment { base: 1, limit: 2, selector: 3, attributes: 4 });
    }
}
