//! Any changes to a snapshot's file, and a guest on a scripted processor that goes on from it: bytes, file, state, config, machine,
//! devices, units.
//!
//! Holds to: nothing panics, on no thread; `create` answers, with a code that tells what is wrong; the lease takes the next one.

#![no_main]

use std::cell::LazyCell;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use arbitrary::Arbitrary;
use capnp_rpc::rpc_twoparty_capnp::Side;
use guest_schema::guest_capnp::guest_lifecycle;
use guest_schema::{Failure, FileSource, GuestConfig, GuestError, SnapshotFile as Kept, SnapshotInfo};
use guest_snapshot_file::{
    Part, SnapshotEncoder, SnapshotFile, SnapshotSource, SnapshotState, SparseOutput, write,
};
use guest_transport::{Connection, Descriptors, Limits};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tokio::runtime::{Builder, Runtime};
use tokio::task::{LocalSet, spawn_local};

/// What the changes are made to.
static FILE: &[u8] = include_bytes!("../../tests/fixtures/snapshots/format-1/whole.snapshot");

/// A change to what is saved, before it is written with checksums that fit.
#[derive(Arbitrary, Debug)]
enum StateChange {
    Format(u32),
    ConfigByte { at: u16, value: u8 },
    ConfigCut(u16),
    Drop(u8),
    Twice(u8),
    Swap(u8, u8),
    Name(u8, String),
    TypeName(u8, String),
    Byte { unit: u8, at: u16, value: u8 },
    Insert { unit: u8, at: u16, bytes: Vec<u8> },
    Cut { unit: u8, at: u16 },
    Value(u8, Vec<u8>),
}

/// A change to the file, counted from its end.
#[derive(Arbitrary, Debug)]
enum FileChange {
    Byte { from_end: u16, value: u8 },
    Cut(u16),
    Append(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Changes {
    state: Vec<StateChange>,
    file: Vec<FileChange>,
}

fn memfd(bytes: &[u8]) -> File {
    const PAGE: usize = 4096;
    let file: File =
        memfd_create("fuzz", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd").into();
    file.set_len(bytes.len() as u64).expect("its length");
    for (at, page) in (0..).step_by(PAGE).zip(bytes.chunks(PAGE)) {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, at).expect("written");
        }
    }
    file
}

/// The snapshot that the changes are made to.
struct Original {
    source: SnapshotSource,
    state: SnapshotState,
}

impl Original {
    fn read() -> Self {
        let file = SnapshotFile::open(memfd(FILE)).expect("a snapshot");
        let part = |part: Part| {
            let mut bytes = Vec::new();
            file.copy_part(part, &mut bytes).expect("readable");
            Arc::new(memfd(&bytes))
        };
        let memory = usize::try_from(file.memory_bytes()).expect("small");
        let files = [(Kept::Memory, Arc::new(memfd(&FILE[..memory]))), (Kept::Kernel, part(Part::Kernel))];
        let info = SnapshotInfo { memory_bytes: file.memory_bytes(), ..SnapshotInfo::default() };
        Self { source: SnapshotSource { files: files.into(), info }, state: file.state().clone() }
    }

    /// The file with these changes, sealed; `None` if a state like that makes no file.
    fn changed(&self, changes: &Changes) -> Option<OwnedFd> {
        let mut state = self.state.clone();
        changes.state.iter().for_each(|change| change.make(&mut state));
        let mut source = self.source.clone();
        source.files.insert(Kept::State, Arc::new(memfd(&state.encode_to_vec())));
        let file = memfd(&[]);
        let mut encoder = SnapshotEncoder::whole(&source).ok()?;
        write(&mut encoder, &mut SparseOutput::new(&file), |_, _| ControlFlow::Continue(())).ok()?;
        changes.file.iter().for_each(|change| change.make(&file));
        fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW).expect("sealed");
        Some(file.into())
    }
}

fn put(bytes: &mut [u8], at: u16, value: u8) {
    if let Some(byte) = bytes.get_mut(usize::from(at)) {
        *byte = value;
    }
}

impl StateChange {
    fn make(&self, state: &mut SnapshotState) {
        let SnapshotState { format, config, units } = state;
        let count = units.len();
        let place = |unit: &u8| (count > 0).then(|| usize::from(*unit) % count);
        match self {
            Self::Format(other) => *format = *other,
            Self::ConfigByte { at, value } => put(config, *at, *value),
            Self::ConfigCut(at) => config.truncate((*at).into()),
            Self::Drop(unit) => drop(place(unit).map(|at| units.remove(at))),
            Self::Twice(unit) => units.extend(place(unit).map(|at| units[at].clone())),
            Self::Swap(one, other) => {
                if let Some((one, other)) = place(one).zip(place(other)) {
                    units.swap(one, other);
                }
            }
            Self::Name(unit, name) => {
                place(unit).into_iter().for_each(|at| units[at].name.clone_from(name));
            }
            Self::TypeName(unit, name) => {
                place(unit).into_iter().for_each(|at| units[at].type_name.clone_from(name));
            }
            Self::Byte { unit, at, value } => {
                place(unit).into_iter().for_each(|unit| put(&mut units[unit].value, *at, *value));
            }
            Self::Insert { unit, at, bytes } => {
                let Some(unit) = place(unit).map(|at| &mut units[at].value) else { return };
                let at = unit.len().min((*at).into());
                unit.splice(at..at, bytes.iter().copied());
            }
            Self::Cut { unit, at } => {
                place(unit).into_iter().for_each(|unit| units[unit].value.truncate((*at).into()));
            }
            Self::Value(unit, bytes) => {
                place(unit).into_iter().for_each(|at| units[at].value.clone_from(bytes));
            }
        }
    }
}

impl FileChange {
    fn make(&self, file: &File) {
        let length = file.metadata().expect("a file").len();
        let changed = match self {
            Self::Byte { from_end, value } => match length.checked_sub(u64::from(*from_end) + 1) {
                Some(at) => file.write_all_at(&[*value], at),
                None => Ok(()),
            },
            Self::Cut(bytes) => file.set_len(length.saturating_sub((*bytes).into())),
            Self::Append(bytes) => file.write_all_at(bytes, length),
        };
        changed.expect("a memfd takes it");
    }
}

/// A VMM on a thread of this process, and its lease.
struct Vmm {
    tasks: LocalSet,
    runtime: Runtime,
    lease: guest_lifecycle::Client,
    descriptors: Descriptors,
    original: Original,
}

impl Vmm {
    fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        guest_vmm::serve(theirs, Vec::new(), "scripted".parse().expect("a platform")).expect("a VMM");
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let tasks = LocalSet::new();
        let (lease, descriptors) = tasks.block_on(&runtime, async {
            let mut connection = Connection::client(ours, Limits::default()).expect("a socket");
            let lease = connection.bootstrap(Side::Server);
            let descriptors = connection.descriptors();
            spawn_local(connection.run());
            (lease, descriptors)
        });
        Self { tasks, runtime, lease, descriptors, original: Original::read() }
    }

    /// Creates a guest of a file, runs it if it can go on from there, and stops it.
    fn live(&self, file: OwnedFd) -> Option<Failure> {
        self.tasks.block_on(&self.runtime, async {
            let mut request = self.lease.create_request();
            let file = FileSource::Descriptor(self.descriptors.push(file));
            GuestConfig::restored(file, None).write(request.get().init_config());
            let created = request.send().promise;
            let run = self.lease.run_request().send().promise;
            let stopped = self.lease.stop_request().send().promise;
            let answer = created.await.expect("the lease lasts");
            let failure =
                Failure::read_result(answer.get().and_then(|answer| answer.get_result()).expect("an answer"));
            run.await.expect("the lease lasts");
            stopped.await.expect("the lease lasts");
            failure.expect("a readable answer").err()
        })
    }
}

thread_local! {
    static VMM: LazyCell<Vmm> = LazyCell::new(Vmm::start);
}

fuzz_target!(|changes: Changes| {
    VMM.with(|vmm| {
        let Some(file) = vmm.original.changed(&changes) else { return };
        if let Some(failure) = vmm.live(file) {
            assert!(failure.code != GuestError::InternalError, "{failure:?}");
            assert!(!failure.detail.is_empty(), "{failure:?}");
        }
    });
});
