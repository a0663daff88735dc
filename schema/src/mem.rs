//! The config of the memory device.

use crate::config_capnp as wire;

/// A region for memory that is plugged while the guest runs. All sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemDeviceConfig {
    /// The size of a block: a power of two.
    pub block_bytes: u64,
    /// The size of the region: whole blocks.
    pub region_bytes: u64,
    /// The region begins at a multiple of this power of two.
    pub region_alignment_bytes: u64,
    /// How much the guest is asked to plug from the beginning.
    pub requested_bytes: u64,
}

impl MemDeviceConfig {
    /// A region of this size, nothing of it plugged, in blocks of 2 MiB and at a multiple of 128 MiB.
    pub fn of_region(region_bytes: u64) -> Self {
        Self { block_bytes: 2 << 20, region_bytes, region_alignment_bytes: 128 << 20, requested_bytes: 0 }
    }

    pub(crate) fn read(reader: wire::mem_device_config::Reader<'_>) -> Self {
        Self {
            block_bytes: reader.get_block_bytes(),
            region_bytes: reader.get_region_bytes(),
            region_alignment_bytes: reader.get_region_alignment_bytes(),
            requested_bytes: reader.get_requested_bytes(),
        }
    }

    pub(crate) fn write(&self, mut builder: wire::mem_device_config::Builder<'_>) {
        let Self { block_bytes, region_bytes, region_alignment_bytes, requested_bytes } = *self;
        builder.set_block_bytes(block_bytes);
        builder.set_region_bytes(region_bytes);
        builder.set_region_alignment_bytes(region_alignment_bytes);
        builder.set_requested_bytes(requested_bytes);
    }
}
