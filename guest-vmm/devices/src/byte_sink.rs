//! Where the bytes go that a guest sends.

/// Takes what a guest sends through a serial port or a port of a console.
///
/// Called on VP threads and on the I/O thread, with a device's lock held: must never block, and must not call back into the device.
pub trait ByteSink: Send + Sync {
    /// Takes bytes, in the order in which the guest sent them.
    fn write(&self, bytes: &[u8]);
}

impl<F: Fn(&[u8]) + Send + Sync> ByteSink for F {
    fn write(&self, bytes: &[u8]) {
        self(bytes);
    }
}
