//! The devices of a config that a guest has only if they are asked for.

use crate::config_capnp as wire;
use crate::failure::lossy;
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
    /// The console.
    pub console: Option<ConsoleConfig>,
    /// Memory that is plugged while the guest runs.
    pub mem: Option<MemDeviceConfig>,
    /// Network devices, in the order in which the guest finds them.
    pub net: Vec<NetConfig>,
}

/// A console, and what it has beside its terminal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Further ports, by their names.
    pub ports: Vec<String>,
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
            console: read_console(reader, faults)?,
            mem,
            net: NetConfig::read_all(reader.get_net()?, faults)?,
            vsock,
        })
    }

    /// Writes it into a config.
    pub(crate) fn write(&self, mut builder: wire::guest_config::Builder<'_>) {
        let Self { block, rng, balloon, console, mem, net, vsock } = self;
        BlockConfig::write_all(block, |count| builder.reborrow().init_block(count));
        builder.set_rng(*rng);
        builder.set_balloon(*balloon);
        if let Some(mem) = mem {
            mem.write(builder.reborrow().init_mem());
        }
        if let Some(ConsoleConfig { ports }) = console {
            builder.set_console(true);
            let length = u32::try_from(ports.len()).expect("a list that a message has room for");
            let mut names = builder.reborrow().init_console_config().init_ports(length);
            for (index, name) in (0..).zip(ports) {
                names.set(index, name);
            }
        }
        NetConfig::write_all(net, |count| builder.reborrow().init_net(count));
        if let Some(vsock) = vsock {
            vsock.write(builder.init_vsock());
        }
    }
}

fn read_console(
    reader: wire::guest_config::Reader<'_>,
    faults: &mut Vec<ConfigFault>,
) -> capnp::Result<Option<ConsoleConfig>> {
    if !reader.get_console() {
        if reader.has_console_config() {
            faults.push(ConfigFault::new("consoleConfig", "given, and `console` is false"));
        }
        return Ok(None);
    }
    let names = reader.get_console_config()?.get_ports()?;
    let names = names.iter().map(|name| name.map(lossy));
    Ok(Some(ConsoleConfig { ports: names.collect::<Result<_, _>>()? }))
}

fn read_unsupported(
    reader: wire::guest_config::Reader<'_>,
    faults: &mut Vec<ConfigFault>,
) -> capnp::Result<()> {
    let asked_for = [
        ("gpu", reader.get_gpu()),
        ("sound", reader.get_sound()),
        ("wayland", reader.get_wayland()),
        ("magma", reader.get_magma()),
    ];
    faults.extend(asked_for.iter().filter(|(_, asked)| *asked).map(|(field, _)| not_supported(field)));
    Ok(())
}
