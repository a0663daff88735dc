//! What a snapshot has, and the files that one consists of.

use crate::failure::lossy;
use crate::snapshot_capnp::snapshot_info as wire;

/// One of the files that a snapshot consists of, each a memfd that is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SnapshotFile {
    /// What the state units have saved.
    State,
    /// The guest's memory.
    Memory,
    /// The kernel that it was booted from.
    Kernel,
    /// The pages that differ from the memory's.
    Layer,
    /// The initrd that it was booted with.
    Ramdisk,
}

impl SnapshotFile {
    /// Every file, those first without which there is no snapshot.
    pub const ALL: [Self; 5] = [Self::State, Self::Memory, Self::Kernel, Self::Layer, Self::Ramdisk];

    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Memory => "memory",
            Self::Kernel => "kernel",
            Self::Layer => "layer",
            Self::Ramdisk => "ramdisk",
        }
    }

    /// The file with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|file| file.name() == name)
    }

    /// Whether every snapshot has it.
    pub const fn is_required(self) -> bool {
        matches!(self, Self::State | Self::Memory | Self::Kernel)
    }
}

/// How a snapshot has got its guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MemoryKept {
    /// The guest goes on with a private mapping of its own memory; nothing was copied.
    #[default]
    Remapped,
    /// What it had written since it was frozen or restored before was copied, beside the memory from then.
    Layered,
    /// All of it was copied.
    Copied,
}

impl MemoryKept {
    /// The name in the schema.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Remapped => "remapped",
            Self::Layered => "layered",
            Self::Copied => "copied",
        }
    }
}

/// What a snapshot has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotInfo {
    /// The size of the guest's memory.
    pub memory_bytes: u64,
    /// The state units that it has state of.
    pub units: Vec<String>,
    /// The id of the guest that it is of.
    pub parent: String,
    /// When it was taken, in µs since 1970 (UTC).
    pub taken_at_us: u64,
    /// How many VPs there are.
    pub vps: u32,
    /// The ids of the disks, which have to be granted.
    pub disks: Vec<String>,
    /// How many network devices there are, which have to be granted.
    pub networks: u32,
    /// How it has got the memory.
    pub memory: MemoryKept,
    /// How many bytes of memory were copied while the guest was paused.
    pub copied_bytes: u64,
}

impl SnapshotInfo {
    /// Reads it from a message. Text that is not UTF-8 is read with replacement characters.
    pub fn read(reader: wire::Reader<'_>) -> capnp::Result<Self> {
        let texts = |list: capnp::text_list::Reader<'_>| {
            list.iter().map(|text| text.map(lossy)).collect::<capnp::Result<Vec<_>>>()
        };
        Ok(Self {
            memory_bytes: reader.get_memory_bytes(),
            units: texts(reader.get_units()?)?,
            parent: lossy(reader.get_parent()?),
            taken_at_us: reader.get_taken_at_us(),
            vps: reader.get_vps(),
            disks: texts(reader.get_disks()?)?,
            networks: reader.get_networks(),
            memory: reader.get_memory()?.into(),
            copied_bytes: reader.get_copied_bytes(),
        })
    }

    /// Writes it into a message.
    pub fn write(&self, mut builder: wire::Builder<'_>) {
        fn fill(texts: &[String], mut list: capnp::text_list::Builder<'_>) {
            (0..).zip(texts).for_each(|(index, text)| list.set(index, &text[..]));
        }
        let length = |texts: &[String]| u32::try_from(texts.len()).expect("a list of 32 bits' length");
        let Self { memory_bytes, units, parent, taken_at_us, vps, disks, networks, memory, copied_bytes } =
            self;
        builder.set_memory_bytes(*memory_bytes);
        fill(units, builder.reborrow().init_units(length(units)));
        builder.set_parent(&parent[..]);
        builder.set_taken_at_us(*taken_at_us);
        builder.set_vps(*vps);
        fill(disks, builder.reborrow().init_disks(length(disks)));
        builder.set_networks(*networks);
        builder.set_memory((*memory).into());
        builder.set_copied_bytes(*copied_bytes);
    }
}

impl From<wire::MemoryKept> for MemoryKept {
    fn from(kept: wire::MemoryKept) -> Self {
        match kept {
            wire::MemoryKept::Remapped => Self::Remapped,
            wire::MemoryKept::Layered => Self::Layered,
            wire::MemoryKept::Copied => Self::Copied,
        }
    }
}

impl From<MemoryKept> for wire::MemoryKept {
    fn from(kept: MemoryKept) -> Self {
        match kept {
            MemoryKept::Remapped => Self::Remapped,
            MemoryKept::Layered => Self::Layered,
            MemoryKept::Copied => Self::Copied,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_info_survives_the_wire() {
        let info = SnapshotInfo {
            memory_bytes: 1 << 30,
            units: vec!["vps".into(), "memory".into()],
            parent: "web".into(),
            taken_at_us: 5,
            vps: 2,
            disks: vec!["root".into(), String::new()],
            networks: 1,
            memory: MemoryKept::Layered,
            copied_bytes: 4096,
        };
        let mut message = capnp::message::Builder::new_default();
        info.write(message.init_root());
        let read = SnapshotInfo::read(message.get_root_as_reader().expect("an info")).expect("readable");
        assert_eq!(read, info);
    }

    #[test]
    fn files_are_known_by_their_names() {
        for file in SnapshotFile::ALL {
            assert_eq!(SnapshotFile::named(file.name()), Some(file));
        }
        assert_eq!(SnapshotFile::named("State"), None);
        let required = SnapshotFile::ALL.into_iter().take_while(|file| file.is_required()).count();
        assert_eq!(required, 3, "the required ones come first");
    }
}
