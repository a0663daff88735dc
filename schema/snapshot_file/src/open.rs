//! Reading a snapshot's file.

use crate::checksum::{Checksum, PagesHasher, PartHasher};
use crate::encode::unit_entries;
use crate::encode::{PAGE_LENGTH, ZERO_PAGE};
use crate::error::OpenError;
use crate::footer::Footer;
use crate::layout::{MANIFEST, MAX_MANIFEST, Part, Place, Places, places};
use crate::memory::MemorySource;
use crate::{BLOCK, pages};
use guest_saved_state::machine::snapshot::SnapshotState;
use guest_saved_state::machine::snapshot_file::{LayerPages, Manifest};
use prost::Message;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A snapshot's file that was opened and checked: all of it but the memory. It stays so for as long as nobody writes to the file.
#[derive(Debug, Clone)]
pub struct SnapshotFile {
    file: Arc<File>,
    bytes: u64,
    manifest: Manifest,
    places: Places,
    state: Vec<u8>,
    decoded: SnapshotState,
    layer: Option<Layer>,
}

#[derive(Debug, Clone)]
struct Layer {
    pages: Vec<Range<u64>>,
    base: Checksum,
}

impl SnapshotFile {
    /// Opens and checks one. It is read at offsets, never at the file's own. Blocks.
    ///
    /// # Errors
    /// [`OpenError`], which names the part and the field that are not as they should be.
    pub fn open(file: File) -> Result<Self, OpenError> {
        let bytes = file.metadata().map_err(OpenError::read("footer"))?.len();
        let footer = Footer::read(&file, bytes)?;
        let manifest = read_manifest(&file, &footer)?;
        let places = places(&manifest, footer.manifest.start)?;
        check_padding(&file, &places, footer.manifest.start)?;
        for part in [Part::Kernel, Part::Ramdisk] {
            if let Some(place) = places.get(&part) {
                copy(&file, part, place, &mut io::sink())?;
            }
        }
        let state = read_part(&file, Part::State, &places[&Part::State])?;
        let decoded = SnapshotState::decode(&*state).map_err(OpenError::decode(Part::State.name()))?;
        check_units(&manifest, &decoded)?;
        let layer = read_layer(&file, &manifest, &places)?;
        Ok(Self { file: Arc::new(file), bytes, manifest, places, state, decoded, layer })
    }

    /// The file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// How long the file is.
    pub fn file_bytes(&self) -> u64 {
        self.bytes
    }

    /// What it says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What the guest's state units have saved, and its config.
    pub fn state(&self) -> &SnapshotState {
        &self.decoded
    }

    /// That, as it was written.
    pub fn state_bytes(&self) -> &[u8] {
        &self.state
    }

    /// Where a part lies in the file; `None` if there is none. That of the memory begins at 0, as does that of a layer, in which only
    /// the pages of [`Self::layer_pages`] are to be looked at: what else is there may be a hole, or zeros.
    pub fn part(&self, part: Part) -> Option<Range<u64>> {
        self.places.get(&part).map(|place| place.range.clone())
    }

    /// The size of the guest's memory, with the region for what is plugged later.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_place().1.range.end
    }

    /// The checksum of the memory, or of a layer's pages, as it is noted.
    pub fn memory_checksum(&self) -> Checksum {
        self.memory_place().1.checksum
    }

    /// Which ranges of bytes of the memory are in a layer, ascending and apart; `None` of a file that has all of the memory.
    pub fn layer_pages(&self) -> Option<&[Range<u64>]> {
        self.layer.as_ref().map(|layer| &layer.pages[..])
    }

    /// The [`Self::memory_checksum`] of the file that this is a layer of; `None` of a file that has all of the memory.
    pub fn base_checksum(&self) -> Option<Checksum> {
        self.layer.as_ref().map(|layer| layer.base)
    }

    /// Writes a part to `to`, and checks it anew.
    ///
    /// # Errors
    /// [`OpenError`] if it cannot be read, or has changed; nothing of the kind if there is no such part, which is of no bytes. What cannot
    /// be written is an error of reading that part.
    pub fn copy_part(&self, part: Part, to: &mut impl Write) -> Result<(), OpenError> {
        self.places.get(&part).map_or(Ok(()), |place| copy(&self.file, part, place, to))
    }

    /// Reads the memory, or a layer's pages, and checks it. `progress` is told how many bytes of how many are done. Blocks.
    ///
    /// # Errors
    /// [`OpenError`] if it cannot be read, or is not what was written.
    pub fn verify_memory(&self, progress: impl FnMut(u64, u64)) -> Result<(), OpenError> {
        let (part, place) = self.memory_place();
        let mut hasher = PagesHasher::default();
        match &self.layer {
            Some(layer) => self.hash_pages(&layer.pages, &mut hasher, progress),
            None => self.hash_memory(&mut hasher, progress),
        }
        .map_err(OpenError::read(part.name()))?;
        matches(part.name(), hasher.finish(), place.checksum)
    }

    fn memory_place(&self) -> (Part, &Place) {
        let part = if self.layer.is_some() { Part::Layer } else { Part::Memory };
        (part, &self.places[&part])
    }

    fn hash_memory(&self, hasher: &mut PagesHasher, mut progress: impl FnMut(u64, u64)) -> io::Result<()> {
        let bytes = self.memory_bytes();
        let mut memory = MemorySource::new(self.file.clone(), None, bytes);
        let mut buffer = vec![0; BLOCK];
        let mut at = 0;
        while at < bytes {
            let data = memory.next(at)?;
            // A file system's blocks may be smaller than pages.
            let start = data.start / crate::PAGE * crate::PAGE;
            let end = data.end.next_multiple_of(crate::PAGE).min(start + BLOCK as u64).min(bytes);
            let buffer = &mut buffer[..usize::try_from(end - start).expect("a block")];
            memory.read(start, buffer)?;
            for (offset, page) in (start..).step_by(PAGE_LENGTH).zip(buffer.chunks(PAGE_LENGTH)) {
                if *page != ZERO_PAGE[..] {
                    hasher.add(offset, page);
                }
            }
            at = end;
            progress(at, bytes);
        }
        Ok(())
    }

    fn hash_pages(
        &self,
        pages: &[Range<u64>],
        hasher: &mut PagesHasher,
        mut progress: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        let bytes = pages.iter().map(|range| range.end - range.start).sum();
        let mut done = 0;
        let mut buffer = vec![0; BLOCK];
        for range in pages {
            for start in range.clone().step_by(BLOCK) {
                let length = (range.end - start).min(BLOCK as u64);
                let buffer = &mut buffer[..usize::try_from(length).expect("a block")];
                self.file.read_exact_at(buffer, start)?;
                hasher.add(start, buffer);
                done += length;
                progress(done, bytes);
            }
        }
        Ok(())
    }
}

fn matches(part: &'static str, found: Checksum, noted: Checksum) -> Result<(), OpenError> {
    if found == noted { Ok(()) } else { Err(OpenError::Checksum { part, found, noted }) }
}

fn read_manifest(file: &File, footer: &Footer) -> Result<Manifest, OpenError> {
    let length = footer.manifest.end - footer.manifest.start;
    if length > MAX_MANIFEST {
        let problem = format!("its {length} bytes are more than the {MAX_MANIFEST} that there can be");
        return Err(OpenError::field("footer", "manifest", problem));
    }
    let mut bytes = vec![0; usize::try_from(length).expect("checked above")];
    file.read_exact_at(&mut bytes, footer.manifest.start).map_err(OpenError::read(MANIFEST))?;
    matches(MANIFEST, Checksum::of(&bytes), footer.checksum)?;
    Manifest::decode(&*bytes).map_err(OpenError::decode(MANIFEST))
}

/// Nothing may hide between the parts.
fn check_padding(file: &File, places: &Places, manifest: u64) -> Result<(), OpenError> {
    let starts = places.values().map(|place| place.range.start).skip(1).chain([manifest]);
    for ((part, place), start) in places.iter().zip(starts) {
        let end = place.range.end;
        let mut padding = vec![0; usize::try_from(start - end).expect("less than a page")];
        file.read_exact_at(&mut padding, end).map_err(OpenError::read(part.name()))?;
        if let Some((at, byte)) = (end..).zip(padding).find(|(_, byte)| *byte != 0) {
            return Err(OpenError::field(
                part.name(),
                "padding",
                format!("{byte:#04x} at {at}, and not zero"),
            ));
        }
    }
    Ok(())
}

/// Of one whose length is bounded.
fn read_part(file: &File, part: Part, place: &Place) -> Result<Vec<u8>, OpenError> {
    let length = usize::try_from(place.range.end - place.range.start).expect("it is bounded");
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, place.range.start).map_err(OpenError::read(part.name()))?;
    matches(part.name(), Checksum::of(&bytes), place.checksum)?;
    Ok(bytes)
}

fn copy(file: &File, part: Part, place: &Place, to: &mut impl Write) -> Result<(), OpenError> {
    let mut hasher = PartHasher::default();
    let mut buffer = vec![0; BLOCK];
    for start in place.range.clone().step_by(BLOCK) {
        let length = (place.range.end - start).min(BLOCK as u64);
        let buffer = &mut buffer[..usize::try_from(length).expect("a block")];
        let copied = file.read_exact_at(buffer, start).and_then(|()| to.write_all(buffer));
        copied.map_err(OpenError::read(part.name()))?;
        hasher.add(buffer);
    }
    matches(part.name(), hasher.finish(), place.checksum)
}

fn check_units(manifest: &Manifest, state: &SnapshotState) -> Result<(), OpenError> {
    let units = unit_entries(state);
    if units == manifest.units {
        return Ok(());
    }
    let differs = units.iter().zip(&manifest.units).take_while(|(one, other)| one == other).count();
    let problem = "it is not that of the state at this place".to_owned();
    Err(OpenError::field(MANIFEST, format!("units[{differs}]"), problem))
}

fn read_layer(file: &File, manifest: &Manifest, places: &Places) -> Result<Option<Layer>, OpenError> {
    let Some(base) = &manifest.base else { return Ok(None) };
    let checksum = &base.memory_checksum;
    let base = Checksum::noted(checksum).ok_or_else(|| {
        let problem = format!("it is of {} bytes, not 16", checksum.len());
        OpenError::field(MANIFEST, "base.memory_checksum", problem)
    })?;
    let bytes = read_part(file, Part::Pages, &places[&Part::Pages])?;
    let pages = LayerPages::decode(&*bytes).map_err(OpenError::decode(Part::Pages.name()))?;
    let pages = pages::decode(&pages, places[&Part::Layer].range.end)?;
    Ok(Some(Layer { pages, base }))
}
