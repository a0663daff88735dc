//! The primitives under a VP's thread and what wakes it.
//!
//! They are the standard library's and `futures`', but for the unit tests, where they are `loom`'s: `thread/model.rs` is run
//! once for every order in which its threads can meet. The queue of commands and reference counts stay as they are.

#[cfg(not(test))]
pub(crate) use futures::{channel::oneshot, task::AtomicWaker};
#[cfg(test)]
pub(crate) use loom::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};
#[cfg(test)]
pub(crate) use modelled::{AtomicWaker, oneshot};
#[cfg(not(test))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};

#[cfg(test)]
mod modelled {
    use loom::sync::Mutex;
    use std::task::Waker;

    /// What [`futures::task::AtomicWaker`] promises, in a way that `loom` sees.
    #[derive(Default)]
    pub(crate) struct AtomicWaker(Mutex<Option<Waker>>);

    impl AtomicWaker {
        pub(crate) fn register(&self, waker: &Waker) {
            *self.0.lock().unwrap() = Some(waker.clone());
        }

        pub(crate) fn wake(&self) {
            let waker = self.0.lock().unwrap().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    /// The channels of `futures`, whose order `loom` sees: what was done before sending comes before what follows on receiving.
    pub(crate) mod oneshot {
        use futures::FutureExt;
        use futures::channel::oneshot::{self, Canceled};
        use loom::sync::Mutex;
        use std::future::Future;
        use std::pin::Pin;
        use std::sync::Arc;
        use std::task::{Context, Poll};

        pub(crate) struct Sender<T>(oneshot::Sender<T>, Arc<Mutex<()>>);
        pub(crate) struct Receiver<T>(oneshot::Receiver<T>, Arc<Mutex<()>>);

        pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
            let (sender, receiver) = oneshot::channel();
            let order = Arc::default();
            (Sender(sender, Arc::clone(&order)), Receiver(receiver, order))
        }

        impl<T> Sender<T> {
            pub(crate) fn send(self, value: T) -> Result<(), T> {
                drop(self.1.lock());
                self.0.send(value)
            }
        }

        impl<T> Future for Receiver<T> {
            type Output = Result<T, Canceled>;

            fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
                let polled = self.0.poll_unpin(cx);
                if polled.is_ready() {
                    drop(self.1.lock());
                }
                polled
            }
        }
    }
}
