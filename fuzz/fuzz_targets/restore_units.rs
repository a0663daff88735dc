//! Any list of entries, restored into a small set of units.
//!
//! Holds to: entries that do not fit the units leave everything as it was; a unit that refuses its state leaves the set
//! faulted; and after a restore that succeeds the units save what they were given.

#![no_main]

use std::cell::LazyCell;

use arbitrary::Arbitrary;
use guest_saved_state::devices::ioapic::IoApicState;
use guest_saved_state::devices::rtc::RtcState;
use guest_saved_state::devices::serial::SerialPortState;
use inspect::{Inspect, Request};
use libfuzzer_sys::fuzz_target;
use save_restore::{RestoreError, SaveError, SavedStateBlob, SavedStateRoot};
use state_unit::{SaveSupport, SavedStateUnit, SetState, StateTransitionError, StateUnit, StateUnits};
use state_unit::{UnitError, run_unit};
use tokio::runtime::{Builder, Runtime};

/// A name, most often one of the set's.
#[derive(Arbitrary, Debug)]
enum Name {
    IoApic,
    Serial,
    Rtc,
    Other(String),
}

/// A state, most often one that its unit could take.
#[derive(Arbitrary, Debug)]
enum State {
    IoApic { select: u32, entries: Vec<u64> },
    Serial { divisor: u32, pending: u32 },
    Rtc { index: u32, ram: Vec<u8>, offset_seconds: i64 },
    Other { type_name: String, value: Vec<u8> },
}

#[derive(Arbitrary, Debug)]
struct Entry {
    name: Name,
    state: Option<State>,
}

impl From<Entry> for SavedStateUnit {
    fn from(Entry { name, state }: Entry) -> Self {
        let name = match name {
            Name::IoApic => "ioapic".to_owned(),
            Name::Serial => "serial".to_owned(),
            Name::Rtc => "rtc".to_owned(),
            Name::Other(name) => name,
        };
        Self { name, state: state.map(blob) }
    }
}

fn blob(state: State) -> SavedStateBlob {
    match state {
        State::IoApic { select, entries } => {
            SavedStateBlob::new(&IoApicState { select, entries, ..IoApicState::default() })
        }
        State::Serial { divisor, pending } => SavedStateBlob::new(&SerialPortState {
            divisor,
            line_status: pending,
            ..SerialPortState::default()
        }),
        State::Rtc { index, ram, offset_seconds } => {
            SavedStateBlob::new(&RtcState { index, ram, offset_seconds, ..RtcState::default() })
        }
        State::Other { type_name, value } => SavedStateBlob::from_parts(type_name, value),
    }
}

/// A unit that takes every state of its type, and gives it back.
#[derive(Default)]
struct Keeper<T>(T);

impl<T> Inspect for Keeper<T> {
    fn inspect(&self, _: Request<'_>) {}
}

impl<T: SavedStateRoot + Clone> StateUnit for Keeper<T> {
    async fn start(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        self.0 = T::default();
        Ok(())
    }

    fn can_save(&mut self) -> SaveSupport {
        SaveSupport::Saves
    }

    async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError> {
        Ok(Some(SavedStateBlob::new(&self.0)))
    }

    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        self.0 = state.parse()?;
        Ok(())
    }
}

/// ioapic, and two units that depend on it.
fn set() -> StateUnits {
    let units = StateUnits::new();
    let ioapic = units.add("ioapic").spawn(|requests| run_unit(Keeper::<IoApicState>::default(), requests));
    let ioapic = ioapic.expect("a new name");
    let serial = units.add("serial").depends_on(ioapic.handle());
    let serial = serial.spawn(|requests| run_unit(Keeper::<SerialPortState>::default(), requests));
    let rtc = units.add("rtc").depends_on(ioapic.handle());
    let rtc = rtc.spawn(|requests| run_unit(Keeper::<RtcState>::default(), requests));
    serial.expect("a new name").detach();
    rtc.expect("a new name").detach();
    ioapic.detach();
    units
}

async fn restore(entries: Vec<SavedStateUnit>) {
    let units = set();
    let before = units.save().await.expect("the units are stopped");
    match units.restore(entries.clone()).await {
        Ok(()) => {
            let saved = units.save().await.expect("the units are stopped");
            assert_eq!(saved.len(), entries.len());
            for unit in saved {
                let given =
                    entries.iter().find(|entry| entry.name == unit.name).expect("no unit was left out");
                assert_same(&unit, given);
            }
        }
        Err(StateTransitionError::SavedState(_)) => {
            assert_eq!(units.save().await.expect("the units are stopped"), before);
        }
        Err(StateTransitionError::Units(_)) => assert_eq!(units.state(), SetState::Faulted),
        Err(error) => panic!("a stopped set may be restored: {error}"),
    }
}

/// The same state; its bytes may differ where the given ones were not in the shortest form.
fn assert_same(saved: &SavedStateUnit, given: &SavedStateUnit) {
    let blobs = saved.state.as_ref().zip(given.state.as_ref()).expect("both have a state");
    match &*saved.name {
        "ioapic" => assert_same_state::<IoApicState>(blobs),
        "serial" => assert_same_state::<SerialPortState>(blobs),
        "rtc" => assert_same_state::<RtcState>(blobs),
        other => panic!("there is no unit {other}"),
    }
}

fn assert_same_state<T: SavedStateRoot + PartialEq>((saved, given): (&SavedStateBlob, &SavedStateBlob)) {
    let [saved, given] = [saved, given].map(|blob| blob.parse::<T>().expect("the unit took it"));
    assert!(saved == given, "{}", T::full_name());
}

thread_local! {
    static RUNTIME: LazyCell<Runtime> =
        LazyCell::new(|| Builder::new_current_thread().enable_time().build().expect("a runtime"));
}

fuzz_target!(|entries: Vec<Entry>| {
    let entries = entries.into_iter().map(SavedStateUnit::from).collect();
    RUNTIME.with(|runtime| runtime.block_on(restore(entries)));
});
