//! Snapshots of the guest: what one consists of on its way to the service, and what a guest goes on from.
//!
//! A snapshot is a handful of files that nobody can change any more: its state (`machine.snapshot.SnapshotState` of the saved state's
//! schema), its memory, and what it boots after a reset. What a guest has of the host is not in it: disks, networks, listeners and
//! clients' units are granted anew to whoever goes on.

use crate::files::SEALED;
use crate::saved::is_writable;
use guest_saved_state::machine::snapshot::{SnapshotState, UnitState};
use guest_schema::{
    ConfigFault, DiskSource, Failure, GuestConfig, GuestError, ImageFormat, MemoryKept, NetBackend,
    SnapshotFile, SnapshotInfo, VsockConfig, chain,
};
use guest_snapshot_file::{STATE_FORMAT, config_of};
use machine::MachineSnapshot;
use machine::memory::{FreezeMethod, Frozen, FrozenMemory, ImageFile, MemoryImage};
use prost::Message;
use rustix::fs::{MemfdFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use save_restore::SavedStateBlob;
use state_unit::SavedStateUnit;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// The most bytes of a state that is read.
const MAX_STATE: u64 = 256 << 20;

/// What a guest was made of, kept for its snapshots.
pub(crate) struct Origin {
    /// Without what is granted.
    config: GuestConfig,
    kernel: Arc<File>,
    ramdisk: Option<Arc<File>>,
}

impl Origin {
    /// Of a guest with this config and these sealed files.
    pub fn new(config: GuestConfig, kernel: &File, ramdisk: Option<&File>) -> io::Result<Self> {
        Ok(Self {
            config: without_grants(config),
            kernel: Arc::new(kernel.try_clone()?),
            ramdisk: ramdisk.map(File::try_clone).transpose()?.map(Arc::new),
        })
    }

    /// The state of a snapshot with these units, as its file has it.
    #[cfg(test)]
    pub fn state_of(&self, units: Vec<SavedStateUnit>) -> Vec<u8> {
        encode(&self.config, units).encode_to_vec()
    }

    /// What its machine gave just now.
    pub fn taken(&self, snapshot: MachineSnapshot) -> TakenSnapshot {
        let Self { config, kernel, ramdisk } = self;
        let MachineSnapshot { states, memory } = snapshot;
        let info = SnapshotInfo {
            units: states.iter().map(|unit| unit.name.clone()).collect(),
            taken_at_us: now_us(),
            vps: config.cpus,
            disks: config.devices.block.iter().map(|disk| disk.id.clone()).collect(),
            networks: u32::try_from(config.devices.net.len()).expect("there are few"),
            ..SnapshotInfo::default()
        };
        let state = encode(config, states);
        TakenSnapshot { state, kernel: kernel.clone(), ramdisk: ramdisk.clone(), memory, info }
    }
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// A config of which only what is the guest's own is left. Numbers of descriptors mean nothing elsewhere.
fn without_grants(mut config: GuestConfig) -> GuestConfig {
    (config.saved, config.kernel, config.ramdisk) = (None, None, None);
    config.units.clear();
    for disk in &mut config.devices.block {
        disk.source = DiskSource::Image(ImageFormat::Raw, None);
    }
    for net in &mut config.devices.net {
        net.backend = NetBackend::Stream(0);
    }
    if let Some(vsock) = &mut config.devices.vsock {
        *vsock = VsockConfig::default();
    }
    config
}

/// A snapshot that was taken, while the guest goes on.
pub(crate) struct TakenSnapshot {
    state: SnapshotState,
    kernel: Arc<File>,
    ramdisk: Option<Arc<File>>,
    memory: Frozen,
    /// Without what is known of the memory once it is sealed.
    info: SnapshotInfo,
}

/// A snapshot that nobody can change any more.
pub(crate) struct SealedSnapshot {
    pub files: SnapshotFiles,
    /// Without its parent's id, which the service knows.
    pub info: SnapshotInfo,
}

impl TakenSnapshot {
    /// Completes it. Blocks for as long as the host takes to unmap what the guest had mapped.
    pub fn seal(self) -> Result<SealedSnapshot, Failure> {
        let Self { state, kernel, ramdisk, memory, info } = self;
        let FrozenMemory { image, bytes, method, copied_bytes, .. } =
            memory.seal().map_err(|error| not_to_be_had(chain(&error)))?;
        let info = SnapshotInfo {
            memory_bytes: bytes,
            memory: match method {
                FreezeMethod::Remapped => MemoryKept::Remapped,
                FreezeMethod::Layered => MemoryKept::Layered,
                FreezeMethod::Copied => MemoryKept::Copied,
            },
            copied_bytes,
            ..info
        };
        let state = state_file(&state).map_err(|error| not_to_be_had(format!("its state: {error}")))?;
        let mut files = BTreeMap::new();
        files.insert(SnapshotFile::State, Arc::new(state));
        files.insert(SnapshotFile::Memory, image.base.file().clone());
        files.insert(SnapshotFile::Kernel, kernel);
        files.extend(image.layer.map(|layer| (SnapshotFile::Layer, layer.file().clone())));
        files.extend(ramdisk.map(|ramdisk| (SnapshotFile::Ramdisk, ramdisk)));
        Ok(SealedSnapshot { files: SnapshotFiles(files), info })
    }
}

fn not_to_be_had(problem: impl std::fmt::Display) -> Failure {
    Failure::new(GuestError::InternalError, format!("the snapshot is not to be had: {problem}"))
}

fn encode(config: &GuestConfig, units: Vec<SavedStateUnit>) -> SnapshotState {
    let mut message = capnp::message::Builder::new_default();
    config.write(message.init_root());
    let unit = |SavedStateUnit { name, state }| {
        let state = state.unwrap_or_default();
        UnitState { name, type_name: state.type_name().to_owned(), value: state.value().to_vec() }
    };
    SnapshotState {
        format: STATE_FORMAT,
        config: capnp::serialize::write_message_to_words(&message),
        units: units.into_iter().map(unit).collect(),
    }
}

/// The state's file, sealed.
fn state_file(state: &SnapshotState) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("snapshot-state", flags)?);
    file.write_all(&state.encode_to_vec())?;
    fcntl_add_seals(&file, SEALED)?;
    Ok(file)
}

/// The files that a snapshot consists of.
#[derive(Clone)]
pub(crate) struct SnapshotFiles(BTreeMap<SnapshotFile, Arc<File>>);

impl SnapshotFiles {
    /// Each by what it is.
    pub fn iter(&self) -> impl Iterator<Item = (SnapshotFile, &Arc<File>)> {
        self.0.iter().map(|(name, file)| (*name, file))
    }

    /// The same from named files.
    ///
    /// # Errors
    /// If one is missing, unknown, there twice, or can still be changed; its name is told. The memory of a guest that goes on from a
    /// snapshot's file is that file, which cannot be sealed, and comes as a descriptor that nothing is written by.
    pub fn from_named(named: Vec<(String, File)>) -> Result<Self, Failure> {
        let mut files = BTreeMap::new();
        for (name, file) in named {
            let place = SnapshotFile::named(&name);
            let place = place.ok_or_else(|| corrupt(format!("{name:?} is no file of a snapshot")))?;
            if !is_sealed(&file) && (place != SnapshotFile::Memory || is_writable(&file)) {
                return Err(corrupt(format!("{name} is not sealed")));
            }
            if files.insert(place, Arc::new(file)).is_some() {
                return Err(corrupt(format!("{name} is there twice")));
            }
        }
        let missing =
            SnapshotFile::ALL.into_iter().find(|file| file.is_required() && !files.contains_key(file));
        match missing {
            Some(file) => Err(corrupt(format!("{} is missing", file.name()))),
            None => Ok(Self(files)),
        }
    }

    /// Reads what a guest goes on from. Blocks for as long as that takes.
    ///
    /// # Errors
    /// `snapshotCorrupt`, `snapshotIncompatible` for a format that this version does not know.
    pub fn open(&self) -> Result<OpenSnapshot, Failure> {
        let missing = |file: SnapshotFile| corrupt(format!("{} is missing", file.name()));
        let state = self.0.get(&SnapshotFile::State).ok_or_else(|| missing(SnapshotFile::State))?;
        let state = read_state(state).map_err(|error| corrupt(format!("state: {error}")))?;
        let (config, units) = decoded(state)?;
        let image = |file: SnapshotFile| {
            let opened = |memory: &Arc<File>| match is_sealed(memory) {
                true => ImageFile::sealed(memory.clone()),
                false => ImageFile::on_disk(memory.clone()),
            };
            let opened = self.0.get(&file).map(opened).transpose();
            opened.map_err(|error| corrupt(format!("{} {}", file.name(), chain(&error))))
        };
        let copy = |file: SnapshotFile| {
            let copied = self.0.get(&file).map(|file| file.try_clone()).transpose();
            copied.map_err(|error| corrupt(format!("{}: {error}", file.name())))
        };
        let base = image(SnapshotFile::Memory)?.ok_or_else(|| missing(SnapshotFile::Memory))?;
        let kernel = copy(SnapshotFile::Kernel)?.ok_or_else(|| missing(SnapshotFile::Kernel))?;
        Ok(OpenSnapshot {
            config,
            units,
            image: MemoryImage { base, layer: image(SnapshotFile::Layer)? },
            kernel,
            ramdisk: copy(SnapshotFile::Ramdisk)?,
        })
    }
}

fn is_sealed(file: &File) -> bool {
    fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SEALED))
}

/// The config and the units of a state.
///
/// # Errors
/// `snapshotCorrupt`, `snapshotIncompatible` for a format that this version does not know.
pub(crate) fn decoded(state: SnapshotState) -> Result<(GuestConfig, Vec<SavedStateUnit>), Failure> {
    let config = config_of(&state)?;
    let unit = |UnitState { name, type_name, value }| {
        let state = Some(SavedStateBlob::from_parts(type_name, value));
        SavedStateUnit { name, state }
    };
    Ok((config, state.units.into_iter().map(unit).collect()))
}

fn corrupt(problem: impl Into<String>) -> Failure {
    Failure::new(GuestError::SnapshotCorrupt, problem)
}

/// At no offset of the file's own, which is shared with whoever else goes on from it.
fn read_state(file: &File) -> io::Result<SnapshotState> {
    let bytes = file.metadata()?.len();
    if bytes > MAX_STATE {
        return Err(io::Error::other(format!("its {bytes} bytes are more than {MAX_STATE}")));
    }
    let mut state = vec![0; usize::try_from(bytes).expect("checked above")];
    file.read_exact_at(&mut state, 0)?;
    SnapshotState::decode(&*state).map_err(io::Error::other)
}

/// A snapshot that a guest is to go on from.
pub(crate) struct OpenSnapshot {
    pub config: GuestConfig,
    pub units: Vec<SavedStateUnit>,
    pub image: MemoryImage,
    pub kernel: File,
    pub ramdisk: Option<File>,
}

impl OpenSnapshot {
    /// The config of a guest that goes on from here with what `grants` has for it. What of it cannot be is a fault.
    pub fn config_with(&self, grants: GuestConfig, faults: &mut Vec<ConfigFault>) -> GuestConfig {
        let mut config = self.config.clone();
        faults.extend(self.config.grant_faults(&grants));
        let (own, granted) = (&mut config.devices, grants.devices);
        for (disk, granted) in own.block.iter_mut().zip(granted.block) {
            (disk.source, disk.mode) = (granted.source, granted.mode);
        }
        for (net, granted) in own.net.iter_mut().zip(granted.net) {
            net.backend = granted.backend;
        }
        if let (Some(vsock), Some(granted)) = (&mut own.vsock, granted.vsock) {
            *vsock = granted;
        }
        config.units = grants.units;
        config
    }
}

#[cfg(test)]
mod tests;
