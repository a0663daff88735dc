//! Snapshots' files, and what is refused of them.

use super::*;
use crate::config::tests::config;
use crate::snapshot::Origin;
use guest_schema::{SnapshotFile as Kept, SnapshotInfo};
use guest_snapshot_file::{SnapshotEncoder, SnapshotSource, SparseOutput, write};
use machine::memory::{GuestMemory, MemoryOptions};
use save_restore::SavedStateBlob;
use state_unit::SavedStateUnit;
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const HOST: u64 = 1 << 30;

fn sealed(bytes: &[u8]) -> File {
    let file = files::memfd().expect("a memfd");
    file.write_all_at(bytes, 0).expect("written");
    fcntl_add_seals(&file, SEALED).expect("sealed");
    file
}

/// Memory of a mebibyte with these bytes in it.
fn memory(bytes: &[(u64, u8)]) -> Arc<File> {
    let mut memory = vec![0; 1 << 20];
    bytes.iter().for_each(|(at, byte)| memory[usize::try_from(*at).expect("small")] = *byte);
    Arc::new(sealed(&memory))
}

fn source(memory: Arc<File>) -> SnapshotSource {
    let origin = Origin::new(config(), &sealed(b"kernel"), Some(&sealed(b"ramdisk"))).expect("an origin");
    let unit = SavedStateUnit { name: "vps".into(), state: Some(SavedStateBlob::from_parts("a.B", [1, 2])) };
    let state = origin.state_of(vec![unit]);
    let files = [
        (Kept::State, Arc::new(sealed(&state))),
        (Kept::Memory, memory),
        (Kept::Kernel, Arc::new(sealed(b"kernel"))),
        (Kept::Ramdisk, Arc::new(sealed(b"ramdisk"))),
    ];
    let info = SnapshotInfo { memory_bytes: MIB, parent: "web".into(), ..SnapshotInfo::default() };
    SnapshotSource { files: BTreeMap::from(files), info }
}

fn saved(memory: Arc<File>, base: Option<&NamedTempFile>) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file");
    let base = base.map(|base| SnapshotFile::open(File::open(base.path()).expect("opened")).expect("a base"));
    let source = source(memory);
    let encoder = match &base {
        Some(base) => SnapshotEncoder::layer(&source, base),
        None => SnapshotEncoder::whole(&source),
    };
    let never = |_, _| std::ops::ControlFlow::Continue(());
    write(&mut encoder.expect("an encoder"), &mut SparseOutput::new(file.as_file()), never).expect("written");
    file
}

fn given(file: &NamedTempFile) -> Obtained {
    Obtained::Given(File::open(file.path()).expect("opened").into())
}

/// What a client's `File` has become.
fn copied(file: &NamedTempFile) -> Obtained {
    let copy = files::memfd().expect("a memfd");
    std::io::copy(&mut File::open(file.path()).expect("opened"), &mut &copy).expect("copied");
    Obtained::Copied(copy)
}

fn problem(file: Obtained, base: Option<Obtained>) -> String {
    let failure = open(file, base, HOST).err().expect("refused");
    format!("{}: {}", failure.code.name(), failure.detail)
}

fn bytes_at(image: &MemoryImage, places: [u64; 3]) -> [u8; 3] {
    let memory = GuestMemory::restore(image, MIB, MemoryOptions::default(), None).expect("restored");
    places.map(|at| memory.view().read_obj(GuestAddress(at)).expect("in memory"))
}

fn contents(mut file: &File) -> String {
    std::io::Seek::rewind(&mut file).and_then(|()| std::io::read_to_string(file)).expect("read")
}

#[test]
fn a_file_has_all_that_a_guest_goes_on_from() {
    let file = saved(memory(&[(0, 1), (9000, 2)]), None);
    for obtained in [given(&file), copied(&file)] {
        let Opened { state, image, kernel, ramdisk } = open(obtained, None, HOST).expect("opened");
        let (config, units) = decoded(state).expect("decoded");
        assert_eq!((config.memory.bytes, &units[0].name[..]), (MIB, "vps"));
        assert_eq!(
            (contents(&kernel), contents(&ramdisk.expect("one"))),
            ("kernel".into(), "ramdisk".into())
        );
        assert!(!is_writable(&kernel) && !is_writable(&**image.base.file()));
        assert_eq!(bytes_at(&image, [0, 9000, 50_000]), [1, 2, 0]);
    }
    let copy = open(copied(&file), None, HOST).expect("opened").image;
    assert_eq!(copy.base.file().metadata().expect("a file").len(), MIB, "no more than memory is kept");
}

#[test]
fn a_layer_goes_with_its_base() {
    let base = saved(memory(&[(0, 1), (9000, 2), (50_000, 3)]), None);
    let layer = saved(memory(&[(0, 1), (9000, 4)]), Some(&base));
    for (layer, base) in
        [(given(&layer), given(&base)), (copied(&layer), copied(&base)), (given(&layer), copied(&base))]
    {
        let opened = open(layer, Some(base), HOST).expect("opened");
        assert_eq!(bytes_at(&opened.image, [0, 9000, 50_000]), [1, 4, 0]);
    }
    let other = saved(memory(&[(0, 2)]), None);
    let none = problem(given(&layer), None);
    assert!(
        none.starts_with(
            "badConfig: source.saved.base: none was given, and the file is a layer of a snapshot of \"web\""
        ),
        "{none}"
    );
    let wrong = problem(given(&layer), Some(given(&other)));
    assert!(
        wrong.starts_with("badConfig: source.saved.base: it is not what the file is a layer of"),
        "{wrong}"
    );
    assert_eq!(
        [problem(given(&base), Some(given(&base))), problem(given(&layer), Some(given(&layer)))],
        [
            "badConfig: source.saved.base: the file is no layer, and has all of its memory",
            "badConfig: source.saved.base: it is a layer itself",
        ]
    );
}

#[test]
fn a_file_that_is_cut_short_or_changed_is_named() {
    let file = saved(memory(&[(9000, 2)]), None);
    let length = file.as_file().metadata().expect("a file").len();
    let opened = SnapshotFile::open(File::open(file.path()).expect("opened")).expect("a snapshot");
    let places = Part::ALL.map(|part| opened.part(part)).into_iter().flatten();
    for cut in places.flat_map(|place| [place.start, place.end]).chain([length - 1]) {
        let short = copied(&file);
        let Obtained::Copied(copy) = &short else { panic!("a copy") };
        copy.set_len(cut).expect("cut");
        let refused = problem(short, None);
        let text = format!(
            "snapshotCorrupt: source.saved.file: it is no snapshot's file, or its end is missing: the last of its {cut} bytes are no footer"
        );
        assert_eq!(refused, text);
    }
    for (part, at) in [(Part::Memory, 9000), (Part::State, 0), (Part::Kernel, 0), (Part::Ramdisk, 0)] {
        let changed = copied(&file);
        let Obtained::Copied(copy) = &changed else { panic!("a copy") };
        let at = opened.part(part).expect("a part").start + at;
        copy.write_at(&[0xff], at).expect("written");
        let refused = problem(changed, None);
        let text = format!("snapshotCorrupt: source.saved.file: {}: its checksum is ", part.name());
        assert!(refused.starts_with(&text), "{refused}");
    }
}

#[test]
fn what_the_host_has_not_is_incompatible() {
    let file = saved(memory(&[]), None);
    let failure = open(given(&file), None, MIB - 1).err().expect("refused");
    assert_eq!(failure.code, GuestError::SnapshotIncompatible);
    assert_eq!(
        failure.detail,
        "source.saved.file: its memory of 1048576 bytes is more than the host's 1048575"
    );
}

#[test]
fn only_what_cannot_be_written_is_taken_as_it_is() {
    let file = NamedTempFile::new().expect("a file");
    assert!(is_writable(file.as_file()));
    assert!(!is_writable(File::open(file.path()).expect("opened")));
    assert!(is_writable(files::memfd().expect("a memfd")) && !is_writable(sealed(b"")));
}
