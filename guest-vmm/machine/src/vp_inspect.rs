//! What the VPs show of themselves: what each is doing and, as the guest's own, its registers.
//!
//! A VP's state belongs to its thread. So each part that needs it is a question of its own to that thread: a VP that is stuck
//! leaves its own questions unanswered and nobody else's. A VP that runs leaves the guest for a moment to answer.

use crate::vp_set::{VpActivity, VpSet};
use futures::FutureExt;
use inspect::{Inspect, Request, Response};
use processor::{ErasedVpState, Registers, Segment, StateError, SystemRegisters, Table, VpThread};

/// One child per VP, called by its number. Once the machine is being destroyed there is nobody to ask.
impl Inspect for VpSet {
    fn inspect(&self, request: Request<'_>) {
        // Locked for writing only to end the threads. The request is dropped then: unanswered.
        let Ok(threads) = self.threads.try_read() else { return };
        let mut response = request.respond();
        for thread in threads.iter() {
            response.child(&thread.vp().to_string(), |request| inspect_vp(self, thread, request));
        }
    }
}

fn inspect_vp(vps: &VpSet, thread: &VpThread, request: Request<'_>) {
    let mut response = request.respond();
    response.child("activity", |request| match vps.known_activity(thread.vp()) {
        Some(known) => request.value(known.to_string()),
        None => ask(thread, request, |state, request| {
            request.value(VpActivity::from(state.mp_state()).to_string());
        }),
    });
    response.sensitive(|response| {
        response.child("registers", |request| ask(thread, request, inspect_registers));
    });
}

/// Lets the VP's own thread answer.
fn ask(
    thread: &VpThread,
    request: Request<'_>,
    answer: impl FnOnce(&mut dyn ErasedVpState, Request<'_>) + Send + 'static,
) {
    let deferred = request.defer();
    let asked = thread.access(move |state| deferred.answer(|request| answer(state, request)));
    // The first poll sends the question, which stays in force. The answer goes to the tree: nobody waits for it here. If the
    // thread is gone, the question is dropped with it.
    let _ = asked.now_or_never();
}

fn inspect_registers(state: &mut dyn ErasedVpState, request: Request<'_>) {
    match read_registers(state) {
        Ok((general, system)) => {
            let mut response = request.respond();
            show_general(&general, &mut response);
            show_system(&system, &mut response);
        }
        Err(error) => request.value(format!("cannot be read: {error}")),
    }
}

fn read_registers(state: &mut dyn ErasedVpState) -> Result<(Registers, SystemRegisters), StateError> {
    Ok((state.registers()?, state.system_registers()?))
}

fn show_general(registers: &Registers, response: &mut Response<'_>) {
    let &Registers {
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
    } = registers;
    response.hex("rip", rip).hex("rflags", rflags).hex("rsp", rsp).hex("rbp", rbp);
    response.hex("rax", rax).hex("rbx", rbx).hex("rcx", rcx).hex("rdx", rdx).hex("rsi", rsi).hex("rdi", rdi);
    response.hex("r8", r8).hex("r9", r9).hex("r10", r10).hex("r11", r11);
    response.hex("r12", r12).hex("r13", r13).hex("r14", r14).hex("r15", r15);
}

fn show_system(registers: &SystemRegisters, response: &mut Response<'_>) {
    let SystemRegisters { cs, ds, es, fs, gs, ss, tr, ldtr, gdtr, idtr, cr0, cr2, cr3, cr4, efer } =
        registers;
    response.hex("cr0", *cr0).hex("cr2", *cr2).hex("cr3", *cr3).hex("cr4", *cr4).hex("efer", *efer);
    let segments =
        [("cs", cs), ("ds", ds), ("es", es), ("fs", fs), ("gs", gs), ("ss", ss), ("tr", tr), ("ldtr", ldtr)];
    for (name, segment) in segments {
        response.child(name, |request| inspect_segment(segment, request));
    }
    for (name, table) in [("gdtr", gdtr), ("idtr", idtr)] {
        response.child(name, |request| inspect_table(table, request));
    }
}

fn inspect_segment(segment: &Segment, request: Request<'_>) {
    let &Segment { base, limit, selector, attributes } = segment;
    request
        .respond()
        .hex("base", base)
        .hex("limit", limit)
        .hex("selector", selector)
        .hex("attributes", attributes);
}

fn inspect_table(table: &Table, request: Request<'_>) {
    request.respond().hex("base", table.base).hex("limit", table.limit);
}
