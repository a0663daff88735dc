//! The guest's config as plain Rust, to and from the wire.

use crate::common_capnp::{file, file_source};
use crate::config_capnp as wire;
use crate::devices::DevicesConfig;
use crate::failure::lossy;
use crate::units::UnitConfig;
use std::collections::BTreeSet;
use std::fmt;

/// One fault of a config: the field, and what is wrong with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFault {
    /// The field's path in `GuestConfig`, for instance `memory.bytes`.
    pub field: String,
    /// What is wrong, with the value.
    pub problem: String,
}

impl ConfigFault {
    /// A fault of this field.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

impl ConfigFault {
    /// The same fault, of the unit at this place in `GuestConfig.units`.
    #[must_use]
    pub fn of_unit(self, index: usize) -> Self {
        Self { field: format!("units[{index}].{}", self.field), ..self }
    }
}

impl fmt::Display for ConfigFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

/// What a reset by the guest itself does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnReset {
    /// The guest starts anew.
    #[default]
    Restart,
    /// The guest ends cleanly.
    Stop,
}

/// Where the VMM gets a file from.
#[derive(Clone)]
pub enum FileSource {
    /// An open descriptor handed over the same channel, by its running number there.
    Descriptor(u64),
    /// A capability that the client implements.
    File(file::Client),
}

impl fmt::Debug for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Descriptor(number) => write!(f, "Descriptor({number})"),
            Self::File(_) => f.write_str("File"),
        }
    }
}

/// A snapshot's file, which a guest goes on from.
#[derive(Debug, Clone, Default)]
pub struct SavedSource {
    /// The file; `None` if none was given.
    pub file: Option<FileSource>,
    /// What it is a layer of, if it is a layer.
    pub base: Option<FileSource>,
}

/// The guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Size in bytes; rounded up to a page by the VMM.
    pub bytes: u64,
    /// Back it with 2 MiB pages of the host's pool.
    pub huge_pages: bool,
    /// Touch every page at create.
    pub prefault: bool,
    /// Keep it from being swapped.
    pub lock: bool,
}

impl MemoryConfig {
    /// Ordinary memory of this size in bytes.
    pub fn of_bytes(bytes: u64) -> Self {
        Self { bytes, huge_pages: false, prefault: false, lock: false }
    }
}

/// On which of the host's CPUs each VP's thread may run, by their numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum VpAffinity {
    /// Every VP wherever the VMM may run.
    #[default]
    Any,
    /// Every VP on these; if there are none, on any.
    All(BTreeSet<u32>),
    /// Each VP, in order, on those of its own set. An empty set, and none for a VP, means any.
    Each(Vec<BTreeSet<u32>>),
}

impl VpAffinity {
    /// The CPUs of this VP; `None` for any.
    pub fn of_vp(&self, vp: usize) -> Option<&BTreeSet<u32>> {
        let cpus = match self {
            Self::Any => None,
            Self::All(cpus) => Some(cpus),
            Self::Each(sets) => sets.get(vp),
        };
        cpus.filter(|cpus| !cpus.is_empty())
    }
}

/// Bits that are cleared in what CPUID answers every VP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names of the registers are the architecture's")]
pub struct CpuidMask {
    /// EAX when CPUID is executed.
    pub leaf: u32,
    /// ECX when CPUID is executed; `None` for whatever it is.
    pub subleaf: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    /// The snapshot's file that it goes on from, in place of being booted: kernel, initrd and command line are not sent then, and of
    /// all else only what is granted is looked at.
    pub saved: Option<SavedSource>,
    /// The kernel, if one was given.
    pub kernel: Option<FileSource>,
    /// The initrd.
    pub ramdisk: Option<FileSource>,
    /// The kernel's command line, complete.
    pub cmdline: String,
    /// How many VPs.
    pub cpus: u32,
    /// On which of the host's CPUs they run.
    pub affinity: VpAffinity,
    /// What of the host's CPU they are not to see.
    pub cpuid_mask: Vec<CpuidMask>,
    /// The memory.
    pub memory: MemoryConfig,
    /// What a reset by the guest itself does.
    pub on_reset: OnReset,
    /// The devices beside the board's.
    pub devices: DevicesConfig,
    /// State units that the client implements.
    pub units: Vec<UnitConfig>,
    /// The guest's clocks jump over the time during which it did not run; else they go on from where they were.
    pub catch_up_time: bool,
    /// There is a port for test guests, a write to which ends the guest.
    pub debug_exit: bool,
}

/// A config as it came, with what cannot even be expressed in a [`GuestConfig`].
#[derive(Debug)]
pub struct ReadConfig {
    /// What could be read.
    pub config: GuestConfig,
    /// What this version does not support, and text that is not UTF-8.
    pub faults: Vec<ConfigFault>,
}

impl GuestConfig {
    /// A guest with this kernel and so many bytes of ordinary memory: one VP, no command line, no device but the board's, and the
    /// defaults of all else.
    pub fn new(kernel: Option<FileSource>, memory_bytes: u64) -> Self {
        Self {
            saved: None,
            kernel,
            ramdisk: None,
            cmdline: String::new(),
            cpus: 1,
            affinity: VpAffinity::default(),
            cpuid_mask: Vec::new(),
            memory: MemoryConfig::of_bytes(memory_bytes),
            on_reset: OnReset::default(),
            devices: DevicesConfig::default(),
            units: Vec::new(),
            catch_up_time: false,
            debug_exit: false,
        }
    }

    /// A guest that goes on from a snapshot's file: a config without grants.
    pub fn restored(file: FileSource, base: Option<FileSource>) -> Self {
        Self { saved: Some(SavedSource { file: Some(file), base }), ..Self::new(None, 0) }
    }

    /// Reads a config that is a message of its own, unpacked, as a snapshot has it. As [`Self::read`].
    pub fn decode(mut message: &[u8]) -> capnp::Result<ReadConfig> {
        let options = capnp::message::ReaderOptions::new();
        let message = capnp::serialize::read_message(&mut message, options)?;
        Self::read(message.get_root()?)
    }

    /// Reads a config from a message. Exceptions are for messages that break the schema itself.
    pub fn read(reader: wire::guest_config::Reader<'_>) -> capnp::Result<ReadConfig> {
        let (mut faults, mut saved) = (Vec::new(), None);
        let boot = match reader.get_source().which() {
            Ok(wire::guest_config::source::Boot(boot)) => Some(boot?),
            Ok(wire::guest_config::source::Saved(source)) => {
                saved = Some(read_saved(source?, &mut faults)?);
                None
            }
            Ok(wire::guest_config::source::Snapshot(_)) => {
                faults.push(not_supported("source.snapshot"));
                None
            }
            Err(_) => {
                faults.push(ConfigFault::new("source", "unknown kind"));
                None
            }
        };
        let (kernel, ramdisk, cmdline) = match boot {
            Some(boot) => read_boot(boot, &mut faults)?,
            None => (None, None, String::new()),
        };
        let memory = reader.get_memory()?;
        let on_reset = match reader.get_on_reset() {
            Ok(wire::OnReset::Restart) => OnReset::Restart,
            Ok(wire::OnReset::Stop) => OnReset::Stop,
            Err(unknown) => {
                faults.push(ConfigFault::new("onReset", format!("unknown value {}", unknown.0)));
                OnReset::default()
            }
        };
        let devices = DevicesConfig::read(reader, &mut faults)?;
        let memory = MemoryConfig {
            bytes: memory.get_bytes(),
            huge_pages: memory.get_huge_pages(),
            prefault: memory.get_prefault(),
            lock: memory.get_lock(),
        };
        let units = UnitConfig::read_all(reader.get_units()?, &mut faults)?;
        let config = Self {
            saved,
            kernel,
            ramdisk,
            cmdline,
            cpus: reader.get_cpus(),
            affinity: read_affinity(reader.get_affinity(), &mut faults)?,
            cpuid_mask: read_cpuid_mask(reader.get_cpuid_mask()?, &mut faults),
            memory,
            on_reset,
            devices,
            units,
            catch_up_time: reader.get_catch_up_time(),
            debug_exit: reader.get_debug_exit(),
        };
        Ok(ReadConfig { config, faults })
    }

    /// Writes the config into a message.
    pub fn write(&self, mut builder: wire::guest_config::Builder<'_>) {
        self.write_source(builder.reborrow().get_source());
        builder.set_cpus(self.cpus);
        write_affinity(&self.affinity, builder.reborrow().init_affinity());
        let length = u32::try_from(self.cpuid_mask.len()).expect("a list of 32 bits' length");
        write_cpuid_mask(&self.cpuid_mask, builder.reborrow().init_cpuid_mask(length));
        let mut memory = builder.reborrow().init_memory();
        memory.set_bytes(self.memory.bytes);
        memory.set_huge_pages(self.memory.huge_pages);
        memory.set_prefault(self.memory.prefault);
        memory.set_lock(self.memory.lock);
        builder.set_on_reset(match self.on_reset {
            OnReset::Restart => wire::OnReset::Restart,
            OnReset::Stop => wire::OnReset::Stop,
        });
        builder.set_catch_up_time(self.catch_up_time);
        builder.set_debug_exit(self.debug_exit);
        self.devices.write(builder.reborrow());
        UnitConfig::write_all(&self.units, |count| builder.init_units(count));
    }

    fn write_source(&self, source: wire::guest_config::source::Builder<'_>) {
        if let Some(SavedSource { file, base }) = &self.saved {
            let mut saved = source.init_saved();
            write_file(file.as_ref(), saved.reborrow().init_file());
            write_file(base.as_ref(), saved.init_base());
            return;
        }
        let mut boot = source.init_boot();
        boot.set_kernel_type(wire::KernelType::Linux);
        write_file(self.kernel.as_ref(), boot.reborrow().init_kernel());
        write_file(self.ramdisk.as_ref(), boot.reborrow().init_ramdisk());
        boot.set_cmdline(&self.cmdline[..]);
    }
}

pub(crate) fn not_supported(field: &str) -> ConfigFault {
    ConfigFault::new(field, "not supported")
}

fn read_saved(
    reader: wire::saved_snapshot::Reader<'_>,
    faults: &mut Vec<ConfigFault>,
) -> capnp::Result<SavedSource> {
    let file = read_file(reader.get_file()?, "source.saved.file", faults)?;
    Ok(SavedSource { file, base: read_file(reader.get_base()?, "source.saved.base", faults)? })
}

type Boot = (Option<FileSource>, Option<FileSource>, String);

fn read_boot(reader: wire::boot_source::Reader<'_>, faults: &mut Vec<ConfigFault>) -> capnp::Result<Boot> {
    match reader.get_kernel_type() {
        Ok(wire::KernelType::Linux) => {}
        Ok(wire::KernelType::Zircon) => {
            faults.push(ConfigFault::new("source.boot.kernelType", "zircon is not supported"));
        }
        Err(unknown) => {
            faults.push(ConfigFault::new("source.boot.kernelType", format!("unknown value {}", unknown.0)));
        }
    }
    let kernel = read_file(reader.get_kernel()?, "source.boot.kernel", faults)?;
    let ramdisk = read_file(reader.get_ramdisk()?, "source.boot.ramdisk", faults)?;
    let mut cmdline = utf8(reader.get_cmdline()?, "source.boot.cmdline", faults);
    for addition in reader.get_cmdline_add()?.iter() {
        if !cmdline.is_empty() {
            cmdline.push(' ');
        }
        cmdline.push_str(&utf8(addition?, "source.boot.cmdlineAdd", faults));
    }
    Ok((kernel, ramdisk, cmdline))
}

fn read_affinity(
    reader: wire::guest_config::affinity::Reader<'_>,
    faults: &mut Vec<ConfigFault>,
) -> capnp::Result<VpAffinity> {
    Ok(match reader.which() {
        Ok(wire::guest_config::affinity::Any(())) => VpAffinity::Any,
        Ok(wire::guest_config::affinity::All(cpus)) => VpAffinity::All(cpus?.iter().collect()),
        Ok(wire::guest_config::affinity::Each(sets)) => {
            let sets = sets?.iter().map(|cpus| Ok(cpus?.iter().collect()));
            VpAffinity::Each(sets.collect::<capnp::Result<_>>()?)
        }
        Err(unknown) => {
            faults.push(ConfigFault::new("affinity", format!("unknown kind {}", unknown.0)));
            VpAffinity::Any
        }
    })
}

fn write_affinity(affinity: &VpAffinity, mut builder: wire::guest_config::affinity::Builder<'_>) {
    fn fill(cpus: &BTreeSet<u32>, mut list: capnp::primitive_list::Builder<'_, u32>) {
        (0..).zip(cpus).for_each(|(index, cpu)| list.set(index, *cpu));
    }
    let length = |length: usize| u32::try_from(length).expect("a list of 32 bits' length");
    match affinity {
        VpAffinity::Any => builder.set_any(()),
        VpAffinity::All(cpus) => fill(cpus, builder.init_all(length(cpus.len()))),
        VpAffinity::Each(sets) => {
            let mut lists = builder.init_each(length(sets.len()));
            for (index, cpus) in (0..).zip(sets) {
                fill(cpus, lists.reborrow().init(index, length(cpus.len())));
            }
        }
    }
}

pub(crate) fn read_cpuid_mask(
    reader: capnp::struct_list::Reader<'_, wire::cpuid_mask::Owned>,
    faults: &mut Vec<ConfigFault>,
) -> Vec<CpuidMask> {
    let mut read = |(index, mask): (usize, wire::cpuid_mask::Reader<'_>)| {
        let subleaf = match mask.get_subleaf().which() {
            Ok(wire::cpuid_mask::subleaf::All(())) => None,
            Ok(wire::cpuid_mask::subleaf::Only(subleaf)) => Some(subleaf),
            Err(unknown) => {
                let field = format!("cpuidMask[{index}].subleaf");
                faults.push(ConfigFault::new(field, format!("unknown kind {}", unknown.0)));
                None
            }
        };
        CpuidMask {
            leaf: mask.get_leaf(),
            subleaf,
            eax: mask.get_eax(),
            ebx: mask.get_ebx(),
            ecx: mask.get_ecx(),
            edx: mask.get_edx(),
        }
    };
    reader.iter().enumerate().map(&mut read).collect()
}

pub(crate) fn write_cpuid_mask(
    masks: &[CpuidMask],
    mut builder: capnp::struct_list::Builder<'_, wire::cpuid_mask::Owned>,
) {
    for (index, &CpuidMask { leaf, subleaf, eax, ebx, ecx, edx }) in (0..).zip(masks) {
        let mut mask = builder.reborrow().get(index);
        mask.set_leaf(leaf);
        match subleaf {
            None => mask.reborrow().init_subleaf().set_all(()),
            Some(subleaf) => mask.reborrow().init_subleaf().set_only(subleaf),
        }
        mask.set_eax(eax);
        mask.set_ebx(ebx);
        mask.set_ecx(ecx);
        mask.set_edx(edx);
    }
}

pub(crate) fn utf8(text: capnp::text::Reader<'_>, field: &str, faults: &mut Vec<ConfigFault>) -> String {
    if let Ok(text) = text.to_str() {
        return text.to_owned();
    }
    let text = lossy(text);
    faults.push(ConfigFault::new(field, format!("{text:?} is not UTF-8")));
    text
}

pub(crate) fn read_file(
    reader: file_source::Reader<'_>,
    field: &str,
    faults: &mut Vec<ConfigFault>,
) -> capnp::Result<Option<FileSource>> {
    Ok(match reader.which() {
        Ok(file_source::None(())) => None,
        Ok(file_source::Descriptor(number)) => Some(FileSource::Descriptor(number)),
        Ok(file_source::File(file)) => Some(FileSource::File(file?)),
        Err(unknown) => {
            faults.push(ConfigFault::new(field, format!("unknown kind of file {}", unknown.0)));
            None
        }
    })
}

pub(crate) fn write_file(source: Option<&FileSource>, mut builder: file_source::Builder<'_>) {
    match source {
        None => builder.set_none(()),
        Some(FileSource::Descriptor(number)) => builder.set_descriptor(*number),
        Some(FileSource::File(file)) => builder.set_file(file.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ConsoleConfig, MemDeviceConfig};

    fn message(fill: impl FnOnce(wire::guest_config::Builder<'_>)) -> ReadConfig {
        let mut message = capnp::message::Builder::new_default();
        fill(message.init_root());
        GuestConfig::read(message.get_root_as_reader().expect("a config")).expect("readable")
    }

    #[test]
    fn a_config_survives_the_wire() {
        let config = GuestConfig {
            saved: None,
            kernel: Some(FileSource::Descriptor(3)),
            ramdisk: None,
            cmdline: "console=ttyS0".into(),
            cpus: 4,
            affinity: VpAffinity::Each(vec![[0, 3].into(), BTreeSet::new(), [1].into()]),
            cpuid_mask: vec![
                CpuidMask { leaf: 7, subleaf: Some(0), ebx: 1 << 5, ..CpuidMask::default() },
                CpuidMask { leaf: 0x8000_0001, eax: 1, ebx: 2, ecx: 3, edx: u32::MAX, subleaf: None },
            ],
            memory: MemoryConfig { lock: true, ..MemoryConfig::of_bytes(1 << 28) },
            on_reset: OnReset::Stop,
            devices: DevicesConfig {
                block: Vec::new(),
                rng: true,
                balloon: true,
                console: Some(ConsoleConfig { ports: vec!["agent".into(), "log".into()] }),
                mem: Some(MemDeviceConfig::of_region(1 << 30)),
                net: Vec::new(),
                vsock: None,
            },
            units: Vec::new(),
            catch_up_time: true,
            debug_exit: true,
        };
        let read = message(|builder| config.write(builder));
        assert!(read.faults.is_empty(), "{:?}", read.faults);
        assert_eq!(format!("{:?}", read.config), format!("{config:?}"));
        let config = GuestConfig { affinity: VpAffinity::All([5].into()), ..config };
        assert_eq!(message(|builder| config.write(builder)).config.affinity, config.affinity);
    }

    #[test]
    fn a_snapshots_file_takes_the_place_of_what_is_booted() {
        let base = Some(FileSource::Descriptor(4));
        let config = GuestConfig { cpus: 3, ..GuestConfig::restored(FileSource::Descriptor(3), base) };
        let read = message(|builder| config.write(builder));
        assert!(read.faults.is_empty(), "{:?}", read.faults);
        assert_eq!(format!("{:?}", read.config), format!("{config:?}"));
        let none = message(|builder| {
            builder.get_source().init_saved();
        })
        .config;
        assert!(none.saved.is_some_and(|saved| saved.file.is_none() && saved.base.is_none()));
    }

    #[test]
    fn an_older_clients_config_asks_for_nothing_new() {
        let config = message(|builder| builder.get_source().init_boot().set_cmdline("a")).config;
        assert_eq!(
            (config.affinity, config.cpuid_mask, config.debug_exit),
            (VpAffinity::Any, Vec::new(), false)
        );
    }

    #[test]
    fn a_vp_without_cpus_of_its_own_may_run_on_any() {
        assert_eq!(VpAffinity::Any.of_vp(0), None);
        assert_eq!(VpAffinity::All(BTreeSet::new()).of_vp(0), None);
        assert_eq!(VpAffinity::All([2].into()).of_vp(77), Some(&[2].into()));
        let each = VpAffinity::Each(vec![BTreeSet::new(), [1].into()]);
        assert_eq!([0, 1, 2].map(|vp| each.of_vp(vp)), [None, Some(&[1].into()), None]);
    }

    #[test]
    fn additions_to_the_command_line_are_joined_by_blanks() {
        let read = message(|builder| {
            let mut boot = builder.get_source().init_boot();
            boot.set_cmdline("a");
            let mut additions = boot.init_cmdline_add(2);
            additions.set(0, "b");
            additions.set(1, "c=d");
        });
        assert_eq!(read.config.cmdline, "a b c=d");
    }

    #[test]
    fn everything_not_supported_is_named() {
        let read = message(|mut builder| {
            builder.reborrow().get_source().init_boot().set_kernel_type(wire::KernelType::Zircon);
            builder.set_gpu(true);
            builder.set_sound(true);
        });
        let fields: Vec<&str> = read.faults.iter().map(|fault| &fault.field[..]).collect();
        assert_eq!(fields, ["source.boot.kernelType", "gpu", "sound"]);
    }
}
