//! A guest's config on its way in: what was asked for, the files already taken from the channel, and the limits it is held to.

use crate::devices::Backends;
use crate::saved::SavedFiles;
use crate::snapshot::OpenSnapshot;
use crate::{client_units, devices};
use capnp::Error;
use guest_schema::config_capnp::guest_config;
use guest_schema::{
    ConfigFault, Failure, FileSource, GuestConfig, GuestError, GuestShape, MemoryConfig, OnReset, ReadConfig,
    VpAffinity,
};
use guest_transport::Descriptors;
use machine::MachineShape;
use machine::layout::COMMAND_LINE;
use machine::memory::{MINIMUM_BYTES, MemoryImage, MemoryOptions};
use processor::{CpuidMask, HostCpus, TimePolicy};
use rustix::fs::FileType;
use state_unit::SavedStateUnit;
use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::OwnedFd;

/// The longest command line, in bytes, without the NUL behind it.
const MAX_CMDLINE: u64 = COMMAND_LINE.end - COMMAND_LINE.start - 1;

/// The most masks of CPUID: many times what a CPU has leaves.
const MAX_CPUID_MASKS: usize = 1024;

/// What the host has for guests.
pub(crate) struct HostLimits {
    /// The most VPs of a guest.
    pub max_vps: u32,
    /// The host's memory.
    pub memory_bytes: u64,
    /// The CPUs that the VMM may use.
    pub cpus: HostCpus,
}

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
    pub backends: Backends,
    /// The snapshot's file that it goes on from, until that is opened. The config is grants so long.
    pub saved: Option<SavedFiles>,
    /// What it goes on from, in place of being booted.
    pub restored: Option<RestoredState>,
    faults: Vec<ConfigFault>,
}

/// The state that a guest goes on from.
pub(crate) struct RestoredState {
    pub units: Vec<SavedStateUnit>,
    pub image: MemoryImage,
}

impl RequestedGuest {
    /// Reads a config, and takes its files from the channel on which it came: whatever becomes of it, they are closed with it.
    pub fn read(reader: guest_config::Reader<'_>, descriptors: &Descriptors) -> Result<Self, Error> {
        let ReadConfig { config, faults } = GuestConfig::read(reader)?;
        Ok(Self::take(config, faults, descriptors))
    }

    /// The same for a guest that goes on from a snapshot: the config has what is granted to it.
    pub fn read_grants(
        reader: guest_config::Reader<'_>,
        descriptors: &Descriptors,
        snapshot: OpenSnapshot,
    ) -> Result<Self, Error> {
        let ReadConfig { config: grants, mut faults } = GuestConfig::read(reader)?;
        if grants.saved.is_some() {
            let problem = "a guest that was launched from a snapshot goes on from that one";
            faults.push(ConfigFault::new("source.saved", problem));
        }
        Ok(Self::take(grants, faults, descriptors).going_on_from(snapshot))
    }

    /// The same once it is known what it goes on from; the config was grants so far.
    pub fn going_on_from(self, snapshot: OpenSnapshot) -> Self {
        let Self { config: grants, mut backends, mut faults, .. } = self;
        let config = snapshot.config_with(grants, &mut faults);
        backends.serve(&config.devices);
        let OpenSnapshot { units, image, kernel, ramdisk, .. } = snapshot;
        Self {
            config,
            kernel: Some(Source::Descriptor(kernel.into())),
            ramdisk: ramdisk.map(|ramdisk| Source::Descriptor(ramdisk.into())),
            backends,
            saved: None,
            restored: Some(RestoredState { units, image }),
            faults,
        }
    }

    fn take(config: GuestConfig, mut faults: Vec<ConfigFault>, descriptors: &Descriptors) -> Self {
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
        let saved = &config.saved;
        let saved = saved.as_ref().and_then(|saved| SavedFiles::take(saved, descriptors, &mut faults));
        let backends = Backends::take(&config.devices, descriptors, &mut faults);
        Self { config, kernel, ramdisk, backends, saved, restored: None, faults }
    }

    pub fn on_reset(&self) -> OnReset {
        self.config.on_reset
    }

    /// Holds the config to its limits: one failure lists every fault. What a snapshot has and the host has not is
    /// `snapshotIncompatible`.
    pub fn check(&self, limits: &HostLimits) -> Result<(), Failure> {
        let Self { config, restored, .. } = self;
        let mut faults = self.faults.clone();
        if config.saved.is_some() {
            // It was not opened, for reasons that are among the faults.
            return refused(&faults).map_or(Ok(()), Err);
        }
        if config.kernel.is_none() && restored.is_none() {
            faults.push(ConfigFault::new("source.boot.kernel", "none was given"));
        }
        let own = own_faults(config, limits);
        if restored.is_none() {
            faults.extend(own.clone());
        }
        faults.extend(devices::faults(config));
        faults.extend(client_units::faults(&config.units));
        refused(&faults).or_else(|| incompatible(&own)).map_or(Ok(()), Err)
    }
}

fn incompatible(faults: &[ConfigFault]) -> Option<Failure> {
    refused(faults).map(|failure| Failure { code: GuestError::SnapshotIncompatible, ..failure })
}

/// One failure that lists every fault, if there are any.
pub(crate) fn refused(faults: &[ConfigFault]) -> Option<Failure> {
    let details: Vec<String> = faults.iter().map(ToString::to_string).collect();
    (!faults.is_empty()).then(|| Failure::new(GuestError::BadConfig, details.join("; ")))
}

/// An open descriptor of a regular file, taken from the channel. Opened by the client with the client's rights.
pub(crate) fn regular_file(descriptors: &Descriptors, number: u64) -> Result<OwnedFd, String> {
    let descriptor = descriptors.take(number).map_err(|error| error.to_string())?;
    let stat = rustix::fs::fstat(&descriptor).map_err(|error| format!("descriptor {number}: {error}"))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(descriptor),
        other => Err(format!("descriptor {number} is no regular file but {other:?}")),
    }
}

/// The host's CPUs of each VP, if the config names any.
fn vp_cpus(config: &GuestConfig) -> Vec<Option<HostCpus>> {
    if config.affinity == VpAffinity::Any {
        return Vec::new();
    }
    let cpus = |vp| Some(config.affinity.of_vp(vp)?.iter().copied().collect());
    (0..config.cpus as usize).map(cpus).collect()
}

/// The masks as processors have them.
fn cpuid_masks(masks: &[guest_schema::CpuidMask]) -> Vec<CpuidMask> {
    let convert = |&guest_schema::CpuidMask { leaf, subleaf, eax, ebx, ecx, edx }| CpuidMask {
        function: leaf,
        index: subleaf,
        eax,
        ebx,
        ecx,
        edx,
    };
    masks.iter().map(convert).collect()
}

/// What a machine of this shape begins with.
pub(crate) fn machine_shape(shape: &GuestShape) -> MachineShape {
    let GuestShape { vps, memory_bytes, hotplug, cpuid_mask, catch_up_time } = shape;
    MachineShape {
        cpuid_mask: cpuid_masks(cpuid_mask),
        time: time_policy(*catch_up_time),
        hotplug: hotplug.clone(),
        ..MachineShape::new(*vps, *memory_bytes)
    }
}

/// The same with what only one guest has: its own CPUs, and memory that is there at once.
pub(crate) fn requested_shape(config: &GuestConfig, hotplug: Option<Range<u64>>) -> MachineShape {
    let MemoryConfig { bytes, huge_pages, prefault, lock } = config.memory;
    MachineShape {
        affinity: vp_cpus(config),
        cpuid_mask: cpuid_masks(&config.cpuid_mask),
        time: time_policy(config.catch_up_time),
        memory: MemoryOptions { huge_pages, prefault, lock },
        hotplug,
        ..MachineShape::new(config.cpus, bytes)
    }
}

fn time_policy(catch_up: bool) -> TimePolicy {
    if catch_up { TimePolicy::CatchUp } else { TimePolicy::Hidden }
}

/// What of the guest itself cannot be.
fn own_faults(config: &GuestConfig, limits: &HostLimits) -> Vec<ConfigFault> {
    let &HostLimits { max_vps, memory_bytes: host_bytes, cpus: _ } = limits;
    let mut faults = Vec::new();
    let mut fault = |field: &str, problem: String| faults.push(ConfigFault::new(field, problem));
    if config.cpus == 0 || config.cpus > max_vps {
        fault("cpus", format!("{} is not from 1 to {max_vps}", config.cpus));
    }
    let masks = config.cpuid_mask.len();
    if masks > MAX_CPUID_MASKS {
        fault("cpuidMask", format!("{masks} entries are more than {MAX_CPUID_MASKS}"));
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
    faults.extend(affinity_faults(config, limits));
    faults.extend(devices::own_faults(config, host_bytes));
    faults
}

/// One fault a list, of the first CPU there that the VMM may not use.
fn affinity_faults(config: &GuestConfig, limits: &HostLimits) -> Vec<ConfigFault> {
    let HostLimits { max_vps, cpus: allowed, .. } = limits;
    let fault = |field: String, cpus: &BTreeSet<u32>| {
        let cpu = cpus.iter().find(|cpu| !allowed.contains(**cpu))?;
        Some(ConfigFault::new(
            field,
            format!("host CPU {cpu} is none of those that the VMM may use, {allowed}"),
        ))
    };
    match &config.affinity {
        VpAffinity::Any => Vec::new(),
        VpAffinity::All(cpus) => fault("affinity.all".into(), cpus).into_iter().collect(),
        VpAffinity::Each(sets) if sets.len() > config.cpus as usize => {
            let problem = format!("{} lists are more than the {} VPs", sets.len(), config.cpus);
            vec![ConfigFault::new("affinity.each", problem)]
        }
        VpAffinity::Each(sets) => {
            let faults = |(vp, cpus)| fault(format!("affinity.each[{vp}]"), cpus);
            // `cpus` may be as wrong.
            sets.iter().take(*max_vps as usize).enumerate().filter_map(faults).collect()
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use guest_schema::MemoryConfig;

    pub(crate) fn config() -> GuestConfig {
        GuestConfig::new(Some(FileSource::Descriptor(0)), 1 << 20)
    }

    /// Of a host whose CPUs 0, 1 and 3 are the VMM's.
    fn limits(max_vps: u32, memory_bytes: u64) -> HostLimits {
        HostLimits { max_vps, memory_bytes, cpus: HostCpus::from_iter([0, 1, 3]) }
    }

    #[test]
    fn the_limits_themselves_are_allowed() {
        assert_eq!(own_faults(&config(), &limits(1, 1 << 20)), []);
        let most = GuestConfig { cpus: 8, cmdline: "x".repeat(65535), ..config() };
        assert_eq!(own_faults(&most, &limits(8, 1 << 30)), []);
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
        let faults: Vec<String> =
            own_faults(&bad, &limits(8, 1 << 30)).iter().map(ToString::to_string).collect();
        assert_eq!(
            faults,
            [
                "cpus: 0 is not from 1 to 8",
                "memory.bytes: 4096 is below the least of 1048576",
                "source.boot.cmdline: 65538 bytes are more than 65535",
                "source.boot.cmdline: there is a NUL at byte 1",
            ]
        );
        let large = GuestConfig { cpus: 9, memory: MemoryConfig::of_bytes(1 << 40), ..config() };
        let faults: Vec<String> =
            own_faults(&large, &limits(8, 1 << 30)).iter().map(ToString::to_string).collect();
        assert_eq!(
            faults,
            ["cpus: 9 is not from 1 to 8", "memory.bytes: 1099511627776 is more than the host's 1073741824"]
        );
    }

    #[test]
    fn vps_are_given_only_cpus_that_the_vmm_has() {
        let faults = |cpus, affinity| {
            let config = GuestConfig { cpus, affinity, ..config() };
            let faults = own_faults(&config, &limits(8, 1 << 30));
            faults.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        assert_eq!(faults(1, VpAffinity::All([0, 1, 3].into())), none);
        assert_eq!(faults(3, VpAffinity::Each(vec![BTreeSet::new(), [3].into()])), none);
        assert_eq!(
            faults(1, VpAffinity::All([1, 2, 4].into())),
            ["affinity.all: host CPU 2 is none of those that the VMM may use, 0-1,3"]
        );
        assert_eq!(
            faults(3, VpAffinity::Each(vec![[7].into(), [0].into(), [0, u32::MAX].into()])),
            [
                "affinity.each[0]: host CPU 7 is none of those that the VMM may use, 0-1,3",
                "affinity.each[2]: host CPU 4294967295 is none of those that the VMM may use, 0-1,3",
            ]
        );
        let many = VpAffinity::Each(vec![[7].into(); 3]);
        assert_eq!(faults(2, many), ["affinity.each: 3 lists are more than the 2 VPs"]);
    }

    #[test]
    fn each_vp_gets_its_own_cpus() {
        let cpus = |affinity| vp_cpus(&GuestConfig { cpus: 3, affinity, ..config() });
        let one = |cpu| Some(HostCpus::from_iter([cpu]));
        assert_eq!(cpus(VpAffinity::Any), []);
        assert_eq!(cpus(VpAffinity::All([1].into())), [one(1), one(1), one(1)]);
        assert_eq!(cpus(VpAffinity::Each(vec![[1].into(), BTreeSet::new()])), [one(1), None, None]);
    }

    #[test]
    fn what_is_made_ahead_for_a_shape_is_what_its_guest_asks_for() {
        let mask = guest_schema::CpuidMask { leaf: 7, subleaf: Some(0), ebx: 1, ..Default::default() };
        let configs = [
            config(),
            GuestConfig { cpus: 3, cpuid_mask: vec![mask], catch_up_time: true, ..config() },
            GuestConfig { memory: MemoryConfig::of_bytes(5 << 30), ..config() },
        ];
        for (config, hotplug) in configs.iter().zip([None, Some(6 << 30..7 << 30), None]) {
            let shape = GuestShape::of(config, hotplug.clone()).expect("ordinary");
            assert_eq!(machine_shape(&shape), requested_shape(config, hotplug));
        }
    }

    #[test]
    fn masks_are_bounded() {
        let masks = |count| GuestConfig { cpuid_mask: vec![Default::default(); count], ..config() };
        assert_eq!(own_faults(&masks(1024), &limits(8, 1 << 30)), []);
        let faults = own_faults(&masks(1025), &limits(8, 1 << 30));
        assert_eq!(faults[0].to_string(), "cpuidMask: 1025 entries are more than 1024");
    }
}
