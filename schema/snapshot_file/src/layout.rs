//! The parts of a file, and whether they lie as they must.

use crate::PAGE;
use crate::checksum::Checksum;
use crate::error::OpenError;
use guest_saved_state::machine::snapshot_file::{Manifest, PartEntry};
use std::collections::BTreeMap;
use std::ops::Range;

/// The most bytes of a manifest.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// The most bytes of a state.
pub(crate) const MAX_STATE: u64 = 256 << 20;
/// The most bytes of a layer's list of pages.
pub(crate) const MAX_PAGES: u64 = 256 << 20;

pub(crate) const MANIFEST: &str = "manifest";

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// All of the guest's memory.
    Memory,
    /// The pages that differ from the memory of another file.
    Layer,
    /// Which pages those are.
    Pages,
    /// What the state units have saved.
    State,
    /// The kernel that the guest was booted from.
    Kernel,
    /// The initrd that it was booted with.
    Ramdisk,
}

impl Part {
    /// Every part, in the order in which they lie.
    pub const ALL: [Self; 6] =
        [Self::Memory, Self::Layer, Self::Pages, Self::State, Self::Kernel, Self::Ramdisk];

    /// Its name in the manifest.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Layer => "layer",
            Self::Pages => "pages",
            Self::State => "state",
            Self::Kernel => "kernel",
            Self::Ramdisk => "ramdisk",
        }
    }

    /// The part with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|part| part.name() == name)
    }

    const fn most(self) -> u64 {
        match self {
            Self::State => MAX_STATE,
            Self::Pages => MAX_PAGES,
            Self::Memory | Self::Layer | Self::Kernel | Self::Ramdisk => u64::MAX,
        }
    }
}

/// Where a part lies, and its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub range: Range<u64>,
    pub checksum: Checksum,
}

/// Where the parts lie.
pub(crate) type Places = BTreeMap<Part, Place>;

/// The first page at or behind this.
pub(crate) fn next_page(at: u64) -> Option<u64> {
    at.checked_next_multiple_of(PAGE)
}

/// The places of the parts of a file whose manifest begins at `end`.
pub(crate) fn places(manifest: &Manifest, end: u64) -> Result<Places, OpenError> {
    let mut places = Places::new();
    let mut last: Option<(Part, u64)> = None;
    for (index, entry) in manifest.parts.iter().enumerate() {
        let bad = |field: &str, problem: String| bad_entry(index, field, problem);
        let part = Part::named(&entry.name)
            .ok_or_else(|| bad("name", format!("{:?} is none of the parts", short(&entry.name))))?;
        let place =
            place(entry, part, last.map_or(0, |(_, end)| end)).map_err(|(field, it)| bad(field, it))?;
        if let Some((before, _)) = last.filter(|(before, _)| *before >= part) {
            return Err(bad("name", format!("{} does not lie behind {}", part.name(), before.name())));
        }
        last = Some((part, place.range.end));
        places.insert(part, place);
    }
    let last = last.map_or(0, |(_, end)| end);
    if next_page(last) != Some(end) {
        let problem = format!("they end at {last}, and the manifest begins at {end}");
        return Err(OpenError::field(MANIFEST, "parts", problem));
    }
    complete(manifest, &places)?;
    Ok(places)
}

fn bad_entry(index: usize, field: &str, problem: String) -> OpenError {
    OpenError::field(MANIFEST, format!("parts[{index}].{field}"), problem)
}

/// What a message shows of a text that anybody may have written.
fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

fn place(entry: &PartEntry, part: Part, last: u64) -> Result<Place, (&'static str, String)> {
    let PartEntry { offset, length, ref checksum, .. } = *entry;
    if next_page(last) != Some(offset) {
        return Err((
            "offset",
            format!("{offset} is not the first page behind {last}, where the part before ends"),
        ));
    }
    let end =
        offset.checked_add(length).ok_or_else(|| ("length", format!("{length} is beyond all files")))?;
    if length > part.most() {
        return Err(("length", format!("{length} is more than the {} that there can be", part.most())));
    }
    let checksum = Checksum::noted(checksum)
        .ok_or_else(|| ("checksum", format!("it is of {} bytes, not 16", checksum.len())))?;
    Ok(Place { range: offset..end, checksum })
}

/// Whether the parts are those of all of the memory, or of a layer, and as long as the manifest says.
fn complete(manifest: &Manifest, places: &Places) -> Result<(), OpenError> {
    let bad = |problem: String| OpenError::field(MANIFEST, "parts", problem);
    let is_layer = manifest.base.is_some();
    let needed: &[Part] = if is_layer { &[Part::Layer, Part::Pages] } else { &[Part::Memory] };
    for part in needed.iter().chain(&[Part::State, Part::Kernel]) {
        places.get(part).ok_or_else(|| bad(format!("{} is missing", part.name())))?;
    }
    let strange: &[Part] = if is_layer { &[Part::Memory] } else { &[Part::Layer, Part::Pages] };
    if let Some(part) = strange.iter().find(|part| places.contains_key(part)) {
        let whole = if is_layer { "a layer's" } else { "a whole memory's" };
        return Err(bad(format!("{} is there, and the file is {whole}", part.name())));
    }
    let (part, length) = (needed[0], places[&needed[0]].range.end);
    let Manifest { memory_bytes, hotplug_bytes, .. } = *manifest;
    let whole_pages = memory_bytes.is_multiple_of(PAGE) && hotplug_bytes.is_multiple_of(PAGE);
    if memory_bytes == 0 || !whole_pages || memory_bytes.checked_add(hotplug_bytes) != Some(length) {
        let problem = format!(
            "{memory_bytes}, with hotplug_bytes of {hotplug_bytes}, are not the {length} bytes of {}, in whole pages",
            part.name()
        );
        return Err(OpenError::field(MANIFEST, "memory_bytes", problem));
    }
    Ok(())
}
