//! The devices of a config that a guest has only if they are asked for.

use crate::config_capnp as wire;
use crate::{BlockConfig, ConfigFault, config::not_supported};

/// The devices of a guest, beside those of the board. None, unless asked for.
#[derive(Debug, Clone, Default)]
pub struct DevicesConfig {
    /// Disks, in the order in which the guest finds them.
    pub block: Vec<BlockConfig>,
    /// The entropy device.
    pub rng: bool,
    /// The memory balloon.
    pub balloon: bool,
    /// Memory that is plugged while the guest runs.
    pub mem: Option<MemDeviceConfig>,
}

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

    fn read(reader: wire::mem_device_config::Reader<'_>) -> Self {
        Self {
            block_bytes: reader.get_block_bytes(),
            region_bytes: reader.get_region_bytes(),
            region_alignment_bytes: reader.get_region_alignment_bytes(),
            requested_bytes: reader.get_requested_bytes(),
        }
    }

    fn write(&self, mut builder: wire::mem_device_config::Builder<'_>) {
        let Self { block_bytes, region_bytes, region_alignment_bytes, requested_bytes } = *self;
        builder.set_block_bytes(block_bytes);
        builder.set_region_bytes(region_bytes);
        builder.set_region_alignment_bytes(region_alignment_bytes);
        builder.set_requested_bytes(requested_bytes);
    }
}

impl DevicesConfig {
    /// Reads what a config asks for.
    pub(crate) fn read(
        reader: wire::guest_config::Reader<'_>,
        faults: &mut Vec<ConfigFault>,
    ) -> capnp::Result<Self> {
        read_unsupported(reader, faults)?;
        let block = BlockConfig::read_all(reader.get_block()?, faults)?;
        let mem = if reader.has_mem() { Some(MemDeviceConfig::read(reader.get_mem()?)) } else { None };
        Ok(Self { block, rng: reader.get_rng(), balloon: reader.get_balloon(), mem })
    }

    /// Writes it into a config.
    pub(crate) fn write(&self, mut builder: wire::guest_config::Builder<'_>) {
        let Self { block, rng, balloon, mem } = self;
        BlockConfig::write_all(block, |count| builder.reborrow().init_block(count));
        builder.set_rng(*rng);
        builder.set_balloon(*balloon);
        if let Some(mem) = mem {
            mem.write(builder.reborrow().init_mem());
        }
    }
}

fn read_unsupported(
    reader: wire::guest_config::Reader<'_>,
    faults: &mut Vec<ConfigFault>,
) -> capnp::Result<()> {
    let asked_for = [
        ("net", !reader.get_net()?.is_empty()),
        ("console", reader.get_console()),
        ("vsock", reader.has_vsock()),
        ("gpu", reader.get_gpu()),
        ("sound", reader.get_sound()),
        ("wayland", reader.get_wayland()),
        ("magma", reader.get_magma()),
    ];
    faults.extend(asked_for.iter().filter(|(_, asked)| *asked).map(|(field, _)| not_supported(field)));
    Ok(())
}
