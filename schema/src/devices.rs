//! The devices of a config that a guest has only if they are asked for.

use crate::config_capnp as wire;
use crate::{ConfigFault, MemDeviceConfig, NetConfig, config::not_supported};

/// The devices of a guest, beside those of the board. None, unless asked for.
#[derive(Debug, Clone, Default)]
pub struct DevicesConfig {
    /// The entropy device.
    pub rng: bool,
    /// The memory balloon.
    pub balloon: bool,
    /// Memory that is plugged while the guest runs.
    pub mem: Option<MemDeviceConfig>,
    /// Network devices, in the order in which the guest finds them.
    pub net: Vec<NetConfig>,
}

impl DevicesConfig {
    /// Reads what a config asks for.
    pub(crate) fn read(
        reader: wire::guest_config::Reader<'_>,
        faults: &mut Vec<ConfigFault>,
    ) -> capnp::Result<Self> {
        read_unsupported(reader, faults)?;
        let mem = if reader.has_mem() { Some(MemDeviceConfig::read(reader.get_mem()?)) } else { None };
        Ok(Self {
            rng: reader.get_rng(),
            balloon: reader.get_balloon(),
            mem,
            net: NetConfig::read_all(reader.get_net()?, faults)?,
        })
    }

    /// Writes it into a config.
    pub(crate) fn write(&self, mut builder: wire::guest_config::Builder<'_>) {
        let Self { rng, balloon, mem, net } = self;
        builder.set_rng(*rng);
        builder.set_balloon(*balloon);
        if let Some(mem) = mem {
            mem.write(builder.reborrow().init_mem());
        }
        NetConfig::write_all(net, |count| builder.init_net(count));
    }
}

fn read_unsupported(
    reader: wire::guest_config::Reader<'_>,
    faults: &mut Vec<ConfigFault>,
) -> capnp::Result<()> {
    let asked_for = [
        ("block", !reader.get_block()?.is_empty()),
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
