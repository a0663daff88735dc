//! What a console's registers, its worker and the host share.

use super::ConsoleSize;
use super::control::{DEVICE_READY, Message, Notice, PORT_OPEN, PORT_READY, encode};
use super::port::Port;
use crate::virtio::Interrupt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

#[derive(Debug)]
pub(super) struct Shared {
    /// By their numbers; there is always port 0, the console itself.
    ports: Vec<Arc<Port>>,
    size: Mutex<ConsoleSize>,
    interrupt: Arc<Interrupt>,
    /// For the worker: there may be something to tell.
    noticed: Notify,
    /// Control messages that made no sense.
    pub ignored: AtomicU64,
}

impl Shared {
    pub fn new(ports: Vec<Arc<Port>>, interrupt: Arc<Interrupt>) -> Self {
        let (size, noticed, ignored) = (Mutex::default(), Notify::new(), AtomicU64::new(0));
        Self { ports, size, interrupt, noticed, ignored }
    }

    pub fn ports(&self) -> &[Arc<Port>] {
        &self.ports
    }

    /// Port 0.
    pub fn console(&self) -> &Arc<Port> {
        &self.ports[0]
    }

    pub fn has_further_ports(&self) -> bool {
        self.ports.len() > 1
    }

    pub fn size(&self) -> ConsoleSize {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_size(&self, size: ConsoleSize) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = size;
    }

    /// Sets the size, and has the driver told in both ways: it heeds the one that its features are for.
    pub fn resize(&self, size: ConsoleSize) {
        self.set_size(size);
        {
            let mut console = self.console().state();
            if console.ready {
                console.notices.add(Notice::Resize);
            }
        }
        self.noticed.notify_one();
        self.interrupt.config_changed();
    }

    /// Takes a message of the driver's. One that makes no sense is counted, and nothing else.
    pub fn hear(&self, message: Message) {
        if !self.heed(message) {
            self.ignored.fetch_add(1, Ordering::Relaxed);
        }
        self.noticed.notify_one();
    }

    fn heed(&self, Message { port, event, value }: Message) -> bool {
        if event == DEVICE_READY {
            if value == 1 {
                self.ports.iter().for_each(|port| port.state().notices.add(Notice::Add));
            }
            return true;
        }
        let port = usize::try_from(port).ok().and_then(|port| self.ports.get(port));
        match (event, port) {
            (PORT_READY, Some(port)) if value == 1 => self.set_ready(port),
            (PORT_READY, Some(port)) => port.forget_driver(),
            (PORT_OPEN, Some(port)) => return port.set_open(value == 1),
            _ => return false,
        }
        true
    }

    fn set_ready(&self, port: &Port) {
        port.set_ready();
        if port.can_have(Notice::Resize) && self.size() != ConsoleSize::default() {
            port.state().notices.add(Notice::Resize);
        }
    }

    /// What the driver is to be told first: a port's number, and what of it.
    pub fn first_notice(&self) -> Option<(usize, Notice)> {
        let mut ports = self.ports.iter().enumerate();
        ports.find_map(|(number, port)| Some((number, port.state().notices.first()?)))
    }

    /// Waits until there is something to tell. May be cancelled at any time.
    pub async fn noticed(&self) {
        // There is one worker, and what is told between the look and the wait is kept for it.
        while self.first_notice().is_none() {
            self.noticed.notified().await;
        }
    }

    /// The message that tells it. It is told from now on; a size that changes later is told again.
    pub fn take_notice(&self, number: usize, notice: Notice) -> Vec<u8> {
        let port = &self.ports[number];
        port.state().notices.remove(notice);
        let id = u32::try_from(number).expect("few ports");
        match notice {
            Notice::Resize => encode(id, notice, &self.size().to_le_bytes()),
            // Without a NUL behind it: what is a name ends with the buffer (5.3.6.2).
            Notice::Name => encode(id, notice, port.name().unwrap_or_default().as_bytes()),
            Notice::Add | Notice::Console | Notice::Open => encode(id, notice, &[]),
        }
    }
}
