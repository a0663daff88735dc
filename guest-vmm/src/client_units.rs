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
        let mut found = faults_of_one(unit);
        if !ids.insert(&unit.id) {
            found.push(ConfigFault::new("id", format!("{:?} is there before", unit.id)));
        }
        let place =
            |fault: ConfigFault| ConfigFault::new(format!("units[{index}].{}", fault.field), fault.problem);
        faults.extend(found.into_iter().map(place));
    }
    faults
}

fn faults_of_one(unit: &UnitConfig) -> Vec<ConfigFault> {
    let mut faults = Vec::new();
    let id = &unit.id;
    let plain = id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if id.is_empty() || id.len() > MAX_ID || !plain {
        let shown: String = id.chars().take(MAX_ID).collect();
        let problem = format!("{shown:?} is not 1 to {MAX_ID} letters, digits, '-', '_' and '.'");
        faults.push(ConfigFault::new("id", problem));
    }
    if unit.deadline_ms == 0 {
        faults.push(ConfigFault::new("deadlineMs", "0 is no time"));
    }
    faults
}

/// The units that have joined a machine, in their order. They leave it when this is dropped.
#[derive(Default)]
pub(crate) struct ClientUnits(Vec<Member>);

struct Member {
    id: String,
    unit: RemoteUnit,
    /// Whether it needs the VPs, itself or through others: then they cannot need it.
    needs_vps: bool,
}

impl ClientUnits {
    /// Adds the units of a config, whose faults were looked for, to the machine's. On an error none is added, and every fault
    /// is listed.
    pub fn join(machine: &Machine, units: Vec<UnitConfig>) -> Result<Self, Failure> {
        let mut joined = Self::default();
        let mut faults = Vec::new();
        for (index, config) in units.into_iter().enumerate() {
            if let Err(fault) = joined.add(machine, config) {
                faults.push(fault.of_unit(index));
            }
        }
        crate::config::refused(&faults).map_or(Ok(joined), Err)
    }

    /// Adds one more unit, stopped.
    pub fn join_one(&mut self, machine: &Machine, config: UnitConfig) -> Result<(), Failure> {
        self.0.retain(|member| !member.unit.is_evicted());
        let mut found = faults_of_one(&config);
        if self.0.len() == MAX_UNITS {
            found.push(ConfigFault::new("units", format!("there are {MAX_UNITS} already")));
        }
        if found.is_empty()
            && let Err(fault) = self.add(machine, config)
        {
            found.push(fault);
        }
        crate::config::refused(&found).map_or(Ok(()), Err)
    }

    /// Takes the last one out again.
    pub fn drop_last(&mut self) {
        self.0.pop();
    }

    fn add(&mut self, machine: &Machine, config: UnitConfig) -> Result<(), ConfigFault> {
        let mut builder = machine.add_unit(&config.id);
        let mut needs_vps = false;
        for name in &config.depends_on {
            let (with_edge, behind) = self.depend(machine, builder, name).ok_or_else(|| {
                let problem = format!("there is no unit {name:?} among the guest's and those before");
                ConfigFault::new("dependsOn", problem)
            })?;
            builder = with_edge;
            needs_vps |= behind;
        }
        if !needs_vps && let Some(vps) = machine.unit(VPS) {
            builder = builder.dependency_of(vps);
        }
        let UnitConfig { id, unit, deadline_ms, when_lost, saved_state, depends_on: _ } = config;
        let options = options(deadline_ms, when_lost, saved_state);
        let unit = RemoteUnit::join(builder, unit, options).map_err(|error| {
            let field = if matches!(error, BuildError::NameInUse(_)) { "id" } else { "dependsOn" };
            ConfigFault::new(field, error.to_string())
        })?;
        self.0.push(Member { id, unit, needs_vps });
        Ok(())
    }

    /// An edge to the unit of this name, and whether that needs the VPs; nothing if there is no such unit.
    fn depend<'a>(
        &self,
        machine: &Machine,
        builder: UnitBuilder<'a>,
        name: &str,
    ) -> Option<(UnitBuilder<'a>, bool)> {
        if let Some(own) = machine.unit(name) {
            return Some((builder.depends_on(own), name == VPS));
        }
        let member = self.0.iter().find(|member| member.id == name)?;
        let builder = member.unit.with_handle(|handle| builder.depends_on(handle))?;
        Some((builder, member.needs_vps))
    }
}

fn options(deadline_ms: u32, when_lost: LossPolicy, saved_state: SavedStateKind) -> RemoteUnitOptions {
    RemoteUnitOptions {
        deadline: Duration::from_millis(deadline_ms.into()),
        when_lost: match when_lost {
            LossPolicy::Fault => WhenLost::Fault,
            LossPolicy::Evict => WhenLost::Evict,
        },
        saves: match saved_state {
            SavedStateKind::None => SaveSupport::Stateless,
            SavedStateKind::Saves => SaveSupport::Saves,
            SavedStateKind::Refused => {
                SaveSupport::Refused("its client has declared that it cannot be saved".into())
            }
        },
    }
}
