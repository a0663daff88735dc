//! The ports through which bytes go to a guest and come from it: the serial port, and those of the console.

use crate::output::OutputLog;
use ::devices::SerialInput;
use ::devices::virtio::console::ConsoleInput;
use guest_schema::{Failure, GuestError};
use std::sync::Arc;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum GuestPort {
    /// The serial port.
    Serial,
    /// The console's terminal.
    Console,
    /// A further port of the console, by its name.
    Named(String),
}

impl GuestPort {
    /// What a guest without it answers.
    pub fn not_present(&self) -> Failure {
        let what = match self {
            Self::Serial => "the guest has no serial port".to_owned(),
            Self::Console => "the guest has no console".to_owned(),
            Self::Named(name) => {
                format!(
                    "name: the guest's console has no port {:?}",
                    name.chars().take(64).collect::<String>()
                )
            }
        };
        Failure::new(GuestError::DeviceNotPresent, what)
    }
}

/// What the ports have sent. It outlives the VM.
#[derive(Clone, Default)]
pub(crate) struct GuestOutputs(Vec<(GuestPort, Arc<OutputLog>)>);

impl GuestOutputs {
    /// Where the output of a further port is kept.
    pub fn add(&mut self, port: GuestPort) -> Arc<OutputLog> {
        let log = Arc::new(OutputLog::default());
        self.0.push((port, log.clone()));
        log
    }

    /// Where a port's output is kept.
    pub fn get(&self, port: &GuestPort) -> Option<&Arc<OutputLog>> {
        self.0.iter().find_map(|(of, log)| (of == port).then_some(log))
    }

    /// The guest sends nothing more.
    pub fn close(&self) {
        self.0.iter().for_each(|(_, log)| log.close());
    }
}

/// A port's input.
#[derive(Debug, Clone)]
pub(crate) enum PortInput {
    Serial(SerialInput),
    Console(ConsoleInput),
}

impl PortInput {
    /// Queues bytes for the guest and says how many there was room for: a prefix. `None` once the device is gone.
    pub fn push(&self, bytes: &[u8]) -> Option<usize> {
        match self {
            Self::Serial(input) => input.push(bytes),
            Self::Console(input) => input.push(bytes),
        }
    }

    /// Resolves once there is room in the queue, or the device is gone.
    pub async fn room(&self) {
        match self {
            Self::Serial(input) => input.room().await,
            Self::Console(input) => input.room().await,
        }
    }
}
