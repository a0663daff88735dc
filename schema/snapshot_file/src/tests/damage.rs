use super::*;
use crate::footer::{FOOTER, Footer};
use proptest::prelude::*;

/// Where the memory ends.
const MEMORY: usize = 4 * PAGE_BYTES;

/// A file with another manifest, whose checksum is right.
fn with_manifest(change: impl FnOnce(&mut Manifest)) -> Vec<u8> {
    let mut bytes = snapshot();
    let file = bytes_file(&bytes);
    let Footer { manifest: place, .. } = Footer::read(&file, bytes.len() as u64).expect("a footer");
    let (start, end) =
        (usize::try_from(place.start).expect("short"), usize::try_from(place.end).expect("short"));
    let mut manifest = Manifest::decode(&bytes[start..end]).expect("a manifest");
    change(&mut manifest);
    bytes.truncate(start);
    with_ending(bytes, &manifest.encode_to_vec())
}

fn with_ending(mut bytes: Vec<u8>, manifest: &[u8]) -> Vec<u8> {
    let start = bytes.len() as u64;
    bytes.extend(manifest);
    let footer = Footer { manifest: start..start + manifest.len() as u64, checksum: Checksum::of(manifest) };
    bytes.extend(footer.encode());
    bytes
}

#[test]
fn every_byte_that_is_changed_is_told() {
    let whole = snapshot();
    let file = bytes_file(&whole);
    for at in MEMORY..whole.len() {
        let bit = 1 << (at % 8);
        file.write_all_at(&[whole[at] ^ bit], at as u64).expect("written");
        let opened = SnapshotFile::open(file.try_clone().expect("a descriptor"));
        assert!(opened.is_err(), "{bit:#x} at {at} of {}", whole.len());
        file.write_all_at(&[whole[at]], at as u64).expect("written");
    }
    SnapshotFile::open(file.try_clone().expect("a descriptor")).expect("as it was");
}

#[test]
fn damaged_memory_is_told_when_it_is_asked_for() {
    let whole = snapshot();
    for at in [0, PAGE_BYTES - 1, PAGE_BYTES, 2 * PAGE_BYTES + 5, MEMORY - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        let file = open_bytes(&bytes).expect("the memory is not looked at");
        let error = file.verify_memory(|_, _| {}).expect_err("refused");
        assert!(matches!(error, OpenError::Checksum { part: "memory", .. }), "{error}");
    }
}

#[test]
fn memory_that_lies_elsewhere_is_told() {
    // The same pages in the same order, one page further on.
    let mut bytes = snapshot();
    bytes.copy_within(3 * PAGE_BYTES..MEMORY, 2 * PAGE_BYTES);
    bytes[3 * PAGE_BYTES..MEMORY].fill(0);
    open_bytes(&bytes).expect("the memory is not looked at").verify_memory(|_, _| {}).expect_err("refused");
}

#[test]
fn a_file_that_is_cut_short_is_told() {
    let whole = snapshot();
    let starts = [
        0,
        1,
        63,
        64,
        PAGE_BYTES,
        MEMORY,
        MEMORY + 1,
        whole.len() - FOOTER,
        whole.len() - FOOTER + 1,
        whole.len() - 1,
    ];
    let pages = (0..whole.len()).step_by(PAGE_BYTES);
    for length in starts.into_iter().chain(pages).chain(whole.len() - 200..whole.len()) {
        let error = open_bytes(&whole[..length]).expect_err("refused");
        assert!(
            matches!(error, OpenError::NotASnapshot { bytes } if bytes == length as u64),
            "{length}: {error}"
        );
    }
    let mut longer = whole.clone();
    longer.extend(&whole[whole.len() - FOOTER..]);
    let text = open_bytes(&longer).expect_err("refused").to_string();
    assert!(text.starts_with("footer: manifest: "), "{text}");
}

#[test]
fn what_is_missing_in_the_middle_is_told() {
    let whole = snapshot();
    for length in [1, 64, PAGE_BYTES, 2 * PAGE_BYTES] {
        let mut bytes = whole.clone();
        bytes.drain(MEMORY..MEMORY + length);
        open_bytes(&bytes).expect_err("refused");
    }
}

#[test]
fn another_format_is_told_by_its_number() {
    let mut bytes = snapshot();
    let footer = bytes.len() - FOOTER;
    bytes[footer + 16] = 2;
    let sum = twox_hash::XxHash3_64::oneshot(&bytes[footer..footer + 56]);
    bytes[footer + 56..].copy_from_slice(&sum.to_le_bytes());
    let error = open_bytes(&bytes).expect_err("refused");
    assert_eq!(error.to_string(), "footer: its format is 2, and 1 is known here");
}

#[test]
fn what_a_manifest_cannot_say_is_told_with_its_field() {
    let parts = |change: fn(&mut Vec<PartEntry>)| with_manifest(move |manifest| change(&mut manifest.parts));
    let base = |checksum: Vec<u8>| Some(LayerBase { memory_checksum: checksum, ..LayerBase::default() });
    let cases = [
        (parts(|parts| parts.clear()), "manifest: parts: they end at 0, and the manifest begins at 32768"),
        (
            parts(|parts| drop(parts.remove(3))),
            "manifest: parts: they end at 25480, and the manifest begins at 32768",
        ),
        (
            parts(|parts| parts[1].name = "stat".into()),
            "manifest: parts[1].name: \"stat\" is none of the parts",
        ),
        (
            parts(|parts| parts[2].name = "state".into()),
            "manifest: parts[2].name: state does not lie behind state",
        ),
        (parts(|parts| parts[1].name = "layer".into()), "manifest: parts: state is missing"),
        (parts(|parts| parts[0].name = "layer".into()), "manifest: parts: memory is missing"),
        (
            parts(|parts| parts[1].offset += 1),
            "manifest: parts[1].offset: 16385 is not the first page behind 16384, where the part before ends",
        ),
        (
            parts(|parts| parts[2].length = u64::MAX),
            "manifest: parts[2].length: 18446744073709551615 is beyond all files",
        ),
        (
            parts(|parts| parts[1].length = 1 << 40),
            "manifest: parts[1].length: 1099511627776 is more than the 268435456 that there can be",
        ),
        (
            parts(|parts| parts[3].checksum.truncate(15)),
            "manifest: parts[3].checksum: it is of 15 bytes, not 16",
        ),
        (
            with_manifest(|manifest| manifest.memory_bytes += PAGE),
            "manifest: memory_bytes: 16384, with hotplug_bytes of 4096, are not the 16384 bytes of memory, in whole pages",
        ),
        (
            with_manifest(|manifest| {
                (manifest.memory_bytes, manifest.hotplug_bytes) = (PAGE + 1, 3 * PAGE - 1)
            }),
            "manifest: memory_bytes: 4097, with hotplug_bytes of 12287, are not the 16384 bytes of memory, in whole pages",
        ),
        (
            with_manifest(|manifest| manifest.units[1].name.push('2')),
            "manifest: units[1]: it is not that of the state at this place",
        ),
        (
            with_manifest(|manifest| drop(manifest.units.pop())),
            "manifest: units[1]: it is not that of the state at this place",
        ),
        (with_manifest(|manifest| manifest.base = base(vec![0; 16])), "manifest: parts: layer is missing"),
    ];
    for (bytes, text) in cases {
        assert_eq!(open_bytes(&bytes).expect_err("refused").to_string(), text);
    }
}

#[test]
fn a_list_of_pages_that_cannot_be_is_told() {
    use crate::pages::{decode, encode};
    use guest_saved_state::machine::snapshot_file::LayerPages;
    let refused = |runs: &[u64]| {
        decode(&LayerPages { runs: runs.to_vec() }, 8 * PAGE).expect_err("refused").to_string()
    };
    assert_eq!(
        refused(&[1, 1, 1]),
        "pages: runs[2]: it is the last, and says how many pages are as the base's"
    );
    assert_eq!(refused(&[0, 1, 0, 1]), "pages: runs[2]: 0 and 1: a run is of no pages");
    assert_eq!(refused(&[3, 0]), "pages: runs[0]: 3 and 0: a run is of no pages");
    assert_eq!(refused(&[7, 2]), "pages: runs[0]: 7 and 2 lie behind the memory's end");
    assert_eq!(
        refused(&[u64::MAX, 2]),
        "pages: runs[0]: 18446744073709551615 and 2 lie behind the memory's end"
    );
    let ranges = vec![0..PAGE, 3 * PAGE..8 * PAGE];
    assert_eq!(decode(&encode(&ranges), 8 * PAGE).expect("as it was"), ranges);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_manifest_is_taken_or_refused(
        parts in proptest::collection::vec(
            ((0..7usize), any::<u64>(), any::<u64>(), 0..5u8, any::<bool>()), 0..7
        ),
        memory in any::<u64>(), hotplug in any::<u64>(), layer: bool,
    ) {
        let bytes = with_manifest(|manifest| {
            let real = manifest.parts.clone();
            manifest.parts = parts.into_iter().map(|(which, offset, length, keep, checksum)| {
                let mut entry = real.get(which).cloned().unwrap_or_default();
                if keep == 0 { entry.offset = offset }
                if keep == 1 { entry.length = length }
                if keep == 2 && checksum { entry.checksum.clear() }
                entry
            }).collect();
            if layer { (manifest.memory_bytes, manifest.hotplug_bytes) = (memory, hotplug) }
        });
        // Neither a panic nor more memory than the file can fill.
        let _opened = open_bytes(&bytes);
    }

    #[test]
    fn any_bytes_are_refused(manifest: Vec<u8>, before in 0..3usize) {
        open_bytes(&manifest).expect_err("no footer");
        open_bytes(&with_ending(vec![0; before * PAGE_BYTES], &manifest)).expect_err("no manifest");
    }
}
