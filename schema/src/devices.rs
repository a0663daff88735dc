//! The devices of a config that a guest has only if they are asked for.

use crate::config_capnp as wire;
use crate::vsock::VsockConfig;
use crate::{BlockConfig, ConfigFault, MemDeviceConfig, NetConfig, config::not_supported};

/// The devices of a guest, beside those of the board. None, unless asked for.
#[derive(Debug, Clone, Default)]
pub struct DevicesConfig {
    /// Disks, in the order in which the guest finds them.
    pub block: Vec<BlockConfig>,
    /// The entropy device.
    pub rng: bool,
    /// The vsock device.
    pub vsock: Option<VsockConfig>,
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
        let block = BlockConfig::read_all(reader.get_block()?, faults)?;
        let mem = if reader.has_mem() { Some(MemDeviceConfig::read(reader.get_mem()?)) } else { None };
        let vsock = match reader.has_vsock() {
            true => Some(VsockConfig::read(reader.get_vsock()?, faults)?),
            false => None,
        };
        Ok(Self {
            block,
            rng: reader.get_rng(),
            balloon: reader.get_balloon(),
            mem,
            net: NetConfig::read_all(reader.get_net()?, faults)?,
            vsock,
        })
    }

    /// Writes it into a config.
    pub(crate) fn write(&self, mut builder: wire::guest_config::Builder<'_>) {
        let Self { block, rng, balloon, mem, net, vsock } = self;
        BlockConfig::write_all(block, |count| builder.reborrow().init_block(count));
        builder.set_rng(*rng);
        builder.set_balloon(*balloon);
        if let Some(mem) = mem {
            mem.write(builder.reborrow().init_mem());
        }
        NetConfig::write_all(net, |count| builder.reborrow().init_net(count));
        if let Some(vsock) = vsock {
            vsock.write(builder.init_vsock());
        }
    }
}

fn read_unsupported(
    reader: wire::guest_config::Reader<'_>,
    faults: &mut Vec<ConfigFault>,
) -> capnp::Result<()> {
    let asked_for = [
        ("console", reader.get_console()),
        ("gpu", reader.get_gpu()),
        ("sound", reader.get_sound()),
        ("wayland", reader.get_wayland()),
        ("magma", reader.get_magma()),
    ];
    faults.extend(asked_for.iter().filter(|(_, asked)| *asked).map(|(field, _)| not_supported(field)));
    Ok(())
}
