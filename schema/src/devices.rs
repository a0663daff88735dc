//! The devices of a config that a guest has only if they are asked for.

use crate::config_capnp as wire;
use crate::failure::lossy;
use crate::{ConfigFault, config::not_supported};

/// The devices of a guest, beside those of the board. None, unless asked for.
#[derive(Debug, Clone, Default)]
pub struct DevicesConfig {
    /// The entropy device.
    pub rng: bool,
    /// The memory balloon.
    pub balloon: bool,
    /// The console.
    pub console: Option<ConsoleConfig>,
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
        let mem = if reader.has_mem() { Some(MemDeviceConfig::read(reader.get_mem()?)) } else { None };
        Ok(Self {
            rng: reader.get_rng(),
            balloon: reader.get_balloon(),
            console: read_console(reader, faults)?,
            mem,
        })
    }

    /// Writes it into a config.
    pub(crate) fn write(&self, mut builder: wire::guest_config::Builder<'_>) {
        let Self { rng, balloon, console, mem } = self;
        builder.set_rng(*rng);
        builder.set_balloon(*balloon);
        if let Some(mem) = mem {
            mem.write(builder.reborrow().init_mem());
        }
        if let Some(ConsoleConfig { ports }) = console {
            builder.set_console(true);
            let length = u32::try_from(ports.len()).expect("a list that a message has room for");
            let mut names = builder.init_console_config().init_ports(length);
            for (index, name) in (0..).zip(ports) {
                names.set(index, name);
            }
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
        ("block", !reader.get_block()?.is_empty()),
        ("net", !reader.get_net()?.is_empty()),
        ("vsock", reader.has_vsock()),
        ("gpu", reader.get_gpu()),
        ("sound", reader.get_sound()),
        ("wayland", reader.get_wayland()),
        ("magma", reader.get_magma()),
    ];
    faults.extend(asked_for.iter().filter(|(_, asked)| *asked).map(|(field, _)| not_supported(field)));
    Ok(())
}
