//! Snapshots of the guest: what one consists of on its way to the service, and what a guest goes on from.
//!
//! A snapshot is a handful of files that nobody can change any more: its state (`machine.snapshot.SnapshotState` of the saved state's
//! schema), its memory, and what it boots after a reset. What a guest has of the host is not in it: disks, networks, listeners and
//! clients' units are granted anew to whoever goes on.

use crate::files::SEALED;
use guest_schema::{
    ConfigFault, DiskSource, Failure, GuestConfig, GuestError, ImageFormat, NetBackend, VsockConfig, chain,
    config_capnp,
};
use guest_saved_state::machine::snapshot::{SnapshotState, UnitState};
use machine::memory::{FreezeMethod, Frozen, FrozenMemory, ImageError, ImageFile, MemoryImage};
use prost::Message;
use rustix::fs::{MemfdFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use save_restore::SavedStateBlob;
use state_unit::SavedStateUnit;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// The version of the state's format.
const FORMAT: u32 = 1;
/// The most bytes of a state that is read.
const MAX_STATE: u64 = 256 << 20;

/// What a guest was made of, kept for its snapshots.
pub(crate) struct Origin {
    /// Without what is granted.
    config: GuestConfig,
    kernel: File,
    ramdisk: Option<File>,
}

impl Origin {
    /// Of a guest with this config and these sealed files.
    pub fn new(config: &GuestConfig, kernel: &File, ramdisk: Option<&File>) -> io::Result<Self> {
        let ramdisk = ramdisk.map(File::try_clone).transpose()?;
        Ok(Self { config: without_grants(config.clone()), kernel: kernel.try_clone()?, ramdisk })
    }

    /// What is known of a snapshot that was taken just now, to be completed.
    pub fn snapshot(&self, units: Vec<SavedStateUnit>, memory: Frozen) -> io::Result<TakenSnapshot> {
        let Self { config, kernel, ramdisk } = self;
        Ok(TakenSnapshot {
            config: config.clone(),
            kernel: kernel.try_clone()?,
            ramdisk: ramdisk.as_ref().map(File::try_clone).transpose()?,
            units,
            memory,
            taken_at_us: now_us(),
        })
    }
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// A config of which only what is the guest's own is left. Numbers of descriptors mean nothing elsewhere.
fn without_grants(mut config: GuestConfig) -> GuestConfig {
    (config.kernel, config.ramdisk) = (None, None);
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
    config: GuestConfig,
    kernel: File,
    ramdisk: Option<File>,
    units: Vec<SavedStateUnit>,
    memory: Frozen,
    taken_at_us: u64,
}

/// What a snapshot has, for people to see.
pub(crate) struct SnapshotSummary {
    pub memory_bytes: u64,
    pub units: Vec<String>,
    pub taken_at_us: u64,
    pub vps: u32,
    /// The ids of its disks.
    pub disks: Vec<String>,
    pub networks: usize,
    pub method: FreezeMethod,
    pub copied_bytes: u64,
}

/// A snapshot that nobody can change any more.
pub(crate) struct SealedSnapshot {
    pub files: SnapshotFiles,
    pub summary: SnapshotSummary,
}

impl TakenSnapshot {
    /// Completes it. Blocks for as long as the host takes to unmap what the guest had mapped.
    pub fn seal(self) -> Result<SealedSnapshot, Failure> {
        let Self { config, kernel, ramdisk, units, memory, taken_at_us } = self;
        let memory = memory.seal().map_err(|error| no_room(chain(&error)))?;
        let summary = summary(&config, &units, &memory, taken_at_us);
        let state = encode(&config, units).map_err(|error| no_room(format!("its state: {error}")))?;
        let FrozenMemory { image: MemoryImage { base, layer }, .. } = memory;
        let files = SnapshotFiles {
            state: Arc::new(state),
            memory: base.file().clone(),
            layer: layer.map(|layer| layer.file().clone()),
            kernel: Arc::new(kernel),
            ramdisk: ramdisk.map(Arc::new),
        };
        Ok(SealedSnapshot { files, summary })
    }
}

fn no_room(problem: impl std::fmt::Display) -> Failure {
    Failure::new(GuestError::InternalError, format!("the snapshot is not to be had: {problem}"))
}

fn summary(
    config: &GuestConfig,
    units: &[SavedStateUnit],
    memory: &FrozenMemory,
    taken_at_us: u64,
) -> SnapshotSummary {
    SnapshotSummary {
        memory_bytes: memory.bytes,
        units: units.iter().map(|unit| unit.name.clone()).collect(),
        taken_at_us,
        vps: config.cpus,
        disks: config.devices.block.iter().map(|disk| disk.id.clone()).collect(),
        networks: config.devices.net.len(),
        method: memory.method,
        copied_bytes: memory.copied_bytes,
    }
}

/// The state's file, sealed.
fn encode(config: &GuestConfig, units: Vec<SavedStateUnit>) -> io::Result<File> {
    let mut message = capnp::message::Builder::new_default();
    config.write(message.init_root());
    let unit = |SavedStateUnit { name, state }| {
        let state = state.unwrap_or_default();
        UnitState { name, type_name: state.type_name().to_owned(), value: state.value().to_vec() }
    };
    let state = SnapshotState {
        format: FORMAT,
        config: capnp::serialize::write_message_to_words(&message),
        units: units.into_iter().map(unit).collect(),
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("snapshot-state", flags)?);
    file.write_all(&state.encode_to_vec())?;
    fcntl_add_seals(&file, SEALED)?;
    Ok(file)
}

/// The files that a snapshot consists of.
#[derive(Clone)]
pub(crate) struct SnapshotFiles {
    pub state: Arc<File>,
    pub memory: Arc<File>,
    pub layer: Option<Arc<File>>,
    pub kernel: Arc<File>,
    pub ramdisk: Option<Arc<File>>,
}

impl SnapshotFiles {
    /// By their names in the protocol.
    pub fn by_name(&self) -> impl Iterator<Item = (&'static str, &Arc<File>)> {
        let Self { state, memory, layer, kernel, ramdisk } = self;
        let optional = [("layer", layer.as_ref()), ("ramdisk", ramdisk.as_ref())];
        let there = optional.into_iter().filter_map(|(name, file)| Some((name, file?)));
        [("state", state), ("memory", memory), ("kernel", kernel)].into_iter().chain(there)
    }

    /// The same from named files.
    ///
    /// # Errors
    /// If one is missing, unknown, there twice, or can still be changed; its name is told.
    pub fn from_named(files: Vec<(String, File)>) -> Result<Self, Failure> {
        let (mut state, mut memory, mut layer, mut kernel, mut ramdisk) = (None, None, None, None, None);
        for (name, file) in files {
            let place = match &name[..] {
                "state" => &mut state,
                "memory" => &mut memory,
                "layer" => &mut layer,
                "kernel" => &mut kernel,
                "ramdisk" => &mut ramdisk,
                _ => return Err(corrupt(format!("{name:?} is no file of a snapshot"))),
            };
            if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SEALED)) {
                return Err(corrupt(format!("{name} is not sealed")));
            }
            if place.replace(Arc::new(file)).is_some() {
                return Err(corrupt(format!("{name} is there twice")));
            }
        }
        let missing = |name: &str| corrupt(format!("{name} is missing"));
        Ok(Self {
            state: state.ok_or_else(|| missing("state"))?,
            memory: memory.ok_or_else(|| missing("memory"))?,
            layer,
            kernel: kernel.ok_or_else(|| missing("kernel"))?,
            ramdisk,
        })
    }

    /// Reads what a guest goes on from. Blocks for as long as that takes.
    ///
    /// # Errors
    /// `snapshotCorrupt`, `snapshotIncompatible` for a format that this version does not know.
    pub fn open(&self) -> Result<OpenSnapshot, Failure> {
        let state = read_state(&self.state).map_err(|error| corrupt(format!("state: {error}")))?;
        let SnapshotState { format, config, units } = state;
        if format != FORMAT {
            let problem = format!("state: its format is {format}, and {FORMAT} is known here");
            return Err(Failure::new(GuestError::SnapshotIncompatible, problem));
        }
        let config = read_config(&config)?;
        let unit = |UnitState { name, type_name, value }| {
            let state = Some(SavedStateBlob::from_parts(type_name, value));
            SavedStateUnit { name, state }
        };
        let bad = |name: &str, error: ImageError| corrupt(format!("{name} {}", chain(&error)));
        let base = ImageFile::sealed(self.memory.clone()).map_err(|error| bad("memory", error))?;
        let layer = self.layer.clone().map(ImageFile::sealed).transpose();
        let layer = layer.map_err(|error| bad("layer", error))?;
        let copy = |file: &File| file.try_clone().map_err(|error| corrupt(error.to_string()));
        Ok(OpenSnapshot {
            config,
            units: units.into_iter().map(unit).collect(),
            image: MemoryImage { base, layer },
            kernel: copy(&self.kernel)?,
            ramdisk: self.ramdisk.as_deref().map(copy).transpose()?,
        })
    }
}

fn corrupt(problem: impl Into<String>) -> Failure {
    Failure::new(GuestError::SnapshotCorrupt, problem)
}

fn read_state(file: &File) -> io::Result<SnapshotState> {
    let mut file = file.try_clone()?;
    let bytes = file.metadata()?.len();
    if bytes > MAX_STATE {
        return Err(io::Error::other(format!("its {bytes} bytes are more than {MAX_STATE}")));
    }
    let mut state = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut state)?;
    SnapshotState::decode(&*state).map_err(io::Error::other)
}

fn read_config(bytes: &[u8]) -> Result<GuestConfig, Failure> {
    let bad = |problem: &dyn std::fmt::Display| corrupt(format!("state: config: {problem}"));
    let options = capnp::message::ReaderOptions::new();
    let message =
        capnp::serialize::read_message(&mut &*bytes, options).map_err(|error| bad(&error))?;
    let reader = message.get_root::<config_capnp::guest_config::Reader<'_>>().map_err(|error| bad(&error))?;
    let read = GuestConfig::read(reader).map_err(|error| bad(&error))?;
    match &read.faults[..] {
        [] => Ok(read.config),
        [fault, ..] => Err(bad(fault)),
    }
}

/// A snapshot that a guest is to go on from.
pub(crate) struct OpenSnapshot {
    config: GuestConfig,
    pub units: Vec<SavedStateUnit>,
    pub image: MemoryImage,
    pub kernel: File,
    pub ramdisk: Option<File>,
}

impl OpenSnapshot {
    /// The config of a guest that goes on from here with what `grants` has for it. What of it cannot be is a fault.
    pub fn config_with(&self, grants: GuestConfig, faults: &mut Vec<ConfigFault>) -> GuestConfig {
        let mut config = self.config.clone();
        for (field, is_given) in
            [("source.boot.kernel", grants.kernel.is_some()), ("source.boot.ramdisk", grants.ramdisk.is_some())]
        {
            if is_given {
                faults.push(ConfigFault::new(field, "a guest that goes on from a snapshot has its own"));
            }
        }
        let (own, granted) = (&mut config.devices, grants.devices);
        count_fault("block", "disks", own.block.len(), granted.block.len(), faults);
        for (disk, granted) in own.block.iter_mut().zip(granted.block) {
            (disk.source, disk.mode) = (granted.source, granted.mode);
        }
        count_fault("net", "network devices", own.net.len(), granted.net.len(), faults);
        for (net, granted) in own.net.iter_mut().zip(granted.net) {
            net.backend = granted.backend;
        }
        match (&mut own.vsock, granted.vsock) {
            (Some(vsock), Some(granted)) => *vsock = granted,
            (None, Some(_)) => faults.push(ConfigFault::new("vsock", "the snapshot has no such device")),
            (_, None) => {}
        }
        config.units = grants.units;
        config
    }
}

fn count_fault(field: &str, what: &str, own: usize, granted: usize, faults: &mut Vec<ConfigFault>) {
    if own != granted {
        let problem = format!("the snapshot has {own} {what}, and {granted} were granted");
        faults.push(ConfigFault::new(field, problem));
    }
}

#[cfg(test)]
mod tests;
