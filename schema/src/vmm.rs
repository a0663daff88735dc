//! What the service and its VMMs tell each other on their private channel.

use crate::config::{read_cpuid_mask, write_cpuid_mask};
use crate::vmm_capnp::guest_shape as wire;
use crate::{CpuidMask, GuestConfig, MemoryConfig, VpAffinity};
use std::ops::Range;

/// What a guest's memory, partition and VPs depend on, so far as they can be made before it is known whose they are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestShape {
    /// How many VPs.
    pub vps: u32,
    /// The memory's size in bytes, without the region for memory that is plugged later.
    pub memory_bytes: u64,
    /// That region, in guest physical addresses.
    pub hotplug: Option<Range<u64>>,
    /// What is hidden from the VPs in CPUID.
    pub cpuid_mask: Vec<CpuidMask>,
    /// Whether the clocks jump over the time during which the guest does not run.
    pub catch_up_time: bool,
}

impl GuestShape {
    /// The shape of a guest with this config and this region for memory that is plugged later. `None` if its memory is all there at
    /// once, which is too dear ahead, or if its VPs are kept on CPUs.
    pub fn of(config: &GuestConfig, hotplug: Option<Range<u64>>) -> Option<Self> {
        let MemoryConfig { bytes, huge_pages, prefault, lock } = config.memory;
        let is_ordinary = !(huge_pages || prefault || lock) && config.affinity == VpAffinity::Any;
        is_ordinary.then(|| Self {
            vps: config.cpus,
            memory_bytes: bytes,
            hotplug,
            cpuid_mask: config.cpuid_mask.clone(),
            catch_up_time: config.catch_up_time,
        })
    }

    /// Reads it from a message.
    ///
    /// # Errors
    /// If the message is malformed, or has a kind of mask that is not known here.
    pub fn read(reader: wire::Reader<'_>) -> capnp::Result<Self> {
        let mut faults = Vec::new();
        let cpuid_mask = read_cpuid_mask(reader.get_cpuid_mask()?, &mut faults);
        if let Some(fault) = faults.first() {
            return Err(capnp::Error::failed(fault.to_string()));
        }
        let hotplug = reader.get_hotplug_start()..reader.get_hotplug_end();
        Ok(Self {
            vps: reader.get_vps(),
            memory_bytes: reader.get_memory_bytes(),
            hotplug: (!hotplug.is_empty()).then_some(hotplug),
            cpuid_mask,
            catch_up_time: reader.get_catch_up_time(),
        })
    }

    /// Writes it into a message.
    pub fn write(&self, mut builder: wire::Builder<'_>) {
        let Self { vps, memory_bytes, hotplug, cpuid_mask, catch_up_time } = self;
        builder.set_vps(*vps);
        builder.set_memory_bytes(*memory_bytes);
        let hotplug = hotplug.clone().unwrap_or_default();
        builder.set_hotplug_start(hotplug.start);
        builder.set_hotplug_end(hotplug.end);
        builder.set_catch_up_time(*catch_up_time);
        let length = u32::try_from(cpuid_mask.len()).expect("a list of 32 bits' length");
        write_cpuid_mask(cpuid_mask, builder.init_cpuid_mask(length));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn config() -> GuestConfig {
        GuestConfig { cpus: 3, catch_up_time: true, ..GuestConfig::new(None, 5 << 30) }
    }

    #[test]
    fn a_shape_is_read_as_it_was_written() {
        let mask = CpuidMask { leaf: 7, subleaf: Some(1), eax: 1, ebx: 2, ecx: 3, edx: 4 };
        let shape = GuestShape {
            cpuid_mask: vec![mask, CpuidMask { subleaf: None, ..mask }],
            ..GuestShape::of(&config(), Some(6 << 30..7 << 30)).unwrap()
        };
        for shape in [shape, GuestShape::default()] {
            let mut message = capnp::message::Builder::new_default();
            shape.write(message.init_root());
            let reader = message.get_root_as_reader::<wire::Reader<'_>>().unwrap();
            assert_eq!(GuestShape::read(reader).unwrap(), shape);
        }
    }

    #[test]
    fn what_costs_memory_or_has_its_own_cpus_is_not_made_ahead() {
        let shape = |change: fn(&mut GuestConfig)| {
            let mut config = config();
            change(&mut config);
            GuestShape::of(&config, None)
        };
        let plain = shape(|_| ()).expect("an ordinary guest");
        assert_eq!((plain.vps, plain.memory_bytes, plain.catch_up_time), (3, 5 << 30, true));
        assert_eq!(shape(|config| config.memory.huge_pages = true), None);
        assert_eq!(shape(|config| config.memory.prefault = true), None);
        assert_eq!(shape(|config| config.memory.lock = true), None);
        assert_eq!(shape(|config| config.affinity = VpAffinity::All(BTreeSet::from([0]))), None);
    }
}
