//! A guest's debugger.

use crate::ClientError;
use crate::call::{Call, SharedCall, failure_beside};
use crate::guest::Control;
use futures::FutureExt;
use guest_schema::guest_capnp::{debug_sink, debugger, guest_control};
use guest_schema::{AddressSpace, Breakpoint, DebugHalt, DebuggedVps, Failure, VpRegisters};
use std::rc::Rc;
use tokio::sync::mpsc;

/// Stops a guest's VPs and looks into them. Dropping it, and all its clones and calls, ends debugging: breakpoints are removed, and
/// VPs that it holds go on.
#[derive(Clone)]
pub struct Debugger {
    client: debugger::Client,
    opened: SharedCall<()>,
    // Never used, but a capability that came over a connection of its own lives no longer than that.
    _control: Control,
}

/// What was read of a guest's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryRead {
    /// The bytes, up to the first address that cannot be read.
    pub bytes: Vec<u8>,
    /// Why that cannot be read, if there is one.
    pub ended: Option<Failure>,
}

impl Debugger {
    pub(crate) fn attach(
        control: &guest_control::Client,
        kept: Control,
        halts: mpsc::Sender<DebugHalt>,
    ) -> Self {
        let mut request = control.debugger_request();
        request.get().set_sink(capnp_rpc::new_client(Sink(halts)));
        let sent = request.send();
        let opened = Call::answer(sent.promise, kept.clone(), |results| {
            failure_beside(results.has_error(), results.get_error())
        });
        Self { client: sent.pipeline.get_debugger(), opened: opened.shared(), _control: kept }
    }

    /// Whether the guest may be debugged: `limitExceeded` if it is already, `notRunning` once it has ended.
    pub async fn opened(&self) -> Result<(), ClientError> {
        self.opened.clone().await
    }

    /// Which VPs are held, and what the hypervisor can do.
    pub fn vps(&self) -> Call<DebuggedVps> {
        Call::send(self.client.vps_request(), self.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let vps = DebuggedVps {
                held: results.get_vps()?.iter().map(|vp| vp.get_held()).collect(),
                breakpoints: results.get_breakpoints(),
                single_step: results.get_single_step(),
                watchpoints: results.get_watchpoints(),
            };
            Ok(refused.map(|()| vps))
        })
    }

    /// Holds all VPs.
    pub fn stop(&self) -> Call<()> {
        Call::send(self.client.stop_request(), self.clone(), |results| {
            Failure::read_result(results.get_result()?)
        })
    }

    /// Lets held VPs go on, for good or for one instruction; others stay held. Answers how often that was done: halts say after which
    /// resumption they came. `alreadyRunning` for a VP that is not held.
    pub fn resume(&self, run: &[u32], step: &[u32]) -> Call<u64> {
        let mut request = self.client.resume_request();
        let mut params = request.get();
        fill(params.reborrow().init_run(length(run)), run);
        fill(params.init_step(length(step)), step);
        Call::send(request, self.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            Ok(refused.map(|()| results.get_resumption()))
        })
    }

    /// Replaces the breakpoints, which are those of all VPs.
    pub fn set_breakpoints(&self, breakpoints: &[Breakpoint]) -> Call<()> {
        let mut request = self.client.set_breakpoints_request();
        Breakpoint::write_all(breakpoints, |count| request.get().init_breakpoints(count));
        Call::send(request, self.clone(), |results| Failure::read_result(results.get_result()?))
    }

    /// The registers of a VP, held or not.
    pub fn registers(&self, vp: u32) -> Call<VpRegisters> {
        let mut request = self.client.get_registers_request();
        request.get().set_vp(vp);
        Call::send(request, self.clone(), |results| {
            let refused = failure_beside(results.has_error(), results.get_error())?;
            let registers = VpRegisters::read(results.get_registers()?)?;
            Ok(refused.map(|()| registers))
        })
    }

    /// Sets the registers of a held VP.
    pub fn set_registers(&self, vp: u32, registers: &VpRegisters) -> Call<()> {
        let mut request = self.client.set_registers_request();
        request.get().set_vp(vp);
        registers.write(request.get().init_registers());
        Call::send(request, self.clone(), |results| Failure::read_result(results.get_result()?))
    }

    /// Reads at most 64 KiB of memory. Fails only if there is nothing to say of it: what cannot be read ends it.
    pub fn read_memory(&self, space: AddressSpace, address: u64, bytes: u32) -> Call<MemoryRead> {
        let mut request = self.client.read_memory_request();
        let mut params = request.get();
        space.write(params.reborrow().init_space());
        params.set_address(address);
        params.set_bytes(bytes);
        Call::send(request, self.clone(), |results| {
            let ended = failure_beside(results.has_error(), results.get_error())?.err();
            Ok(Ok(MemoryRead { bytes: results.get_data()?.to_vec(), ended }))
        })
    }

    /// Writes memory, at most 64 KiB: all or nothing.
    pub fn write_memory(&self, space: AddressSpace, address: u64, bytes: &[u8]) -> Call<()> {
        let mut request = self.client.write_memory_request();
        let mut params = request.get();
        space.write(params.reborrow().init_space());
        params.set_address(address);
        params.set_data(bytes);
        Call::send(request, self.clone(), |results| Failure::read_result(results.get_result()?))
    }
}

fn length(list: &[u32]) -> u32 {
    u32::try_from(list.len()).unwrap_or(u32::MAX)
}

fn fill(mut list: capnp::primitive_list::Builder<'_, u32>, values: &[u32]) {
    for (index, value) in (0u32..).zip(values) {
        list.set(index, *value);
    }
}

struct Sink(mpsc::Sender<DebugHalt>);

impl debug_sink::Server for Sink {
    async fn halted(self: Rc<Self>, params: debug_sink::HaltedParams) -> capnp::Result<()> {
        let halt = DebugHalt::read(params.get()?.get_halt()?)?;
        let gone = |_| capnp::Error::failed("nobody takes these halts any more".into());
        self.0.send(halt).await.map_err(gone)
    }
}
