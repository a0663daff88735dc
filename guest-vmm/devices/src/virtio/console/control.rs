//! Control messages (VIRTIO 1.3, 5.3.6.2).
//!
//! What the driver is to be told of a port is a set, not a queue: a driver that keeps asking and never listens costs nothing.

use crate::virtio::{Buffers, DeviceFault};
use vm_memory::GuestMemoryMmap;

/// The bytes of a message without what follows some of them.
pub(super) const MESSAGE_BYTES: usize = 8;

/// The driver is there (value 1), or could not get there (0).
pub(super) const DEVICE_READY: u16 = 0;
/// The driver knows a port (value 1), or could not make one of it (0).
pub(super) const PORT_READY: u16 = 3;
/// The other side has opened the port (value 1), or closed it (0).
pub(super) const PORT_OPEN: u16 = 6;

/// What a driver is told of a port, by the number of the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Notice {
    /// There is this port (DEVICE_ADD).
    Add = 1,
    /// It is a console (CONSOLE_PORT).
    Console = 4,
    /// It has another size (RESIZE).
    Resize = 5,
    /// The host has opened it (PORT_OPEN).
    Open = PORT_OPEN,
    /// It has a name (PORT_NAME).
    Name = 7,
}

impl Notice {
    /// In the order in which they are told: a port is complete when it opens.
    pub const ALL: [Self; 5] = [Self::Add, Self::Console, Self::Resize, Self::Name, Self::Open];

    fn bit(self) -> u32 {
        1 << self as u16
    }
}

/// Some of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Notices(u32);

impl Notices {
    pub fn add(&mut self, notice: Notice) {
        self.0 |= notice.bit();
    }

    pub fn remove(&mut self, notice: Notice) {
        self.0 &= !notice.bit();
    }

    /// The one that is to be told first.
    pub fn first(self) -> Option<Notice> {
        Notice::ALL.into_iter().find(|notice| self.0 & notice.bit() != 0)
    }

    /// Bit n for event n.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Those of the bits; `None` if one of them is none that is `allowed`.
    pub fn from_bits(bits: u32, allowed: impl Fn(Notice) -> bool) -> Option<Self> {
        let mask = Notice::ALL.into_iter().filter(|notice| allowed(*notice));
        let mask = mask.fold(0, |mask, notice| mask | notice.bit());
        (bits & !mask == 0).then_some(Self(bits))
    }
}

/// A message of the driver's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    pub port: u32,
    pub event: u16,
    pub value: u16,
}

impl Message {
    /// Reads the driver's buffers.
    pub fn read(buffers: &Buffers, memory: &GuestMemoryMmap) -> Result<Self, DeviceFault> {
        let mut reader = buffers.reader(memory)?;
        let [a, b, c, d, event @ .., low, high] =
            reader.read_obj::<[u8; MESSAGE_BYTES]>().ok_or_else(|| {
                DeviceFault::Driver(format!("a control message of {} bytes is too short", buffers.bytes()))
            })?;
        let (port, value) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([low, high]));
        Ok(Self { port, event: u16::from_le_bytes(event), value })
    }
}

/// What a driver is told: that something is so, with its details.
pub(super) fn encode(port: u32, notice: Notice, details: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MESSAGE_BYTES + details.len());
    bytes.extend(port.to_le_bytes());
    bytes.extend((notice as u16).to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(details);
    bytes
}
