//! What an observer sees of a guest, as plain Rust.

use crate::failure::lossy;
use crate::guest_capnp::{self, guest_state, unit_status, vp_status};
use capnp::{struct_list, text_list};

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

pub(crate) use mirrored;

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
        Unanswered "unanswered", Debugged "debugged",
    }
}

/// What a guest reports of its own kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Panic {
    /// It has panicked.
    Panicked,
    /// It has panicked, and goes on with a crash kernel.
    CrashLoaded,
}

impl Panic {
    /// The name in the schema.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Panicked => "panicked",
            Self::CrashLoaded => "crashLoaded",
        }
    }

    pub(crate) fn to_wire(panic: Option<Self>) -> guest_capnp::Panic {
        match panic {
            None => guest_capnp::Panic::None,
            Some(Self::Panicked) => guest_capnp::Panic::Panicked,
            Some(Self::CrashLoaded) => guest_capnp::Panic::CrashLoaded,
        }
    }

    pub(crate) fn from_wire(panic: guest_capnp::Panic) -> Option<Self> {
        match panic {
            guest_capnp::Panic::None => None,
            guest_capnp::Panic::Panicked => Some(Self::Panicked),
            guest_capnp::Panic::CrashLoaded => Some(Self::CrashLoaded),
        }
    }
}

mirrored! {
    /// How an inspection tree is rendered.
    Rendering = guest_capnp::Rendering { Json "json", Text "text", }
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
    /// The units that it waits for in the transition under way.
    pub waits_for: Vec<String>,
}

impl UnitStatus {
    /// Writes several into a message: `init` makes a list of a length.
    pub fn write_all<'a>(
        units: &[Self],
        init: impl FnOnce(u32) -> struct_list::Builder<'a, unit_status::Owned>,
    ) {
        let mut list = init(length(units));
        for (index, unit) in (0u32..).zip(units) {
            let mut status = list.reborrow().get(index);
            status.set_name(&unit.name[..]);
            status.set_state(&unit.state[..]);
            write_names(&unit.depends_on, status.reborrow().init_depends_on(length(&unit.depends_on)));
            write_names(&unit.waits_for, status.init_waits_for(length(&unit.waits_for)));
        }
    }

    /// Reads several from a message.
    pub fn read_all(units: struct_list::Reader<'_, unit_status::Owned>) -> capnp::Result<Vec<Self>> {
        let read = |unit: unit_status::Reader<'_>| {
            Ok(Self {
                name: lossy(unit.get_name()?),
                state: lossy(unit.get_state()?),
                depends_on: read_names(unit.get_depends_on()?)?,
                waits_for: read_names(unit.get_waits_for()?)?,
            })
        };
        units.iter().map(read).collect()
    }
}

/// How long a list of these is in a message.
pub(crate) fn length<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).unwrap_or(u32::MAX)
}

pub(crate) fn write_names(names: &[String], mut list: text_list::Builder<'_>) {
    for (index, name) in (0u32..).zip(names) {
        list.set(index, &name[..]);
    }
}

pub(crate) fn read_names(names: text_list::Reader<'_>) -> capnp::Result<Vec<String>> {
    names.iter().map(|name| name.map(lossy)).collect()
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
        let mut vps = builder.reborrow().init_vps(length(&self.vps));
        for (index, state) in (0u32..).zip(&self.vps) {
            let mut vp = vps.reborrow().get(index);
            vp.set_index(index);
            vp.set_state((*state).into());
        }
        UnitStatus::write_all(&self.units, |count| builder.reborrow().init_units(count));
        builder.set_uptime_us(self.uptime_us);
        builder.set_resets(self.resets);
    }

    /// Reads it from a message.
    pub fn read(reader: guest_state::Reader<'_>) -> capnp::Result<Self> {
        let vps =
            reader.get_vps()?.iter().map(|vp| Ok(vp.get_state()?.into())).collect::<capnp::Result<_>>()?;
        let units = UnitStatus::read_all(reader.get_units()?)?;
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
                waits_for: vec!["memory".into(), "ioapic".into()],
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
