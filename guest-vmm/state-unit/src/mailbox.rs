//! The channel from a set to one unit: unbounded, one receiver, in order.
//!
//! A transition sends one request to each unit, so that sending is most of what it costs. A mailbox holds one request in
//! place, the next ones in a queue that is not allocated before it is needed, and says whether a request reached a receiver
//! that still lives: what was sent before the receiver is dropped is dropped with it, what is sent later comes back.
//!
//! The lock is never held while a request is dropped or a waker called: each of these may run code of others.

use crate::StateRequest;
use crate::sync::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

#[derive(Debug, Default)]
struct Contents {
    /// Always the oldest; none only if there are no others.
    first: Option<StateRequest>,
    others: VecDeque<StateRequest>,
    receiver: Option<Waker>,
    /// No more requests are taken; those that are in go out still.
    closed: bool,
}

impl Contents {
    fn push(&mut self, request: StateRequest) {
        match self.first {
            None => self.first = Some(request),
            Some(_) => self.others.push_back(request),
        }
    }

    fn pop(&mut self) -> Option<StateRequest> {
        let next = if self.others.is_empty() { None } else { self.others.pop_front() };
        std::mem::replace(&mut self.first, next)
    }
}

#[derive(Debug, Default)]
struct Mailbox(Mutex<Contents>);

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The set's end.
#[derive(Debug)]
pub(crate) struct RequestSender(Arc<Mailbox>);

impl RequestSender {
    /// Sends a request, or gives it back if nobody will take it any more.
    pub(crate) fn send(&self, request: StateRequest) -> Result<(), StateRequest> {
        let mut contents = self.0.lock();
        if contents.closed {
            return Err(request);
        }
        contents.push(request);
        let receiver = contents.receiver.take();
        drop(contents);
        receiver.into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// Lets the receiver end after the requests that are in.
    pub(crate) fn close(&self) {
        let mut contents = self.0.lock();
        contents.closed = true;
        let receiver = contents.receiver.take();
        drop(contents);
        receiver.into_iter().for_each(Waker::wake);
    }
}

impl Drop for RequestSender {
    fn drop(&mut self) {
        self.close();
    }
}

/// The requests of one unit, in order. Dropped, it answers those that are in with "gone".
#[derive(Debug)]
pub struct RequestReceiver(Arc<Mailbox>);

impl RequestReceiver {
    pub(crate) fn channel() -> (RequestSender, Self) {
        let mailbox = Arc::<Mailbox>::default();
        (RequestSender(mailbox.clone()), Self(mailbox))
    }

    /// The next request; `None` once the unit has been removed, or the set dropped. Cancel safe.
    pub async fn recv(&mut self) -> Option<StateRequest> {
        std::future::poll_fn(|context| self.poll_recv(context)).await
    }

    fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<StateRequest>> {
        let mut contents = self.0.lock();
        if let Some(request) = contents.pop() {
            return Poll::Ready(Some(request));
        }
        if contents.closed {
            return Poll::Ready(None);
        }
        let former = contents.receiver.replace(context.waker().clone());
        drop(contents);
        drop(former);
        Poll::Pending
    }
}

impl Drop for RequestReceiver {
    fn drop(&mut self) {
        let mut contents = self.0.lock();
        contents.closed = true;
        let undone = (contents.first.take(), std::mem::take(&mut contents.others));
        drop(contents);
        drop(undone);
    }
}
