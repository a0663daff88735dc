//! A VMM without a guest: it remembers what it was attached with, and hands the parts of snapshots to the service that it is told to.
//!
//! `GuestControl.update` chooses the parts by their name as the path, `snapshot` hands them over, `inspect` tells what it began with.

use guest_schema::guest_capnp::guest_control;
use guest_schema::vmm_capnp::{snapshot_parts, vmm, vmm_watcher};
use guest_schema::{Failure, MemoryKept, SnapshotFile, SnapshotInfo};
use guest_transport::{Connection, Descriptors, Limits};
use rustix::fs::{MemfdFlags, SealFlags};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::rc::Rc;
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;
use tokio::task::{LocalSet, spawn_local};

macro_rules! parts {
    ($($variant:ident,)*) => {
        /// What a VMM hands over for a snapshot.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub enum Parts { #[default] $($variant,)* }

        impl Parts {
            const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name, as the path of an update.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }
        }
    };
}

parts! {
    Good, All, Unsealed, Writable, Device, File, UnknownNumber, NumberTwice, NameTwice, Many, UnknownName, Missing, Nothing,
    LargeInfo, Flood,
}

/// What the snapshots are said to be of.
pub fn info() -> SnapshotInfo {
    SnapshotInfo {
        memory_bytes: 1 << 30,
        units: vec!["vps".into(), "memory".into()],
        parent: "somebody else's".into(),
        taken_at_us: 17,
        vps: 3,
        disks: vec!["root".into()],
        networks: 1,
        memory: MemoryKept::Layered,
        copied_bytes: 4096,
    }
}

/// The VMM, whose channel is its standard input.
pub fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let channel = std::io::stdin().as_fd().try_clone_to_owned().expect("a channel");
    LocalSet::new().block_on(&runtime, async { serve(channel.into()).await });
    ExitCode::SUCCESS
}

fn watched(lease: OwnedFd) -> tokio::net::UnixStream {
    let lease = UnixStream::from(lease);
    lease.set_nonblocking(true).expect("a socket");
    tokio::net::UnixStream::from_std(lease).expect("a stream")
}

/// Until the lease ends, or the service wants it: whose channel is cut is killed.
async fn serve(channel: UnixStream) {
    let over = Rc::new(Notify::new());
    let connection = Connection::server(channel, Limits::default(), |descriptors| {
        let state = State::new(descriptors.clone(), over.clone());
        let vmm: vmm::Client = capnp_rpc::new_client(StandIn(Rc::new(state)));
        vmm.client
    });
    spawn_local(connection.expect("a socket").run());
    over.notified().await;
}

struct State {
    descriptors: Descriptors,
    over: Rc<Notify>,
    watcher: RefCell<Option<vmm_watcher::Client>>,
    began_with: RefCell<String>,
    parts: Cell<Parts>,
}

impl State {
    fn new(descriptors: Descriptors, over: Rc<Notify>) -> Self {
        Self {
            descriptors,
            over,
            watcher: RefCell::default(),
            began_with: RefCell::new("nothing".into()),
            parts: Cell::default(),
        }
    }
}

#[derive(Clone)]
struct StandIn(Rc<State>);

impl StandIn {
    /// The parts' names, if their contents are what they were sent with.
    fn read(&self, parts: snapshot_parts::Reader<'_>) -> capnp::Result<String> {
        let mut names = Vec::new();
        for file in parts.get_files()?.iter() {
            let name = file.get_name()?.to_string()?;
            let descriptor = self.0.descriptors.take(file.get_descriptor()).expect("handed over");
            let mut contents = String::new();
            // Whoever reads a duplicate moves the offset that all share.
            let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
            File::open(path)?.read_to_string(&mut contents)?;
            names.push(if contents == name { name } else { format!("{name} with {contents:?}") });
        }
        let parent = parts.get_info()?.get_parent()?.to_string()?;
        Ok(format!("of {parent}: {}", names.join(", ")))
    }
}

impl vmm::Server for StandIn {
    async fn attach(
        self: Rc<Self>,
        params: vmm::AttachParams,
        mut results: vmm::AttachResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let lease = self.0.descriptors.take(params.get_server_end()).expect("handed over");
        let over = self.0.over.clone();
        spawn_local(async move {
            // Whatever is said on it, it ends.
            let _ = watched(lease).read_to_end(&mut Vec::new()).await;
            over.notify_one();
        });
        *self.0.watcher.borrow_mut() = Some(params.get_watcher()?);
        if params.has_snapshot() {
            *self.0.began_with.borrow_mut() = self.read(params.get_snapshot()?)?;
        }
        Failure::write_result(&Ok(()), results.get().init_result());
        Ok(())
    }

    async fn control(
        self: Rc<Self>,
        _: vmm::ControlParams,
        mut results: vmm::ControlResults,
    ) -> capnp::Result<()> {
        results.get().set_control(capnp_rpc::new_client(StandIn::clone(&self)));
        Ok(())
    }

    async fn shutdown(
        self: Rc<Self>,
        _: vmm::ShutdownParams,
        mut results: vmm::ShutdownResults,
    ) -> capnp::Result<()> {
        Failure::write_result(&Ok(()), results.get().init_result());
        self.0.over.notify_one();
        Ok(())
    }
}

impl guest_control::Server for StandIn {
    async fn update(
        self: Rc<Self>,
        params: guest_control::UpdateParams,
        mut results: guest_control::UpdateResults,
    ) -> capnp::Result<()> {
        let wanted = params.get()?.get_path()?.to_str()?;
        let parts = Parts::ALL.iter().find(|parts| parts.name() == wanted);
        self.0.parts.set(*parts.expect("known parts"));
        Failure::write_result(&Ok(()), results.get().init_result());
        Ok(())
    }

    async fn inspect(
        self: Rc<Self>,
        _: guest_control::InspectParams,
        mut results: guest_control::InspectResults,
    ) -> capnp::Result<()> {
        results.get().set_tree(&self.0.began_with.borrow()[..]);
        Ok(())
    }

    async fn snapshot(
        self: Rc<Self>,
        _: guest_control::SnapshotParams,
        mut results: guest_control::SnapshotResults,
    ) -> capnp::Result<()> {
        let watcher = self.0.watcher.borrow().clone().expect("attached");
        let mut request = watcher.keep_request();
        self.hand_over(self.0.parts.get(), request.get().init_parts());
        let answer = request.send().promise.await?;
        let (answer, mut results) = (answer.get()?, results.get());
        if answer.has_error() {
            results.set_error(answer.get_error()?)?;
        } else {
            results.set_snapshot(answer.get_snapshot()?);
            results.set_token(answer.get_token()?);
        }
        Ok(())
    }
}

const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

fn memfd(contents: &str, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("part", flags).expect("a memfd"));
    file.write_all(contents.as_bytes()).expect("written");
    rustix::fs::fcntl_add_seals(&file, seals).expect("sealed");
    file.into()
}

impl StandIn {
    fn hand_over(&self, parts: Parts, mut message: snapshot_parts::Builder<'_>) {
        let files = self.files(parts);
        let count = u32::try_from(files.len()).expect("few");
        let mut list = message.reborrow().init_files(count);
        for (index, (name, number)) in (0..count).zip(&files) {
            let mut file = list.reborrow().get(index);
            file.set_name(name);
            file.set_descriptor(*number);
        }
        let units = if parts == Parts::LargeInfo { vec!["u".repeat(70 << 10)] } else { info().units };
        SnapshotInfo { units, ..info() }.write(message.init_info());
    }

    /// The files by name, and the numbers of their descriptors.
    fn files(&self, parts: Parts) -> Vec<(&'static str, u64)> {
        let sealed = |name: &'static str| (name, self.0.descriptors.push(memfd(name, SEALS)));
        let with_memory = |memory: OwnedFd| {
            vec![sealed("state"), ("memory", self.0.descriptors.push(memory)), sealed("kernel")]
        };
        let good = |more: &[&'static str]| {
            ["state", "memory", "kernel"].iter().chain(more).map(|name| sealed(name)).collect::<Vec<_>>()
        };
        match parts {
            Parts::Good | Parts::LargeInfo => good(&[]),
            Parts::All => SnapshotFile::ALL.map(|file| sealed(file.name())).to_vec(),
            Parts::Unsealed => with_memory(memfd("", SealFlags::empty())),
            Parts::Writable => with_memory(memfd("", SealFlags::SHRINK | SealFlags::GROW)),
            Parts::Device => with_memory(File::open("/dev/zero").expect("there").into()),
            Parts::File => with_memory(tempfile::tempfile().expect("a file").into()),
            Parts::UnknownNumber => vec![sealed("state"), ("memory", 1 << 40), sealed("kernel")],
            Parts::NumberTwice => {
                let memory = sealed("memory");
                vec![sealed("state"), memory, ("kernel", memory.1)]
            }
            Parts::NameTwice => good(&["memory"]),
            Parts::Many => good(&["layer", "ramdisk", "layer"]),
            Parts::UnknownName => good(&["disk\n"]),
            Parts::Missing => vec![sealed("state"), sealed("memory")],
            Parts::Nothing => Vec::new(),
            Parts::Flood => std::iter::repeat_with(|| sealed("state")).take(600).collect(),
        }
    }
}
