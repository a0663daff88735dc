//! guestd: launches guest VMMs and hands clients the capability to a guest's life.
//!
//! A [`Service`] lives on one thread, in a tokio `LocalSet`. [`Service::serve`] runs one client's connection; the binary accepts
//! them on a socket, and a program that embeds the service hands over one end of a socket pair.

mod config;
mod exit;
mod export;
mod guests;
mod host;
mod launch;
mod launcher;
mod log;
mod pool;
mod process;
mod proxy;
mod restorable;
mod snapshots;
mod socket;
mod watcher;

pub use config::{ConfigError, ServiceConfig, WrongSetting};
pub use socket::{ListenError, listen};

use futures::future::join_all;
use guest_schema::{Failure, GuestError};
use guest_transport::{Connection, ConnectionError, Limits};
use guests::Guests;
use host::Host;
use launch::{Guest, Order};
use pool::Pool;
use process::Program;
use snapshots::Snapshots;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

/// How long a client may take until its first message.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// How long a launch waits for another guest of the same id to end.
const ID_PATIENCE: Duration = Duration::from_millis(500);

/// How long a guest may take to stop when the service ends, before its process is killed.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// Why a service cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// There is no guest-vmm to launch.
    #[error("no guest-vmm beside {beside} nor in PATH: build it, or name it with --vmm")]
    NoVmm {
        /// The folder of the running executable.
        beside: String,
    },
    /// A setting cannot be used.
    #[error(transparent)]
    Setting(#[from] WrongSetting),
}

/// The service: the guests that it launched, and what it launches them with.
pub struct Service {
    config: ServiceConfig,
    program: Rc<Program>,
    pool: Rc<Pool>,
    guests: Guests,
    snapshots: Rc<Snapshots>,
    connections: Connections,
    /// Whether no more guests may come.
    ending: Cell<bool>,
}

impl Service {
    /// A service that launches the guest-vmm of this config: the one it names, else the one beside the running executable, else
    /// the one in PATH. With `warm` it starts VMMs from now on, which takes a tokio `LocalSet`.
    pub fn new(config: ServiceConfig) -> Result<Rc<Self>, ServiceError> {
        config.check()?;
        let program = Rc::new(Program::of(&config)?);
        let pool = Pool::start(config.warm, program.clone());
        let connections = Connections { most: config.max_connections, open: RefCell::default() };
        let snapshots = Snapshots::new(config.max_snapshots);
        let (guests, ending) = (Guests::default(), Cell::new(false));
        Ok(Rc::new(Self { config, program, pool, guests, snapshots, connections, ending }))
    }

    /// Serves a client until its connection ends. `uid` is the client's user: it finds the guests of that user.
    pub async fn serve(self: Rc<Self>, stream: UnixStream, uid: u32) -> Result<(), ConnectionError> {
        let Some(_open) = self.connections.open(uid) else {
            tracing::debug!(uid, most = self.connections.most, "connection refused: too many of this user");
            return Ok(());
        };
        let limits = Limits { handshake: Some(HANDSHAKE), ..Limits::default() };
        let connection = Connection::server(stream, limits, |descriptors| {
            let host: guest_schema::host_capnp::guest_host::Client =
                capnp_rpc::new_client(Host::new(self.clone(), descriptors.clone(), uid));
            host.client
        });
        connection?.run().await
    }

    /// Stops all guests by force and waits until their processes have ended. No guest is launched and no snapshot kept from now on;
    /// those that are kept last until the last reference to them is dropped, or this process ends.
    pub async fn shutdown(&self) {
        self.ending.set(true);
        let idle = self.pool.close();
        join_all(self.guests.all().iter().map(|guest| guest.end(SHUTDOWN))).await;
        join_all(idle.iter().map(|process| process.ended())).await;
    }

    /// Resolves when the id is free, or is not about to become so: a lease that has just been given up takes a moment to end.
    async fn await_id(&self, id: &str) {
        if let Some(guest) = self.guests.get(id)
            && tokio::time::timeout(ID_PATIENCE, guest.ended()).await.is_ok()
        {
            self.guests.remove(&guest);
        }
    }

    /// Has a VMM for a guest and hands it its lease.
    fn launch(self: &Rc<Self>, order: Order) -> Result<Rc<Guest>, Failure> {
        if self.ending.get() {
            return Err(Failure::new(GuestError::FailedServiceConnect, "the service is ending"));
        }
        let id = self.guests.choose_id(&order.id)?;
        if self.guests.count() >= self.config.max_guests {
            let detail = format!("the service's limit of {} guests is reached", self.config.max_guests);
            return Err(Failure::new(GuestError::LimitExceeded, detail));
        }
        let guest = launch::launch(self, Order { id, ..order })?;
        self.guests.insert(guest.clone());
        let service = self.clone();
        let launched = guest.clone();
        tokio::task::spawn_local(async move {
            launched.ended().await;
            service.guests.remove(&launched);
        });
        Ok(guest)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Nobody waits for them any more.
        drop(self.pool.close());
    }
}

/// How many connections each user has.
struct Connections {
    most: usize,
    open: RefCell<HashMap<u32, Rc<Cell<usize>>>>,
}

impl Connections {
    fn open(&self, uid: u32) -> Option<OpenConnection> {
        let count = self.open.borrow_mut().entry(uid).or_default().clone();
        if count.get() >= self.most {
            return None;
        }
        count.set(count.get() + 1);
        Some(OpenConnection(count))
    }
}

struct OpenConnection(Rc<Cell<usize>>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
