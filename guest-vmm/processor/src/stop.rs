//! Asking a VP to stop.

use crate::VpHaltReason;
use crate::sync::AtomicWaker;
use crate::sync::atomic::{AtomicU8, Ordering};
use std::convert::Infallible;
use std::future::poll_fn;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::task::{Context, Poll};

const GO_ON: u8 = 0;
const CANCEL: u8 = 1;
const STOP: u8 = 2;

#[derive(Default)]
struct Shared {
    /// The greatest of what was asked for.
    asked: AtomicU8,
    waker: AtomicWaker,
}

/// Asks one VP to stop; may be used from any thread, and more than once.
pub struct StopVpSource(Arc<Shared>);

/// What [`crate::Processor::run_vp`] watches.
pub struct StopVp(Arc<Shared>);

impl StopVpSource {
    /// A source and what it stops.
    pub fn new() -> (Self, StopVp) {
        let shared = Arc::new(Shared::default());
        (Self(shared.clone()), StopVp(shared))
    }

    /// Asks the VP to stop. [`crate::Processor::run_vp`] then returns [`crate::VpHaltReason::Stop`].
    pub fn stop(&self) {
        self.ask(STOP);
    }

    /// Calls the run off. [`crate::Processor::run_vp`] then returns [`crate::VpHaltReason::Cancel`], or
    /// [`crate::VpHaltReason::Stop`] if it was asked to stop too.
    pub fn cancel(&self) {
        self.ask(CANCEL);
    }

    fn ask(&self, what: u8) {
        self.0.asked.fetch_max(what, Ordering::AcqRel);
        self.0.waker.wake();
    }
}

impl StopVp {
    /// Resolves once the VP has been asked to leave the guest, to why.
    pub async fn asked(&mut self) -> VpHaltReason {
        poll_fn(|cx| self.poll_asked(cx)).await
    }

    /// Why the VP has been asked to leave the guest; if it was not, the task is woken when it is.
    pub fn poll_asked(&mut self, cx: &mut Context<'_>) -> Poll<VpHaltReason> {
        self.0.waker.register(cx.waker());
        match self.0.asked.load(Ordering::Acquire) {
            GO_ON => Poll::Pending,
            CANCEL => Poll::Ready(VpHaltReason::Cancel),
            _ => Poll::Ready(VpHaltReason::Stop),
        }
    }
}

/// The loop of [`crate::Processor::run_vp`]: enters the guest until there is a reason not to.
///
/// `enter` runs the guest and comes back with `Continue` when it was asked to yield, or with `Break` when the VP halts.
/// The task is polled again after every yield, and the stop looked at before the guest is entered.
pub async fn run_guest(
    stop: &mut StopVp,
    mut enter: impl FnMut() -> ControlFlow<VpHaltReason>,
) -> Result<Infallible, VpHaltReason> {
    poll_fn(|cx| {
        if let Poll::Ready(reason) = stop.poll_asked(cx) {
            return Poll::Ready(Err(reason));
        }
        match enter() {
            ControlFlow::Break(reason) => Poll::Ready(Err(reason)),
            ControlFlow::Continue(()) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    })
    .await
}
