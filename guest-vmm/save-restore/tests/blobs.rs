//! State through blobs: there and back, and what is refused.

use prost::Message;
use save_restore::{
    NoSavedState, ProtobufSaveRestore, ProtobufSaveRestoreWith, RestoreError, SaveError, SaveRestore,
    SaveRestoreWith, SavedStateBlob, SavedStateNotSupported, saved_state_root,
};
use std::error::Error;

#[derive(Clone, PartialEq, Message)]
struct TimerState {
    #[prost(uint64, tag = "1")]
    deadline: u64,
    #[prost(bool, tag = "2")]
    armed: bool,
}

saved_state_root!(TimerState, package = "save_restore.tests");

#[derive(Default)]
struct Timer {
    deadline: Option<u64>,
    removable: bool,
}

impl SaveRestore for Timer {
    type SavedState = TimerState;

    fn save(&mut self) -> Result<TimerState, SaveError> {
        if self.removable {
            return Err(SaveError::not_supported("a removable timer"));
        }
        Ok(TimerState { deadline: self.deadline.unwrap_or(0), armed: self.deadline.is_some() })
    }

    fn restore(&mut self, TimerState { deadline, armed }: TimerState) -> Result<(), RestoreError> {
        if !armed && deadline != 0 {
            return Err(RestoreError::invalid("deadline", deadline));
        }
        self.deadline = armed.then_some(deadline);
        Ok(())
    }
}

struct Stateless;

impl SaveRestore for Stateless {
    type SavedState = NoSavedState;

    fn save(&mut self) -> Result<NoSavedState, SaveError> {
        Ok(NoSavedState {})
    }

    fn restore(&mut self, NoSavedState {}: NoSavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[test]
fn state_survives_the_blob_and_the_blob_its_own_encoding() {
    let mut parts: Vec<Box<dyn ProtobufSaveRestore>> =
        vec![Box::new(Timer { deadline: Some(7), removable: false }), Box::new(Stateless)];
    let blobs: Vec<SavedStateBlob> = parts.iter_mut().map(|part| part.save_blob().unwrap()).collect();
    assert_eq!(blobs[0].type_name(), "save_restore.tests.TimerState");
    assert_eq!(blobs[1].type_name(), "save_restore.NoSavedState");

    let stored = blobs[0].encode_to_vec();
    let loaded = SavedStateBlob::decode(&*stored).unwrap();
    let mut timer = Timer::default();
    timer.restore_blob(loaded).unwrap();
    assert_eq!(timer.deadline, Some(7));
    Stateless.restore_blob(blobs[1].clone()).unwrap();
}

#[test]
fn another_type_is_refused_with_both_names() {
    let blob = Stateless.save_blob().unwrap();
    let error = Timer::default().restore_blob(blob).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the saved state is of type save_restore.NoSavedState, not save_restore.tests.TimerState"
    );
    for name in [
        "",
        "TimerState",
        "save_restore.tests",
        "save_restore.testsTimerState",
        "x.save_restore.tests.TimerState",
    ] {
        assert!(!SavedStateBlob::from_parts(name, []).is::<TimerState>(), "{name}");
    }
    assert!(SavedStateBlob::from_parts("save_restore.tests.TimerState", []).is::<TimerState>());
}

#[test]
fn damaged_bytes_are_refused_with_the_decoder_as_the_cause() {
    let blob = SavedStateBlob::from_parts("save_restore.tests.TimerState", [0x08]);
    let error = Timer::default().restore_blob(blob).unwrap_err();
    assert!(matches!(error, RestoreError::Decode { .. }), "{error}");
    assert!(error.source().is_some());
}

#[test]
fn an_invalid_value_names_the_field_and_a_part_names_itself() {
    let blob = SavedStateBlob::new(&TimerState { deadline: 9, armed: false });
    let error = Timer::default().restore_blob(blob).unwrap_err().in_child("timer 0");
    assert_eq!(error.to_string(), "timer 0 could not be restored");
    assert_eq!(error.source().unwrap().to_string(), "deadline is 9, which is not valid");
}

#[test]
fn what_cannot_be_saved_says_why() {
    let error = Timer { deadline: None, removable: true }.save_blob().unwrap_err().in_child("timer 0");
    assert_eq!(error.source().unwrap().to_string(), "saving is not supported: a removable timer");
}

/// An alarm is saved with its deadline, and restored beside a clock that only the restoring side has.
#[derive(Default)]
struct Alarm {
    deadline: u64,
    rings_in: u64,
}

struct Clock {
    now: u64,
}

impl SaveRestoreWith<&Clock> for Alarm {
    type SavedState = TimerState;

    fn save(&mut self) -> Result<TimerState, SaveError> {
        Ok(TimerState { deadline: self.deadline, armed: true })
    }

    fn restore_with(&mut self, state: TimerState, clock: &Clock) -> Result<(), RestoreError> {
        let TimerState { deadline, armed } = state;
        if !armed {
            return Err(RestoreError::invalid("armed", armed));
        }
        *self = Self { deadline, rings_in: deadline.saturating_sub(clock.now) };
        Ok(())
    }
}

#[test]
fn what_restore_takes_beside_the_state_comes_with_the_blob() {
    let mut alarms: Vec<Box<dyn ProtobufSaveRestoreWith<&Clock>>> = vec![Box::new(Alarm::default())];
    alarms[0].restore_blob_with(blob_of_timer(900, true), &Clock { now: 700 }).unwrap();
    assert_eq!(alarms[0].save_blob().unwrap(), blob_of_timer(900, true));

    let mut alarm = Alarm::default();
    alarm.restore_blob_with(blob_of_timer(900, true), &Clock { now: 700 }).unwrap();
    assert_eq!(alarm.rings_in, 200);
    let error = alarm.restore_blob_with(blob_of_timer(900, false), &Clock { now: 0 }).unwrap_err();
    assert_eq!(error.to_string(), "armed is false, which is not valid");
    let error = alarm.restore_blob_with(Stateless.save_blob().unwrap(), &Clock { now: 0 }).unwrap_err();
    assert!(matches!(error, RestoreError::WrongType { .. }), "{error}");
}

fn blob_of_timer(deadline: u64, armed: bool) -> SavedStateBlob {
    SavedStateBlob::new(&TimerState { deadline, armed })
}

/// Whatever the blob is: a type that does not fit is not the reason.
#[test]
fn what_is_not_supported_refuses_to_be_saved_and_every_blob() {
    let mut part: Box<dyn ProtobufSaveRestore> =
        Box::new(SavedStateNotSupported::new("a device of the host"));
    let error = part.save_blob().unwrap_err();
    assert!(
        matches!(&error, SaveError::NotSupported { reason } if reason == "a device of the host"),
        "{error}"
    );
    for blob in [blob_of_timer(1, true), SavedStateBlob::new(&NoSavedState {}), SavedStateBlob::default()] {
        let error = part.restore_blob(blob).unwrap_err();
        assert!(matches!(&error, RestoreError::NotSupported { reason } if reason == "a device of the host"));
    }
}

#[test]
fn an_entry_for_nothing_and_an_error_of_another_type_are_told() {
    let error = RestoreError::UnknownEntry { name: "timer 9".to_owned() }.in_child("board");
    assert_eq!(error.source().unwrap().to_string(), "there is saved state for timer 9, which does not exist");
    let error = RestoreError::other(std::io::Error::other("the disk is gone"));
    assert_eq!(error.source().unwrap().to_string(), "the disk is gone");
    let error = SaveError::other(std::io::Error::other("the disk is full"));
    assert_eq!(error.source().unwrap().to_string(), "the disk is full");
}

/// The bytes of a blob are a format: they do not change.
#[test]
fn the_encoding_is_fixed() {
    let blob = SavedStateBlob::new(&TimerState { deadline: 300, armed: true });
    let mut expected = vec![0x0a, 29];
    expected.extend(b"save_restore.tests.TimerState");
    expected.extend([0x12, 5, 0x08, 0xac, 0x02, 0x10, 0x01]);
    assert_eq!(blob.encode_to_vec(), expected);
}

proptest::proptest! {
    #[test]
    fn any_bytes_decode_or_are_refused_by_name(name in ".*", bytes: Vec<u8>) {
        if let Ok(blob) = SavedStateBlob::decode(&*bytes) {
            let again = SavedStateBlob::decode(&*blob.encode_to_vec());
            proptest::prop_assert_eq!(again, Ok(blob));
        }
        for name in [name.as_str(), "save_restore.tests.TimerState"] {
            match SavedStateBlob::from_parts(name, bytes.clone()).parse::<TimerState>() {
                Ok(_) => proptest::prop_assert_eq!(name, "save_restore.tests.TimerState"),
                Err(error) => proptest::prop_assert!(error.to_string().contains(name), "{}", error),
            }
        }
    }
}
