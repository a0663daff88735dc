//! Units in real processes: each is this binary again, serving a `StateUnit` on its standard input, and some are killed in the
//! middle of what they are asked.

use capnp_rpc::rpc_twoparty_capnp::Side;
use guest_schema::config_capnp::state_unit as served;
use guest_schema::{Failure, GuestError};
use guest_transport::{Connection, Limits};
use inspect::{Inspection, Node};
use libtest_mimic::{Arguments, Trial};
use remote_unit::{RemoteUnit, RemoteUnitOptions, WhenLost};
use save_restore::SavedStateBlob;
use state_unit::{
    SaveSupport, SavedStateUnit, SetState, StateTransitionError, StateUnit, StateUnits, TransitionRecord,
    UnitHandle, UnitOutcome, run_unit,
};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode, Stdio};
use std::rc::Rc;
use std::time::Duration;

/// Set, it makes this binary serve a unit; its value names the operation that never ends, if any.
const SERVE: &str = "REMOTE_UNIT_SERVES";
const PATIENCE: Duration = Duration::from_secs(30);
const TYPE: &str = "tests.Count";
const REFUSED: &str = "refused";

fn main() -> ExitCode {
    if let Ok(hangs) = std::env::var(SERVE) {
        on_a_thread_of_its_own(serve(hangs));
        return ExitCode::SUCCESS;
    }
    let mut trials = vec![
        test("a_life", || on_a_thread_of_its_own(a_life())),
        test("a_refusal_is_the_cause", || on_a_thread_of_its_own(a_refusal_is_the_cause())),
        test("a_late_unit_fails_the_transition", || {
            on_a_thread_of_its_own(a_late_unit_fails_the_transition())
        }),
        test("a_dropped_unit_leaves_the_graph", || on_a_thread_of_its_own(a_dropped_unit_leaves_the_graph())),
    ];
    for operation in OPERATIONS {
        for when_lost in [WhenLost::Fault, WhenLost::Evict] {
            let name = format!("killed_in::{operation}::{when_lost:?}").to_lowercase();
            trials.push(test(&name, move || on_a_thread_of_its_own(killed_in(operation, when_lost))));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

const OPERATIONS: [&str; 6] = ["start", "stop", "reset", "save", "restore", "post-restore"];

fn test(name: &str, body: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        body();
        Ok(())
    })
}

fn on_a_thread_of_its_own(story: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, story);
}

/// The unit of the other process: counts its starts, and hangs in one operation.
struct Counter {
    starts: Cell<u64>,
    hangs: String,
}

impl Counter {
    async fn asked(&self, operation: &str) -> Result<(), Failure> {
        if self.hangs == operation {
            std::future::pending::<()>().await;
        }
        if self.hangs == REFUSED {
            return Err(Failure::new(GuestError::InternalError, format!("no {operation} today")));
        }
        Ok(())
    }
}

macro_rules! serves {
    ($($method:ident($params:ident, $results:ident) = $operation:literal;)*) => {$(
        async fn $method(self: Rc<Self>, _: served::$params, mut results: served::$results) -> capnp::Result<()> {
            let done = self.asked($operation).await;
            if done.is_ok() && $operation == "start" {
                self.starts.set(self.starts.get() + 1);
            }
            Failure::write_result(&done, results.get().init_result());
            Ok(())
        }
    )*};
}

impl served::Server for Counter {
    serves! {
        start(StartParams, StartResults) = "start";
        stop(StopParams, StopResults) = "stop";
        reset(ResetParams, ResetResults) = "reset";
        post_restore(PostRestoreParams, PostRestoreResults) = "post-restore";
    }

    async fn save(
        self: Rc<Self>,
        _: served::SaveParams,
        mut results: served::SaveResults,
    ) -> capnp::Result<()> {
        let done = self.asked("save").await;
        let mut results = results.get();
        results.set_type_name(TYPE);
        results.set_state(&self.starts.get().to_le_bytes());
        Failure::write_result(&done, results.init_result());
        Ok(())
    }

    async fn restore(
        self: Rc<Self>,
        params: served::RestoreParams,
        mut results: served::RestoreResults,
    ) -> capnp::Result<()> {
        let done = self.asked("restore").await;
        let params = params.get()?;
        assert_eq!(params.get_type_name()?.to_str()?, TYPE);
        let state = params.get_state()?.try_into().expect("eight bytes");
        self.starts.set(u64::from_le_bytes(state));
        Failure::write_result(&done, results.get().init_result());
        Ok(())
    }

    async fn inspect(
        self: Rc<Self>,
        _: served::InspectParams,
        mut results: served::InspectResults,
    ) -> capnp::Result<()> {
        let shown = format!(
            r#"{{"starts":{},"name":"counter","nested":{{"low":-5,"list":[true]}}}}"#,
            self.starts.get()
        );
        results.get().set_json(&shown[..]);
        Ok(())
    }
}

async fn serve(hangs: String) {
    let socket: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().expect("a standard input");
    let connection = Connection::server(socket.into(), Limits::default(), |_| {
        let client: served::Client = capnp_rpc::new_client(Counter { starts: Cell::new(0), hangs });
        client.client
    });
    // The end of the tests' end is this process's end.
    let _ = connection.expect("a socket").run().await;
}

/// A unit's process.
struct Peer {
    child: Child,
    client: served::Client,
}

impl Peer {
    fn start(hangs: &str) -> Self {
        let (here, there) = UnixStream::pair().expect("a pair");
        let child = Command::new(std::env::current_exe().expect("this binary"))
            .env(SERVE, hangs)
            .stdin(Stdio::from(OwnedFd::from(there)))
            .spawn()
            .expect("started");
        let mut connection = Connection::client(here, Limits::of_client()).expect("a socket");
        let client = connection.bootstrap(Side::Server);
        tokio::task::spawn_local(connection.run());
        Self { child, client }
    }

    fn kill(&mut self) {
        self.child.kill().expect("it runs");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may be dead already; waited for, it leaves no zombie.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A unit of this process, which notes what it was asked.
struct Noting(&'static str, Rc<RefCell<Vec<String>>>);

impl Noting {
    fn note(&self, operation: &str) {
        self.1.borrow_mut().push(format!("{} {operation}", self.0));
    }
}

impl inspect::InspectMut for Noting {
    fn inspect_mut(&mut self, request: inspect::Request<'_>) {
        request.respond();
    }
}

impl StateUnit for Noting {
    async fn start(&mut self) -> Result<(), state_unit::UnitError> {
        self.note("start");
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), state_unit::UnitError> {
        self.note("stop");
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), state_unit::UnitError> {
        self.note("reset");
        Ok(())
    }

    fn can_save(&mut self) -> SaveSupport {
        SaveSupport::Stateless
    }

    async fn save(&mut self) -> Result<Option<SavedStateBlob>, save_restore::SaveError> {
        Ok(None)
    }

    async fn restore(&mut self, _: SavedStateBlob) -> Result<(), save_restore::RestoreError> {
        Ok(())
    }
}

/// `below ← remote ← above`: the remote unit in the middle of a graph.
struct Stage {
    units: StateUnits,
    peer: Peer,
    remote: RemoteUnit,
    notes: Rc<RefCell<Vec<String>>>,
    _handles: [UnitHandle; 2],
}

impl Stage {
    fn set(hangs: &str, options: RemoteUnitOptions) -> Self {
        let (units, notes) = (StateUnits::new(), Rc::new(RefCell::new(Vec::new())));
        let (below, requests) = units.add("below").build().expect("a free name");
        tokio::task::spawn_local(run_unit(Noting("below", notes.clone()), requests));
        let (above, requests) = units.add("above").build().expect("a free name");
        tokio::task::spawn_local(run_unit(Noting("above", notes.clone()), requests));
        let peer = Peer::start(hangs);
        let builder = units.add("remote").depends_on(&below).dependency_of(&above);
        let remote = RemoteUnit::join(builder, peer.client.clone(), options).expect("no cycle");
        Self { units, peer, remote, notes, _handles: [below, above] }
    }

    fn saving(hangs: &str, when_lost: WhenLost) -> Self {
        Self::set(hangs, RemoteUnitOptions { deadline: PATIENCE, when_lost, saves: SaveSupport::Saves })
    }

    async fn perform(&self, operation: &str) -> Result<(), StateTransitionError> {
        match operation {
            "start" => self.units.start().await,
            "stop" => self.units.stop().await,
            "reset" => self.units.reset().await,
            "save" => self.units.save().await.map(drop),
            _ => self.units.restore(count(3)).await,
        }
    }

    /// Waits until the remote unit has taken up what it does not answer.
    async fn is_asked(&self, operation: &str) {
        let taken_up = |record: &TransitionRecord| {
            let remote = record.units.iter().find(|unit| &*unit.name == "remote");
            let asked = remote.is_some_and(|unit| unit.begun.is_some() && unit.outcome == UnitOutcome::Asked);
            asked && record.operation.to_string() == operation
        };
        let asked = async {
            while !self.units.timeline().last().is_some_and(taken_up) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, asked).await.expect("it is asked");
    }

    fn names(&self) -> Vec<String> {
        self.units.graph().iter().map(|unit| unit.name.to_string()).collect()
    }

    async fn shown(&self, path: &str) -> Node {
        let inspector = self.units.inspector();
        let inspection = Inspection::start(path, 8, inspect::View::Everything, |request| {
            inspect::Inspect::inspect(&inspector, request)
        });
        inspection.finish(PATIENCE).await
    }
}

fn count(starts: u64) -> Vec<SavedStateUnit> {
    let state = SavedStateBlob::from_parts(TYPE, starts.to_le_bytes());
    vec![SavedStateUnit { name: "remote".into(), state: Some(state) }]
}

fn units_of(error: StateTransitionError) -> String {
    let StateTransitionError::Units(failures) = error else { panic!("{error}") };
    let failed: Vec<String> = failures.failed.iter().map(ToString::to_string).collect();
    failed.join("; ")
}

async fn a_life() {
    let stage = Stage::saving("", WhenLost::Fault);
    stage.units.start().await.expect("started");
    assert_eq!(*stage.notes.borrow(), ["below start", "above start"]);
    assert_eq!(stage.shown("units/remote/unit/starts").await.to_string(), "1\n");
    assert_eq!(stage.shown("units/remote/unit/nested/low").await.to_string(), "-5\n");
    assert_eq!(stage.shown("units/remote/unit/nested/list/0").await.to_string(), "true\n");
    stage.units.stop().await.expect("stopped");
    let saved = stage.units.save().await.expect("saved");
    let blob = saved[0].state.as_ref().expect("a state");
    assert_eq!(
        (&saved[0].name[..], blob.type_name(), blob.value()),
        ("remote", TYPE, &1u64.to_le_bytes()[..])
    );
    stage.units.restore(count(41)).await.expect("restored");
    stage.units.start().await.expect("started again");
    assert_eq!(stage.shown("units/remote/unit/starts").await.to_string(), "42\n");
    stage.units.stop().await.expect("stopped");
    stage.units.reset().await.expect("reset");
}

async fn a_refusal_is_the_cause() {
    let stage = Stage::saving(REFUSED, WhenLost::Evict);
    let said = units_of(stage.units.start().await.expect_err("refused"));
    assert!(said.contains("remote failed: the remote unit refused to start"), "{said}");
    assert_eq!(*stage.notes.borrow(), ["below start", "below stop"]);
    assert!(!stage.remote.is_evicted(), "a refusal is no loss");
    assert_eq!(stage.units.state(), SetState::Stopped);
}

async fn a_late_unit_fails_the_transition() {
    let deadline = Duration::from_millis(50);
    let stage = Stage::set("start", RemoteUnitOptions { deadline, ..RemoteUnitOptions::default() });
    let said = units_of(stage.units.start().await.expect_err("late"));
    assert!(said.contains("did not start within 50ms"), "{said}");
    let stage = Stage::set(
        "start",
        RemoteUnitOptions { deadline, when_lost: WhenLost::Evict, ..RemoteUnitOptions::default() },
    );
    stage.units.start().await.expect("without it");
    assert_eq!(stage.names(), ["below", "above"]);
}

async fn a_dropped_unit_leaves_the_graph() {
    let stage = Stage::saving("", WhenLost::Fault);
    let Stage { units, remote, .. } = &stage;
    units.start().await.expect("started");
    assert!(!remote.is_evicted());
    let Stage { units, remote, _handles, .. } = stage;
    drop(remote);
    let names: Vec<_> = units.graph().iter().map(|unit| unit.name.to_string()).collect();
    assert_eq!(names, ["below", "above"]);
    units.stop().await.expect("stopped");
}

async fn killed_in(operation: &str, when_lost: WhenLost) {
    let mut stage = Stage::saving(operation, when_lost);
    if operation == "stop" {
        stage.units.start().await.expect("started");
    }
    let mut peer = std::mem::replace(&mut stage.peer, Peer::start(""));
    let kill = async {
        stage.is_asked(operation).await;
        peer.kill();
    };
    let (result, ()) = tokio::join!(stage.perform(operation), kill);
    // The state that it was to take is lost with it.
    let evicted = when_lost == WhenLost::Evict && operation != "restore";
    assert_eq!(stage.remote.is_evicted(), evicted);
    if evicted {
        result.expect("it goes on without the unit");
        assert_eq!(stage.names(), ["below", "above"]);
        stage.units.stop().await.expect("stopped");
        stage.units.start().await.expect("the rest goes on");
    } else {
        let said = units_of(result.expect_err("lost"));
        assert!(said.contains("remote failed: ") && said.contains("the remote unit was lost when"), "{said}");
        let faulted = matches!(operation, "stop" | "reset" | "restore" | "post-restore");
        let end = if faulted { SetState::Faulted } else { SetState::Stopped };
        assert_eq!(stage.units.state(), end);
    }
}
