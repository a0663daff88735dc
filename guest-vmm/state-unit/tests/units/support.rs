//! A scripted unit and the log that all units of a test write to.

use inspect::{InspectMut, Request};
use save_restore::{RestoreError, SaveError, SavedStateBlob, saved_state_root};
use state_unit::{
    RequestReceiver, SaveSupport, SpawnedUnit, StateUnit, StateUnits, UnitError, UnitHandle, run_unit,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;

/// What a unit does when it is asked for an operation.
#[derive(Debug, Clone)]
pub enum Script {
    Fail(&'static str),
    Panic,
    /// Answers only once this is notified.
    WaitFor(Arc<Notify>),
    /// Never answers.
    Hang,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CounterState {
    #[prost(uint64, tag = "1")]
    pub count: u64,
}

saved_state_root!(CounterState, package = "state_unit.tests");

/// What happened, in order: `name operation` as a unit begins, `name operation!` as it ends well.
pub type Log = Arc<Mutex<Vec<String>>>;

#[derive(Debug)]
pub struct TestUnit {
    pub name: String,
    pub log: Log,
    pub scripts: HashMap<&'static str, Script>,
    /// How long it takes before it follows the script.
    pub delays: HashMap<&'static str, Duration>,
    pub support: SaveSupport,
    pub count: u64,
}

impl TestUnit {
    pub fn new(name: &str, log: &Log) -> Self {
        Self {
            name: name.to_owned(),
            log: log.clone(),
            scripts: HashMap::new(),
            delays: HashMap::new(),
            support: SaveSupport::Saves,
            count: 1,
        }
    }

    pub fn on(mut self, operation: &'static str, script: Script) -> Self {
        self.scripts.insert(operation, script);
        self
    }

    pub fn stateless(mut self) -> Self {
        self.support = SaveSupport::Stateless;
        self
    }

    fn note(&self, text: &str) {
        self.log.lock().unwrap().push(format!("{} {text}", self.name));
    }

    async fn act(&self, operation: &'static str) -> Result<(), UnitError> {
        self.note(operation);
        tracing::info!("{} does {operation}", self.name);
        if let Some(delay) = self.delays.get(operation) {
            tokio::time::sleep(*delay).await;
        }
        match self.scripts.get(operation) {
            None => tokio::task::yield_now().await,
            Some(Script::Fail(reason)) => return Err((*reason).into()),
            Some(Script::Panic) => panic!("{} cannot {operation}", self.name),
            Some(Script::WaitFor(notify)) => notify.notified().await,
            Some(Script::Hang) => std::future::pending().await,
        }
        self.note(&format!("{operation}!"));
        Ok(())
    }
}

impl InspectMut for TestUnit {
    fn inspect_mut(&mut self, request: Request<'_>) {
        let count = self.count;
        let write = |new| match new {
            0..1000 => {
                self.count = new;
                Ok(new)
            }
            _ => Err("a test counts to 999"),
        };
        request.respond().writable("count", || count, write);
    }
}

impl StateUnit for TestUnit {
    async fn start(&mut self) -> Result<(), UnitError> {
        self.act("start").await
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        self.act("stop").await
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        self.count = 0;
        self.act("reset").await
    }

    fn can_save(&mut self) -> SaveSupport {
        self.support.clone()
    }

    async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError> {
        self.act("save").await.map_err(SaveError::other)?;
        let saves = self.support == SaveSupport::Saves;
        Ok(saves.then(|| SavedStateBlob::new(&CounterState { count: self.count })))
    }

    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        self.count = state.parse::<CounterState>()?.count;
        self.act("restore").await.map_err(RestoreError::other)
    }

    async fn post_restore(&mut self) -> Result<(), UnitError> {
        self.act("post-restore").await
    }
}

/// A set and its log.
pub struct Machine {
    pub units: StateUnits,
    pub log: Log,
}

impl Machine {
    pub fn new() -> Self {
        Self { units: StateUnits::new(), log: Log::default() }
    }

    pub fn unit(&self, name: &str) -> TestUnit {
        TestUnit::new(name, &self.log)
    }

    /// Adds a unit that depends on `needs`.
    pub fn add(&self, unit: TestUnit, needs: &[&SpawnedUnit<TestUnit>]) -> SpawnedUnit<TestUnit> {
        let needs: Vec<&UnitHandle> = needs.iter().map(|unit| unit.handle()).collect();
        self.spawn(unit, &needs)
    }

    pub fn spawn(&self, unit: TestUnit, needs: &[&UnitHandle]) -> SpawnedUnit<TestUnit> {
        let builder = self.units.add(unit.name.as_str());
        let builder = needs.iter().fold(builder, |builder, other| builder.depends_on(other));
        builder.spawn(|requests: RequestReceiver| run_unit(unit, requests)).unwrap()
    }

    /// What has happened since the last look.
    pub fn happened(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}
