//! guestd, as its clients see it.

use crate::call::{Call, Read, SharedCall, failure_beside};
use crate::channel::Channel;
use crate::error::{ClientError, ConnectError};
use crate::guest::{Control, GuestExit, Observer};
use crate::lifecycle::{Files, Lifecycle};
use crate::snapshot::Snapshot;
use capnp::capability::{Promise, Response};
use capnp::traits::{Owned, Pipelined};
use futures::FutureExt;
use guest_schema::common_capnp::failure;
use guest_schema::guest_capnp::guest_lifecycle;
use guest_schema::host_capnp::{guest_exit, guest_host, guest_info, host_info};
use guest_schema::vmm_capnp::snapshot_file;
use guest_schema::{Failure, Phase, SnapshotFile};
use guest_transport::broken;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::task::spawn_local;

/// A connection to guestd. Clones share it; it closes when the last clone and everything that came from it are gone. A guest
/// that was launched over it (not proxied) does not need it any more.
#[derive(Clone)]
pub struct Host {
    client: guest_host::Client,
    channel: Rc<Channel>,
}

/// A connection to guestd for as long as others keep it open.
#[derive(Clone)]
pub(crate) struct WeakHost(Weak<Channel>);

impl WeakHost {
    /// The connection, if it is open on this side.
    pub fn upgrade(&self) -> Option<Host> {
        let channel = self.0.upgrade()?;
        Some(Host { client: channel.bootstrap(), channel })
    }
}

/// A lease on its way, from the client's side.
pub(crate) struct Lease {
    client: guest_lifecycle::Client,
    files: Files,
    channel: Rc<Channel>,
}

impl Lease {
    /// On a channel of its own, and the end of that for the VMM.
    pub fn new() -> Result<(Self, OwnedFd), ClientError> {
        let (ours, theirs) =
            UnixStream::pair().map_err(|error| ClientError::local("cannot make a socket pair", error))?;
        let (channel, client) = Channel::open(ours)?;
        Ok((Self { client, files: Files::Descriptors, channel }, theirs.into()))
    }

    /// Through the service, over the connection to it.
    pub fn proxied(client: guest_lifecycle::Client, host: &Host) -> Self {
        Self { client, files: Files::Served, channel: host.channel.clone() }
    }
}

/// A guest that has been asked for.
pub struct Launched {
    /// Its lease; calls on it may be made at once.
    pub lifecycle: Lifecycle,
    /// How it ended, from the service.
    pub exit: GuestExit,
    /// The launch's answer: the guest's id. `badConfig` (the id is taken, too long or not printable), `failedServiceConnect` (the
    /// VMM cannot be started), `limitExceeded`. Calls on `lifecycle` fail with the same.
    pub id: Call<String>,
}

/// A guest that was found.
pub struct Found {
    /// Its full id.
    pub id: String,
    /// Its operator.
    pub control: Control,
    /// Its observer.
    pub observer: Observer,
    /// How it ended.
    pub exit: GuestExit,
}

/// A guest in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestInfo {
    /// Its id.
    pub id: String,
    /// Where it is in its life.
    pub phase: Phase,
    /// Its VMM's process.
    pub pid: u32,
    /// Time since run began, µs.
    pub uptime_us: u64,
    /// How many VPs it has.
    pub vps: u32,
    /// Whether its lease goes through the service.
    pub proxied: bool,
}

/// What the service says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostInfo {
    /// Its version.
    pub version: String,
    /// The version of the protocol that it speaks.
    pub protocol: u32,
    /// How many guests it has.
    pub guests: u32,
    /// What runs them.
    pub hypervisor: String,
    /// How many VMMs it has ready for guests to come.
    pub warm: u32,
    /// How many of them have memory, partition and VPs ready for a guest like one of the last.
    pub prepared: u32,
}

impl Host {
    /// Connects to the guestd that listens on this socket.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self, ConnectError> {
        let path = path.as_ref();
        let failed = |error| ConnectError::new(path, error);
        let stream = tokio::net::UnixStream::connect(path).await.map_err(failed)?;
        let stream = stream.into_std().map_err(failed)?;
        Self::over(stream).map_err(|error| failed(std::io::Error::other(error)))
    }

    /// Speaks with a guestd that serves the other end of this socket, which is made non-blocking.
    pub fn over(stream: UnixStream) -> Result<Self, ClientError> {
        let (channel, client) = Channel::open(stream)?;
        Ok(Self { client, channel })
    }

    /// Launches a guest's VMM and hands it a channel of its own, on which this speaks at once. An empty id lets the service
    /// choose one. Fails only for want of descriptors; a refusal is told by what is returned.
    pub fn launch(&self, id: &str) -> Result<Launched, ClientError> {
        let (lease, theirs) = Lease::new()?;
        let mut request = self.client.launch_request();
        request.get().set_server_end(self.pass(theirs));
        request.get().set_id(id);
        Ok(self.launched(lease, request.send().promise, |results| {
            read_launched(results.has_error(), results.get_error(), results.get_id(), results.get_exit())
        }))
    }

    /// The same with the lease going through the service, as for a client that cannot pass descriptors: every call costs one
    /// hop more, and files are read through this process.
    pub fn launch_proxied(&self, id: &str) -> Launched {
        let mut request = self.client.launch_proxied_request();
        request.get().set_id(id);
        let sent = request.send();
        let lease = Lease::proxied(sent.pipeline.get_lifecycle(), self);
        self.launched(lease, sent.promise, |results| {
            read_launched(results.has_error(), results.get_error(), results.get_id(), results.get_exit())
        })
    }

    /// Sends a descriptor with the next message, which is to hold its number.
    pub(crate) fn pass(&self, descriptor: OwnedFd) -> u64 {
        self.channel.descriptors.push(descriptor)
    }

    /// Takes a file of a snapshot that was passed.
    pub(crate) fn take_file(
        &self,
        file: snapshot_file::Reader<'_>,
    ) -> capnp::Result<(SnapshotFile, Arc<File>)> {
        let taken = self.channel.descriptors.take(file.get_descriptor());
        let name = file.get_name()?.to_str()?;
        let unknown = || capnp::Error::failed(format!("{name:?} is none of a snapshot's files"));
        let taken = taken.map_err(|error| capnp::Error::failed(format!("{name}: {error}")))?;
        Ok((SnapshotFile::named(name).ok_or_else(unknown)?, Arc::new(taken.into())))
    }

    /// What a launch over this connection comes to, whose answer is on its way.
    pub(crate) fn launched<R: Pipelined + Owned + 'static>(
        &self,
        lease: Lease,
        answer: Promise<Response<R>, capnp::Error>,
        read: impl FnOnce(R::Reader<'_>) -> Read<(String, guest_exit::Client)> + 'static,
    ) -> Launched {
        let (id, exit) = self.id_and_exit(answer, read);
        let Lease { client, files, channel } = lease;
        let lifecycle = Lifecycle::new(client, files, channel, id.clone(), self.downgrade());
        Launched { lifecycle, exit, id: Call::around(id) }
    }

    /// Takes a launch's answer apart as soon as it comes, whoever waits for it. The answer of a proxied launch holds the lease:
    /// neither it nor a capability that is a promise of it may be left lying about.
    fn id_and_exit<R: Pipelined + Owned + 'static>(
        &self,
        answer: Promise<Response<R>, capnp::Error>,
        read: impl FnOnce(R::Reader<'_>) -> Read<(String, guest_exit::Client)> + 'static,
    ) -> (SharedCall<String>, GuestExit) {
        let answered = Call::answer(answer, self.clone(), read);
        let (give, exit) = oneshot::channel();
        let task = spawn_local(async move {
            let (id, exit) = match answered.await {
                Ok((id, exit)) => (Ok(id), Some(exit)),
                Err(ClientError::Refused(failure)) => {
                    let exit = broken(&failure);
                    (Err(ClientError::Refused(failure)), Some(exit))
                }
                Err(error) => (Err(error), None),
            };
            // Nobody may wait for it.
            let _ = exit.map(|exit| give.send(exit));
            id
        });
        let id = Call::around(async move {
            task.await.unwrap_or_else(|_| Err(ClientError::Lost("the runtime has ended".into())))
        });
        let exit = capnp_rpc::new_future_client(async move {
            exit.await.map_err(|_| capnp::Error::disconnected("the launch was not answered".into()))
        });
        (id.shared(), GuestExit::new(exit, Some(self.channel.clone())))
    }

    /// The guest with this id, or the only one whose id begins so. `badConfig` if there is none, or more than one.
    pub fn find(&self, id: &str) -> Call<Found> {
        let mut request = self.client.find_request();
        request.get().set_id(id);
        let (kept, host) = (Some(self.channel.clone()), self.downgrade());
        Call::send(request, (), move |results| {
            if results.has_error() {
                return Ok(Err(Failure::read(results.get_error()?)?));
            }
            Ok(Ok(Found {
                id: text(results.get_id()?),
                control: Control::new(results.get_control()?, None, kept.clone(), host),
                observer: Observer::new(results.get_observer()?, None, kept.clone()),
                exit: GuestExit::new(results.get_exit()?, kept),
            }))
        })
    }

    /// The guests of this user.
    pub fn list(&self) -> Call<Vec<GuestInfo>> {
        Call::send(self.client.list_request(), self.clone(), |results| {
            Ok(Ok(results.get_guests()?.iter().map(GuestInfo::read).collect::<capnp::Result<_>>()?))
        })
    }

    /// The snapshot with this token, for as long as anybody refers to it. `badConfig` if there is none.
    pub fn snapshot(&self, token: &[u8]) -> Call<Snapshot> {
        let mut request = self.client.snapshot_request();
        request.get().set_token(token);
        let (host, token) = (self.clone(), token.to_owned());
        Call::send(request, (), move |results| {
            if results.has_error() {
                return Ok(Err(Failure::read(results.get_error()?)?));
            }
            Ok(Ok(Snapshot::new(results.get_snapshot()?, &token, Some(host))))
        })
    }

    /// The same connection, without keeping it open.
    pub(crate) fn downgrade(&self) -> WeakHost {
        WeakHost(Rc::downgrade(&self.channel))
    }

    /// What the service says of itself.
    pub fn info(&self) -> Call<HostInfo> {
        Call::send(self.client.info_request(), self.clone(), |results| {
            Ok(Ok(HostInfo::read(results.get_info()?)?))
        })
    }
}

impl GuestInfo {
    fn read(reader: guest_info::Reader<'_>) -> capnp::Result<Self> {
        Ok(Self {
            id: text(reader.get_id()?),
            phase: reader.get_phase()?.into(),
            pid: reader.get_pid(),
            uptime_us: reader.get_uptime_us(),
            vps: reader.get_vps(),
            proxied: reader.get_proxied(),
        })
    }
}

impl HostInfo {
    fn read(reader: host_info::Reader<'_>) -> capnp::Result<Self> {
        Ok(Self {
            version: text(reader.get_version()?),
            protocol: reader.get_protocol(),
            guests: reader.get_guests(),
            hypervisor: text(reader.get_hypervisor()?),
            warm: reader.get_warm(),
            prepared: reader.get_prepared(),
        })
    }
}

pub(crate) fn read_launched(
    refused: bool,
    failure: capnp::Result<failure::Reader<'_>>,
    id: capnp::Result<capnp::text::Reader<'_>>,
    exit: capnp::Result<guest_exit::Client>,
) -> Read<(String, guest_exit::Client)> {
    Ok(match failure_beside(refused, failure)? {
        Ok(()) => Ok((text(id?), exit?)),
        Err(failure) => Err(failure),
    })
}

fn text(reader: capnp::text::Reader<'_>) -> String {
    String::from_utf8_lossy(reader.as_bytes()).into_owned()
}
