//! The memory device.

use super::RequestedDevices;
use ::devices::virtio::mem::{Geometry, GeometryError, Mem, MemHandle, SizeError};
use guest_schema::{ConfigFault, Failure, GuestConfig, GuestError, MemDeviceConfig};
use machine::layout::hotplug_region;

/// What is backed by huge pages is given back by them.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Adds it, if it is asked for.
pub(super) fn add(config: &GuestConfig, devices: &mut RequestedDevices) -> Result<(), Failure> {
    let Some(mem) = &config.devices.mem else { return Ok(()) };
    let unchecked = |problem: String| Failure::new(GuestError::BadConfig, format!("mem: {problem}"));
    let geometry = geometry(config, mem).map_err(|error| unchecked(error.to_string()))?;
    devices.hotplug = Some(geometry.region());
    let (spec, handle) = Mem::spec("mem", geometry);
    handle.request(mem.requested_bytes).map_err(|error| unchecked(error.to_string()))?;
    devices.specs.push(spec);
    devices.ends.mem = Some(handle);
    Ok(())
}

fn geometry(config: &GuestConfig, mem: &MemDeviceConfig) -> Result<Geometry, GeometryError> {
    let memory_bytes = config.memory.bytes.next_multiple_of(HUGE_PAGE_BYTES);
    let region = hotplug_region(memory_bytes, mem.region_bytes, mem.region_alignment_bytes);
    Geometry::new(region, mem.block_bytes)
}

/// What is wrong with it; `host_bytes` is the host's memory.
pub(super) fn faults(config: &GuestConfig, host_bytes: u64) -> Vec<ConfigFault> {
    let Some(mem) = &config.devices.mem else { return Vec::new() };
    match problem(config, mem, host_bytes) {
        Some((field, problem)) => vec![ConfigFault::new(format!("mem.{field}"), problem)],
        None => Vec::new(),
    }
}

/// The first thing that is wrong: each check needs those before it.
fn problem(config: &GuestConfig, mem: &MemDeviceConfig, host_bytes: u64) -> Option<(&'static str, String)> {
    let &MemDeviceConfig { block_bytes, region_bytes, region_alignment_bytes: alignment, requested_bytes } =
        mem;
    if config.memory.huge_pages && block_bytes < HUGE_PAGE_BYTES {
        return Some(("blockBytes", format!("{block_bytes} is less than a huge page of {HUGE_PAGE_BYTES}")));
    }
    if region_bytes > host_bytes {
        return Some(("regionBytes", format!("{region_bytes} is more than the host's {host_bytes}")));
    }
    if !alignment.is_power_of_two() || alignment < block_bytes || alignment > host_bytes.next_power_of_two() {
        let problem = format!("{alignment} is no power of two from a block to the host's memory");
        return Some(("regionAlignmentBytes", problem));
    }
    if config.memory.bytes > host_bytes {
        // It is a fault of its own.
        return None;
    }
    let geometry = match geometry(config, mem) {
        Ok(geometry) => geometry,
        Err(error @ GeometryError::BlockBytes(_)) => return Some(("blockBytes", error.to_string())),
        Err(error) => return Some(("regionBytes", error.to_string())),
    };
    let refused = geometry.check_size(requested_bytes).err();
    refused.map(|error| ("requestedBytes", error.to_string()))
}

/// Asks a device for another size.
pub(crate) fn request(mem: &MemHandle, bytes: u64) -> Result<(), Failure> {
    mem.request(bytes).map_err(|error| {
        let code = match error {
            SizeError::NotWhole { .. } => GuestError::BadConfig,
            SizeError::TooLarge { .. } => GuestError::LimitExceeded,
        };
        Failure::new(code, format!("bytes: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::config;
    use guest_schema::{DevicesConfig, MemoryConfig};

    const HOST: u64 = 8 << 30;

    fn faults_of(mem: MemDeviceConfig, huge_pages: bool) -> Vec<String> {
        let devices = DevicesConfig { mem: Some(mem), ..DevicesConfig::default() };
        let memory = MemoryConfig { huge_pages, ..MemoryConfig::of_bytes(1 << 30) };
        let faults = faults(&GuestConfig { devices, memory, ..config() }, HOST);
        faults.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_fault_is_named_with_its_value() {
        let good = MemDeviceConfig { requested_bytes: 4 << 20, ..MemDeviceConfig::of_region(1 << 30) };
        let none: [&str; 0] = [];
        assert_eq!(faults_of(good, true), none);
        let faulty = [
            (
                MemDeviceConfig { region_bytes: 9 << 30, ..good },
                "mem.regionBytes: 9663676416 is more than the host's 8589934592",
            ),
            (
                MemDeviceConfig { region_bytes: 0, ..good },
                "mem.regionBytes: a region of 0 bytes at 0x100000000 is not of whole blocks of 2097152 bytes",
            ),
            (
                MemDeviceConfig { block_bytes: 3 << 20, ..good },
                "mem.blockBytes: blocks of 3145728 bytes: a power of two from 4096 on is needed",
            ),
            (
                MemDeviceConfig { block_bytes: 4096, region_bytes: 8 << 30, ..good },
                "mem.regionBytes: 2097152 blocks are more than 1048576",
            ),
            (
                MemDeviceConfig { region_alignment_bytes: 0, ..good },
                "mem.regionAlignmentBytes: 0 is no power of two from a block to the host's memory",
            ),
            (
                MemDeviceConfig { region_alignment_bytes: 4096, ..good },
                "mem.regionAlignmentBytes: 4096 is no power of two from a block to the host's memory",
            ),
            (
                MemDeviceConfig { region_alignment_bytes: 1 << 63, ..good },
                "mem.regionAlignmentBytes: 9223372036854775808 is no power of two from a block to the host's memory",
            ),
            (
                MemDeviceConfig { requested_bytes: 1, ..good },
                "mem.requestedBytes: 1 bytes are not whole blocks of 2097152 bytes",
            ),
            (
                MemDeviceConfig { requested_bytes: 2 << 30, ..good },
                "mem.requestedBytes: 2147483648 bytes are more than the region's 1073741824",
            ),
        ];
        for (mem, fault) in faulty {
            assert_eq!(faults_of(mem, false), [fault]);
        }
        let small = MemDeviceConfig { block_bytes: 4096, ..good };
        assert_eq!(faults_of(small, true), ["mem.blockBytes: 4096 is less than a huge page of 2097152"]);
    }
}
