//! State units that a client implements, as plain Rust.

use crate::config::ConfigFault;
use crate::config_capnp::{state_unit, unit_config};
use crate::failure::lossy;
use crate::state::{length, mirrored};
use crate::{config_capnp as wire, state};
use capnp::struct_list;
use std::fmt;

mirrored! {
    /// What becomes of a transition whose unit is late or lost.
    LossPolicy = wire::LossPolicy { Fault "fault", Evict "evict", }
}

mirrored! {
    /// Whether a unit can be saved.
    SavedStateKind = wire::SavedStateKind { None "none", Saves "saves", Refused "refused", }
}

/// A state unit that a client implements.
#[derive(Clone)]
pub struct UnitConfig {
    /// Its name among the guest's units.
    pub id: String,
    /// The units that it needs, by name: the guest's own, and those before it in the list.
    pub depends_on: Vec<String>,
    /// How long it may take to answer, ms.
    pub deadline_ms: u32,
    /// What happens after that, or when its connection is lost.
    pub when_lost: LossPolicy,
    /// Whether it can be saved.
    pub saved_state: SavedStateKind,
    /// The unit.
    pub unit: state_unit::Client,
}

/// The capability has nothing to show.
impl fmt::Debug for UnitConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnitConfig")
            .field("id", &self.id)
            .field("depends_on", &self.depends_on)
            .field("deadline_ms", &self.deadline_ms)
            .field("when_lost", &self.when_lost)
            .field("saved_state", &self.saved_state)
            .finish_non_exhaustive()
    }
}

impl UnitConfig {
    /// A unit that needs none of the others, has 5 s for each answer, fails the transition when it is lost, and has nothing to
    /// save.
    pub fn new(id: impl Into<String>, unit: state_unit::Client) -> Self {
        Self {
            id: id.into(),
            depends_on: Vec::new(),
            deadline_ms: 5000,
            when_lost: LossPolicy::Fault,
            saved_state: SavedStateKind::None,
            unit,
        }
    }

    /// Writes it into a message.
    pub fn write(&self, mut builder: unit_config::Builder<'_>) {
        builder.set_id(&self.id[..]);
        builder.set_deadline_ms(self.deadline_ms);
        builder.set_when_lost(self.when_lost.into());
        builder.set_saved_state(self.saved_state.into());
        builder.set_unit(self.unit.clone());
        state::write_names(&self.depends_on, builder.init_depends_on(length(&self.depends_on)));
    }

    /// Reads it from a message. Faults are what makes no sense there; they are never empty.
    pub fn read(unit: unit_config::Reader<'_>) -> capnp::Result<Result<Self, Vec<ConfigFault>>> {
        let mut faults = Vec::new();
        let mut fault = |field: &str, problem: String| faults.push(ConfigFault::new(field, problem));
        let when_lost = unit.get_when_lost().map(LossPolicy::from);
        let saved_state = unit.get_saved_state().map(SavedStateKind::from);
        if let Err(unknown) = &when_lost {
            fault("whenLost", format!("unknown value {}", unknown.0));
        }
        if let Err(unknown) = &saved_state {
            fault("savedState", format!("unknown value {}", unknown.0));
        }
        if !unit.has_unit() {
            fault("unit", "none was given".into());
        }
        let (Ok(when_lost), Ok(saved_state), true) = (when_lost, saved_state, unit.has_unit()) else {
            return Ok(Err(faults));
        };
        let read = Self {
            id: lossy(unit.get_id()?),
            depends_on: state::read_names(unit.get_depends_on()?)?,
            deadline_ms: unit.get_deadline_ms(),
            when_lost,
            saved_state,
            unit: unit.get_unit()?,
        };
        Ok(Ok(read))
    }

    pub(crate) fn write_all<'a>(
        units: &[Self],
        init: impl FnOnce(u32) -> struct_list::Builder<'a, unit_config::Owned>,
    ) {
        let mut list = init(length(units));
        for (index, unit) in (0u32..).zip(units) {
            unit.write(list.reborrow().get(index));
        }
    }

    pub(crate) fn read_all(
        units: struct_list::Reader<'_, unit_config::Owned>,
        faults: &mut Vec<ConfigFault>,
    ) -> capnp::Result<Vec<Self>> {
        let mut all = Vec::new();
        for (index, unit) in units.iter().enumerate() {
            match Self::read(unit)? {
                Ok(unit) => all.push(unit),
                Err(found) => faults.extend(found.into_iter().map(|fault| fault.of_unit(index))),
            }
        }
        Ok(all)
    }
}
