//! A port: its two directions, and what its driver knows of it.

use super::control::{Notice, Notices};
use crate::virtio::{Buffers, DeviceFault};
use crate::{ByteSink, INPUT_CAPACITY};
use inspect::{Inspect, Request};
use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use vm_memory::GuestMemoryMmap;

/// A port. The console itself has no name.
pub(super) struct Port {
    name: Option<String>,
    output: Arc<dyn ByteSink>,
    /// Bytes that the guest has sent, ever.
    sent: AtomicU64,
    state: Mutex<PortState>,
    /// For the worker: there may be something to deliver.
    deliverable: Notify,
    /// For senders: there may be room.
    room: Notify,
}

/// What changes of a port.
#[derive(Debug, Default)]
pub(super) struct PortState {
    /// What the host has sent and the guest has not got.
    pub queue: VecDeque<u8>,
    /// The device is gone.
    pub closed: bool,
    /// The driver knows the port.
    pub ready: bool,
    /// The guest has opened it.
    pub open: bool,
    /// What the driver is still to be told.
    pub notices: Notices,
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Port {
    pub fn new(name: Option<String>, output: Arc<dyn ByteSink>) -> Self {
        Self {
            name,
            output,
            sent: AtomicU64::new(0),
            state: Mutex::default(),
            deliverable: Notify::new(),
            room: Notify::new(),
        }
    }

    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    pub fn state(&self) -> MutexGuard<'_, PortState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there can ever be this to tell of it.
    pub fn can_have(&self, notice: Notice) -> bool {
        match notice {
            Notice::Add | Notice::Open => true,
            Notice::Console | Notice::Resize => self.name.is_none(),
            Notice::Name => self.name.is_some(),
        }
    }

    /// Takes bytes that the guest has sent.
    pub fn send(&self, bytes: &[u8]) {
        self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.output.write(bytes);
    }

    /// The driver knows the port.
    pub fn set_ready(&self) {
        let mut state = self.state();
        state.ready = true;
        for notice in [Notice::Console, Notice::Name, Notice::Open] {
            if self.can_have(notice) {
                state.notices.add(notice);
            }
        }
    }

    /// The guest has opened it, or closed it. Whether it may: not before its driver knows the port.
    pub fn set_open(&self, open: bool) -> bool {
        let mut state = self.state();
        if state.ready {
            state.open = open;
            self.deliverable.notify_one();
        }
        state.ready
    }

    /// A driver begins anew, or gives the port up: what it knew of it is forgotten, what the host has sent is not.
    pub fn forget_driver(&self) {
        let mut state = self.state();
        (state.ready, state.open, state.notices) = (false, false, Notices::default());
    }

    /// The device is gone.
    pub fn close(&self) {
        self.state().closed = true;
        self.room.notify_waiters();
    }

    /// Replaces what is saved.
    pub fn replace(&self, PortState { queue, closed: _, ready, open, notices }: PortState) {
        {
            let mut state = self.state();
            *state = PortState { queue, closed: state.closed, ready, open, notices };
        }
        self.room.notify_waiters();
    }

    /// Whether the guest would get bytes now. A port that can be opened has to be open.
    pub fn is_deliverable(&self, opens: bool) -> bool {
        let state = self.state();
        !state.queue.is_empty() && (state.open || !opens)
    }

    /// Waits until there are bytes for the guest. May be cancelled at any time.
    pub async fn deliverable(&self, opens: bool) {
        // There is one worker, and what is told between the look and the wait is kept for it.
        while !self.is_deliverable(opens) {
            self.deliverable.notified().await;
        }
    }

    /// Moves bytes from the queue into a driver's buffers, and says how many.
    pub fn deliver(&self, buffers: &Buffers, memory: &GuestMemoryMmap) -> Result<u32, DeviceFault> {
        let mut writer = buffers.writer(memory)?;
        if writer.remaining() == 0 {
            return Err(DeviceFault::Driver("a buffer for input cannot be written".into()));
        }
        let mut state = self.state();
        let (front, back) = state.queue.as_slices();
        let mut count = 0;
        for bytes in [front, back] {
            count += writer.write(bytes).map_err(DeviceFault::Host)?;
        }
        state.queue.drain(..count);
        drop(state);
        self.room.notify_waiters();
        Ok(writer.written())
    }

    fn push(&self, bytes: &[u8]) -> Option<usize> {
        let accepted = {
            let mut state = self.state();
            if state.closed {
                return None;
            }
            let accepted = bytes.len().min(INPUT_CAPACITY - state.queue.len());
            state.queue.extend(&bytes[..accepted]);
            accepted
        };
        self.deliverable.notify_one();
        Some(accepted)
    }

    async fn room(&self) {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            {
                let state = self.state();
                if state.closed || state.queue.len() < INPUT_CAPACITY {
                    return;
                }
            }
            room.await;
        }
    }
}

/// Shows how it stands, and how many bytes are on their way or were sent.
impl Inspect for Port {
    fn inspect(&self, request: Request<'_>) {
        let (ready, open, queued) = {
            let state = self.state();
            (state.ready, state.open, state.queue.len())
        };
        let mut response = request.respond();
        if let Some(name) = self.name() {
            response.field_with("name", || name.to_owned());
        }
        response
            .field("ready", &ready)
            .field("open", &open)
            .field_with("queued_bytes", || queued as u64)
            .field_with("sent_bytes", || self.sent.load(Ordering::Relaxed));
    }
}

/// The host's end of a port's input. Any number of them may exist; their bytes are not interleaved within one push.
#[derive(Debug, Clone)]
pub struct ConsoleInput(Arc<Port>);

impl ConsoleInput {
    pub(super) fn new(port: Arc<Port>) -> Self {
        Self(port)
    }

    /// Queues bytes for the guest and says how many there was room for: a prefix. Does not wait. `None` once the console is gone.
    pub fn push(&self, bytes: &[u8]) -> Option<usize> {
        self.0.push(bytes)
    }

    /// Resolves once there is room in the queue, or the console is gone.
    pub async fn room(&self) {
        self.0.room().await;
    }
}
