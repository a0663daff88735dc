//! What an observer sees of a guest, as plain Rust.

use crate::failure::lossy;
use crate::guest_capnp::{guest_state, vp_status};

macro_rules! mirrored {
    ($(#[$doc:meta])* $name:ident = $wire:path { $($variant:ident $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[expect(missing_docs, reason = "guest.capnp documents them")]
        pub enum $name { $($variant,)* }

        impl $name {
            /// The name in the schema.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl From<$name> for $wire {
            fn from(value: $name) -> Self {
                match value { $($name::$variant => Self::$variant,)* }
            }
        }

        impl From<$wire> for $name {
            fn from(value: $wire) -> Self {
                match value { $(<$wire>::$variant => Self::$variant,)* }
            }
        }
    };
}

mirrored! {
    /// Where a guest is in its life.
    Phase = guest_state::Phase {
        Empty "empty", Creating "creating", Created "created", Running "running", Paused "paused",
        Stopping "stopping", Faulted "faulted", Terminated "terminated",
    }
}

mirrored! {
    /// What a VP is doing.
    VpState = vp_status::State {
        Stopped "stopped", Running "running", Halted "halted", WaitForSipi "waitForSipi", Failed "failed",
        Unanswered "unanswered",
    }
}

/// A state unit as an observer sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitStatus {
    /// Its name.
    pub name: String,
    /// Its state, in the words of the unit set.
    pub state: String,
    /// The units it depends on.
    pub depends_on: Vec<String>,
}

/// What an observer sees of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestState {
    /// Where it is in its life.
    pub phase: Phase,
    /// Its VPs, in order.
    pub vps: Vec<VpState>,
    /// Its state units.
    pub units: Vec<UnitStatus>,
    /// Time since run began, µs.
    pub uptime_us: u64,
    /// How often it was reset.
    pub resets: u32,
}

impl GuestState {
    /// Writes it into a message.
    pub fn write(&self, mut builder: guest_state::Builder<'_>) {
        builder.set_phase(self.phase.into());
        let mut vps = builder.reborrow().init_vps(u32::try_from(self.vps.len()).unwrap_or(u32::MAX));
        for (index, state) in (0u32..).zip(&self.vps) {
            let mut vp = vps.reborrow().get(index);
            vp.set_index(index);
            vp.set_state((*state).into());
        }
        let mut units = builder.reborrow().init_units(u32::try_from(self.units.len()).unwrap_or(u32::MAX));
        for (index, unit) in (0u32..).zip(&self.units) {
            let mut status = units.reborrow().get(index);
            status.set_name(&unit.name[..]);
            status.set_state(&unit.state[..]);
            let count = u32::try_from(unit.depends_on.len()).unwrap_or(u32::MAX);
            let mut names = status.init_depends_on(count);
            for (index, name) in (0u32..).zip(&unit.depends_on) {
                names.set(index, &name[..]);
            }
        }
        builder.set_uptime_us(self.uptime_us);
        builder.set_resets(self.resets);
    }

    /// Reads it from a message.
    pub fn read(reader: guest_state::Reader<'_>) -> capnp::Result<Self> {
        let vps =
            reader.get_vps()?.iter().map(|vp| Ok(vp.get_state()?.into())).collect::<capnp::Result<_>>()?;
        let mut units = Vec::new();
        for unit in reader.get_units()?.iter() {
            let names = unit.get_depends_on()?.iter().map(|name| name.map(lossy));
            units.push(UnitStatus {
                name: lossy(unit.get_name()?),
                state: lossy(unit.get_state()?),
                depends_on: names.collect::<Result<_, _>>()?,
            });
        }
        let phase = reader.get_phase()?.into();
        Ok(Self { phase, vps, units, uptime_us: reader.get_uptime_us(), resets: reader.get_resets() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_survives_the_wire() {
        let state = GuestState {
            phase: Phase::Paused,
            vps: vec![VpState::Stopped, VpState::WaitForSipi],
            units: vec![UnitStatus {
                name: "vps".into(),
                state: "running".into(),
                depends_on: vec!["serial".into()],
            }],
            uptime_us: 7,
            resets: 1,
        };
        let mut message = capnp::message::Builder::new_default();
        state.write(message.init_root());
        assert_eq!(
            GuestState::read(message.get_root_as_reader().expect("a state")).expect("readable"),
            state
        );
    }
}
