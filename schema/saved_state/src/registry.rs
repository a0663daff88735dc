//! All messages that can be the whole saved state of a component, found by name.

use crate::generated::{FILE_DESCRIPTOR_SET, roots};
use prost_reflect::text_format::FormatOptions;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use save_restore::{RestoreError, SavedStateBlob, SavedStateRoot};
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// Why saved state could not be described.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescribeError {
    /// There is no such saved state.
    #[error("no saved state is of type {type_name:?}")]
    UnknownType {
        /// The name that was asked for.
        type_name: String,
    },
    /// The bytes are no message of that type.
    #[error("the saved state of type {type_name} does not decode")]
    Decode {
        /// Full name of the type.
        type_name: String,
        /// The decoder's error.
        source: prost::DecodeError,
    },
}

/// A root as the generated code lists it.
pub(crate) struct Root {
    full_name: fn() -> String,
    check: Check,
}

type Check = fn(&SavedStateBlob) -> Result<(), RestoreError>;

impl Root {
    pub(crate) const fn of<T: SavedStateRoot>() -> Self {
        Self { full_name: T::full_name, check: |blob| blob.parse::<T>().map(drop) }
    }
}

/// A root with what the schema says of it.
struct Entry {
    message: MessageDescriptor,
    check: Check,
}

/// Every message in the schema that can be the whole saved state of a component. See [`saved_state_roots`].
pub struct SavedStateRegistry {
    entries: BTreeMap<String, Entry>,
}

impl std::fmt::Debug for SavedStateRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.type_names()).finish()
    }
}

/// The registry of all saved state in the schema.
#[must_use]
pub fn saved_state_roots() -> &'static SavedStateRegistry {
    static REGISTRY: LazyLock<SavedStateRegistry> = LazyLock::new(SavedStateRegistry::generated);
    &REGISTRY
}

impl SavedStateRegistry {
    fn generated() -> Self {
        let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the compiler's own output");
        let entries = roots::ROOTS.iter().map(|root| {
            let name = (root.full_name)();
            let message = pool.get_message_by_name(&name).expect("roots are listed from the same set");
            (name, Entry { message, check: root.check })
        });
        Self { entries: entries.collect() }
    }

    /// The full names of all types, in alphabetical order.
    pub fn type_names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether a blob could be restored, as far as that can be told without its device: it is of a known type, and decodes.
    ///
    /// # Errors
    /// [`RestoreError::Invalid`] if there is no such type, [`RestoreError::Decode`] if the bytes are damaged.
    pub fn check(&self, blob: &SavedStateBlob) -> Result<(), RestoreError> {
        let unknown = || RestoreError::invalid("type_name", blob.type_name());
        (self.entries.get(blob.type_name()).ok_or_else(unknown)?.check)(blob)
    }

    /// Saved state as protobuf text, one field in each line, fields that are zero included. Fields that this schema does not
    /// know are shown by their numbers. The text is for people; its layout may change.
    ///
    /// # Errors
    /// If there is no such type, or if the bytes are damaged.
    pub fn describe(&self, type_name: &str, bytes: &[u8]) -> Result<String, DescribeError> {
        let unknown = || DescribeError::UnknownType { type_name: type_name.to_owned() };
        let message = self.entries.get(type_name).ok_or_else(unknown)?.message.clone();
        let state = DynamicMessage::decode(message, bytes)
            .map_err(|source| DescribeError::Decode { type_name: type_name.to_owned(), source })?;
        let options = FormatOptions::new().pretty(true).skip_default_fields(false).skip_unknown_fields(false);
        Ok(state.to_text_format_with_options(&options))
    }
}
