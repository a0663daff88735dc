//! State through blobs: there and back, and what is refused.

use prost::Message;
use save_restore::{NoSavedState, ProtobufSaveRestore, RestoreError, SaveError, SaveRestore, SavedStateBlob};
use std::error::Error;

#[derive(Clone, PartialEq, Message)]
struct TimerState {
    #[prost(uint64, tag = "1")]
    deadline: u64,
    #[prost(bool, tag = "2")]
    armed: bool,
}

impl prost::Name for TimerState {
    const NAME: &'static str = "TimerState";
    const PACKAGE: &'static str = "save_restore.tests";
}

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
    fn any_bytes_decode_or_are_refused(name in ".*", bytes: Vec<u8>) {
        let _ = SavedStateBlob::decode(&*bytes);
        let _ = Timer::default().restore_blob(SavedStateBlob::from_parts(name, bytes.clone()));
        let _ = Timer::default().restore_blob(SavedStateBlob::from_parts("save_restore.tests.TimerState", bytes));
    }
}
