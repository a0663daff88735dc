//! The VMM of one guest: the driver of its life, and the protocol served on top of it.
//!
//! [`serve`] runs a VMM on a thread of its own and serves `GuestLifecycle` on a socket; [`serve_service`] is what the binary does:
//! the same, launched by guestd. Whoever holds the other end of the lease's channel owns the guest: it lives no longer than that.
//!
//! Parts: [`driver`](self) makes every transition; `admission` says what may be asked when; `vm` is the machine with the guest in
//! it; `guest` what holders of a capability see, `settings` and `log` what its operator may change; `rpc` the capabilities; `config` and
//! `files` what comes in; `snapshot` and `saved` what a guest goes on from; `rehearsal` what makes the first guest as quick as those after it.

mod admission;
mod client_units;
mod config;
mod devices;
mod driver;
mod events;
mod files;
mod guest;
mod log;
mod output;
mod panics;
mod platform;
mod ports;
mod rehearsal;
mod rpc;
mod saved;
mod settings;
mod shown;
mod snapshot;
mod vm;

pub use log::{LogFilter, LogFilterError};
pub use platform::{Platform, UnknownPlatform};

use driver::{Command, Driver, DriverHandle};
use guest::Milestone;
use guest_schema::guest_capnp::guest_lifecycle;
use guest_schema::vmm_capnp::{vmm, vmm_watcher};
use guest_transport::{Connection, Limits};
use rpc::{Lifecycle, ServiceEnds, VmmChannel};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{LocalSet, spawn_local};

/// How long the service may take to hear how the guest ended, before the VMM ends all the same.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serves `GuestLifecycle` on a socket, on a thread of its own that ends with the lease.
///
/// `descriptors` are numbered from 0 as if they had come over the channel; those that come over it follow. Ends no process and
/// installs nothing process-wide but the handler of the signal that kicks VPs out of the guest.
pub fn serve(
    stream: UnixStream,
    descriptors: Vec<OwnedFd>,
    platform: Platform,
) -> io::Result<JoinHandle<()>> {
    let runtime = runtime()?;
    std::thread::Builder::new().name("guest-vmm".into()).spawn(move || {
        LocalSet::new().block_on(&runtime, async move {
            let (milestones, _) = mpsc::unbounded_channel();
            let (driver, handle) = Driver::new(platform, None, milestones);
            let driving = spawn_local(driver.drive());
            hold_lease(stream, descriptors, &handle, ServiceEnds::default()).await;
            end(&handle, driving).await;
        });
        // The thread ends with the lease, whatever a file on a hung file system still waits for.
        runtime.shutdown_background();
    })
}

/// How long a VMM may take to take its guest down once the lease has ended: longer than a pause that fails, its way back and
/// the stop that follows, each with its deadline, unless an operator has made that longer: then the process ends first.
const LEASE_END: Duration = Duration::from_secs(60);

/// A runtime for the control thread of one VMM.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Serves the private channel of the service that launched this process, until the lease has ended. The guest's operator may
/// change the filter of the process's log.
pub fn serve_service(channel: UnixStream, platform: Platform, log: LogFilter) -> io::Result<()> {
    let runtime = runtime()?;
    let attended = LocalSet::new().block_on(&runtime, attend(channel, platform, log));
    // The process ends now, whatever a thread of the blocking pool still waits for.
    runtime.shutdown_background();
    attended
}

/// The service speaks here for all clients that found this guest: each of them is bounded by the service.
fn service_limits() -> Limits {
    Limits { calls: 1 << 20, call_bytes: 256 << 20, cancelled: 1 << 20, ..Limits::default() }
}

async fn attend(channel: UnixStream, platform: Platform, log: LogFilter) -> io::Result<()> {
    let (milestones, told) = mpsc::unbounded_channel();
    let (driver, handle) = Driver::new(platform, Some(log), milestones);
    let driving = spawn_local(driver.drive());
    let (attach, attached) = oneshot::channel();
    let connection = Connection::server(channel, service_limits(), |descriptors| {
        let channel = VmmChannel::new(handle.clone(), descriptors.clone(), attach);
        let channel: vmm::Client = capnp_rpc::new_client(channel);
        channel.client
    })?;
    let disconnector = connection.disconnector();
    let service = spawn_local(async move {
        match connection.run().await {
            Ok(()) => tracing::debug!("the service's channel was closed"),
            Err(error) => tracing::warn!(%error, "the service's channel ended"),
        }
    });
    // Without a lease there is nothing to live for: a service that ends before it attaches one drops `attach`.
    if let Ok(attached) = attached.await {
        let telling = spawn_local(tell(attached.id, attached.watcher, told));
        let lease = hold_lease(attached.lease.into(), Vec::new(), &handle, attached.service);
        // A shutdown by the service ends the driver while the lease is held.
        let mut driving = driving;
        tokio::select! {
            () = lease => end(&handle, driving).await,
            driven = &mut driving => {
                if let Err(panic) = driven {
                    tracing::error!(%panic, "the driver failed");
                }
            }
        }
        // The driver is gone, so no milestone follows: once all are told, the service knows how the guest ended.
        let _ = tokio::time::timeout(LAST_WORDS, telling).await;
    }
    let _ = tokio::time::timeout(LAST_WORDS, disconnector).await;
    service.abort();
    Ok(())
}

/// Serves the lease until its channel closes.
async fn hold_lease(
    stream: UnixStream,
    descriptors: Vec<OwnedFd>,
    driver: &DriverHandle,
    service: ServiceEnds,
) {
    let connection = Connection::server_with(stream, descriptors, Limits::default(), |descriptors| {
        let lifecycle = Lifecycle::new(driver.clone(), descriptors.clone(), service);
        let lifecycle: guest_lifecycle::Client = capnp_rpc::new_client(lifecycle);
        lifecycle.client
    });
    let connection = match connection {
        Ok(connection) => connection,
        Err(error) => return tracing::error!(%error, "the lease cannot be used"),
    };
    // A task of its own, so that a panic in a method ends the lease and not the VMM in the middle of things.
    match spawn_local(connection.run()).await {
        Ok(Ok(())) => tracing::debug!("the lease's channel was closed"),
        Ok(Err(error)) => tracing::warn!(%error, "the lease's channel ended"),
        Err(panic) => tracing::error!(%panic, "serving the lease failed"),
    }
}

/// Ends the guest and its driver.
async fn end(driver: &DriverHandle, driving: tokio::task::JoinHandle<()>) {
    let ended = async {
        if let Err(failure) = driver.ask(|reply| Command::End("its lease ended", reply)).await {
            tracing::debug!(failure = failure.chain(), "the end");
        }
        if let Err(panic) = driving.await {
            tracing::error!(%panic, "the driver failed");
        }
    };
    if tokio::time::timeout(LEASE_END, ended).await.is_err() {
        tracing::error!("the guest could not be taken down within {LEASE_END:?}");
    }
}

/// How long news are held back after the lease was attached: what was asked for in one flight with it runs by then.
const FLIGHT: Duration = Duration::from_millis(2);

/// Tells the service what becomes of the guests, in order.
async fn tell(id: String, watcher: vmm_watcher::Client, mut milestones: mpsc::UnboundedReceiver<Milestone>) {
    tokio::time::sleep(FLIGHT).await;
    tracing::info!(id, "attached");
    while let Some(milestone) = milestones.recv().await {
        let told = match milestone {
            Milestone::Created { generation, shape } => {
                let mut request = watcher.created_request();
                request.get().set_generation(generation);
                if let Some(shape) = shape {
                    shape.write(request.get().init_shape());
                }
                request.send().promise.await.map(drop)
            }
            Milestone::Terminated { generation, exit } => {
                let mut request = watcher.terminated_request();
                request.get().set_generation(generation);
                exit.write(request.get().init_exit());
                request.send().promise.await.map(drop)
            }
        };
        if let Err(error) = told {
            // The service is gone; the guest lives on for as long as its lease.
            tracing::debug!(%error, "the service did not hear of a milestone");
        }
    }
}
