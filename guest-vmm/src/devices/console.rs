//! The console.

use super::RequestedDevices;
use crate::ports::GuestPort;
use ::devices::virtio::console::{Console, MAX_NAMED_PORTS, NamedPort};
use guest_schema::{ConfigFault, ConsoleConfig, DevicesConfig};
use std::collections::BTreeSet;

/// The longest name of a port, in bytes.
const MAX_NAME: usize = 64;

/// Adds it, if it is asked for.
pub(super) fn add(config: &DevicesConfig, devices: &mut RequestedDevices) {
    let Some(ConsoleConfig { ports }) = &config.console else { return };
    let terminal = devices.outputs.add(GuestPort::Console);
    let named = ports.iter().map(|name| {
        let output = devices.outputs.add(GuestPort::Named(name.clone()));
        NamedPort { name: name.clone(), output }
    });
    let (spec, handle) = Console::spec("console", terminal, named.collect());
    devices.specs.push(spec);
    devices.ends.console = Some(handle);
}

/// At most so many ports as a console has, each with a name of its own that a guest's file system can have.
pub(super) fn faults(config: &DevicesConfig) -> Vec<ConfigFault> {
    let Some(ConsoleConfig { ports }) = &config.console else { return Vec::new() };
    let count = ports.len();
    if count > MAX_NAMED_PORTS {
        let problem = format!("{count} names are more than {MAX_NAMED_PORTS}");
        return vec![ConfigFault::new("consoleConfig.ports", problem)];
    }
    let mut known = BTreeSet::new();
    let faults = ports.iter().enumerate().filter_map(|(index, name)| {
        let problem = name_problem(name).or((!known.insert(name)).then_some("stands there twice"))?;
        let shown: String = name.chars().take(MAX_NAME).collect();
        Some(ConfigFault::new(format!("consoleConfig.ports[{index}]"), format!("{shown:?} {problem}")))
    });
    faults.collect()
}

fn name_problem(name: &str) -> Option<&'static str> {
    let may_be = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME {
        Some("has not 1 to 64 bytes")
    } else if !name.bytes().all(may_be) {
        Some("has other characters than letters, digits, '.', '_', ':' and '-'")
    } else if !name.as_bytes()[0].is_ascii_alphanumeric() {
        Some("does not begin with a letter or a digit")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(ports: &[&str]) -> Vec<String> {
        let ports = ports.iter().map(|name| (*name).to_owned()).collect();
        let config = DevicesConfig { console: Some(ConsoleConfig { ports }), ..DevicesConfig::default() };
        faults(&config).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ports_have_names_of_their_own_that_a_file_can_have() {
        let none: [&str; 0] = [];
        let long = "x".repeat(64);
        assert_eq!(told(&["org.qemu.guest_agent.0", "9", &long]), none);
        let bad = "has other characters than letters, digits, '.', '_', ':' and '-'";
        assert_eq!(
            told(&["", "a/b", "a", "..", "a", &format!("{long}y")]),
            [
                "consoleConfig.ports[0]: \"\" has not 1 to 64 bytes".to_owned(),
                format!("consoleConfig.ports[1]: \"a/b\" {bad}"),
                "consoleConfig.ports[3]: \"..\" does not begin with a letter or a digit".to_owned(),
                "consoleConfig.ports[4]: \"a\" stands there twice".to_owned(),
                format!("consoleConfig.ports[5]: \"{long}\" has not 1 to 64 bytes"),
            ]
        );
    }

    #[test]
    fn ports_are_bounded() {
        let names: Vec<String> = (0..16).map(|port| format!("port{port}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert!(told(&names[..15]).is_empty());
        assert_eq!(told(&names), ["consoleConfig.ports: 16 names are more than 15"]);
    }
}
