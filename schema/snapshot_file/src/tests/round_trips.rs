use super::*;
use proptest::prelude::*;
use std::os::unix::fs::MetadataExt;

pub(super) fn page() -> impl Strategy<Value = Page> {
    prop_oneof![3 => Just(Page::Hole), 1 => Just(Page::Zeros), 2 => (1..4u8).prop_map(Page::Filled)]
}

pub(super) fn pages(count: usize) -> impl Strategy<Value = Vec<Page>> {
    proptest::collection::vec(page(), count)
}

fn memory_and_layer() -> impl Strategy<Value = (Vec<Page>, Option<Vec<Page>>)> {
    (2..40usize).prop_flat_map(|count| (pages(count), proptest::option::of(pages(count))))
}

proptest! {
    #[test]
    fn what_is_written_is_what_was_there((base, layer) in memory_and_layer()) {
        let source = source(&base, layer.as_deref());
        let file = whole(&source);
        let memory = contents(&base, layer.as_deref().unwrap_or_default());
        prop_assert_eq!(&bytes_of(file.file())[..memory.len()], &memory[..]);
        file.verify_memory(|_, _| {}).expect("as it was");
        let kept = memory.chunks(PAGE_BYTES).filter(|page| page.iter().any(|byte| *byte != 0)).count();
        prop_assert_eq!(file.manifest().data_bytes, kept as u64 * PAGE);
        // The same file, however the memory lies in its own.
        let merged: Vec<_> = memory.chunks(PAGE_BYTES).enumerate().map(|(index, page)| {
            if page == filled(page[PAGE_BYTES - 1], (index * PAGE_BYTES) as u64) { Page::Filled(page[PAGE_BYTES - 1]) } else { Page::Zeros }
        }).collect();
        let other = whole(&super::source(&merged, None));
        prop_assert_eq!(bytes_of(other.file()), bytes_of(file.file()));
    }
}

#[test]
fn everything_of_a_snapshot_is_in_its_file() {
    let pages = [Page::Filled(1), Page::Hole, Page::Zeros, Page::Filled(2)];
    let file = whole(&source(&pages, None));
    assert_eq!(*file.state(), state(4));
    assert_eq!(file.state_bytes(), state(4).encode_to_vec());
    assert_eq!(file.memory_bytes(), 4 * PAGE);
    assert_eq!(file.layer_pages(), None);
    for (part, bytes) in
        [(Part::Kernel, vec![0xeb; 5000]), (Part::Ramdisk, vec![0x1f; 10]), (Part::Pages, vec![])]
    {
        let mut copied = Vec::new();
        file.copy_part(part, &mut copied).expect("copied");
        assert_eq!(copied, bytes, "{}", part.name());
        let range = file.part(part);
        assert!(
            range
                .is_none_or(|range| range.start % PAGE == 0 && range.end - range.start == bytes.len() as u64)
        );
    }
    let Manifest {
        product_version,
        parent,
        taken_at_us,
        memory_bytes,
        hotplug_bytes,
        vps,
        disks,
        networks,
        units,
        ..
    } = file.manifest().clone();
    assert_eq!(product_version, env!("CARGO_PKG_VERSION"));
    assert_eq!((&parent[..], taken_at_us, vps, networks), ("web", 5, 2, 1));
    assert_eq!((memory_bytes, hotplug_bytes, disks), (3 * PAGE, PAGE, vec!["root".to_owned()]));
    let names: Vec<_> = units.iter().map(|unit| (&unit.name[..], &unit.type_name[..])).collect();
    assert_eq!(names, [("memory", "machine.memory.MemoryState"), ("rtc", "devices.rtc.RtcState")]);
}

#[test]
fn a_stream_has_the_bytes_of_the_file() {
    let pages = [Page::Hole, Page::Filled(1), Page::Hole, Page::Filled(2)];
    let source = source(&pages, Some(&[Page::Hole, Page::Hole, Page::Filled(3), Page::Zeros]));
    let mut stream = StreamOutput(Vec::new());
    let mut encoder = SnapshotEncoder::whole(&source).expect("fit");
    let mut told = Vec::new();
    write(&mut encoder, &mut stream, |done, of| {
        told.push((done, of));
        CONTINUE
    })
    .expect("written");
    assert_eq!(stream.0, bytes_of(whole(&source).file()));
    assert!(told.is_sorted() && told.iter().all(|(done, of)| done <= of), "{told:?}");
    assert_eq!(told.last(), Some(&(stream.0.len() as u64, stream.0.len() as u64)));
}

#[test]
fn zeros_take_no_room() {
    // Extents that are longer than what is read at once, and end within it.
    let mut pages = vec![Page::Hole; 3000];
    pages[..700].fill(Page::Filled(9));
    pages[1000..1600].fill(Page::Zeros);
    let file = whole(&source(&pages, None));
    let memory = contents(&pages, &[]);
    assert_eq!(&bytes_of(file.file())[..memory.len()], &memory[..]);
    assert_eq!(file.manifest().data_bytes, 700 * PAGE);
    let room = file.file().metadata().expect("its size").blocks() * 512;
    assert!(room < 720 * PAGE, "{room} bytes for 700 pages and little else");
}

#[test]
fn what_a_snapshot_lacks_is_named() {
    let pages = [Page::Filled(1), Page::Hole];
    for file in [SourceFile::State, SourceFile::Memory, SourceFile::Kernel] {
        let mut source = source(&pages, None);
        source.files.remove(&file);
        let error = SnapshotEncoder::whole(&source).err().expect("refused");
        assert!(matches!(error, WriteError::Missing(missing) if missing == file), "{error}");
    }
    let mut short = source(&pages, None);
    short.info.memory_bytes = 2 * PAGE;
    let error = SnapshotEncoder::whole(&short).err().expect("refused");
    let text = "the snapshot's memory: its 8192 bytes do not hold memory of 8192 and a region of 4096, in whole pages";
    assert_eq!(error.to_string(), text);
    let mut strange = source(&pages, None);
    strange.files.insert(SourceFile::State, bytes_file(&[0xff; 9]));
    let error = SnapshotEncoder::whole(&strange).err().expect("refused");
    assert!(error.to_string().starts_with("the snapshot's state: it cannot be decoded: "), "{error}");
}

#[test]
fn a_snapshot_without_a_ramdisk_has_none() {
    let mut source = source(&[Page::Filled(1), Page::Hole], None);
    source.files.remove(&SourceFile::Ramdisk);
    assert_eq!(whole(&source).part(Part::Ramdisk), None);
}

#[test]
fn whoever_is_told_of_the_progress_may_end_it() {
    let mut encoder = SnapshotEncoder::whole(&source(&[Page::Filled(1), Page::Hole], None)).expect("fit");
    let file = tempfile::tempfile().expect("a file");
    let ended = write(&mut encoder, &mut SparseOutput::new(&file), |_, _| ControlFlow::Break(()));
    assert!(matches!(ended, Err(WriteError::Ended)), "{ended:?}");
}
