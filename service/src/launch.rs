//! A guest's launch: a lease is attached to a VMM's process, one that is ready or a new one; and the guest's end.

use crate::Service;
use crate::exit::Ending;
use crate::export::Exports;
use crate::process::Process;
use crate::snapshots::{Duplicates, Kept};
use crate::watcher::Watcher;
use guest_schema::vmm_capnp::vmm;
use guest_schema::{Failure, GuestError};
use guest_transport::{Descriptors, printable};
use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::spawn_local;

/// A guest that was launched: its VMM's process with its lease attached.
pub(crate) struct Guest {
    pub id: String,
    pub uid: u32,
    pub pid: u32,
    pub proxied: bool,
    pub vmm: vmm::Client,
    pub ending: Ending,
    process: Rc<Process>,
    /// Whether the process has ended and `ending` knows.
    over: watch::Sender<bool>,
    /// Whether the service itself ends the guest.
    ending_it: Cell<bool>,
}

impl Guest {
    /// Resolves once the VMM's process has ended.
    pub async fn ended(&self) {
        let mut over = self.over.subscribe();
        over.wait_for(|over| *over).await.expect("the sender is held by self");
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
            self.process.kill();
            self.ended().await;
        }
    }

    async fn tell_end(self: Rc<Self>) {
        let end = self.process.ended().await;
        self.ending.process_ended(end.status, self.ending_it.get(), &end.log);
        self.over.send_replace(true);
    }
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

/// Hands a VMM the lease, and watches over it: one that is ready, or else a new one.
pub(crate) fn launch(service: &Rc<Service>, order: Order) -> Result<Rc<Guest>, Failure> {
    let Order { id, lease, uid, proxied, snapshot } = order;
    check_channel(&lease)?;
    let parts = snapshot.as_ref().map(|kept| kept.duplicate()).transpose();
    let cannot = |error| service.program.failed("the snapshot cannot be handed over", &error);
    let parts = parts.map_err(cannot)?;
    let ready = service.pool.take(snapshot.as_ref().map(|kept| &kept.info));
    let (warm, prepared) = (ready.is_some(), ready.as_ref().is_some_and(|ready| ready.is_prepared));
    let process = ready.map_or_else(|| service.program.start(), |ready| Ok(ready.process))?;
    process.belongs_to(&id);
    let guest = Rc::new(Guest {
        id,
        uid,
        pid: process.pid,
        proxied,
        vmm: process.vmm.clone(),
        ending: Ending::new(),
        process,
        over: watch::Sender::new(false),
        ending_it: Cell::new(false),
    });
    let watcher = Watcher {
        service: service.clone(),
        descriptors: guest.process.descriptors.clone(),
        guest: guest.id.clone(),
        uid,
        ending: guest.ending.clone(),
        exports: Exports::default(),
    };
    let attached = attach(&guest.process, lease, watcher, parts);
    let watched = guest.clone();
    // Told once the lease is on its way: the guest does not wait for a line of the log.
    spawn_local(async move {
        tracing::info!(guest = watched.id, pid = watched.pid, proxied, warm, prepared, "launched");
        if let Err(error) = attached.await {
            tracing::warn!(guest = watched.id, error = printable(&error), "the VMM took no lease");
            watched.process.kill();
        }
    });
    spawn_local(guest.clone().tell_end());
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

/// Sends the lease, and what the guest goes on from. The request goes out before this returns.
fn attach(
    process: &Process,
    lease: OwnedFd,
    watcher: Watcher,
    parts: Option<Duplicates<'_>>,
) -> impl Future<Output = Result<(), String>> + use<> {
    let descriptors: &Descriptors = &process.descriptors;
    let mut request = process.vmm.attach_request();
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
