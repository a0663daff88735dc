//! What became of a guest, as plain Rust: its events, and the transitions of its state units.

use crate::failure::lossy;
use crate::guest_capnp::{event, panic_report, transition, transition_end, unit_step};
use crate::state::{Panic, Phase, length, mirrored};
use crate::{Exit, Failure};
use capnp::struct_list;

/// Something that became of a guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Counts the guest's events from 0.
    pub sequence: u64,
    /// How many events before this one the subscriber asked for and did not get.
    pub missed: u64,
    /// When, in µs since 1970 (UTC).
    pub at_us: u64,
    /// What.
    pub kind: EventKind,
}

/// What became of a guest.
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    /// It entered this phase.
    Phase(Phase),
    /// A transition of all its state units has ended.
    Transition(TransitionEnd),
    /// It has ended; no event follows.
    Terminated(Exit),
    /// Its kernel has panicked.
    Panic(PanicReport),
    /// Its operator has pressed its power button.
    PowerButton,
}

/// What a guest has reported of its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PanicReport {
    /// The latest.
    pub panic: Panic,
    /// How many were reported since the event before, this one included.
    pub count: u32,
}

/// The end of a transition of all state units.
#[derive(Debug, Clone, PartialEq)]
pub struct TransitionEnd {
    /// start, pause, resume, reset or stop.
    pub operation: String,
    /// How long it took, µs.
    pub duration_us: u64,
    /// Why it failed, if it did.
    pub failure: Option<Failure>,
}

impl Event {
    /// Writes it into a message.
    pub fn write(&self, mut builder: event::Builder<'_>) {
        builder.set_sequence(self.sequence);
        builder.set_missed(self.missed);
        builder.set_at_us(self.at_us);
        match &self.kind {
            EventKind::Phase(phase) => builder.set_phase((*phase).into()),
            EventKind::Transition(end) => end.write(builder.init_transition()),
            EventKind::Terminated(exit) => exit.write(builder.init_terminated()),
            EventKind::Panic(report) => report.write(builder.init_panic()),
            EventKind::PowerButton => builder.set_power_button(()),
        }
    }

    /// Reads it from a message.
    pub fn read(reader: event::Reader<'_>) -> capnp::Result<Self> {
        let kind = match reader.which()? {
            event::Phase(phase) => EventKind::Phase(phase?.into()),
            event::Transition(end) => EventKind::Transition(TransitionEnd::read(end?)?),
            event::Terminated(exit) => EventKind::Terminated(Exit::read(exit?)?),
            event::Panic(report) => EventKind::Panic(PanicReport::read(report?)?),
            event::PowerButton(()) => EventKind::PowerButton,
        };
        Ok(Self {
            sequence: reader.get_sequence(),
            missed: reader.get_missed(),
            at_us: reader.get_at_us(),
            kind,
        })
    }
}

impl PanicReport {
    fn write(self, mut builder: panic_report::Builder<'_>) {
        builder.set_panic(Panic::to_wire(Some(self.panic)));
        builder.set_count(self.count);
    }

    fn read(reader: panic_report::Reader<'_>) -> capnp::Result<Self> {
        let panic = Panic::from_wire(reader.get_panic()?);
        let panic = panic.ok_or_else(|| capnp::Error::failed("a report of no panic".into()))?;
        Ok(Self { panic, count: reader.get_count() })
    }
}

impl TransitionEnd {
    fn write(&self, mut builder: transition_end::Builder<'_>) {
        builder.set_operation(&self.operation[..]);
        builder.set_duration_us(self.duration_us);
        if let Some(failure) = &self.failure {
            failure.write(builder.init_failure());
        }
    }

    fn read(reader: transition_end::Reader<'_>) -> capnp::Result<Self> {
        Ok(Self {
            operation: lossy(reader.get_operation()?),
            duration_us: reader.get_duration_us(),
            failure: reader.has_failure().then(|| Failure::read(reader.get_failure()?)).transpose()?,
        })
    }
}

/// One pass over the state units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// What the units were asked.
    pub operation: String,
    /// When it began, in µs since 1970 (UTC).
    pub began_at_us: u64,
    /// Those that take part, in the order of their addition.
    pub units: Vec<UnitStep>,
}

/// One unit's part in a pass. Times are µs since the pass began, and absent for what has not happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitStep {
    /// The unit.
    pub name: String,
    /// When the units that it waits for were done, and it was asked.
    pub ready_us: Option<u64>,
    /// When it took up the request.
    pub begun_us: Option<u64>,
    /// When it answered, or was passed over.
    pub ended_us: Option<u64>,
    /// How far it has come.
    pub outcome: StepOutcome,
    /// The error of one that failed; the units that a waiting one waits for, separated by ", ".
    pub detail: String,
}

mirrored! {
    /// How a unit's part in a pass ended, if it has.
    StepOutcome = unit_step::Outcome {
        Waiting "waiting", Asked "asked", Done "done", Failed "failed", Gone "gone", Removed "removed", Skipped "skipped",
        Late "late",
    }
}

impl Transition {
    /// Writes several into a message: `init` makes a list of a length.
    pub fn write_all<'a>(
        transitions: &[Self],
        init: impl FnOnce(u32) -> struct_list::Builder<'a, transition::Owned>,
    ) {
        let mut list = init(length(transitions));
        for (index, pass) in (0u32..).zip(transitions) {
            let mut builder = list.reborrow().get(index);
            builder.set_operation(&pass.operation[..]);
            builder.set_began_at_us(pass.began_at_us);
            let mut steps = builder.init_units(length(&pass.units));
            for (index, step) in (0u32..).zip(&pass.units) {
                step.write(steps.reborrow().get(index));
            }
        }
    }

    /// Reads several from a message.
    pub fn read_all(transitions: struct_list::Reader<'_, transition::Owned>) -> capnp::Result<Vec<Self>> {
        let read = |pass: transition::Reader<'_>| {
            Ok(Self {
                operation: lossy(pass.get_operation()?),
                began_at_us: pass.get_began_at_us(),
                units: pass.get_units()?.iter().map(UnitStep::read).collect::<capnp::Result<_>>()?,
            })
        };
        transitions.iter().map(read).collect()
    }
}

impl UnitStep {
    fn write(&self, mut builder: unit_step::Builder<'_>) {
        let offset = |time: Option<u64>| time.and_then(|us| i64::try_from(us).ok()).unwrap_or(-1);
        builder.set_name(&self.name[..]);
        builder.set_ready_us(offset(self.ready_us));
        builder.set_begun_us(offset(self.begun_us));
        builder.set_ended_us(offset(self.ended_us));
        builder.set_outcome(self.outcome.into());
        builder.set_detail(&self.detail[..]);
    }

    fn read(reader: unit_step::Reader<'_>) -> capnp::Result<Self> {
        let time = |offset: i64| u64::try_from(offset).ok();
        Ok(Self {
            name: lossy(reader.get_name()?),
            ready_us: time(reader.get_ready_us()),
            begun_us: time(reader.get_begun_us()),
            ended_us: time(reader.get_ended_us()),
            outcome: reader.get_outcome()?.into(),
            detail: lossy(reader.get_detail()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestError;
    use capnp::message::Builder;

    fn over_the_wire(event: &Event) -> Event {
        let mut message = Builder::new_default();
        event.write(message.init_root());
        Event::read(message.get_root_as_reader().expect("an event")).expect("readable")
    }

    #[test]
    fn events_survive_the_wire() {
        let failure = Failure::new(GuestError::TransitionTimedOut, "serial is late");
        let end = |failure| TransitionEnd { operation: "pause".into(), duration_us: 12, failure };
        let kinds = [
            EventKind::Phase(Phase::Stopping),
            EventKind::Transition(end(None)),
            EventKind::Transition(end(Some(failure.clone()))),
            EventKind::Terminated(Exit::crashed(&failure)),
            EventKind::Panic(PanicReport { panic: Panic::Panicked, count: 1 }),
            EventKind::Panic(PanicReport { panic: Panic::CrashLoaded, count: u32::MAX }),
            EventKind::PowerButton,
        ];
        for (sequence, kind) in (7..).zip(kinds) {
            let event = Event { sequence, missed: 3, at_us: 1_700_000_000_000_000, kind };
            assert_eq!(over_the_wire(&event), event);
        }
    }

    #[test]
    fn what_has_not_happened_stays_absent() {
        let step = UnitStep {
            name: "vps".into(),
            ready_us: Some(0),
            begun_us: Some(5),
            ended_us: None,
            outcome: StepOutcome::Asked,
            detail: String::new(),
        };
        let passes = [Transition { operation: "start".into(), began_at_us: 9, units: vec![step] }];
        let mut message = Builder::new_default();
        let mut results: crate::guest_capnp::observer::timeline_results::Builder<'_> = message.init_root();
        Transition::write_all(&passes, |count| results.reborrow().init_transitions(count));
        let read = results.into_reader().get_transitions().and_then(Transition::read_all);
        assert_eq!(read.expect("readable"), passes);
    }
}
