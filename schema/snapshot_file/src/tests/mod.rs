//! Snapshots as files: what was written is read, and what is damaged is refused.

mod damage;
mod layers;
mod round_trips;
mod saving;

use crate::*;
use guest_saved_state::machine::memory::MemoryState;
use guest_schema::{SnapshotFile as SourceFile, SnapshotInfo};
use prost::{Message, Name};
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// What a page of memory has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    Hole,
    /// Zeros that are no hole.
    Zeros,
    /// These bytes, with the page's number in it.
    Filled(u8),
}

use crate::encode::PAGE_LENGTH as PAGE_BYTES;

const CONTINUE: ControlFlow<()> = ControlFlow::Continue(());

/// A sparse file of pages.
fn file_of(pages: &[Page]) -> Arc<File> {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(pages.len() as u64 * PAGE).expect("its size");
    for (page, at) in pages.iter().zip((0..).step_by(PAGE_BYTES)) {
        let bytes = match page {
            Page::Hole => continue,
            Page::Zeros => vec![0; PAGE_BYTES],
            Page::Filled(byte) => filled(*byte, at),
        };
        file.write_all_at(&bytes, at).expect("written");
    }
    Arc::new(file)
}

fn filled(byte: u8, at: u64) -> Vec<u8> {
    let mut bytes = vec![byte; PAGE_BYTES];
    bytes[..8].copy_from_slice(&(at + 1).to_le_bytes());
    bytes
}

/// What memory of these pages, with others over them, is.
fn contents(base: &[Page], layer: &[Page]) -> Vec<u8> {
    let mut memory = vec![0; base.len() * PAGE_BYTES];
    for (index, page) in base.iter().enumerate().chain(layer.iter().enumerate()) {
        let place = &mut memory[index * PAGE_BYTES..][..PAGE_BYTES];
        match page {
            Page::Hole => {}
            Page::Zeros => place.fill(0),
            Page::Filled(byte) => place.copy_from_slice(&filled(*byte, (index * PAGE_BYTES) as u64)),
        }
    }
    memory
}

fn bytes_file(bytes: &[u8]) -> Arc<File> {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(bytes, 0).expect("written");
    Arc::new(file)
}

/// Of the memory's two pages at the end, one is of the region for what is plugged later.
fn state(pages: u64) -> SnapshotState {
    let memory =
        MemoryState { bytes: (pages - 1) * PAGE, hotplug_start: 1 << 32, hotplug_end: (1 << 32) + PAGE };
    let unit = |name: &str, type_name: String, value| UnitState { name: name.into(), type_name, value };
    let units = vec![
        unit("memory", MemoryState::full_name(), memory.encode_to_vec()),
        unit("rtc", "devices.rtc.RtcState".into(), vec![8, 1]),
    ];
    SnapshotState { format: 1, config: vec![7; 40], units }
}

/// A snapshot of a guest with memory of these pages.
fn source(base: &[Page], layer: Option<&[Page]>) -> SnapshotSource {
    let pages = base.len() as u64;
    let mut files: std::collections::BTreeMap<_, _> = [
        (SourceFile::State, bytes_file(&state(pages).encode_to_vec())),
        (SourceFile::Memory, file_of(base)),
        (SourceFile::Kernel, bytes_file(&[0xeb; 5000])),
        (SourceFile::Ramdisk, bytes_file(&[0x1f; 10])),
    ]
    .into();
    files.extend(layer.map(|layer| (SourceFile::Layer, file_of(layer))));
    let info = SnapshotInfo {
        memory_bytes: (pages - 1) * PAGE,
        parent: "web".into(),
        taken_at_us: 5,
        vps: 2,
        disks: vec!["root".into()],
        networks: 1,
        ..SnapshotInfo::default()
    };
    SnapshotSource { files, info }
}

fn written(mut encoder: SnapshotEncoder) -> File {
    let file = tempfile::tempfile().expect("a file");
    write(&mut encoder, &mut SparseOutput::new(&file), |_, _| CONTINUE).expect("written");
    assert_eq!(file.metadata().expect("its size").len(), encoder.at());
    file
}

fn whole(source: &SnapshotSource) -> SnapshotFile {
    SnapshotFile::open(written(SnapshotEncoder::whole(source).expect("fit"))).expect("opened")
}

fn bytes_of(file: &File) -> Vec<u8> {
    let length = usize::try_from(file.metadata().expect("its size").len()).expect("it is short");
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).expect("read");
    bytes
}

fn open_bytes(bytes: &[u8]) -> Result<SnapshotFile, OpenError> {
    SnapshotFile::open(bytes_file(bytes).try_clone().expect("a descriptor"))
}

fn snapshot() -> Vec<u8> {
    let pages = [Page::Filled(1), Page::Hole, Page::Zeros, Page::Filled(2)];
    bytes_of(whole(&source(&pages, None)).file())
}
