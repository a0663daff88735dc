//! What can go wrong when state is saved or restored.

/// A cause of any type.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why a component's state could not be saved. The component is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The component cannot be saved at all, or not in its present state.
    #[error("saving is not supported: {reason}")]
    NotSupported {
        /// Why, in words for the user.
        reason: String,
    },
    /// A part of the component failed.
    #[error("{name} could not be saved")]
    Child {
        /// The part.
        name: String,
        /// Why.
        source: Box<SaveError>,
    },
    /// Anything else.
    #[error("the state could not be saved")]
    Other(#[source] Cause),
}

impl SaveError {
    /// The component cannot be saved, for this reason.
    pub fn not_supported(reason: impl Into<String>) -> Self {
        Self::NotSupported { reason: reason.into() }
    }

    /// Says in which part of a component the error happened.
    #[must_use]
    pub fn in_child(self, name: impl Into<String>) -> Self {
        Self::Child { name: name.into(), source: Box::new(self) }
    }

    /// An error of another type.
    pub fn other(cause: impl Into<Cause>) -> Self {
        Self::Other(cause.into())
    }
}

/// Why a component's state could not be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The blob carries another type.
    #[error("the saved state is of type {found}, not {expected}")]
    WrongType {
        /// Full name of the type that the component restores from.
        expected: String,
        /// Full name that the blob carries.
        found: String,
    },
    /// The bytes are no message of the type they claim.
    #[error("the saved state of type {type_name} does not decode")]
    Decode {
        /// Full name of the type.
        type_name: String,
        /// The decoder's error.
        source: prost::DecodeError,
    },
    /// A field has a value that the component cannot have.
    #[error("{field} is {value}, which is not valid")]
    Invalid {
        /// The field, as the message calls it.
        field: String,
        /// Its value.
        value: String,
    },
    /// There is state for a part that the component does not have.
    #[error("there is saved state for {name}, which does not exist")]
    UnknownEntry {
        /// The part, as the saved state calls it.
        name: String,
    },
    /// The component cannot be restored at all.
    #[error("restoring is not supported: {reason}")]
    NotSupported {
        /// Why, in words for the user.
        reason: String,
    },
    /// A part of the component failed.
    #[error("{name} could not be restored")]
    Child {
        /// The part.
        name: String,
        /// Why.
        source: Box<RestoreError>,
    },
    /// Anything else.
    #[error("the state could not be restored")]
    Other(#[source] Cause),
}

impl RestoreError {
    /// A field with a value that the component cannot have.
    pub fn invalid(field: impl Into<String>, value: impl std::fmt::Display) -> Self {
        Self::Invalid { field: field.into(), value: value.to_string() }
    }

    /// The component cannot be restored, for this reason.
    pub fn not_supported(reason: impl Into<String>) -> Self {
        Self::NotSupported { reason: reason.into() }
    }

    /// Says in which part of a component the error happened.
    #[must_use]
    pub fn in_child(self, name: impl Into<String>) -> Self {
        Self::Child { name: name.into(), source: Box::new(self) }
    }

    /// An error of another type.
    pub fn other(cause: impl Into<Cause>) -> Self {
        Self::Other(cause.into())
    }
}
