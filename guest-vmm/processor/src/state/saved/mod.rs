//! The tables' states as messages of the schema of saved state, and back.
//!
//! A message's fields have the numbers and names of its table. Both ways take everything apart, so that a field that is new on
//! either side fails to compile. A value that no VP or partition can have is refused by the field that has it.

mod partition;
mod vp;

use super::StateAccessError;
use crate::{VpError, VpIndex};
use save_restore::{RestoreError, SaveError};
use std::fmt::{Debug, Display};

/// Both ways between a type and a message with the same fields of the same types.
macro_rules! same_fields {
    ($type:ident: $($field:ident),+ $(,)?) => {
        impl From<&$type> for message::$type {
            fn from(&$type { $($field),+ }: &$type) -> Self {
                Self { $($field),+ }
            }
        }

        impl From<message::$type> for $type {
            fn from(message::$type { $($field),+ }: message::$type) -> Self {
                Self { $($field),+ }
            }
        }
    };
}

use same_fields;

/// A value that has fewer bits than its field.
fn narrow<T: TryFrom<u32>>(field: &str, value: u32) -> Result<T, RestoreError> {
    T::try_from(value).map_err(|_| RestoreError::invalid(field, value))
}

/// A message that is always there.
fn present<T>(field: &str, value: Option<T>) -> Result<T, RestoreError> {
    value.ok_or_else(|| RestoreError::invalid(field, "absent"))
}

impl<K: Debug + Display + Send + Sync + 'static> From<StateAccessError<K>> for SaveError {
    fn from(error: StateAccessError<K>) -> Self {
        Self::other(error)
    }
}

/// What a host lacks is not supported there, and named; everything else has failed.
impl<K: Debug + Display + Send + Sync + 'static> From<StateAccessError<K>> for RestoreError {
    fn from(error: StateAccessError<K>) -> Self {
        match error {
            StateAccessError::Lacking(_) => Self::not_supported(error.to_string()),
            error => Self::other(error),
        }
    }
}

impl From<VpError> for SaveError {
    fn from(error: VpError) -> Self {
        match error {
            VpError::Running { .. } => Self::not_supported(error.to_string()),
            VpError::States { vp, source } => Self::from(source).in_child(name(vp)),
            error => Self::other(error),
        }
    }
}

impl From<VpError> for RestoreError {
    fn from(error: VpError) -> Self {
        match error {
            VpError::Running { .. } => Self::not_supported(error.to_string()),
            VpError::States { vp, source } => Self::from(source).in_child(name(vp)),
            error => Self::other(error),
        }
    }
}

/// What a VP is called as a part of its machine.
fn name(vp: VpIndex) -> String {
    format!("VP {vp}")
}

#[cfg(test)]
mod tests;
