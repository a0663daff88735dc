//! Any bytes as a blob of saved state, and its value as every root of the schema.
//!
//! Holds to: nothing panics; what decodes is the same after it was encoded again; the registry accepts exactly what its
//! type decodes, and describes it; a state of VPs or of a partition is refused, or is the same after it was saved again.

#![no_main]

use std::collections::BTreeSet;
use std::fmt::Debug;

use guest_saved_state::devices::balloon::BalloonState;
use guest_saved_state::devices::block::BlockState;
use guest_saved_state::devices::console::ConsoleState;
use guest_saved_state::devices::generic_event::GenericEventState;
use guest_saved_state::devices::i8042::I8042State;
use guest_saved_state::devices::ioapic::IoApicState;
use guest_saved_state::devices::mem::MemState;
use guest_saved_state::devices::net::NetState;
use guest_saved_state::devices::rtc::RtcState;
use guest_saved_state::devices::serial::SerialPortState;
use guest_saved_state::devices::virtio::VirtioState;
use guest_saved_state::devices::vsock::VsockState;
use guest_saved_state::machine::memory::MemoryState;
use guest_saved_state::machine::snapshot::SnapshotState;
use guest_saved_state::processor::{partition, vp};
use guest_saved_state::saved_state_roots;
use libfuzzer_sys::fuzz_target;
use processor::{PartitionState, VpState};
use prost::{Message, Name};
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

fn roots() -> [Root; 17] {
    [
        Root::of::<BalloonState>(),
        Root::of::<BlockState>(),
        Root::of::<ConsoleState>(),
        Root::of::<GenericEventState>(),
        Root::of::<I8042State>(),
        Root::of::<IoApicState>(),
        Root::of::<MemState>(),
        Root::of::<MemoryState>(),
        Root::of::<NetState>(),
        Root::of::<RtcState>(),
        Root::of::<SerialPortState>(),
        Root::of::<SnapshotState>(),
        Root::of::<VirtioState>(),
        Root::of::<VsockState>(),
        Root::of::<NoSavedState>(),
        Root { name: vp::VpSetState::full_name(), hold: hold_vps },
        Root { name: partition::PartitionState::full_name(), hold: hold_partition },
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

fn hold_vps(value: &[u8]) {
    hold::<vp::VpSetState>(value);
    let Ok(state) = vp::VpSetState::decode(value) else { return };
    for vp in state.vps.into_iter().filter_map(|vp| VpState::try_from(vp).ok()) {
        let again = VpState::try_from(vp::VpState::from(&vp)).expect("saved just now");
        assert_eq!(again, vp);
    }
}

fn hold_partition(value: &[u8]) {
    hold::<partition::PartitionState>(value);
    let Ok(state) = partition::PartitionState::decode(value) else { return };
    let Ok(state) = PartitionState::try_from(state) else { return };
    let again = PartitionState::try_from(partition::PartitionState::from(&state)).expect("saved just now");
    assert_eq!(again, state);
}

fuzz_target!(init: no_root_is_left_out(), |bytes: &[u8]| {
    let Ok(blob) = SavedStateBlob::decode(bytes) else { return };
    assert_eq!(SavedStateBlob::decode(&*blob.encode_to_vec()).expect("encoded just now"), blob);
    let described = saved_state_roots().describe(blob.type_name(), blob.value());
    assert_eq!(saved_state_roots().check(&blob).is_ok(), described.is_ok());
    roots().iter().for_each(|root| (root.hold)(blob.value()));
});
