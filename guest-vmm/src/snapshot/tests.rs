//! Snapshots as files, and the configs of guests that go on from them.

use super::*;
use guest_schema::{BlockConfig, BlockMode, FileSource, NetConfig};
use std::io::{Read, Seek, SeekFrom};

fn sealed(bytes: &[u8]) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("file", flags).expect("a memfd"));
    file.write_all(bytes).expect("written");
    fcntl_add_seals(&file, SEALED).expect("sealed");
    file
}

fn disk(id: &str, number: u64, mode: BlockMode) -> BlockConfig {
    BlockConfig { id: id.into(), ..BlockConfig::raw(FileSource::Descriptor(number), mode) }
}

fn config() -> GuestConfig {
    let mut config = GuestConfig::new(Some(FileSource::Descriptor(0)), 1 << 20);
    config.cmdline = "console=ttyS0".into();
    config.cpus = 2;
    config.devices.block = vec![disk("root", 1, BlockMode::ReadWrite), disk("data", 2, BlockMode::ReadOnly)];
    config.devices.net = vec![NetConfig { mtu: Some(1400), ..NetConfig::new(NetBackend::Stream(3)) }];
    config.devices.vsock = Some(VsockConfig::default());
    config
}

/// The files of a snapshot of a guest with that config.
fn files() -> Vec<(String, File)> {
    let origin = Origin::new(config(), &sealed(b"kernel"), None).expect("an origin");
    let unit = SavedStateUnit { name: "vps".into(), state: Some(SavedStateBlob::from_parts("a.B", [1, 2])) };
    let state = state_file(&encode(&origin.config, vec![unit])).expect("a state");
    let named = [("state", state), ("memory", sealed(&[0; 4096])), ("kernel", sealed(b"kernel"))];
    named.map(|(name, file)| (name.to_owned(), file)).into()
}

fn opened() -> OpenSnapshot {
    SnapshotFiles::from_named(files()).and_then(|files| files.open()).expect("a snapshot")
}

fn problem(files: Vec<(String, File)>) -> String {
    let refused = SnapshotFiles::from_named(files).and_then(|files| files.open()).err().expect("refused");
    format!("{}: {}", refused.code.name(), refused.detail)
}

#[test]
fn a_state_has_the_units_and_the_guests_own_config() {
    let snapshot = opened();
    assert_eq!(snapshot.units.len(), 1);
    let state = snapshot.units[0].state.as_ref().expect("a state");
    assert_eq!((&snapshot.units[0].name[..], state.type_name(), state.value()), ("vps", "a.B", &[1, 2][..]));
    let own = &snapshot.config;
    assert_eq!((own.cpus, &own.cmdline[..], own.kernel.is_none()), (2, "console=ttyS0", true));
    assert!(own.devices.block.iter().all(|disk| !disk.source.is_given()));
}

#[test]
fn who_goes_on_has_what_it_was_granted_and_all_else_of_the_snapshot() {
    let mut grants = GuestConfig::new(None, 7);
    grants.cpus = 9;
    grants.devices.block =
        vec![disk("ignored", 7, BlockMode::VolatileWrite), disk("", 8, BlockMode::ReadWrite)];
    grants.devices.net = vec![NetConfig::new(NetBackend::Tap(vec![4, 5]))];
    let mut faults = Vec::new();
    let config = opened().config_with(grants, &mut faults);
    assert!(faults.is_empty(), "{faults:?}");
    assert_eq!((config.cpus, config.memory.bytes, &config.cmdline[..]), (2, 1 << 20, "console=ttyS0"));
    let [root, data] = &config.devices.block[..] else { panic!("two disks") };
    assert_eq!((&root.id[..], root.mode, &data.id[..]), ("root", BlockMode::VolatileWrite, "data"));
    assert!(root.source.is_given() && data.source.is_given());
    assert_eq!(config.devices.net[0].backend, NetBackend::Tap(vec![4, 5]));
    assert_eq!(config.devices.net[0].mtu, Some(1400));
}

#[test]
fn grants_that_do_not_fit_are_named() {
    let mut grants = config();
    grants.devices.block.pop();
    grants.devices.net.clear();
    grants.ramdisk = Some(FileSource::Descriptor(1));
    let mut snapshot = opened();
    snapshot.config.devices.vsock = None;
    let mut faults = Vec::new();
    snapshot.config_with(grants, &mut faults);
    let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
    assert_eq!(
        faults,
        [
            "source.boot.kernel: a guest that goes on from a snapshot has its own",
            "source.boot.ramdisk: a guest that goes on from a snapshot has its own",
            "block: the snapshot has 2 disks, and 1 were granted",
            "net: the snapshot has 1 network devices, and 0 were granted",
            "vsock: the snapshot has no such device",
        ]
    );
}

#[test]
fn files_that_are_none_of_a_snapshot_are_named() {
    for (index, name) in ["state", "memory", "kernel"].iter().enumerate() {
        let mut without = files();
        without.remove(index);
        assert_eq!(problem(without), format!("snapshotCorrupt: {name} is missing"));
        let mut open = files();
        open[index].1 = tempfile();
        assert_eq!(problem(open), format!("snapshotCorrupt: {name} is not sealed"));
        let mut twice = files();
        let again = twice[index].1.try_clone().expect("again");
        twice.push(((*name).to_owned(), again));
        assert_eq!(problem(twice), format!("snapshotCorrupt: {name} is there twice"));
    }
    let mut more = files();
    more.push(("more".into(), sealed(b"")));
    assert_eq!(problem(more), "snapshotCorrupt: \"more\" is no file of a snapshot");
}

/// A file of memory that can still be changed.
fn tempfile() -> File {
    File::from(memfd_create("open", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd"))
}

fn with_state(bytes: &[u8]) -> Vec<(String, File)> {
    let mut files = files();
    files[0].1 = sealed(bytes);
    files
}

#[test]
fn a_state_that_cannot_be_read_is_refused_and_never_a_panic() {
    let mut state = Vec::new();
    files()[0]
        .1
        .try_clone()
        .and_then(|mut file| {
            file.seek(SeekFrom::Start(0))?;
            file.read_to_end(&mut state)
        })
        .expect("read");
    let newer = SnapshotState { format: 2, ..SnapshotState::decode(&*state).expect("a state") };
    let refused = problem(with_state(&newer.encode_to_vec()));
    assert_eq!(refused, "snapshotIncompatible: state: its format is 2, and 1 is known here");
    for length in 0..state.len() {
        let refused = SnapshotFiles::from_named(with_state(&state[..length])).and_then(|files| files.open());
        // Protobuf takes a message apart into fields: cut between two of them, it is another one.
        if let Err(failure) = refused {
            let codes = [GuestError::SnapshotCorrupt, GuestError::SnapshotIncompatible];
            assert!(codes.contains(&failure.code), "{failure:?}");
        }
    }
    for at in 0..state.len() {
        let mut flipped = state.clone();
        flipped[at] ^= 0xff;
        if let Ok(snapshot) = SnapshotFiles::from_named(with_state(&flipped)).and_then(|files| files.open()) {
            snapshot.config_with(config(), &mut Vec::new());
        }
    }
}
