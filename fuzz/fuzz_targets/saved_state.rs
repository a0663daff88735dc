//! Any bytes as a blob of saved state, and its value as every root of the schema.
//!
//! Holds to: nothing panics; what decodes is the same after it was encoded again; the registry accepts exactly what its
//! type decodes, and describes it.

#![no_main]

use std::collections::BTreeSet;
use std::fmt::Debug;

use guest_saved_state::devices::i8042::I8042State;
use guest_saved_state::devices::ioapic::IoApicState;
use guest_saved_state::devices::rtc::RtcState;
use guest_saved_state::devices::serial::SerialPortState;
use guest_saved_state::saved_state_roots;
use libfuzzer_sys::fuzz_target;
use prost::Message;
use save_restore::{NoSavedState, SavedStateBlob, SavedStateRoot};

/// A root: its full name, and what has to hold for any bytes as its message.
struct Root {
    name: String,
    hold: fn(&[u8]),
}

impl Root {
    fn of<T: SavedStateRoot + PartialEq + Debug>() -> Self {
        Self { name: T::full_name(), hold: hold::<T> }
    }
}

fn roots() -> [Root; 5] {
    [
        Root::of::<I8042State>(),
        Root::of::<IoApicState>(),
        Root::of::<RtcState>(),
        Root::of::<SerialPortState>(),
        Root::of::<NoSavedState>(),
    ]
}

fn no_root_is_left_out() {
    let names: BTreeSet<String> = roots().into_iter().map(|root| root.name).collect();
    assert_eq!(names, saved_state_roots().type_names().map(str::to_owned).collect());
}

fn hold<T: SavedStateRoot + PartialEq + Debug>(value: &[u8]) {
    let blob = SavedStateBlob::from_parts(T::full_name(), value);
    let parsed = blob.parse::<T>();
    assert_eq!(saved_state_roots().check(&blob).is_ok(), parsed.is_ok());
    let Ok(state) = parsed else { return };
    saved_state_roots().describe(blob.type_name(), blob.value()).expect("what decodes is described");
    let again = SavedStateBlob::new(&state);
    assert_eq!(again.type_name(), blob.type_name());
    assert_eq!(again.parse::<T>().expect("encoded just now"), state);
}

fuzz_target!(init: no_root_is_left_out(), |bytes: &[u8]| {
    let Ok(blob) = SavedStateBlob::decode(bytes) else { return };
    assert_eq!(SavedStateBlob::decode(&*blob.encode_to_vec()).expect("encoded just now"), blob);
    let described = saved_state_roots().describe(blob.type_name(), blob.value());
    assert_eq!(saved_state_roots().check(&blob).is_ok(), described.is_ok());
    roots().iter().for_each(|root| (root.hold)(blob.value()));
});
