//! What the devices' restores have in common.

use save_restore::RestoreError;
use std::fmt::LowerHex;

/// The register's value, if it has no bit but those in `defined` and fits.
pub(crate) fn register<T: TryFrom<u32>>(field: &str, value: u32, defined: u32) -> Result<T, RestoreError> {
    let defined = Some(value).filter(|value| value & !defined == 0);
    defined.and_then(|value| T::try_from(value).ok()).ok_or_else(|| invalid(field, value))
}

/// A register that the device cannot have, its value as datasheets write it.
pub(crate) fn invalid(field: &str, value: impl LowerHex) -> RestoreError {
    RestoreError::invalid(field, format_args!("{value:#x}"))
}
