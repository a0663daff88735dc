//! What is in a snapshot's file, for people and for programs.

use guest_client::snapshot_file::{Manifest, SnapshotFile, UnitState};
use guest_client::{BlockMode, GuestConfig, OnReset};
use guest_saved_state::saved_state_roots;
use indicatif::BinaryBytes;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::fmt::Write;

/// Text of a file that may be anybody's, fit for a terminal.
fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A moment in µs since 1970, in UTC, to the second; the number itself if no calendar goes so far.
fn utc(us: u64) -> String {
    let moment = i64::try_from(us).ok().and_then(|us| Timestamp::from_microsecond(us).ok());
    moment.map_or_else(|| format!("{us} µs"), |moment| moment.strftime("%F %T UTC").to_string())
}

/// The config that is in it, if it can be read.
fn config(file: &SnapshotFile) -> Result<GuestConfig, String> {
    GuestConfig::decode(&file.state().config).map(|read| read.config).map_err(|error| error.to_string())
}

/// What a unit has saved, as text; why not, if this version does not know it.
fn state(unit: &UnitState) -> Result<String, String> {
    saved_state_roots().describe(&unit.type_name, &unit.value).map_err(|error| guest_schema::chain(&error))
}

/// All but the units' states.
pub fn text(file: &SnapshotFile, verified: bool) -> String {
    let manifest = file.manifest();
    let mut text = String::new();
    let mut line =
        |name: &str, value: &str| writeln!(text, "{name:<12}{}", shown(value)).expect("a string takes all");
    line("guest", &manifest.parent);
    line("taken", &utc(manifest.taken_at_us));
    line("guestd", &manifest.product_version);
    line("memory", &memory(manifest));
    if let (Some(base), Some(checksum)) = (&manifest.base, file.base_checksum()) {
        line("base", &format!("{} of {}, memory {checksum}", base.parent, utc(base.taken_at_us)));
    }
    line("checksum", &format!("{}{}", file.memory_checksum(), if verified { ", verified" } else { "" }));
    line("VPs", &manifest.vps.to_string());
    match config(file) {
        Ok(config) => config_lines(&config, line),
        Err(error) => line("config", &format!("unreadable: {error}")),
    }
    text.push('\n');
    text + &table(&["UNIT", "STATE", "BYTES"], &unit_rows(file))
        + "\n"
        + &table(&["PART", "AT", "BYTES"], &part_rows(manifest))
}

fn memory(manifest: &Manifest) -> String {
    let Manifest { memory_bytes, hotplug_bytes, data_bytes, .. } = *manifest;
    let region = match hotplug_bytes {
        0 => String::new(),
        bytes => format!(" and a region of {} for more", BinaryBytes(bytes)),
    };
    format!("{}{region}, {} of it in the file", BinaryBytes(memory_bytes), BinaryBytes(data_bytes))
}

fn config_lines(config: &GuestConfig, mut line: impl FnMut(&str, &str)) {
    let devices = &config.devices;
    if !config.cmdline.is_empty() {
        line("cmdline", &config.cmdline);
    }
    line("on reset", on_reset(config.on_reset));
    for disk in &devices.block {
        let id = if disk.id.is_empty() { "without an id" } else { &disk.id };
        line("disk", &format!("{id}, {}, {} queues", mode(disk.mode), disk.queues));
    }
    for net in &devices.net {
        line(
            "network",
            &net.mac.map_or_else(|| "an address that was made up".to_owned(), |mac| mac.to_string()),
        );
    }
    let others = others(config);
    if !others.is_empty() {
        line("devices", &others.join(", "));
    }
}

fn others(config: &GuestConfig) -> Vec<String> {
    let devices = &config.devices;
    let there = [
        (devices.rng, "rng"),
        (devices.vsock.is_some(), "vsock"),
        (devices.balloon, "balloon"),
        (devices.mem.is_some(), "mem"),
        (config.debug_exit, "debug exit"),
    ];
    let mut others: Vec<_> = there.iter().filter(|(is, _)| *is).map(|(_, name)| (*name).to_owned()).collect();
    others.extend(devices.console.as_ref().map(|console| match &console.ports[..] {
        [] => "console".to_owned(),
        ports => format!("console with {}", ports.join(", ")),
    }));
    others
}

fn on_reset(on_reset: OnReset) -> &'static str {
    match on_reset {
        OnReset::Restart => "restart",
        OnReset::Stop => "stop",
    }
}

fn mode(mode: BlockMode) -> &'static str {
    match mode {
        BlockMode::ReadWrite => "read-write",
        BlockMode::ReadOnly => "read-only",
        BlockMode::VolatileWrite => "volatile",
    }
}

fn unit_rows(file: &SnapshotFile) -> Vec<[String; 3]> {
    let row = |unit: &UnitState| [shown(&unit.name), shown(&unit.type_name), unit.value.len().to_string()];
    file.state().units.iter().map(row).collect()
}

fn part_rows(manifest: &Manifest) -> Vec<[String; 3]> {
    let parts = manifest.parts.iter();
    parts.map(|part| [part.name.clone(), part.offset.to_string(), part.length.to_string()]).collect()
}

/// Columns, the last of numbers.
fn table(head: &[&str; 3], rows: &[[String; 3]]) -> String {
    let head = head.map(str::to_owned);
    let all: Vec<_> = [&head].into_iter().chain(rows).collect();
    let width = |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (a, b, c) = (width(0), width(1), width(2));
    all.iter().map(|[one, two, three]| format!("{one:a$}  {two:b$}  {three:>c$}\n")).collect()
}

/// What the units have saved; of one of them unless its name is empty. Nothing if it is not asked for.
pub fn states(file: &SnapshotFile, asked: Option<&str>) -> String {
    let Some(asked) = asked else { return String::new() };
    let units = file.state().units.iter().filter(|unit| asked.is_empty() || unit.name == asked);
    units.map(state_text).collect()
}

fn state_text(unit: &UnitState) -> String {
    let lines = state(unit).unwrap_or_else(|error| format!("({error})"));
    let lines: String = lines.lines().map(|line| format!("  {}\n", shown(line))).collect();
    format!("\n{}\n{lines}", shown(&unit.name))
}

/// All of it as one object.
pub fn as_json(file: &SnapshotFile, verified: bool) -> String {
    let manifest = file.manifest();
    let base = manifest.base.as_ref().zip(file.base_checksum()).map(|(base, checksum)| {
        json!({ "memory_checksum": checksum.to_string(), "parent": base.parent, "taken_at_us": base.taken_at_us })
    });
    let Manifest {
        product_version,
        parent,
        taken_at_us,
        memory_bytes,
        hotplug_bytes,
        data_bytes,
        vps,
        disks,
        ..
    } = manifest;
    let object = json!({
        "format": guest_client::snapshot_file::FORMAT, "version": product_version, "parent": parent,
        "taken_at_us": taken_at_us, "bytes": file.file_bytes(), "memory_bytes": memory_bytes,
        "hotplug_bytes": hotplug_bytes, "data_bytes": data_bytes,
        "memory_checksum": file.memory_checksum().to_string(), "verified": verified, "base": base, "vps": vps,
        "disks": disks, "networks": manifest.networks, "config": config(file).ok().as_ref().map(config_json),
        "units": file.state().units.iter().map(unit_json).collect::<Vec<_>>(), "parts": parts_json(manifest),
    });
    format!("{object}\n")
}

fn config_json(config: &GuestConfig) -> Value {
    let disks = config
        .devices
        .block
        .iter()
        .map(|disk| json!({ "id": disk.id, "mode": mode(disk.mode), "queues": disk.queues }));
    let networks = config.devices.net.iter().map(|net| net.mac.map(|mac| mac.to_string()));
    json!({
        "cmdline": config.cmdline, "cpus": config.cpus, "on_reset": on_reset(config.on_reset),
        "disks": disks.collect::<Vec<_>>(), "networks": networks.collect::<Vec<_>>(), "devices": others(config),
    })
}

fn unit_json(unit: &UnitState) -> Value {
    json!({ "name": unit.name, "type": unit.type_name, "bytes": unit.value.len(), "state": state(unit).ok() })
}

fn parts_json(manifest: &Manifest) -> Vec<Value> {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let part = |part: &guest_client::snapshot_file::PartEntry| json!({ "name": part.name, "at": part.offset, "bytes": part.length, "checksum": hex(&part.checksum) });
    manifest.parts.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_dates_and_those_beyond_the_calendar_numbers() {
        assert_eq!(utc(1_795_303_659_000_007), "2026-11-21 23:27:39 UTC");
        assert_eq!(utc(u64::MAX), "18446744073709551615 µs");
    }
}
