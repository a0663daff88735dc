use super::*;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

fn save(path: &Path, bytes: &[u8]) {
    let saved = SavedFile::create(path).expect("created");
    saved.file().write_all_at(bytes, 0).expect("written");
    saved.commit().expect("saved");
}

#[test]
fn a_file_is_there_only_once_it_is_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("one.snapshot");
    let saved = SavedFile::create(&path).expect("created");
    saved.file().write_all_at(b"half", 0).expect("written");
    assert_eq!(names(folder.path()), [""; 0], "not even under another name");
    saved.commit().expect("saved");
    assert_eq!(std::fs::read(&path).expect("there"), b"half");
    assert_eq!(names(folder.path()), ["one.snapshot"]);
    assert_eq!(path.metadata().expect("there").permissions().mode() & 0o777, 0o600, "memory has secrets");
}

#[test]
fn what_was_there_stays_until_then() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, link) = (folder.path().join("one"), folder.path().join("link"));
    save(&path, b"old");
    std::os::unix::fs::symlink("one", &link).expect("a link");
    let dropped = SavedFile::create(&link).expect("created");
    dropped.file().write_all_at(b"new", 0).expect("written");
    drop(dropped);
    assert_eq!(std::fs::read(&path).expect("there"), b"old");
    save(&link, b"new");
    assert_eq!(std::fs::read(&path).expect("there"), b"new", "through the link");
    assert_eq!(names(folder.path()), ["link", "one"]);
}

#[test]
fn a_file_of_a_snapshot_is_known_by_its_end() {
    assert!(is_snapshot_file(&bytes_file(&snapshot())).expect("read"));
    for bytes in [&b""[..], b"guestd snapshot\n", &[0; 64], &[b'g'; 5000]] {
        assert!(!is_snapshot_file(&bytes_file(bytes)).expect("read"));
    }
}

#[test]
fn a_file_is_the_same_when_the_disk_is_at_work_meanwhile() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("one");
    // Long enough for the disk to be told more than once, most of it holes.
    let mut pages = vec![Page::Hole; 50_000];
    pages.iter_mut().step_by(9_000).for_each(|page| *page = Page::Filled(3));
    let source = source(&pages, None);
    let saved = SavedFile::create(&path).expect("created");
    saved.write(&mut SnapshotEncoder::whole(&source).expect("fit"), |_, _| CONTINUE).expect("written");
    saved.commit().expect("saved");
    let opened = SnapshotFile::open(File::open(&path).expect("there")).expect("whole");
    opened.verify_memory(|_, _| {}).expect("as it was");
    assert_eq!(opened.memory_checksum(), whole(&source).memory_checksum());
}

#[test]
fn what_is_ended_is_not_saved() {
    let folder = tempfile::tempdir().expect("a folder");
    let saved = SavedFile::create(&folder.path().join("one")).expect("created");
    let mut encoder = SnapshotEncoder::whole(&source(&[Page::Filled(1), Page::Hole], None)).expect("fit");
    let ended = saved.write(&mut encoder, |_, _| ControlFlow::Break(()));
    assert!(matches!(ended, Err(WriteError::Ended)), "{ended:?}");
    drop(saved);
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn where_every_file_has_a_name_it_has_another_meanwhile() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("one");
    save(&path, b"old");
    for (keep, expected) in [(false, b"old"), (true, b"new")] {
        let saved = SavedFile::named(path.clone()).expect("created");
        saved.file().write_all_at(b"new", 0).expect("written");
        let meanwhile = names(folder.path());
        let other = meanwhile.iter().find(|name| *name != "one").expect("another name");
        assert!(other.starts_with('.') && other.ends_with(".partial"), "{other}");
        if keep {
            saved.commit().expect("saved")
        } else {
            drop(saved)
        }
        assert_eq!(std::fs::read(&path).expect("there"), expected);
        assert_eq!(names(folder.path()), ["one"]);
    }
}
