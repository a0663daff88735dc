//! Whether a guest could go on from a snapshot with what it would be granted.
//!
//! Told without a VMM: what only its devices and this host can tell is not looked at. What `create` refuses of it is refused here.

use crate::snapshots::Kept;
use guest_saved_state::saved_state_roots;
use guest_schema::{Failure, GuestConfig, GuestError, ReadConfig, SavedStateKind, chain};
use guest_snapshot_file::{SnapshotState, UnitState, config_of};
use std::collections::HashSet;
use tokio::task::spawn_blocking;

/// Whether nothing speaks against it.
///
/// # Errors
/// Those of `create`: `snapshotIncompatible`, `snapshotCorrupt`, `badConfig`.
pub(crate) async fn can_restore(kept: &Kept, grants: &ReadConfig) -> Result<(), Failure> {
    let source = kept.source();
    let state = spawn_blocking(move || source.state()).await;
    let state = state.map_err(|error| Failure::new(GuestError::InternalError, error.to_string()))?;
    let state = state.map_err(|error| corrupt(chain(&error)))?;
    check_grants(&config_of(&state)?, grants)?;
    check_names(&state, &grants.config)?;
    check_states(&state.units, &grants.config)
}

fn corrupt(problem: impl Into<String>) -> Failure {
    Failure::new(GuestError::SnapshotCorrupt, problem)
}

fn check_grants(own: &GuestConfig, grants: &ReadConfig) -> Result<(), Failure> {
    let faults = grants.faults.iter().cloned().chain(own.grant_faults(&grants.config));
    let faults: Vec<_> = faults.map(|fault| fault.to_string()).collect();
    if faults.is_empty() { Ok(()) } else { Err(Failure::new(GuestError::BadConfig, faults.join("; "))) }
}

/// No unit twice, and none that saves without a state.
fn check_names(state: &SnapshotState, grants: &GuestConfig) -> Result<(), Failure> {
    let mut names = HashSet::new();
    let twice = state.units.iter().find(|unit| !names.insert(&unit.name));
    if let Some(UnitState { name, .. }) = twice {
        return Err(incompatible(format!("the snapshot has two states of {name}"), vec![name.clone()]));
    }
    let saves = grants.units.iter().filter(|unit| unit.saved_state == SavedStateKind::Saves);
    let missing: Vec<_> =
        saves.filter(|unit| !names.contains(&unit.id)).map(|unit| unit.id.clone()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(incompatible(format!("the snapshot has no state of {}", missing.join(", ")), missing))
}

fn incompatible(problem: String, units: Vec<String>) -> Failure {
    Failure::new(GuestError::SnapshotIncompatible, problem).of_units(units)
}

/// Every state is that of a client's unit, or of a type that is known here, and can be decoded.
fn check_states(units: &[UnitState], grants: &GuestConfig) -> Result<(), Failure> {
    let is_granted = |unit: &&UnitState| grants.units.iter().any(|granted| granted.id == unit.name);
    let own: Vec<_> = units.iter().filter(|unit| !is_granted(unit)).collect();
    let known: HashSet<_> = saved_state_roots().type_names().collect();
    let unknown: Vec<_> = own.iter().filter(|unit| !known.contains(&unit.type_name[..])).collect();
    if !unknown.is_empty() {
        let told = unknown.iter().map(|unit| format!("{} ({})", unit.name, unit.type_name));
        let problem = format!("no unit for the states of {}", told.collect::<Vec<_>>().join(", "));
        return Err(incompatible(problem, unknown.iter().map(|unit| unit.name.clone()).collect()));
    }
    own.into_iter().try_for_each(|UnitState { name, type_name, value }| {
        saved_state_roots().describe(type_name, value).map(drop).map_err(|error| {
            corrupt(format!("state: {name}: {}", chain(&error))).of_units(vec![name.clone()])
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_schema::UnitConfig;

    fn unit(name: &str, type_name: &str, value: &[u8]) -> UnitState {
        UnitState { name: name.into(), type_name: type_name.into(), value: value.to_vec() }
    }

    fn granted(id: &str, saved_state: SavedStateKind) -> GuestConfig {
        let unit = UnitConfig::new(id, capnp_rpc::new_future_client(std::future::pending()));
        GuestConfig { units: vec![UnitConfig { saved_state, ..unit }], ..GuestConfig::new(None, 0) }
    }

    fn no_grants() -> GuestConfig {
        GuestConfig::new(None, 0)
    }

    #[test]
    fn a_state_is_of_a_unit_that_is_known_or_granted() {
        let rtc = unit("rtc", "devices.rtc.RtcState", &[]);
        check_states(std::slice::from_ref(&rtc), &no_grants()).expect("known");
        let units = [rtc, unit("mine", "any.State", &[0xff]), unit("other", "any.State", &[])];
        let failure = check_states(&units, &granted("mine", SavedStateKind::Saves)).expect_err("refused");
        assert_eq!(failure.code, GuestError::SnapshotIncompatible);
        assert_eq!(failure.units, ["other"]);
        assert_eq!(failure.detail, "no unit for the states of other (any.State)");
    }

    #[test]
    fn a_state_that_cannot_be_decoded_is_named() {
        let units = [unit("rtc", "devices.rtc.RtcState", &[0xff])];
        let failure = check_states(&units, &no_grants()).expect_err("refused");
        assert_eq!(
            (failure.code, &failure.units[..]),
            (GuestError::SnapshotCorrupt, &["rtc".to_owned()][..])
        );
    }

    #[test]
    fn units_have_one_state_each() {
        let state = |names: &[&str]| SnapshotState {
            units: names.iter().map(|name| unit(name, "any.State", &[])).collect(),
            ..SnapshotState::default()
        };
        check_names(&state(&["a", "b"]), &granted("a", SavedStateKind::Saves)).expect("has one");
        check_names(&state(&["b"]), &granted("a", SavedStateKind::None)).expect("needs none");
        let twice = check_names(&state(&["a", "b", "a"]), &no_grants()).expect_err("refused");
        assert_eq!((twice.code, &twice.units[..]), (GuestError::SnapshotIncompatible, &["a".to_owned()][..]));
        let missing = check_names(&state(&["b"]), &granted("a", SavedStateKind::Saves)).expect_err("refused");
        assert_eq!(missing.detail, "the snapshot has no state of a");
    }
}
