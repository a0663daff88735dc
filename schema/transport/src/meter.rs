//! The account of one peer: bytes that came and went, calls that are not finished.

use crate::limits::{Limit, Limits};
use futures::{AsyncRead, AsyncWrite};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::sync::Notify;

/// What a queued message takes besides its bytes: about what the library allocates for a small one.
const MESSAGE_COST: usize = 2 << 10;

struct OpenCall {
    bytes: usize,
    answered: bool,
}

pub(crate) struct Meter {
    limits: Limits,
    /// The answers that are not written yet: where each ends among all bytes queued, and its size.
    answers: RefCell<VecDeque<(usize, usize)>>,
    answer_bytes: Cell<usize>,
    calls: RefCell<HashMap<u32, OpenCall>>,
    /// Calls that were finished before they were answered. The library forgets one only with its answer, which may never come.
    cancelled: RefCell<HashSet<u32>>,
    call_bytes: Cell<usize>,
    read: Cell<usize>,
    queued: Cell<usize>,
    written: Cell<usize>,
    greeted: Cell<bool>,
    ended: Cell<bool>,
    exceeded: Cell<Option<Limit>>,
    changed: Notify,
    flowed: Notify,
}

impl Meter {
    pub fn new(limits: Limits) -> Rc<Self> {
        Rc::new(Self {
            limits,
            answers: RefCell::default(),
            answer_bytes: Cell::new(0),
            calls: RefCell::default(),
            cancelled: RefCell::default(),
            call_bytes: Cell::new(0),
            read: Cell::new(0),
            queued: Cell::new(0),
            written: Cell::new(0),
            greeted: Cell::new(false),
            ended: Cell::new(false),
            exceeded: Cell::new(None),
            changed: Notify::new(),
            flowed: Notify::new(),
        })
    }

    pub fn exceeded(&self) -> Option<Limit> {
        self.exceeded.get()
    }

    pub fn bytes_read(&self) -> usize {
        self.read.get()
    }

    pub fn message_came(&self) {
        if !self.greeted.replace(true) {
            self.changed.notify_one();
        }
    }

    pub fn call_opened(&self, question: u32, bytes: usize) {
        let mut calls = self.calls.borrow_mut();
        let replaced = calls.insert(question, OpenCall { bytes, answered: false });
        let replaced = replaced.map_or(0, |call| call.bytes);
        self.call_bytes.set(self.call_bytes.get() + bytes - replaced);
        if calls.len() > self.limits.calls {
            self.exceed(Limit::Calls);
        } else if self.call_bytes.get() > self.limits.call_bytes {
            self.exceed(Limit::CallBytes);
        }
    }

    /// An answer was sent; `last` if the peer sends no finish for it.
    pub fn call_answered(&self, question: u32, last: bool) {
        self.cancelled.borrow_mut().remove(&question);
        if let Some(call) = self.calls.borrow_mut().get_mut(&question) {
            call.answered = true;
        }
        if last {
            self.call_finished(question);
        }
    }

    /// The peer needs the answer no more.
    pub fn call_finished(&self, question: u32) {
        let Some(call) = self.calls.borrow_mut().remove(&question) else { return };
        self.call_bytes.set(self.call_bytes.get() - call.bytes);
        if !call.answered {
            let mut cancelled = self.cancelled.borrow_mut();
            cancelled.insert(question);
            if cancelled.len() > self.limits.cancelled {
                self.exceed(Limit::Cancelled);
            }
        }
    }

    /// A message was queued for the peer: an answer to it, or something of our own.
    pub fn queued(&self, bytes: usize, answer: bool) {
        self.queued.set(self.queued.get() + bytes);
        if answer {
            self.answers.borrow_mut().push_back((self.queued.get(), bytes));
            self.answer_bytes.set(self.answer_bytes.get() + bytes);
        }
        if self.backlog() > self.limits.queued_hard {
            self.exceed(Limit::Queued);
        }
    }

    /// Resolves once the answers that wait leave room for those to further messages.
    pub async fn room(&self) {
        while self.answers_cost() > self.limits.queued_soft && self.exceeded.get().is_none() {
            if tokio::time::timeout(self.limits.stall, self.flowed.notified()).await.is_err() {
                self.exceed(Limit::Queued);
            }
        }
    }

    fn answers_cost(&self) -> usize {
        self.answer_bytes.get() + self.answers.borrow().len() * MESSAGE_COST
    }

    /// Resolves when the connection must be cut, whatever it waits for.
    pub async fn cut(&self) -> Limit {
        if let Some(within) = self.limits.handshake {
            let greeting = async {
                while !self.greeted.get() && self.exceeded.get().is_none() {
                    self.changed.notified().await;
                }
            };
            if tokio::time::timeout(within, greeting).await.is_err() {
                return Limit::Handshake;
            }
        }
        loop {
            if let Some(limit) = self.exceeded.get() {
                return limit;
            }
            if self.ended.get() {
                tokio::time::sleep(self.limits.drain).await;
                return self.exceeded.get().unwrap_or(Limit::Drain);
            }
            self.changed.notified().await;
        }
    }

    fn backlog(&self) -> usize {
        self.queued.get().saturating_sub(self.written.get())
    }

    fn exceed(&self, limit: Limit) {
        if self.exceeded.get().is_none() {
            self.exceeded.set(Some(limit));
            self.changed.notify_one();
        }
    }

    fn came(&self, bytes: usize) {
        self.read.set(self.read.get() + bytes);
        if bytes == 0 {
            self.ended.set(true);
            self.changed.notify_one();
        }
    }

    fn went(&self, bytes: usize) {
        self.written.set(self.written.get() + bytes);
        let mut answers = self.answers.borrow_mut();
        while let Some((_, size)) = answers.front().copied().filter(|(end, _)| *end <= self.written.get()) {
            answers.pop_front();
            self.answer_bytes.set(self.answer_bytes.get() - size);
        }
        drop(answers);
        self.flowed.notify_one();
    }
}

/// A reader whose bytes are counted.
pub(crate) struct MeteredRead<R> {
    pub inner: R,
    pub meter: Rc<Meter>,
}

impl<R: AsyncRead + Unpin> AsyncRead for MeteredRead<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = Pin::new(&mut self.inner).poll_read(cx, buffer);
        if let Poll::Ready(Ok(bytes)) = read {
            self.meter.came(bytes);
        }
        read
    }
}

/// A writer whose bytes are counted.
pub(crate) struct MeteredWrite<W> {
    pub inner: W,
    pub meter: Rc<Meter>,
}

impl<W: AsyncWrite + Unpin> AsyncWrite for MeteredWrite<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, buffer);
        if let Poll::Ready(Ok(bytes)) = written {
            self.meter.went(bytes);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}
