//! The console (VIRTIO 1.3, 5.3): a terminal that can be resized, and further ports over which programs talk, known by their names.
//!
//! [`Console`] is what its registers show, [`ConsoleWorker`] moves the bytes, and a [`ConsoleHandle`] is the host's end. What the guest
//! sends goes to a [`ByteSink`] at once. What the host sends goes through a [`ConsoleInput`] into a queue of [`INPUT_CAPACITY`](crate::INPUT_CAPACITY)
//! bytes, which the guest empties by its own buffers; beyond the queue, the sender waits for room. So no byte is lost, as long as
//! the guest keeps the port open.
//!
//! A console without further ports does not offer MULTIPORT: drivers then learn its size from the configuration, about whose order of
//! columns and rows all agree. With several ports a control message takes its place, which is as the specification has it (5.3.6.2);
//! Linux before 6.15, and before the fix came to the kernels that are kept alive, has it the other way round.
//!
//! What is saved: the size, and of each port what the driver knows of it and the queue, whose sender was told that it was taken.
//!
//! Limits: the host's side of every port is open for ever; no port comes or goes; one console.

mod control;
mod port;
mod saved;
mod shared;
mod worker;

pub use port::ConsoleInput;
pub use worker::ConsoleWorker;

use super::{DeviceType, Interrupt, VirtioDevice, VirtioSpec, read_config};
use crate::ByteSink;
use guest_saved_state::devices::console::ConsoleState;
use inspect::{FromText, Inspect, Request, Value};
use port::Port;
use save_restore::{RestoreError, SaveError};
use shared::Shared;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The most ports beside the console itself.
pub const MAX_NAMED_PORTS: usize = 15;

/// How many buffers a driver can have with the device for each direction of a port; Linux's are of a page.
const QUEUE_SIZE: u16 = 64;
/// Each port has one for each direction, and so have the control messages.
const QUEUES_PER_PORT: usize = 2;

const FEATURE_SIZE: u32 = 0;
const FEATURE_MULTIPORT: u32 = 1;
const FEATURE_EMERG_WRITE: u32 = 2;

/// Where a driver writes a character that is sent without a queue.
const CONFIG_EMERG_WRITE: u64 = 8;

/// The size of a terminal, in characters; 0 by 0 if it is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConsoleSize {
    /// How many characters a line has.
    pub columns: u16,
    /// How many lines there are.
    pub rows: u16,
}

impl ConsoleSize {
    /// As the configuration and the control message have it (5.3.4, 5.3.6.2).
    fn to_le_bytes(self) -> [u8; 4] {
        let ([low, high], [row_low, row_high]) = (self.columns.to_le_bytes(), self.rows.to_le_bytes());
        [low, high, row_low, row_high]
    }
}

/// Columns by rows.
impl fmt::Display for ConsoleSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.columns, self.rows)
    }
}

/// As it is shown.
impl From<ConsoleSize> for Value {
    fn from(size: ConsoleSize) -> Self {
        size.to_string().into()
    }
}

impl FromText for ConsoleSize {
    fn from_text(text: &str) -> Option<Self> {
        let (columns, rows) = text.split_once('x')?;
        Some(Self { columns: columns.parse().ok()?, rows: rows.parse().ok()? })
    }

    fn expected() -> String {
        "columns by rows, 80x25".to_owned()
    }
}

/// A port beside the console itself.
pub struct NamedPort {
    /// By which the guest finds it. No other port of the console has it.
    pub name: String,
    /// Takes what the guest sends.
    pub output: Arc<dyn ByteSink>,
}

impl fmt::Debug for NamedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NamedPort").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A console.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
}

/// The host's end of a console. Clones are of the same one.
#[derive(Debug, Clone)]
pub struct ConsoleHandle {
    shared: Arc<Shared>,
}

impl Console {
    /// A console as a unit of this name, and its host's end. What the guest writes to the terminal goes to `output`. There may
    /// be [`MAX_NAMED_PORTS`] further ports.
    pub fn spec(
        name: impl Into<String>,
        output: Arc<dyn ByteSink>,
        further: Vec<NamedPort>,
    ) -> (VirtioSpec, ConsoleHandle) {
        let interrupt = Arc::new(Interrupt::default());
        let named = further.into_iter().map(|NamedPort { name, output }| Port::new(Some(name), output));
        let ports = std::iter::once(Port::new(None, output)).chain(named).map(Arc::new).collect();
        let shared = Arc::new(Shared::new(ports, interrupt.clone()));
        let worker = ConsoleWorker::new(shared.clone());
        let spec = VirtioSpec::new(name, Self { shared: shared.clone() }, worker, interrupt);
        (spec, ConsoleHandle { shared })
    }
}

/// Whoever waits for room learns that there is no console.
impl Drop for Console {
    fn drop(&mut self) {
        self.shared.ports().iter().for_each(|port| port.close());
    }
}

impl ConsoleHandle {
    /// The terminal has this size now. A guest whose driver cares for it is told, also one that runs only later.
    pub fn resize(&self, size: ConsoleSize) {
        self.shared.resize(size);
    }

    /// The size that the guest was told last.
    pub fn size(&self) -> ConsoleSize {
        self.shared.size()
    }

    /// The input of the console itself.
    pub fn input(&self) -> ConsoleInput {
        ConsoleInput::new(self.shared.console().clone())
    }

    /// The input of the port with this name, if there is one.
    pub fn port_input(&self, name: &str) -> Option<ConsoleInput> {
        let port = self.shared.ports().iter().find(|port| port.name() == Some(name))?;
        Some(ConsoleInput::new(port.clone()))
    }
}

impl VirtioDevice for Console {
    type Worker = ConsoleWorker;
    type SavedState = ConsoleState;

    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        let multiport = u64::from(self.shared.has_further_ports());
        1 << FEATURE_SIZE | multiport << FEATURE_MULTIPORT | 1 << FEATURE_EMERG_WRITE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let control = usize::from(self.shared.has_further_ports());
        vec![QUEUE_SIZE; (self.shared.ports().len() + control) * QUEUES_PER_PORT]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let ports = u32::try_from(self.shared.ports().len()).expect("few ports");
        let mut config = [0; 12];
        config[..4].copy_from_slice(&self.shared.size().to_le_bytes());
        config[4..8].copy_from_slice(&ports.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_EMERG_WRITE, [character, ..]) = (offset, data) {
            self.shared.console().send(&[*character]);
        }
    }

    fn reset(&mut self) {
        self.shared.ports().iter().for_each(|port| port.forget_driver());
    }

    fn save(&mut self, _: &mut ConsoleWorker) -> Result<ConsoleState, SaveError> {
        Ok(self.shared.save())
    }

    fn restore(&mut self, _: &mut ConsoleWorker, state: ConsoleState) -> Result<(), RestoreError> {
        self.shared.restore(state)
    }
}

/// Shows the size, which can be written, and the ports.
impl Inspect for Console {
    fn inspect(&self, request: Request<'_>) {
        let mut response = request.respond();
        response
            .writable(
                "size",
                || self.shared.size(),
                |size| {
                    self.shared.resize(size);
                    Ok::<_, Infallible>(size)
                },
            )
            .field_with("ignored_messages", || self.shared.ignored.load(Ordering::Relaxed));
        response.child("ports", |request| {
            let mut response = request.respond();
            for (number, port) in self.shared.ports().iter().enumerate() {
                response.field(&number.to_string(), &**port);
            }
        });
    }
}

#[cfg(test)]
mod tests;
