//! The messages that crates of their own declare in Rust are those of the schema, to the byte.

use guest_saved_state::FILE_DESCRIPTOR_SET;
use proptest::prelude::*;
use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, Kind, MessageDescriptor, Value};
use save_restore::{NoSavedState, SavedStateBlob};
use state_unit::SavedStateUnit;
use std::sync::LazyLock;

static SCHEMA: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the compiler's own output"));

fn in_schema<T: Name>() -> MessageDescriptor {
    SCHEMA.get_message_by_name(&T::full_name()).unwrap_or_else(|| panic!("{} has no .proto", T::full_name()))
}

/// The same message as the schema reads it, which must know every field and write the same bytes.
fn as_schema_reads<T: Message + Name>(message: &T) -> DynamicMessage {
    let bytes = message.encode_to_vec();
    let read = DynamicMessage::decode(in_schema::<T>(), &*bytes).expect("the schema reads what Rust writes");
    assert_eq!(read.unknown_fields().count(), 0, "{read:?}");
    assert_eq!(read.encode_to_vec(), bytes, "{read:?}");
    read
}

/// A message with every field of the schema set.
fn with_every_field(message: &MessageDescriptor) -> DynamicMessage {
    let mut filled = DynamicMessage::new(message.clone());
    for field in message.fields() {
        let value = match field.kind() {
            Kind::String => Value::String("text".to_owned()),
            Kind::Bytes => Value::Bytes(vec![1, 2, 3].into()),
            Kind::Message(inner) => Value::Message(with_every_field(&inner)),
            kind => panic!("{}: give {kind:?} a value here", field.full_name()),
        };
        filled.set_field(&field, value);
    }
    filled
}

/// Rust knows every field of the schema: nothing is lost.
fn keeps_every_field<T: Message + Name + Default + std::fmt::Debug>() {
    let bytes = with_every_field(&in_schema::<T>()).encode_to_vec();
    let read = T::decode(&*bytes).expect("Rust reads what the schema writes");
    assert_eq!(read.encode_to_vec(), bytes, "{read:?}");
}

#[test]
fn rust_keeps_every_field_of_the_schema() {
    keeps_every_field::<SavedStateBlob>();
    keeps_every_field::<SavedStateUnit>();
    keeps_every_field::<NoSavedState>();
    as_schema_reads(&NoSavedState {});
}

fn field(message: &DynamicMessage, name: &str) -> Value {
    message.get_field_by_name(name).expect("a field of the schema").into_owned()
}

proptest! {
    #[test]
    fn the_schema_reads_what_rust_writes(name: String, state: Option<(String, Vec<u8>)>) {
        let blob = state.clone().map(|(type_name, value)| SavedStateBlob::from_parts(type_name, value));
        let unit = as_schema_reads(&SavedStateUnit { name: name.clone(), state: blob.clone() });
        prop_assert_eq!(field(&unit, "name"), Value::String(name));
        prop_assert_eq!(unit.has_field_by_name("state"), blob.is_some());
        let (Some(blob), Some((type_name, value))) = (blob, state) else { return Ok(()) };
        let read = as_schema_reads(&blob);
        prop_assert_eq!(field(&read, "type_name"), Value::String(type_name));
        prop_assert_eq!(field(&read, "value"), Value::Bytes(value.into()));
        prop_assert_eq!(field(&unit, "state"), Value::Message(read));
    }
}
