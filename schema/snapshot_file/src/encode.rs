//! Making the file of a snapshot, piece by piece.

mod memory;
mod parts;

use crate::error::WriteError;
use crate::footer::Footer;
use crate::layout::{MAX_MANIFEST, MAX_PAGES, MAX_STATE, Part, next_page};
use crate::open;
use crate::{Checksum, PAGE, pages};
use guest_saved_state::machine::memory::MemoryState;
use guest_saved_state::machine::snapshot::SnapshotState;
use guest_saved_state::machine::snapshot_file::{LayerBase, Manifest, PartEntry, UnitEntry};
use guest_schema::{SnapshotFile, SnapshotInfo};
use memory::{Against, MemoryEncoder};
pub(crate) use memory::{PAGE_LENGTH, ZERO_PAGE};
use parts::{Body, PartEncoder};
use prost::{Message, Name};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A snapshot that is to be written. Its files do not change meanwhile.
#[derive(Debug, Clone)]
pub struct SnapshotSource {
    /// What it consists of.
    pub files: BTreeMap<SnapshotFile, Arc<File>>,
    /// What it says of itself.
    pub info: SnapshotInfo,
}

impl SnapshotSource {
    fn file(&self, file: SnapshotFile) -> Result<&Arc<File>, WriteError> {
        self.files.get(&file).ok_or(WriteError::Missing(file))
    }

    fn length(&self, file: SnapshotFile) -> Result<u64, WriteError> {
        Ok(self.file(file)?.metadata().map_err(WriteError::read(file))?.len())
    }

    /// What the guest's state units have saved, and its config. Blocks.
    ///
    /// # Errors
    /// [`WriteError`] if there is none, or it cannot be read or decoded.
    pub fn state(&self) -> Result<SnapshotState, WriteError> {
        SnapshotState::decode(&*self.state_bytes()?)
            .map_err(|error| WriteError::unfit(SnapshotFile::State, format!("it cannot be decoded: {error}")))
    }

    fn state_bytes(&self) -> Result<Vec<u8>, WriteError> {
        const STATE: SnapshotFile = SnapshotFile::State;
        let bytes = self.length(STATE)?;
        if bytes > MAX_STATE {
            return Err(WriteError::unfit(STATE, format!("its {bytes} bytes are more than {MAX_STATE}")));
        }
        let mut state = vec![0; usize::try_from(bytes).expect("checked above")];
        self.file(STATE)?.read_exact_at(&mut state, 0).map_err(WriteError::read(STATE))?;
        Ok(state)
    }
}

/// The parts that are files of the snapshot as they are.
const FILES: [(Part, SnapshotFile); 3] = [
    (Part::State, SnapshotFile::State),
    (Part::Kernel, SnapshotFile::Kernel),
    (Part::Ramdisk, SnapshotFile::Ramdisk),
];

/// What of a file comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// These bytes, at most 1 MiB; pages that are all zeros may be among them only where they are no memory, or a layer's.
    Bytes(&'a [u8]),
    /// So many zeros, which can be a hole.
    Zeros(u64),
}

/// Makes a file of a snapshot. The file is the same, however often it is made. Limit: an encoder that has failed is of no further use.
pub struct SnapshotEncoder {
    memory: Option<MemoryEncoder>,
    waiting: VecDeque<(Part, Body)>,
    part: Option<PartEncoder>,
    /// Until it has become a part.
    manifest: Option<Manifest>,
    at: u64,
    bytes: u64,
    made: Option<MemoryMade>,
}

/// The memory in a file that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryMade {
    /// Its checksum, or that of a layer's pages.
    pub checksum: Checksum,
    /// How many bytes of it are there.
    pub data_bytes: u64,
}

impl SnapshotEncoder {
    /// The file with all of the memory.
    ///
    /// # Errors
    /// [`WriteError`] if a file of the snapshot is missing, cannot be read, or is not what it should be.
    pub fn whole(source: &SnapshotSource) -> Result<Self, WriteError> {
        Self::new(source, None)
    }

    /// The file with a layer alone: the pages that differ from those of `base`, which is read whole for it, and checked.
    ///
    /// # Errors
    /// As [`Self::whole`]; and if `base` is a layer itself or its memory has another size. Later, if its memory is damaged.
    pub fn layer(source: &SnapshotSource, base: &open::SnapshotFile) -> Result<Self, WriteError> {
        Self::new(source, Some(base))
    }

    fn new(source: &SnapshotSource, base: Option<&open::SnapshotFile>) -> Result<Self, WriteError> {
        let manifest = manifest(source, &source.state()?)?;
        let memory_bytes = memory_bytes(source, &manifest)?;
        let against = base.map(|base| against(base, memory_bytes)).transpose()?;
        let mut waiting = VecDeque::new();
        for (part, file) in FILES {
            if file.is_required() || source.files.contains_key(&file) {
                let (from, bytes) = (source.file(file)?.clone(), source.length(file)?);
                waiting.push_back((part, Body::File { file: from, bytes, of: file }));
            }
        }
        let bytes = waiting.iter().map(|(_, body)| body.bytes()).sum::<u64>().saturating_add(memory_bytes);
        let memory = MemoryEncoder::new(source, memory_bytes, against)?;
        let manifest = Manifest { base: base.map(layer_base), ..manifest };
        Ok(Self {
            memory: Some(memory),
            waiting,
            part: None,
            manifest: Some(manifest),
            at: 0,
            bytes,
            made: None,
        })
    }

    /// How much of the file has been made, in bytes, holes included.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// About how long the file will be: without what is known only once it is made.
    pub fn bytes(&self) -> u64 {
        self.bytes.max(self.at)
    }

    /// The memory, once all of it has been made.
    pub fn memory(&self) -> Option<MemoryMade> {
        self.made
    }

    /// What comes next; `None` at the end. Blocks for as long as it takes to read it.
    ///
    /// # Errors
    /// [`WriteError`] if a file of the snapshot or of the base cannot be read, or the base's memory is damaged.
    pub fn next_piece(&mut self) -> Result<Option<Piece<'_>>, WriteError> {
        while !self.is_ready()? {
            if !self.begin_part()? {
                return Ok(None);
            }
        }
        let piece = match (&mut self.memory, &mut self.part) {
            (Some(memory), _) => memory.piece(),
            (None, Some(part)) => part.piece(),
            (None, None) => return Ok(None),
        };
        self.at += match piece {
            Piece::Bytes(bytes) => bytes.len() as u64,
            Piece::Zeros(count) => count,
        };
        Ok(Some(piece))
    }

    /// Whether there is a piece; if not, what was being made is finished.
    fn is_ready(&mut self) -> Result<bool, WriteError> {
        if let Some(memory) = &mut self.memory {
            if memory.fill()? {
                return Ok(true);
            }
            self.finish_memory()?;
        }
        let Some(part) = &mut self.part else { return Ok(false) };
        if part.fill()? {
            return Ok(true);
        }
        self.finish_part();
        Ok(false)
    }

    fn finish_memory(&mut self) -> Result<(), WriteError> {
        let (Some(memory), Some(manifest)) = (self.memory.take(), &mut self.manifest) else { return Ok(()) };
        let made = memory.finish()?;
        manifest.data_bytes = made.data_bytes;
        self.made = Some(MemoryMade { checksum: made.checksum, data_bytes: made.data_bytes });
        let part = if manifest.base.is_some() { Part::Layer } else { Part::Memory };
        manifest.parts.push(entry(part, 0, self.at, made.checksum));
        if let Some(ranges) = made.layer {
            let pages = pages::encode(&ranges).encode_to_vec();
            check_length("list of pages", pages.len(), MAX_PAGES)?;
            self.waiting.push_front((Part::Pages, Body::Bytes(pages)));
        }
        Ok(())
    }

    /// Goes on to the next part, if there is one.
    fn begin_part(&mut self) -> Result<bool, WriteError> {
        let start = next_page(self.at).expect("files are shorter");
        let padding = start - self.at;
        self.part = match self.waiting.pop_front() {
            Some((part, body)) => Some(PartEncoder::new(Some(part), start, padding, body)),
            None => match self.manifest.take() {
                Some(manifest) => Some(PartEncoder::new(None, start, padding, ending(&manifest, start)?)),
                None => None,
            },
        };
        Ok(self.part.is_some())
    }

    fn finish_part(&mut self) {
        let (Some(part), Some(manifest)) = (self.part.take(), &mut self.manifest) else { return };
        let PartEncoder { part: Some(name), start, .. } = part else { return };
        manifest.parts.push(entry(name, start, self.at - start, part.checksum()));
    }
}

fn entry(part: Part, offset: u64, length: u64, checksum: Checksum) -> PartEntry {
    PartEntry { name: part.name().to_owned(), offset, length, checksum: checksum.bytes().to_vec() }
}

fn check_length(what: &str, bytes: usize, most: u64) -> Result<(), WriteError> {
    if bytes as u64 <= most {
        return Ok(());
    }
    Err(WriteError::unfit(SnapshotFile::State, format!("the {what} of {bytes} bytes is longer than {most}")))
}

/// The manifest and the footer, which begin at `start`.
fn ending(manifest: &Manifest, start: u64) -> Result<Body, WriteError> {
    let mut bytes = manifest.encode_to_vec();
    check_length("manifest", bytes.len(), MAX_MANIFEST)?;
    let footer = Footer { manifest: start..start + bytes.len() as u64, checksum: Checksum::of(&bytes) };
    bytes.extend(footer.encode());
    Ok(Body::Bytes(bytes))
}

/// The manifest of a file without its parts.
fn manifest(source: &SnapshotSource, state: &SnapshotState) -> Result<Manifest, WriteError> {
    let SnapshotInfo { memory_bytes, ref parent, taken_at_us, vps, ref disks, networks, .. } = source.info;
    Ok(Manifest {
        product_version: env!("CARGO_PKG_VERSION").to_owned(),
        parent: parent.clone(),
        taken_at_us,
        memory_bytes,
        hotplug_bytes: hotplug_bytes(state)?,
        data_bytes: 0,
        vps,
        disks: disks.clone(),
        networks,
        units: unit_entries(state),
        parts: Vec::new(),
        base: None,
    })
}

/// What the manifest says of the units of a state.
pub(crate) fn unit_entries(state: &SnapshotState) -> Vec<UnitEntry> {
    let entry =
        |name: &String, type_name: &String| UnitEntry { name: name.clone(), type_name: type_name.clone() };
    state.units.iter().map(|unit| entry(&unit.name, &unit.type_name)).collect()
}

/// The size of the region for memory that is plugged later, which the memory's unit knows.
fn hotplug_bytes(state: &SnapshotState) -> Result<u64, WriteError> {
    let Some(unit) = state.units.iter().find(|unit| unit.type_name == MemoryState::full_name()) else {
        return Ok(0);
    };
    let bad = |problem: String| WriteError::unfit(SnapshotFile::State, format!("{}: {problem}", unit.name));
    let memory = MemoryState::decode(&*unit.value).map_err(|error| bad(error.to_string()))?;
    let MemoryState { hotplug_start, hotplug_end, .. } = memory;
    hotplug_end
        .checked_sub(hotplug_start)
        .ok_or_else(|| bad(format!("its region begins at {hotplug_start} and ends at {hotplug_end}")))
}

/// How long the memory's part is.
fn memory_bytes(source: &SnapshotSource, manifest: &Manifest) -> Result<u64, WriteError> {
    const MEMORY: SnapshotFile = SnapshotFile::Memory;
    let Manifest { memory_bytes, hotplug_bytes, .. } = *manifest;
    let length = source.length(MEMORY)?;
    let bytes = memory_bytes.checked_add(hotplug_bytes).filter(|bytes| *bytes <= length && *bytes > 0);
    let whole = memory_bytes.is_multiple_of(PAGE) && hotplug_bytes.is_multiple_of(PAGE);
    bytes.filter(|_| whole).ok_or_else(|| {
        let problem = format!(
            "its {length} bytes do not hold memory of {memory_bytes} and a region of {hotplug_bytes}, in whole pages"
        );
        WriteError::unfit(MEMORY, problem)
    })
}

fn against(base: &open::SnapshotFile, memory_bytes: u64) -> Result<Against, WriteError> {
    if base.manifest().base.is_some() {
        return Err(WriteError::Base("it is a layer itself".into()));
    }
    let bytes = base.memory_bytes();
    if bytes != memory_bytes {
        return Err(WriteError::Base(format!(
            "its memory is of {bytes} bytes, and the snapshot's of {memory_bytes}"
        )));
    }
    Ok(Against { file: base.file().clone(), noted: base.memory_checksum() })
}

fn layer_base(base: &open::SnapshotFile) -> LayerBase {
    let Manifest { ref parent, taken_at_us, .. } = *base.manifest();
    let memory_checksum = base.memory_checksum().bytes().to_vec();
    LayerBase { memory_checksum, parent: parent.clone(), taken_at_us }
}
