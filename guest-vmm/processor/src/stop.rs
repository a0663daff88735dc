//! Asking a VP to stop.

use crate::VpHaltReason;
use futures::task::AtomicWaker;
use std::convert::Infallible;
use std::future::poll_fn;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

#[derive(Default)]
struct Shared {
    stopped: AtomicBool,
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
        self.0.stopped.store(true, Ordering::Release);
        self.0.waker.wake();
    }
}

impl StopVp {
    /// Resolves once the VP has been asked to stop.
    pub async fn stopped(&mut self) {
        poll_fn(|cx| self.poll_stopped(cx)).await;
    }

    /// Whether the VP has been asked to stop; if not, the task is woken when it is.
    pub fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.waker.register(cx.waker());
        if self.is_stopped() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Whether the VP has been asked to stop.
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Acquire)
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
        if stop.poll_stopped(cx).is_ready() {
            return Poll::Ready(Err(VpHaltReason::Stop));
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
