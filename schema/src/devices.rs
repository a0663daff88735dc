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
}

impl DevicesConfig {
    /// Reads what a config asks for.
    pub(crate) fn read(
        reader: wire::guest_config::Reader<'_>,
        faults: &mut Vec<ConfigFault>,
    ) -> capnp::Result<Self> {
        read_unsupported(reader, faults)?;
        let block = BlockConfig::read_all(reader.get_block()?, faults)?;
        Ok(Self { block, rng: reader.get_rng(), balloon: reader.get_balloon() })
    }

    /// Writes it into a config.
    pub(crate) fn write(&self, mut builder: wire::guest_config::Builder<'_>) {
        let Self { block, rng, balloon } = self;
        BlockConfig::write_all(block, |count| builder.reborrow().init_block(count));
        builder.set_rng(*rng);
        builder.set_balloon(*balloon);
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
        ("mem", reader.has_mem()),
        ("gpu", reader.get_gpu()),
        ("sound", reader.get_sound()),
        ("wayland", reader.get_wayland()),
        ("magma", reader.get_magma()),
    ];
    faults.extend(asked_for.iter().filter(|(_, asked)| *asked).map(|(field, _)| not_supported(field)));
    Ok(())
}
