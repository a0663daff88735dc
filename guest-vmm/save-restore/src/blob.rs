//! The opaque blob.

use crate::{RestoreError, SavedStateRoot};

/// Encoded saved state with the full name of its protobuf type; itself a protobuf message
/// (`save_restore.SavedStateBlob`), so that it can be a field of others.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct SavedStateBlob {
    #[prost(string, tag = "1")]
    type_name: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

impl prost::Name for SavedStateBlob {
    const NAME: &'static str = "SavedStateBlob";
    const PACKAGE: &'static str = "save_restore";
}

impl SavedStateBlob {
    /// Encodes `state`.
    pub fn new<T: SavedStateRoot>(state: &T) -> Self {
        Self { type_name: T::full_name(), value: state.encode_to_vec() }
    }

    /// A blob from its parts, for whoever transports blobs in another envelope. Nothing is checked before
    /// [`parse`](Self::parse).
    pub fn from_parts(type_name: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self { type_name: type_name.into(), value: value.into() }
    }

    /// Decodes the state, if it is of type `T`.
    ///
    /// # Errors
    /// [`RestoreError::WrongType`] if the blob carries another name, [`RestoreError::Decode`] if the bytes are damaged.
    pub fn parse<T: SavedStateRoot>(&self) -> Result<T, RestoreError> {
        if !self.is::<T>() {
            return Err(RestoreError::WrongType { expected: T::full_name(), found: self.type_name.clone() });
        }
        T::decode(self.value.as_slice())
            .map_err(|source| RestoreError::Decode { type_name: self.type_name.clone(), source })
    }

    /// Whether the blob carries a `T`.
    #[must_use]
    pub fn is<T: SavedStateRoot>(&self) -> bool {
        // Compared in parts: the full name would be a new allocation for each restore.
        let rest = self.type_name.strip_prefix(T::PACKAGE);
        let rest = if T::PACKAGE.is_empty() { rest } else { rest.and_then(|rest| rest.strip_prefix('.')) };
        rest == Some(T::NAME)
    }

    /// Full name of the protobuf type, package included.
    #[must_use]
    pub fn type_name(&self) -> &str {
        &self.type_name
    }

    /// The encoded message.
    #[must_use]
    pub fn value(&self) -> &[u8] {
        &self.value
    }
}
