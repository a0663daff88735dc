//! What a device is to the bus.

use futures::future::{BoxFuture, ready};
use inspect::InspectMut;
use processor::PowerRequest;
use save_restore::ProtobufSaveRestore;
use std::ops::ControlFlow;

/// A device with registers in a window of I/O ports or of guest physical addresses.
///
/// Offsets count from the window's base and, with the data's length, stay inside the window. Data is 1, 2, 4 or 8 bytes,
/// little endian. A read that the device does not understand gives all ones, a write that it does not understand is ignored.
/// The caller holds the device's lock for one call. No call blocks, but for a virtio driver's reset, which is waited for.
pub trait IoDevice: Send {
    /// Reads registers. Fills all of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes registers. `Break` halts the VP that wrote, with the request as its reason.
    fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<PowerRequest>;

    /// Puts the registers into the state in which the device was built. What belongs to the host (queued input) stays.
    fn reset(&mut self);
}

/// A device all of whose registers are one byte wide.
///
/// A wider access is taken apart into its bytes, lowest first, as the ISA bus does it.
pub trait ByteRegisters: Send {
    /// Reads the register at an offset; 0xff if there is none.
    fn read_byte(&mut self, offset: u64) -> u8;

    /// Writes the register at an offset; ignored if there is none.
    fn write_byte(&mut self, offset: u64, value: u8) -> ControlFlow<PowerRequest>;

    /// As [`IoDevice::reset`].
    fn reset(&mut self);
}

impl<T: ByteRegisters> IoDevice for T {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.read_byte(at);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        (offset..).zip(data).try_for_each(|(at, &byte)| self.write_byte(at, byte))
    }

    fn reset(&mut self) {
        ByteRegisters::reset(self);
    }
}

/// A device that finishes what it has begun.
pub type Stopping = BoxFuture<'static, ()>;

/// Of a device that had begun nothing.
pub(crate) fn stopped() -> Stopping {
    Box::pin(ready(()))
}

/// A device of a machine, which starts and stops with the guest, and is saved and restored with it.
///
/// Stopped, it does nothing of its own: no interrupt, no byte to the guest. It answers accesses all the same.
///
/// It shows its registers at any time. That must not change what the guest reads, and answers at once: nothing is deferred.
///
/// A device that was restored and then told of it ([`post_restore`](Self::post_restore)) answers as the one that was saved
/// would have. A state that the device cannot be in is refused with the field's name and value, and the device is as it was.
/// One without state is saved as [`NoSavedState`](save_restore::NoSavedState).
pub trait Device: IoDevice + InspectMut + ProtobufSaveRestore {
    /// Begins to act of its own. Called only while stopped.
    fn start(&mut self);

    /// Ceases to act of its own. Called only while started. What it has begun is finished when the future resolves; the device's
    /// lock is not to be held meanwhile.
    fn stop(&mut self) -> Stopping;

    /// Tells the rest of the machine what follows from the restored state. Called while stopped, once every part of the machine
    /// is restored.
    fn post_restore(&mut self);
}

/// Devices that only answer accesses: they have nothing of their own to begin or cease, and nobody to tell.
macro_rules! passive {
    ($($device:ty),*) => {$(
        impl Device for $device {
            fn start(&mut self) {}
            fn stop(&mut self) -> Stopping {
                stopped()
            }

            fn post_restore(&mut self) {}
        }
    )*};
}

passive!(crate::AcpiPower, crate::DebugExit, crate::I8042, crate::Pvpanic, crate::Rtc);
