//! A small guestd and VMM in one, served for real over a socket pair: what the library says is what arrives here.
//!
//! Its guest prints the kernel it was given, then everything that it is sent; it ends when it reads `poweroff` or `crash`.

mod snapshot;

pub use snapshot::TOKEN;

use capnp::capability::Promise;
use guest_client::{Exit, Failure, FileSource, GuestConfig, GuestError, GuestState, Phase, VpState};
use guest_schema::common_capnp::file;
use guest_schema::common_capnp::{byte_stream, output_sink};
use guest_schema::guest_capnp::{guest, guest_control, guest_lifecycle, observer};
use guest_schema::host_capnp::{guest_exit, guest_host};
use guest_transport::{Connection, Descriptors, Limits, broken};
use snapshot::{DISKS, Snapshot};
use std::cell::RefCell;
use std::io::{Read, Seek};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use tokio::sync::watch;
use tokio::task::spawn_local;

/// A guest of the fake, shared by all its capabilities.
#[derive(Clone)]
pub struct Machine(Rc<State>);

struct State {
    created: RefCell<Result<Vec<u8>, Failure>>,
    phase: watch::Sender<(Phase, Option<Exit>)>,
    outputs: RefCell<Vec<output_sink::Client>>,
    pub log: RefCell<Vec<&'static str>>,
    /// Of one that was launched from a snapshot.
    fork: Option<Fork>,
    forks: RefCell<Vec<Machine>>,
}

/// What a machine has that was launched from a snapshot.
struct Fork {
    /// How it ends at once when it runs, if it does.
    fate: Option<Exit>,
}

impl Machine {
    pub fn new() -> Self {
        Self::with(None)
    }

    fn with(fork: Option<Fork>) -> Self {
        Self(Rc::new(State {
            fork,
            forks: RefCell::default(),
            created: RefCell::new(Err(Failure::new(GuestError::NotCreated, "nothing was created"))),
            phase: watch::Sender::new((Phase::Empty, None)),
            outputs: RefCell::default(),
            log: RefCell::default(),
        }))
    }

    /// The calls in the order in which they came.
    pub fn log(&self) -> Vec<&'static str> {
        self.0.log.borrow().clone()
    }

    /// What was launched from this machine's snapshot.
    pub fn forks(&self) -> Vec<Machine> {
        self.0.forks.borrow().clone()
    }

    /// Another that goes on from this one's snapshot: those whose id ends in -1 end cleanly as soon as they run, those in -2 crash.
    fn fork(&self, id: &str) -> Machine {
        let crash = || Exit::crashed(&Failure::new(GuestError::VcpuRuntimeFailure, "VP 0: triple fault"));
        let fate = match id.rsplit_once('-') {
            Some((_, "1")) => Some(Exit::clean("powered off")),
            Some((_, "2")) => Some(crash()),
            _ => None,
        };
        let fork = Machine::with(Some(Fork { fate }));
        self.0.forks.borrow_mut().push(fork.clone());
        fork
    }

    /// Resolves when the lease has ended.
    pub async fn lease_ended(&self) {
        self.ended().await;
    }

    fn saw(&self, call: &'static str) {
        self.0.log.borrow_mut().push(call);
    }

    fn not_created(&self) -> Option<Failure> {
        let cause = self.0.created.borrow().as_ref().err().cloned()?;
        Some(Failure::new(GuestError::NotCreated, "there is no guest").caused_by(cause))
    }

    /// Ends the guest.
    pub fn end(&self, exit: Exit) {
        self.0.outputs.borrow_mut().clear();
        self.0.phase.send_replace((Phase::Terminated, Some(exit)));
    }

    async fn ended(&self) -> Exit {
        let mut phase = self.0.phase.subscribe();
        let ended = phase.wait_for(|(_, exit)| exit.is_some()).await.expect("the sender is in self");
        ended.1.clone().expect("waited for")
    }

    /// Serves this machine's lifecycle as the bootstrap of a channel, which is its lease.
    pub fn serve(&self, stream: UnixStream) {
        let machine = self.clone();
        let connection = Connection::server(stream, Limits::default(), |descriptors| {
            let files = Some(descriptors.clone());
            let client: guest_lifecycle::Client = capnp_rpc::new_client(Lifecycle::new(machine, files));
            client.client
        });
        let machine = self.clone();
        spawn_local(async move {
            let _ = connection.expect("a socket").run().await;
            machine.end(Exit::forced("the lease ended"));
        });
    }
}

/// The lifecycle: with descriptors on its own channel, without when proxied, and then the lease is the object.
struct Lifecycle {
    machine: Machine,
    files: Option<Descriptors>,
    // Held while a call takes effect, so that those behind it queue in their order.
    turn: tokio::sync::Mutex<()>,
}

impl Drop for Lifecycle {
    fn drop(&mut self) {
        self.machine.end(Exit::forced("the lifecycle was dropped"));
    }
}

impl Lifecycle {
    fn new(machine: Machine, files: Option<Descriptors>) -> Self {
        Self { machine, files, turn: tokio::sync::Mutex::default() }
    }

    async fn kernel(&self, source: Option<FileSource>) -> capnp::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match source {
            None => {}
            Some(FileSource::Descriptor(number)) => {
                let files = self.files.as_ref().expect("a channel with descriptors");
                let mut file = std::fs::File::from(files.take(number).expect("handed over"));
                file.rewind()?;
                file.read_to_end(&mut bytes)?;
            }
            Some(FileSource::File(file)) => {
                let size = file.size_request().send().promise.await?.get()?.get_bytes();
                while (bytes.len() as u64) < size {
                    let mut request = file.read_request();
                    request.get().set_offset(bytes.len() as u64);
                    request.get().set_count(u32::MAX);
                    bytes.extend(request.send().promise.await?.get()?.get_bytes()?);
                }
            }
        }
        Ok(bytes)
    }
}

impl guest_lifecycle::Server for Lifecycle {
    async fn create(
        self: Rc<Self>,
        params: guest_lifecycle::CreateParams,
        mut results: guest_lifecycle::CreateResults,
    ) -> capnp::Result<()> {
        let _turn = self.turn.lock().await;
        self.machine.saw("create");
        let config = GuestConfig::read(params.get()?.get_config()?)?.config;
        let disks = config.devices.block.len();
        let created = if self.machine.0.fork.is_some() && (config.kernel.is_some() || disks != DISKS.len()) {
            Err(Failure::new(GuestError::BadConfig, format!("{disks} disks are not the snapshot's")))
        } else if config.cpus == 0 {
            Err(Failure::new(GuestError::BadConfig, "cpus: 0 is not 1 to 254"))
        } else {
            Ok(self.kernel(config.kernel).await?)
        };
        let answer = created.as_ref().map(|_| ()).map_err(Clone::clone);
        *self.machine.0.created.borrow_mut() = created;
        Failure::write_result(&answer, results.get().init_result());
        Ok(())
    }

    async fn bind(
        self: Rc<Self>,
        _: guest_lifecycle::BindParams,
        mut results: guest_lifecycle::BindResults,
    ) -> capnp::Result<()> {
        let _turn = self.turn.lock().await;
        self.machine.saw("bind");
        match self.machine.not_created() {
            None => results.get().set_guest(capnp_rpc::new_client(Guest(self.machine.clone()))),
            Some(failure) => {
                results.get().set_guest(broken(&failure));
                failure.write(results.get().init_error());
            }
        }
        Ok(())
    }

    async fn run(
        self: Rc<Self>,
        _: guest_lifecycle::RunParams,
        mut results: guest_lifecycle::RunResults,
    ) -> capnp::Result<()> {
        let turn = self.turn.lock().await;
        self.machine.saw("run");
        let answer = match self.machine.not_created() {
            Some(failure) => Err(failure),
            None => {
                self.machine.0.phase.send_replace((Phase::Running, None));
                drop(turn);
                if let Some(Fork { fate: Some(fate) }) = &self.machine.0.fork {
                    self.machine.end(fate.clone());
                }
                self.machine.ended().await.failure().map_or(Ok(()), Err)
            }
        };
        Failure::write_result(&answer, results.get().init_result());
        Ok(())
    }

    async fn stop(
        self: Rc<Self>,
        _: guest_lifecycle::StopParams,
        mut results: guest_lifecycle::StopResults,
    ) -> capnp::Result<()> {
        self.machine.saw("stop");
        self.machine.end(Exit::forced("stopped"));
        Failure::write_result(&Ok(()), results.get().init_result());
        Ok(())
    }

    async fn control(
        self: Rc<Self>,
        _: guest_lifecycle::ControlParams,
        mut results: guest_lifecycle::ControlResults,
    ) -> capnp::Result<()> {
        let _turn = self.turn.lock().await;
        self.machine.saw("control");
        match self.machine.not_created() {
            None => results.get().set_control(capnp_rpc::new_client(Control(self.machine.clone()))),
            Some(failure) => {
                results.get().set_control(broken(&failure));
                failure.write(results.get().init_error());
            }
        }
        Ok(())
    }
}

struct Guest(Machine);

impl Guest {
    /// A port that prints what the guest was created of, and then what it is sent.
    fn open(&self, output: Option<output_sink::Client>) -> byte_stream::Client {
        if let Some(output) = output {
            let text = self.0.0.created.borrow().clone().expect("a bound guest was created");
            self.0.0.outputs.borrow_mut().push(output.clone());
            spawn_local(async move {
                for part in text.chunks(64 << 10) {
                    if print(&output, part).await.is_err() {
                        return;
                    }
                }
            });
        }
        capnp_rpc::new_client(Input(self.0.clone()))
    }
}

impl guest::Server for Guest {
    async fn get_serial(
        self: Rc<Self>,
        params: guest::GetSerialParams,
        mut results: guest::GetSerialResults,
    ) -> capnp::Result<()> {
        self.0.saw("getSerial");
        let params = params.get()?;
        results.get().set_input(self.open(params.has_output().then(|| params.get_output()).transpose()?));
        Ok(())
    }

    async fn get_console(
        self: Rc<Self>,
        params: guest::GetConsoleParams,
        mut results: guest::GetConsoleResults,
    ) -> capnp::Result<()> {
        self.0.saw("getConsole");
        let params = params.get()?;
        results.get().set_input(self.open(params.has_output().then(|| params.get_output()).transpose()?));
        Ok(())
    }

    /// Prints the size.
    async fn resize_console(
        self: Rc<Self>,
        params: guest::ResizeConsoleParams,
        mut results: guest::ResizeConsoleResults,
    ) -> capnp::Result<()> {
        self.0.saw("resizeConsole");
        let params = params.get()?;
        let size = format!("{}x{}\n", params.get_columns(), params.get_rows());
        let outputs = self.0.0.outputs.borrow().clone();
        for output in outputs {
            print(&output, size.as_bytes()).await?;
        }
        Failure::write_result(&Ok(()), results.get().init_result());
        Ok(())
    }

    async fn observer(
        self: Rc<Self>,
        _: guest::ObserverParams,
        mut results: guest::ObserverResults,
    ) -> capnp::Result<()> {
        results.get().set_observer(capnp_rpc::new_client(Observer(self.0.clone())));
        Ok(())
    }

    async fn when_terminated(
        self: Rc<Self>,
        _: guest::WhenTerminatedParams,
        mut results: guest::WhenTerminatedResults,
    ) -> capnp::Result<()> {
        self.0.ended().await.write(results.get().init_exit());
        Ok(())
    }
}

fn print(output: &output_sink::Client, bytes: &[u8]) -> Promise<(), capnp::Error> {
    let mut request = output.write_request();
    request.get().set_bytes(bytes);
    request.send()
}

struct Input(Machine);

impl byte_stream::Server for Input {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> capnp::Result<()> {
        let bytes = params.get()?.get_bytes()?;
        let outputs = self.0.0.outputs.borrow().clone();
        for output in &outputs {
            print(output, bytes).await?;
        }
        if bytes.starts_with(b"poweroff") {
            self.0.end(Exit::clean("powered off"));
        }
        if bytes.starts_with(b"crash") {
            self.0.end(Exit::crashed(&Failure::new(GuestError::VcpuRuntimeFailure, "VP 0: triple fault")));
        }
        Ok(())
    }

    async fn end(self: Rc<Self>, _: byte_stream::EndParams, _: byte_stream::EndResults) -> capnp::Result<()> {
        self.0.saw("end");
        Ok(())
    }
}

struct Control(Machine);

impl guest_control::Server for Control {
    async fn pause(
        self: Rc<Self>,
        _: guest_control::PauseParams,
        mut results: guest_control::PauseResults,
    ) -> capnp::Result<()> {
        let failure = Failure::new(GuestError::NotRunning, "the guest is created, not running");
        Failure::write_result(&Err(failure), results.get().init_result());
        Ok(())
    }

    async fn update(
        self: Rc<Self>,
        params: guest_control::UpdateParams,
        mut results: guest_control::UpdateResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let updated = updated(params.get_path()?.to_str()?, params.get_value()?.to_str()?);
        if let Ok(value) = &updated {
            results.get().set_value(&value[..]);
        }
        Failure::write_result(&updated.map(drop), results.get().init_result());
        Ok(())
    }

    async fn nmi(
        self: Rc<Self>,
        _: guest_control::NmiParams,
        mut results: guest_control::NmiResults,
    ) -> capnp::Result<()> {
        let failure = Failure::new(GuestError::NotRunning, "the guest does not run");
        Failure::write_result(&Err(failure), results.get().init_result());
        Ok(())
    }

    /// Its capability is none that launches.
    async fn snapshot(
        self: Rc<Self>,
        _: guest_control::SnapshotParams,
        mut results: guest_control::SnapshotResults,
    ) -> capnp::Result<()> {
        self.0.saw("snapshot");
        if self.0.0.phase.borrow().0 == Phase::Terminated {
            let failure = Failure::new(GuestError::NotRunning, "the guest has ended");
            failure.write(results.get().init_error());
            return Ok(());
        }
        results.get().set_token(TOKEN);
        results.get().set_snapshot(capnp_rpc::new_client(Snapshot(self.0.clone(), None)));
        Ok(())
    }

    async fn dump(
        self: Rc<Self>,
        _: guest_control::DumpParams,
        mut results: guest_control::DumpResults,
    ) -> capnp::Result<()> {
        results.get().set_core(capnp_rpc::new_client(Core));
        Ok(())
    }

    async fn observer(
        self: Rc<Self>,
        _: guest_control::ObserverParams,
        mut results: guest_control::ObserverResults,
    ) -> capnp::Result<()> {
        results.get().set_observer(capnp_rpc::new_client(Observer(self.0.clone())));
        Ok(())
    }
}

/// The size of the core dump: neither a multiple of what is read at a time nor of a page.
pub const CORE_BYTES: u64 = (3 << 20) + 77;

/// A byte of the core dump: most of it is zeros.
pub fn core_byte(offset: u64) -> u8 {
    if offset.is_multiple_of(1_000_003) || offset + 1 == CORE_BYTES { 0x5a } else { 0 }
}

/// A core dump.
struct Core;

impl file::Server for Core {
    async fn size(self: Rc<Self>, _: file::SizeParams, mut results: file::SizeResults) -> capnp::Result<()> {
        results.get().set_bytes(CORE_BYTES);
        Ok(())
    }

    async fn read(
        self: Rc<Self>,
        params: file::ReadParams,
        mut results: file::ReadResults,
    ) -> capnp::Result<()> {
        let (offset, count) = (params.get()?.get_offset(), u64::from(params.get()?.get_count()));
        let bytes: Vec<u8> = (offset..CORE_BYTES.min(offset + count)).map(core_byte).collect();
        results.get().set_bytes(&bytes);
        Ok(())
    }
}

/// What there is to be updated: the node `greeting`, in upper case.
fn updated(path: &str, value: &str) -> Result<String, Failure> {
    match path {
        "greeting" => Ok(value.to_uppercase()),
        _ => Err(Failure::new(GuestError::BadConfig, format!("path: there is no node {path:?}"))),
    }
}

struct Observer(Machine);

impl observer::Server for Observer {
    async fn state(
        self: Rc<Self>,
        _: observer::StateParams,
        mut results: observer::StateResults,
    ) -> capnp::Result<()> {
        let phase = self.0.0.phase.borrow().0;
        let vps = vec![VpState::Halted];
        GuestState { phase, vps, units: Vec::new(), uptime_us: 7, resets: 1 }
            .write(results.get().init_state());
        Ok(())
    }
}

struct ExitOf(Machine);

impl guest_exit::Server for ExitOf {
    async fn when_terminated(
        self: Rc<Self>,
        _: guest_exit::WhenTerminatedParams,
        mut results: guest_exit::WhenTerminatedResults,
    ) -> capnp::Result<()> {
        self.0.ended().await.write(results.get().init_exit());
        Ok(())
    }
}

/// The service: one machine, whatever is launched. The id `taken` is taken.
pub struct HostServer {
    pub machine: Machine,
    descriptors: Descriptors,
}

impl HostServer {
    /// Serves the host on a new socket pair and returns the client's end.
    pub fn start(machine: &Machine) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        Self::serve(machine, ours);
        theirs
    }

    /// Serves the host to one client.
    pub fn serve(machine: &Machine, stream: UnixStream) {
        let machine = machine.clone();
        let connection = Connection::server(stream, Limits::default(), |descriptors| {
            let server = Self { machine, descriptors: descriptors.clone() };
            let client: guest_host::Client = capnp_rpc::new_client(server);
            client.client
        });
        spawn_local(connection.expect("a socket").run());
    }
}

fn refusal(id: &str) -> Option<Failure> {
    (id == "taken").then(|| Failure::new(GuestError::BadConfig, "id: \"taken\" is taken"))
}

impl guest_host::Server for HostServer {
    async fn launch(
        self: Rc<Self>,
        params: guest_host::LaunchParams,
        mut results: guest_host::LaunchResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let id = params.get_id()?.to_str()?;
        let end = self.descriptors.take(params.get_server_end()).expect("handed over");
        if let Some(failure) = refusal(id) {
            results.get().set_exit(broken(&failure));
            failure.write(results.get().init_error());
            return Ok(());
        }
        self.machine.serve(end.into());
        results.get().set_id(id);
        results.get().set_exit(capnp_rpc::new_client(ExitOf(self.machine.clone())));
        Ok(())
    }

    async fn launch_proxied(
        self: Rc<Self>,
        params: guest_host::LaunchProxiedParams,
        mut results: guest_host::LaunchProxiedResults,
    ) -> capnp::Result<()> {
        let lifecycle = Lifecycle::new(self.machine.clone(), None);
        results.get().set_id(params.get()?.get_id()?);
        results.get().set_lifecycle(capnp_rpc::new_client(lifecycle));
        results.get().set_exit(capnp_rpc::new_client(ExitOf(self.machine.clone())));
        Ok(())
    }

    async fn find(
        self: Rc<Self>,
        params: guest_host::FindParams,
        mut results: guest_host::FindResults,
    ) -> capnp::Result<()> {
        let id = params.get()?.get_id()?.to_str()?;
        if !"one".starts_with(id) {
            let failure = Failure::new(GuestError::BadConfig, format!("id: there is no guest {id:?}"));
            failure.write(results.get().init_error());
            return Ok(());
        }
        let mut results = results.get();
        results.set_id("one");
        results.set_control(capnp_rpc::new_client(Control(self.machine.clone())));
        results.set_observer(capnp_rpc::new_client(Observer(self.machine.clone())));
        results.set_exit(capnp_rpc::new_client(ExitOf(self.machine.clone())));
        Ok(())
    }

    async fn snapshot(
        self: Rc<Self>,
        params: guest_host::SnapshotParams,
        mut results: guest_host::SnapshotResults,
    ) -> capnp::Result<()> {
        if params.get()?.get_token()? != TOKEN {
            let failure = Failure::new(GuestError::BadConfig, "token: no snapshot has it");
            failure.write(results.get().init_error());
            return Ok(());
        }
        let found = Snapshot(self.machine.clone(), Some(self.descriptors.clone()));
        results.get().set_snapshot(capnp_rpc::new_client(found));
        Ok(())
    }

    async fn list(
        self: Rc<Self>,
        _: guest_host::ListParams,
        mut results: guest_host::ListResults,
    ) -> capnp::Result<()> {
        let mut guest = results.get().init_guests(1).get(0);
        guest.set_id("one");
        guest.set_phase(self.machine.0.phase.borrow().0.into());
        guest.set_vps(2);
        guest.set_pid(4711);
        Ok(())
    }
}
