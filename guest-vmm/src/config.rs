//! A guest's config on its way in: what was asked for, the files already taken from the channel, and the limits it is held to.

use crate::client_units;
use capnp::Error;
use guest_schema::config_capnp::guest_config;
use guest_schema::{ConfigFault, Failure, FileSource, GuestConfig, GuestError, OnReset, ReadConfig};
use guest_transport::Descriptors;
use machine::layout::COMMAND_LINE;
use machine::memory::MINIMUM_BYTES;
use rustix::fs::FileType;
use std::os::fd::OwnedFd;

/// The longest command line, in bytes, without the NUL behind it.
const MAX_CMDLINE: u64 = COMMAND_LINE.end - COMMAND_LINE.start - 1;

/// Where a file comes from, its descriptor in hand.
pub(crate) enum Source {
    Descriptor(OwnedFd),
    File(guest_schema::common_capnp::file::Client),
}

/// What `create` asked for.
pub(crate) struct RequestedGuest {
    pub config: GuestConfig,
    pub kernel: Option<Source>,
    pub ramdisk: Option<Source>,
    faults: Vec<ConfigFault>,
}

impl RequestedGuest {
    /// Reads a config, and takes its files from the channel on which it came: whatever becomes of it, they are closed with it.
    pub fn read(reader: guest_config::Reader<'_>, descriptors: &Descriptors) -> Result<Self, Error> {
        let ReadConfig { config, mut faults } = GuestConfig::read(reader)?;
        let mut take = |source: &Option<FileSource>, field: &str| match source {
            None => None,
            Some(FileSource::File(file)) => Some(Source::File(file.clone())),
            Some(FileSource::Descriptor(number)) => match regular_file(descriptors, *number) {
                Ok(descriptor) => Some(Source::Descriptor(descriptor)),
                Err(problem) => {
                    faults.push(ConfigFault::new(field, problem));
                    None
                }
            },
        };
        let kernel = take(&config.kernel, "source.boot.kernel");
        let ramdisk = take(&config.ramdisk, "source.boot.ramdisk");
        Ok(Self { config, kernel, ramdisk, faults })
    }

    pub fn on_reset(&self) -> OnReset {
        self.config.on_reset
    }

    /// Holds the config to its limits: one failure lists every fault.
    pub fn check(&self, max_vps: u32, host_bytes: u64) -> Result<(), Failure> {
        let mut faults = self.faults.clone();
        faults.extend(limit_faults(&self.config, max_vps, host_bytes));
        refused(&faults).map_or(Ok(()), Err)
    }
}

/// One failure that lists every fault, if there are any.
pub(crate) fn refused(faults: &[ConfigFault]) -> Option<Failure> {
    let details: Vec<String> = faults.iter().map(ToString::to_string).collect();
    (!faults.is_empty()).then(|| Failure::new(GuestError::BadConfig, details.join("; ")))
}

/// An open descriptor of a regular file. Opened by the client with the client's rights.
fn regular_file(descriptors: &Descriptors, number: u64) -> Result<OwnedFd, String> {
    let descriptor = descriptors.take(number).map_err(|error| error.to_string())?;
    let stat = rustix::fs::fstat(&descriptor).map_err(|error| format!("descriptor {number}: {error}"))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(descriptor),
        other => Err(format!("descriptor {number} is no regular file but {other:?}")),
    }
}

fn limit_faults(config: &GuestConfig, max_vps: u32, host_bytes: u64) -> Vec<ConfigFault> {
    let mut faults = Vec::new();
    let mut fault = |field: &str, problem: String| faults.push(ConfigFault::new(field, problem));
    if config.kernel.is_none() {
        fault("source.boot.kernel", "none was given".into());
    }
    if config.cpus == 0 || config.cpus > max_vps {
        fault("cpus", format!("{} is not from 1 to {max_vps}", config.cpus));
    }
    let bytes = config.memory.bytes;
    if bytes < MINIMUM_BYTES {
        fault("memory.bytes", format!("{bytes} is below the least of {MINIMUM_BYTES}"));
    } else if bytes > host_bytes {
        fault("memory.bytes", format!("{bytes} is more than the host's {host_bytes}"));
    }
    let cmdline = &config.cmdline;
    if cmdline.len() as u64 > MAX_CMDLINE {
        fault("source.boot.cmdline", format!("{} bytes are more than {MAX_CMDLINE}", cmdline.len()));
    }
    if let Some(position) = cmdline.find('\0') {
        fault("source.boot.cmdline", format!("there is a NUL at byte {position}"));
    }
    faults.extend(client_units::faults(&config.units));
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_schema::MemoryConfig;

    fn config() -> GuestConfig {
        GuestConfig {
            kernel: Some(FileSource::Descriptor(0)),
            ramdisk: None,
            cmdline: String::new(),
            cpus: 1,
            memory: MemoryConfig::of_bytes(1 << 20),
            on_reset: OnReset::Restart,
            units: Vec::new(),
            catch_up_time: false,
        }
    }

    #[test]
    fn the_limits_themselves_are_allowed() {
        assert_eq!(limit_faults(&config(), 1, 1 << 20), []);
        let most = GuestConfig { cpus: 8, cmdline: "x".repeat(65535), ..config() };
        assert_eq!(limit_faults(&most, 8, 1 << 30), []);
    }

    #[test]
    fn every_fault_is_listed_with_its_value() {
        let bad = GuestConfig {
            kernel: None,
            cpus: 0,
            memory: MemoryConfig::of_bytes(4096),
            cmdline: format!("a\0{}", "x".repeat(65536)),
            ..config()
        };
        let faults: Vec<String> = limit_faults(&bad, 8, 1 << 30).iter().map(ToString::to_string).collect();
        assert_eq!(
            faults,
            [
                "source.boot.kernel: none was given",
                "cpus: 0 is not from 1 to 8",
                "memory.bytes: 4096 is below the least of 1048576",
                "source.boot.cmdline: 65538 bytes are more than 65535",
                "source.boot.cmdline: there is a NUL at byte 1",
            ]
        );
        let large = GuestConfig { cpus: 9, memory: MemoryConfig::of_bytes(1 << 40), ..config() };
        let faults: Vec<String> = limit_faults(&large, 8, 1 << 30).iter().map(ToString::to_string).collect();
        assert_eq!(
            faults,
            ["cpus: 9 is not from 1 to 8", "memory.bytes: 1099511627776 is more than the host's 1073741824"]
        );
    }
}
