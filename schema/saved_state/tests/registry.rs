//! The registry: what it lists and shows, and that no bytes bring it down.

use guest_saved_state::devices::i8042::I8042State;
use guest_saved_state::devices::ioapic::IoApicState;
use guest_saved_state::devices::rtc::RtcState;
use guest_saved_state::devices::serial::SerialPortState;
use guest_saved_state::processor::partition::PartitionState;
use guest_saved_state::processor::vp::VpSetState;
use guest_saved_state::{DescribeError, saved_state_roots};
use proptest::prelude::*;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use save_restore::{NoSavedState, RestoreError, SavedStateBlob, SavedStateRoot};
use std::error::Error;

fn describe<T: SavedStateRoot>(state: &T) -> String {
    let blob = SavedStateBlob::new(state);
    saved_state_roots().describe(blob.type_name(), blob.value()).expect("a message of that type")
}

#[test]
fn every_root_is_listed_by_its_name() {
    let names: Vec<&str> = saved_state_roots().type_names().collect();
    let expected = [
        "devices.balloon.BalloonState",
        "devices.block.BlockState",
        "devices.console.ConsoleState",
        "devices.generic_event.GenericEventState",
        "devices.i8042.I8042State",
        "devices.ioapic.IoApicState",
        "devices.mem.MemState",
        "devices.net.NetState",
        "devices.rtc.RtcState",
        "devices.serial.SerialPortState",
        "devices.virtio.VirtioState",
        "devices.vsock.VsockState",
        "machine.memory.MemoryState",
        "machine.snapshot.SnapshotState",
        "processor.partition.PartitionState",
        "processor.vp.VpSetState",
        "save_restore.NoSavedState",
    ];
    assert_eq!(names, expected);
}

#[test]
fn state_is_described_with_the_names_of_its_fields() {
    assert_eq!(describe(&NoSavedState {}), "");
    assert_eq!(describe(&I8042State { port_b: 0 }), "port_b: 0");
    let ioapic = IoApicState {
        select: 0x10,
        id: 1 << 24,
        entries: vec![1 << 16, 0x31],
        asserted: 2,
        asserted_high: 0,
    };
    assert_eq!(
        describe(&ioapic),
        "select: 16\nid: 16777216\nentries: [65536, 49]\nasserted: 2\nasserted_high: 0"
    );
    let rtc = RtcState { index: 0x0b, ram: vec![0, 0x26], offset_seconds: -3600, acknowledged_seconds: 9 };
    let expected = "index: 11\nram: \"\\000&\"\noffset_seconds: -3600\nacknowledged_seconds: 9";
    assert_eq!(describe(&rtc), expected);
    let serial = SerialPortState { divisor: 12, queued_input: b"ls\n".to_vec(), ..Default::default() };
    let text = describe(&serial);
    assert!(text.starts_with("divisor: 12\ninterrupt_enable: 0\n"), "{text}");
    assert!(text.ends_with("receive_fifo: \"\"\nqueued_input: \"ls\\n\""), "{text}");
}

#[test]
fn a_field_of_a_later_version_is_shown_by_its_number() {
    let mut bytes = I8042State { port_b: 3 }.encode_to_vec();
    encode_key(90, WireType::Varint, &mut bytes);
    encode_varint(7, &mut bytes);
    let text = saved_state_roots().describe("devices.i8042.I8042State", &bytes).expect("it decodes");
    assert_eq!(text, "port_b: 3\n90: 7");
}

#[test]
fn what_cannot_be_described_is_named() {
    let error = saved_state_roots().describe("devices.Toaster", &[]).unwrap_err();
    assert_eq!(error.to_string(), "no saved state is of type \"devices.Toaster\"");
    let error = saved_state_roots().describe("devices.rtc.RtcState", &[0x08]).unwrap_err();
    assert_eq!(error.to_string(), "the saved state of type devices.rtc.RtcState does not decode");
    assert!(error.source().is_some());
    let error = saved_state_roots().check(&SavedStateBlob::from_parts("devices.Toaster", [])).unwrap_err();
    assert_eq!(error.to_string(), "type_name is devices.Toaster, which is not valid");
    let error =
        saved_state_roots().check(&SavedStateBlob::from_parts("devices.rtc.RtcState", [0x08])).unwrap_err();
    assert!(matches!(&error, RestoreError::Decode { type_name, .. } if type_name == "devices.rtc.RtcState"));
}

/// Messages of messages, deeper than the decoders go: refused, and no stack overflows.
#[test]
fn nesting_is_bounded() {
    let mut bytes = Vec::new();
    for _ in 0..100_000 {
        encode_key(90, WireType::StartGroup, &mut bytes);
    }
    let error = saved_state_roots().describe("devices.i8042.I8042State", &bytes).unwrap_err();
    assert!(matches!(error, DescribeError::Decode { .. }), "{error}");
    let blob = SavedStateBlob::from_parts("devices.i8042.I8042State", bytes);
    assert!(saved_state_roots().check(&blob).is_err());
}

/// Bytes as they come, and bytes that look like a message: fields with numbers of the schema and of every wire type.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let field = (0u32..14, 0u8..6, any::<u64>(), prop::collection::vec(any::<u8>(), 0..40));
    let field = field.prop_map(|(number, wire_type, value, content)| {
        let mut bytes = Vec::new();
        encode_varint(u64::from(number) << 3 | u64::from(wire_type), &mut bytes);
        match wire_type {
            0 => encode_varint(value, &mut bytes),
            1 => bytes.extend(value.to_le_bytes()),
            2 => {
                encode_varint(content.len() as u64, &mut bytes);
                bytes.extend(content);
            }
            5 => bytes.extend(&value.to_le_bytes()[..4]),
            _ => {}
        }
        bytes
    });
    let fields = prop::collection::vec(field, 0..8).prop_map(|fields| fields.concat());
    let cut = (fields.clone(), any::<prop::sample::Index>()).prop_map(|(mut bytes, end)| {
        bytes.truncate(end.index(bytes.len() + 1));
        bytes
    });
    prop_oneof![prop::collection::vec(any::<u8>(), 0..200), fields, cut]
}

/// Reads as `T`: what decodes survives the blob, what does not names the type.
fn read_as<T: SavedStateRoot + std::fmt::Debug + PartialEq>(bytes: &[u8]) -> Result<(), TestCaseError> {
    let blob = SavedStateBlob::from_parts(T::full_name(), bytes);
    match blob.parse::<T>() {
        Ok(state) => {
            prop_assert_eq!(SavedStateBlob::new(&state).parse::<T>().expect("its own encoding"), state)
        }
        Err(error) => prop_assert!(error.to_string().contains(&T::full_name()), "{}", error),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_decode_or_are_refused_by_name(bytes in bytes()) {
        read_as::<I8042State>(&bytes)?;
        read_as::<IoApicState>(&bytes)?;
        read_as::<RtcState>(&bytes)?;
        read_as::<SerialPortState>(&bytes)?;
        read_as::<PartitionState>(&bytes)?;
        read_as::<VpSetState>(&bytes)?;
        read_as::<NoSavedState>(&bytes)?;
    }

    /// What the registry shows and what the device would read are decoded by different code: both accept, or both refuse.
    #[test]
    fn any_bytes_are_described_exactly_if_they_decode(bytes in bytes()) {
        for name in saved_state_roots().type_names() {
            let checked = saved_state_roots().check(&SavedStateBlob::from_parts(name, bytes.clone()));
            let described = saved_state_roots().describe(name, &bytes);
            prop_assert_eq!(checked.is_ok(), described.is_ok(), "{:?} {:?}", checked, described);
            if let Err(error) = described {
                prop_assert!(error.to_string().contains(name), "{}", error);
            }
        }
    }

    #[test]
    fn any_name_is_known_or_told(name in ".*", bytes in bytes()) {
        let error = saved_state_roots().describe(&name, &bytes).unwrap_err();
        prop_assert!(error.to_string().contains(&format!("{name:?}")), "{}", error);
    }
}
