//! What the VPs show of themselves: what each is doing, on which of the host's CPUs it may and, as the guest's own, what its
//! hypervisor keeps for it and its state.
//!
//! A VP's state belongs to its thread. So each part that needs it is a question of its own to that thread: a VP that is stuck
//! leaves its own questions unanswered and nobody else's. A VP that runs leaves the guest for a moment to answer.

use crate::vp_set::{VpActivity, VpSet};
use futures::FutureExt;
use inspect::{Inspect, Request};
use processor::{ErasedVpState, VpThread};

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

impl VpSet {
    /// Whether there is a debugger, and which VPs it holds. Nothing once the VPs are gone.
    pub(crate) fn inspect_debugger(&self, request: Request<'_>) {
        match self.threads.try_read() {
            Ok(threads) if threads.is_empty() => drop(request.respond()),
            _ => self.debug.inspect(request),
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
    // Unanswered once the thread has ended.
    response.child("affinity", |request| {
        if let Ok(cpus) = thread.affinity() {
            request.value(cpus.to_string());
        }
    });
    response.sensitive(|response| {
        response.child("processor", |request| thread.inspect(request.defer()));
        response.child("state", |request| {
            ask(thread, request, |state, request| state.inspect_states(&mut request.respond()));
        });
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
