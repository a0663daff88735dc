//! What the protobuf compiler made of the schema.

/// Everything in the schema, imports included, as an encoded `google.protobuf.FileDescriptorSet`: what tools need to read saved
/// state (`protoc --descriptor_set_in`).
#[cfg(feature = "registry")]
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptors.bin");

/// The devices' messages, one module for each package.
pub mod devices {
    /// The memory balloon.
    #[rustfmt::skip]
    pub mod balloon; /// The block device.
    #[rustfmt::skip]
    pub mod block; /// The console.
    #[rustfmt::skip]
    pub mod console; /// The Generic Event Device.
    #[rustfmt::skip]
    pub mod generic_event; /// The keyboard controller, and system control port B beside it.
    #[rustfmt::skip]
    pub mod i8042; /// The I/O APIC.
    #[rustfmt::skip]
    pub mod ioapic; /// The memory device.
    #[rustfmt::skip]
    pub mod mem; /// The virtio network device.
    #[rustfmt::skip]
    pub mod net; /// The real-time clock.
    #[rustfmt::skip]
    pub mod rtc; /// The serial port.
    #[rustfmt::skip]
    pub mod serial; /// Virtio devices: what their transport keeps.
    #[rustfmt::skip]
    pub mod virtio; /// The socket device.
    #[rustfmt::skip]
    pub mod vsock;
}

/// The messages of the machine.
pub mod machine {
    /// The memory.
    #[rustfmt::skip]
    pub mod memory; /// Snapshots of guests.
    #[rustfmt::skip]
    pub mod snapshot; /// Files of snapshots.
    #[rustfmt::skip]
    pub mod snapshot_file;
}

/// The messages of the VPs and the partition.
pub mod processor {
    /// The partition.
    #[rustfmt::skip]
    pub mod partition; /// The VPs.
    #[expect(missing_docs, reason = "the names of registers are the architecture's")]
    #[rustfmt::skip]
    pub mod vp;
}

#[rustfmt::skip]
pub(crate) mod roots;
