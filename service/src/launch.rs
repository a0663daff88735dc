//! The process of one guest: its private channel, its log, its end.

use crate::config::ServiceConfig;
use crate::exit::Ending;
use crate::log::follow_log;
use crate::snapshots::{Duplicates, Kept};
use crate::watcher::Watcher;
use crate::{Service, ServiceError};
use capnp_rpc::rpc_twoparty_capnp::Side;
use guest_schema::vmm_capnp::vmm;
use guest_schema::{Failure, GuestError};
use guest_transport::{Connection, Descriptors, Limits, printable};
use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};
use tokio::task::spawn_local;

/// A guest that was launched: its VMM's process and the private channel to it.
pub(crate) struct Guest {
    pub id: String,
    pub uid: u32,
    pub pid: u32,
    pub proxied: bool,
    pub vmm: vmm::Client,
    pub ending: Ending,
    process_ended: watch::Sender<bool>,
    /// Tells the task that waits for the process to kill it.
    kill: Notify,
    /// Whether the service itself ends the guest.
    ending_it: Cell<bool>,
}

impl Guest {
    /// Resolves once the VMM's process has ended.
    pub async fn ended(&self) {
        let mut ended = self.process_ended.subscribe();
        ended.wait_for(|ended| *ended).await.expect("the sender is held by self");
    }

    /// Stops the guest by force; kills its process if it takes longer than the deadline.
    pub async fn end(&self, deadline: Duration) {
        self.ending_it.set(true);
        let mut request = self.vmm.shutdown_request();
        request.get().set_deadline_ms(u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX));
        let orderly = async {
            // A VMM that is gone already cannot answer: its process has ended, or is about to.
            let _ = request.send().promise.await;
            self.ended().await;
        };
        if tokio::time::timeout(deadline, orderly).await.is_err() {
            tracing::warn!(guest = self.id, pid = self.pid, "did not stop in time: killed");
            self.kill();
            self.ended().await;
        }
    }

    /// Has the process killed, if it has not ended.
    fn kill(&self) {
        self.kill.notify_one();
    }
}

/// The guest-vmm to launch: the one that is named, which was looked for already, or the first that is found.
pub(crate) fn find_vmm(named: Option<&Path>) -> Result<PathBuf, ServiceError> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let beside =
        std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned)).unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(beside.clone())
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join("guest-vmm"))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| ServiceError::NoVmm { beside: beside.display().to_string() })
}

/// A guest that is asked for.
pub(crate) struct Order {
    pub id: String,
    pub lease: OwnedFd,
    /// Whose it is.
    pub uid: u32,
    pub proxied: bool,
    /// What it goes on from, if anything.
    pub snapshot: Option<Rc<Kept>>,
}

/// Starts a VMM, hands it the lease, and watches over it.
pub(crate) fn spawn(service: &Rc<Service>, order: Order) -> Result<Rc<Guest>, Failure> {
    let (vmm, Order { id, lease, uid, proxied, snapshot }) = (&service.vmm, order);
    check_channel(&lease)?;
    let failed = |what: &str, error: &std::io::Error| {
        Failure::new(GuestError::FailedServiceConnect, format!("{}: {what}: {error}", vmm.display()))
    };
    let (ours, theirs) = StdStream::pair().map_err(|error| failed("no socket pair", &error))?;
    let channel = ours.set_nonblocking(true).and_then(|()| UnixStream::from_std(ours));
    let channel = channel.map_err(|error| failed("no channel", &error))?;
    let parts = snapshot.as_ref().map(|kept| kept.duplicate()).transpose();
    let parts = parts.map_err(|error| failed("the snapshot cannot be handed over", &error))?;
    let mut child =
        start(vmm, &service.config, theirs.into()).map_err(|error| failed("cannot be started", &error))?;

    let mut connection = Connection::client(channel, Limits::of_client());
    let client: vmm::Client = connection.bootstrap(Side::Server);
    let ending = Ending::new();
    let descriptors = connection.descriptors();
    let watcher = Watcher {
        service: service.clone(),
        descriptors: descriptors.clone(),
        guest: id.clone(),
        uid,
        ending: ending.clone(),
    };
    let attached = attach(&client, &descriptors, lease, watcher, parts);
    let guest = Rc::new(Guest {
        pid: child.id().unwrap_or(0),
        id,
        uid,
        proxied,
        vmm: client,
        ending,
        process_ended: watch::Sender::new(false),
        kill: Notify::new(),
        ending_it: Cell::new(false),
    });
    let log = spawn_local(follow_log(guest.id.clone(), child.stderr.take()));
    let watched = guest.clone();
    spawn_local(async move {
        match connection.run().await {
            Ok(()) => tracing::debug!(guest = watched.id, "the VMM closed its channel"),
            Err(error) => {
                tracing::warn!(guest = watched.id, %error, "the VMM's channel ended");
                watched.kill();
            }
        }
    });
    let watched = guest.clone();
    spawn_local(async move {
        if let Err(error) = attached.await {
            tracing::warn!(guest = watched.id, error = printable(&error), "the VMM took no lease");
            watched.kill();
        }
    });
    spawn_local(reap(guest.clone(), child, log));
    tracing::info!(guest = guest.id, pid = guest.pid, proxied, "launched");
    Ok(guest)
}

/// Whether a lease can be held over this. A socket without another end would never tell that nobody holds it.
fn check_channel(descriptor: &OwnedFd) -> Result<(), Failure> {
    use rustix::net::{AddressFamily, SocketType, sockopt};
    let bad = |problem: &str| Err(Failure::new(GuestError::BadConfig, format!("serverEnd: {problem}")));
    let stream = sockopt::socket_domain(descriptor.as_fd()) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(descriptor.as_fd()) == Ok(SocketType::STREAM);
    if !stream {
        return bad("not a Unix stream socket");
    }
    match rustix::net::getpeername(descriptor) {
        Ok(_) => Ok(()),
        Err(_) => bad("the socket is not connected"),
    }
}

/// Starts the process. Its channel is its standard input: no descriptor has to be placed by number.
fn start(vmm: &Path, config: &ServiceConfig, channel: OwnedFd) -> std::io::Result<Child> {
    Command::new(vmm)
        .args(["--hypervisor", &config.hypervisor, "--log", &config.vmm_log])
        .stdin(Stdio::from(channel))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // A terminal's Ctrl-C is for its client, who decides what becomes of the guest.
        .process_group(0)
        .spawn()
}

/// Sends the lease, and what the guest goes on from. The request goes out before this returns.
fn attach(
    client: &vmm::Client,
    descriptors: &Descriptors,
    lease: OwnedFd,
    watcher: Watcher,
    parts: Option<Duplicates<'_>>,
) -> impl Future<Output = Result<(), String>> + use<> {
    let mut request = client.attach_request();
    let mut params = request.get();
    params.set_server_end(descriptors.push(lease));
    params.set_id(&watcher.guest[..]);
    params.set_watcher(capnp_rpc::new_client(watcher));
    if let Some(parts) = parts {
        parts.write(descriptors, params.init_snapshot());
    }
    let answer = request.send().promise;
    async move {
        let answer = answer.await.map_err(|error| error.to_string())?;
        let result = answer.get().and_then(|results| results.get_result()).and_then(Failure::read_result);
        result.map_err(|error| error.to_string())?.map_err(|failure| failure.chain())
    }
}

/// Waits for the end of the process, and tells it. Only here is the process killed: before it is reaped, its number is its own.
async fn reap(guest: Rc<Guest>, mut child: Child, log: tokio::task::JoinHandle<String>) {
    let status = tokio::select! {
        status = child.wait() => status,
        () = guest.kill.notified() => match child.kill().await {
            Ok(()) => child.wait().await,
            Err(error) => Err(error),
        },
    };
    let log = log.await.unwrap_or_default();
    match &status {
        Ok(status) => tracing::info!(guest = guest.id, pid = guest.pid, %status, "the VMM has ended"),
        Err(error) => tracing::error!(guest = guest.id, %error, "the VMM's end is unknown"),
    }
    guest.ending.process_ended(status.ok(), guest.ending_it.get(), &log);
    guest.process_ended.send_replace(true);
}
