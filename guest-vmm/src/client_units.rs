//! State units that a client implements, joined to the machine's own.

use guest_schema::{ConfigFault, Failure, LossPolicy, SavedStateKind, UnitConfig};
use machine::{Machine, VPS};
use remote_unit::{RemoteUnit, RemoteUnitOptions, WhenLost};
use state_unit::{BuildError, SaveSupport, UnitBuilder};
use std::collections::HashSet;
use std::time::Duration;

const MAX_UNITS: usize = 64;

/// The longest name, in bytes.
const MAX_ID: usize = 64;

/// What is wrong with the units by themselves.
pub(crate) fn faults(units: &[UnitConfig]) -> Vec<ConfigFault> {
    let mut faults = Vec::new();
    if units.len() > MAX_UNITS {
        faults.push(ConfigFault::new("units", format!("{} are more than {MAX_UNITS}", units.len())));
    }
    let mut ids = HashSet::new();
    for (index, unit) in units.iter().enumerate() {
        let mut fault = |field: &str, problem: String| {
            faults.push(ConfigFault::new(format!("units[{index}].{field}"), problem))
        };
        let id = &unit.id;
        let plain = id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        if id.is_empty() || id.len() > MAX_ID || !plain {
            let shown: String = id.chars().take(MAX_ID).collect();
            fault("id", format!("{shown:?} is not 1 to {MAX_ID} letters, digits, '-', '_' and '.'"));
        } else if !ids.insert(id) {
            fault("id", format!("{id:?} is there before"));
        }
        if unit.deadline_ms == 0 {
            fault("deadlineMs", "0 is no time".into());
        }
    }
    faults
}

/// The units that have joined, in their order.
pub(crate) type Joined = Vec<RemoteUnit>;

/// Adds the units to the machine's. On an error none is added, and every fault is listed.
pub(crate) fn join(machine: &Machine, units: Vec<UnitConfig>) -> Result<Joined, Failure> {
    let mut joined: Vec<Member> = Vec::new();
    let mut faults = Vec::new();
    for (index, config) in units.into_iter().enumerate() {
        match add(machine, &joined, config) {
            Ok(member) => joined.push(member),
            Err((field, problem)) => {
                faults.push(ConfigFault::new(format!("units[{index}].{field}"), problem));
            }
        }
    }
    match crate::config::refused(&faults) {
        Some(failure) => Err(failure),
        None => Ok(joined.into_iter().map(|member| member.unit).collect()),
    }
}

struct Member {
    id: String,
    unit: RemoteUnit,
    /// Whether it needs the VPs, itself or through others: then they cannot need it.
    needs_vps: bool,
}

fn add(machine: &Machine, joined: &[Member], config: UnitConfig) -> Result<Member, (&'static str, String)> {
    let mut builder = machine.add_unit(&config.id);
    let mut needs_vps = false;
    for name in &config.depends_on {
        let (with_edge, behind) = depend(machine, joined, builder, name).ok_or_else(|| {
            ("dependsOn", format!("there is no unit {name:?} among the guest's and those before"))
        })?;
        builder = with_edge;
        needs_vps |= behind;
    }
    if !needs_vps && let Some(vps) = machine.unit(VPS) {
        builder = builder.dependency_of(vps);
    }
    let options = RemoteUnitOptions {
        deadline: Duration::from_millis(config.deadline_ms.into()),
        when_lost: match config.when_lost {
            LossPolicy::Fault => WhenLost::Fault,
            LossPolicy::Evict => WhenLost::Evict,
        },
        saves: match config.saved_state {
            SavedStateKind::None => SaveSupport::Stateless,
            SavedStateKind::Saves => SaveSupport::Saves,
            SavedStateKind::Refused => {
                SaveSupport::Refused("its client has declared that it cannot be saved".into())
            }
        },
    };
    let unit = RemoteUnit::join(builder, config.unit, options).map_err(|error| {
        let field = if matches!(error, BuildError::NameInUse(_)) { "id" } else { "dependsOn" };
        (field, error.to_string())
    })?;
    Ok(Member { id: config.id, unit, needs_vps })
}

/// An edge to the unit of this name, and whether that needs the VPs; nothing if there is no such unit.
fn depend<'a>(
    machine: &Machine,
    joined: &[Member],
    builder: UnitBuilder<'a>,
    name: &str,
) -> Option<(UnitBuilder<'a>, bool)> {
    if let Some(own) = machine.unit(name) {
        return Some((builder.depends_on(own), name == VPS));
    }
    let member = joined.iter().find(|member| member.id == name)?;
    let builder = member.unit.with_handle(|handle| builder.depends_on(handle))?;
    Some((builder, member.needs_vps))
}
