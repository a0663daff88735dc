use super::round_trips::pages;
use super::*;
use proptest::prelude::*;

fn layer(source: &SnapshotSource, base: &SnapshotFile) -> Result<SnapshotFile, WriteError> {
    let mut encoder = SnapshotEncoder::layer(source, base)?;
    let file = tempfile::tempfile().expect("a file");
    write(&mut encoder, &mut SparseOutput::new(&file), |_, _| CONTINUE)?;
    Ok(SnapshotFile::open(file).expect("opened"))
}

/// The memory of a base with a layer over it.
fn joined(base: &SnapshotFile, layer: &SnapshotFile) -> Vec<u8> {
    let length = usize::try_from(base.memory_bytes()).expect("it is short");
    let (mut memory, over) = (bytes_of(base.file()), bytes_of(layer.file()));
    memory.truncate(length);
    for range in layer.layer_pages().expect("a layer") {
        let range = usize::try_from(range.start).expect("short")..usize::try_from(range.end).expect("short");
        memory[range.clone()].copy_from_slice(&over[range]);
    }
    memory
}

proptest! {
    #[test]
    fn a_layer_over_its_base_is_the_memory(
        (first, base, over) in (2..40usize).prop_flat_map(|count| (pages(count), pages(count), pages(count)))
    ) {
        let saved = whole(&source(&first, None));
        let file = layer(&source(&base, Some(&over)), &saved).expect("written");
        let memory = contents(&base, &over);
        prop_assert_eq!(joined(&saved, &file), &memory[..]);
        prop_assert_eq!(file.base_checksum(), Some(saved.memory_checksum()));
        file.verify_memory(|_, _| {}).expect("as it was");
        let before = contents(&first, &[]);
        let differ = memory.chunks(PAGE_BYTES).zip(before.chunks(PAGE_BYTES)).filter(|(one, other)| one != other);
        prop_assert_eq!(file.manifest().data_bytes, differ.count() as u64 * PAGE);
    }
}

#[test]
fn a_copy_without_holes_is_the_same_layer() {
    let before = [Page::Filled(1), Page::Filled(1), Page::Hole, Page::Filled(4)];
    let after = [Page::Filled(1), Page::Zeros, Page::Filled(2), Page::Filled(4)];
    let saved = whole(&source(&before, None));
    let file = layer(&source(&after, None), &saved).expect("written");
    assert!(matches!(file.layer_pages(), Some([range]) if *range == (PAGE..3 * PAGE)));
    let copy = open_bytes(&bytes_of(file.file())).expect("opened");
    assert_eq!(joined(&saved, &copy), contents(&after, &[]));
    copy.verify_memory(|_, _| {}).expect("as it was");
}

#[test]
fn what_is_no_base_is_refused() {
    let pages = [Page::Filled(1), Page::Hole, Page::Filled(3)];
    let saved = whole(&source(&pages, None));
    let over = layer(&source(&pages, None), &saved).expect("written");
    assert_eq!(over.layer_pages(), Some(&[][..]), "nothing differs");
    let refused = |source: &SnapshotSource, base: &SnapshotFile| layer(source, base).expect_err("refused");
    assert_eq!(refused(&source(&pages, None), &over).to_string(), "the base: it is a layer itself");
    let other = refused(&source(&pages[..2], None), &saved).to_string();
    assert_eq!(other, "the base: its memory is of 12288 bytes, and the snapshot's of 8192");
    let mut bytes = bytes_of(saved.file());
    bytes[100] ^= 1;
    let damaged = open_bytes(&bytes).expect("the memory is not looked at");
    let error = refused(&source(&pages, None), &damaged);
    let WriteError::BadBase(OpenError::Checksum { part: "memory", .. }) = error else { panic!("{error:?}") };
}
