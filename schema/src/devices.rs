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
        Ok(Self {
            rng: reader.get_rng(),
            balloon: reader.get_balloon(),
            console: read_console(reader, faults)?,
        })
    }

    /// Writes it into a config.
    pub(crate) fn write(&self, mut builder: wire::guest_config::Builder<'_>) {
        let Self { rng, balloon, console } = self;
        builder.set_rng(*rng);
        builder.set_balloon(*balloon);
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
        ("mem", reader.has_mem()),
        ("gpu", reader.get_gpu()),
        ("sound", reader.get_sound()),
        ("wayland", reader.get_wayland()),
        ("magma", reader.get_magma()),
    ];
    faults.extend(asked_for.iter().filter(|(_, asked)| *asked).map(|(field, _)| not_supported(field)));
    Ok(())
}
