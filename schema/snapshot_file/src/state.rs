//! What a state says of its guest.

use crate::{STATE_FORMAT, SnapshotState};
use guest_schema::{Failure, GuestConfig, GuestError};
use std::fmt::Display;

/// The config of a state's guest.
///
/// # Errors
/// `snapshotIncompatible` for a format that this version does not know, `snapshotCorrupt` for a config that cannot be.
pub fn config_of(state: &SnapshotState) -> Result<GuestConfig, Failure> {
    let SnapshotState { format, config, .. } = state;
    if *format != STATE_FORMAT {
        let problem = format!("state: its format is {format}, and {STATE_FORMAT} is known here");
        return Err(Failure::new(GuestError::SnapshotIncompatible, problem));
    }
    let bad = |problem: &dyn Display| {
        Failure::new(GuestError::SnapshotCorrupt, format!("state: config: {problem}"))
    };
    let read = GuestConfig::decode(config).map_err(|error| bad(&error))?;
    read.faults.first().map_or(Ok(()), |fault| Err(bad(fault)))?;
    Ok(read.config)
}
