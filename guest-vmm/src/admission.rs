//! What may be asked of a guest when: the table of the lifecycle protocol, and nothing else.
//!
//! No I/O, no locks, no guest: the driver asks what to do with a request in its present phase and does it. Requests that have to
//! wait are queued by the driver in the order in which they came, and asked about again when the phase has changed.

use guest_schema::{GuestError, Phase as ObservedPhase};

/// Where the guest is, as far as admission is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// There is no VMM.
    Empty,
    /// A VMM is being made.
    Creating,
    /// There is a VMM, and no VP runs yet.
    Created,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// A transition between running and paused, or a reset, is under way.
    Changing,
    /// The VMM is being taken down.
    Stopping,
    /// A transition failed and could not be undone.
    Faulted,
}

impl Phase {
    /// What an observer calls it.
    pub fn observed(self) -> ObservedPhase {
        match self {
            Self::Empty => ObservedPhase::Empty,
            Self::Creating => ObservedPhase::Creating,
            Self::Created => ObservedPhase::Created,
            Self::Running | Self::Changing => ObservedPhase::Running,
            Self::Paused => ObservedPhase::Paused,
            Self::Stopping => ObservedPhase::Stopping,
            Self::Faulted => ObservedPhase::Faulted,
        }
    }
}

/// What is asked of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Make a VMM.
    Create,
    /// Hand out a capability to the guest, or to its control.
    Bind,
    /// Start the guest.
    Run,
    /// End the guest by force.
    Stop,
    /// Stop VPs and devices, to go on later.
    Pause,
    /// Go on.
    Resume,
    /// Reset the guest.
    Reset,
    /// Keep the guest as it is at this moment.
    Snapshot,
    /// Let a client's unit join the guest's.
    AddUnit,
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no VMM.
    #[error("no guest was created")]
    NotCreated,
    /// There is one, and it was started.
    #[error("the guest was started already")]
    AlreadyRunning,
    /// The guest does not run, or is not paused.
    #[error("{0}")]
    NotRunning(&'static str),
    /// Only stop is legal.
    #[error("a transition failed: only stop is possible")]
    Faulted,
}

impl Refusal {
    /// The protocol's code for it.
    pub fn code(self) -> GuestError {
        match self {
            Self::NotCreated => GuestError::NotCreated,
            Self::AlreadyRunning => GuestError::AlreadyRunning,
            Self::NotRunning(_) => GuestError::NotRunning,
            Self::Faulted => GuestError::Faulted,
        }
    }
}

/// What the driver is to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Do it.
    Act,
    /// It is done already: answer ok.
    Done,
    /// Take down the VMM that there is, then do it.
    Replace,
    /// End what is under way and everything that waits for it, then answer.
    Cancel,
    /// Answer when the VMM is gone.
    Join,
    /// Ask again when the phase has changed.
    Wait,
    /// Answer with this.
    Refuse(Refusal),
}

/// The table. Rows are phases, columns are requests.
pub fn admit(phase: Phase, request: Request) -> Verdict {
    use Phase::{Changing, Created, Creating, Empty, Faulted, Paused, Running, Stopping};
    use Request::{AddUnit, Bind, Create, Pause, Reset, Resume, Run, Snapshot, Stop};
    use Verdict::{Act, Cancel, Done, Join, Refuse, Replace, Wait};
    match (phase, request) {
        (Creating, Stop) => Cancel,
        (Creating, _) => Wait,

        (Stopping, Create) => Wait,
        (Stopping, Stop) => Join,

        (Empty, Create) | (Created, Run) => Act,
        (Created, Create) => Replace,
        (Empty, Run) | (Empty | Stopping, Bind) => Refuse(Refusal::NotCreated),
        (_, Create | Run) => Refuse(Refusal::AlreadyRunning),
        (Created | Running | Paused | Changing | Faulted, Bind) => Act,

        (Empty, Stop) => Done,
        (Changing, Stop | Pause | Resume | Reset | Snapshot | AddUnit) => Wait,
        (Created | Running | Paused | Faulted, Stop) => Act,

        (Created | Running | Paused, AddUnit) => Act,
        (Faulted, Pause | Resume | Reset | Snapshot | AddUnit) => Refuse(Refusal::Faulted),
        (Running, Pause | Reset | Snapshot) | (Paused, Resume | Reset | Snapshot) => Act,
        (Paused, Pause) => Done,
        (Running, Resume) => Refuse(Refusal::NotRunning("the guest is not paused")),
        (Empty | Stopping, AddUnit) | (Empty | Created | Stopping, Pause | Resume | Reset | Snapshot) => {
            Refuse(Refusal::NotRunning("the guest does not run"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PHASES: [Phase; 8] = [
        Phase::Empty,
        Phase::Creating,
        Phase::Created,
        Phase::Running,
        Phase::Paused,
        Phase::Changing,
        Phase::Stopping,
        Phase::Faulted,
    ];

    /// The protocol's table, in its own words; `Changing` stands for the moments between its rows.
    const TABLE: &str = "
        phase    | create         | bind       | run            | stop
        empty    | act            | notCreated | notCreated     | done
        creating | wait           | wait       | wait           | cancel
        created  | replace        | act        | act            | act
        running  | alreadyRunning | act        | alreadyRunning | act
        paused   | alreadyRunning | act        | alreadyRunning | act
        changing | alreadyRunning | act        | alreadyRunning | wait
        stopping | wait           | notCreated | alreadyRunning | join
        faulted  | alreadyRunning | act        | alreadyRunning | act
    ";

    fn word(verdict: Verdict) -> &'static str {
        match verdict {
            Verdict::Act => "act",
            Verdict::Done => "done",
            Verdict::Replace => "replace",
            Verdict::Cancel => "cancel",
            Verdict::Join => "join",
            Verdict::Wait => "wait",
            Verdict::Refuse(refusal) => refusal.code().name(),
        }
    }

    #[test]
    fn the_table_is_the_protocols() {
        let rows: Vec<Vec<&str>> = TABLE
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(|line| line.split('|').map(str::trim).collect())
            .collect();
        assert_eq!(rows[0][1..], ["create", "bind", "run", "stop"]);
        let requests = [Request::Create, Request::Bind, Request::Run, Request::Stop];
        for (row, phase) in rows[1..].iter().zip(PHASES) {
            assert_eq!(row[0], format!("{phase:?}").to_lowercase());
            let words: Vec<&str> = requests.iter().map(|request| word(admit(phase, *request))).collect();
            assert_eq!(words, row[1..], "{phase:?}");
        }
    }

    #[test]
    fn pause_resume_reset_and_snapshot_need_a_guest_that_runs_or_is_paused() {
        for phase in PHASES {
            for request in [Request::Pause, Request::Resume, Request::Reset, Request::Snapshot] {
                let allowed = matches!(admit(phase, request), Verdict::Act | Verdict::Done);
                let fits = match phase {
                    Phase::Running => request != Request::Resume,
                    Phase::Paused => true,
                    _ => false,
                };
                assert_eq!(allowed, fits, "{phase:?} {request:?}");
            }
        }
    }

    #[test]
    fn a_unit_may_join_any_guest_that_is_in_order() {
        for phase in PHASES {
            let expected = match phase {
                Phase::Created | Phase::Running | Phase::Paused => "act",
                Phase::Creating | Phase::Changing => "wait",
                Phase::Empty | Phase::Stopping => "notRunning",
                Phase::Faulted => "faulted",
            };
            assert_eq!(word(admit(phase, Request::AddUnit)), expected, "{phase:?}");
        }
    }

    /// A model of a guest that does everything at once: what a driver's phase does between two requests.
    fn after(phase: Phase, request: Request, verdict: Verdict) -> Phase {
        match (verdict, request) {
            (Verdict::Act | Verdict::Replace, Request::Create) => Phase::Creating,
            (Verdict::Act, Request::Run | Request::Resume) => Phase::Running,
            (Verdict::Act, Request::Pause) => Phase::Paused,
            (Verdict::Act | Verdict::Cancel, Request::Stop) => Phase::Stopping,
            _ => phase,
        }
    }

    fn settle(phase: Phase) -> Phase {
        match phase {
            Phase::Creating => Phase::Created,
            Phase::Stopping => Phase::Empty,
            other => other,
        }
    }

    proptest! {
        #[test]
        fn whatever_is_asked_stop_leads_to_empty_and_create_to_a_guest(requests in prop::collection::vec(0usize..9, 0..40)) {
            let all = [
                Request::Create, Request::Bind, Request::Run, Request::Stop, Request::Pause, Request::Resume, Request::Reset,
                Request::Snapshot, Request::AddUnit,
            ];
            let mut phase = Phase::Empty;
            for request in requests.into_iter().map(|index| all[index]) {
                let verdict = admit(phase, request);
                let started = matches!(phase, Phase::Running | Phase::Paused);
                if started && matches!(request, Request::Create | Request::Run) {
                    prop_assert_eq!(verdict, Verdict::Refuse(Refusal::AlreadyRunning));
                }
                phase = settle(after(phase, request, verdict));
            }
            let stopped = settle(after(phase, Request::Stop, admit(phase, Request::Stop)));
            prop_assert_eq!(stopped, Phase::Empty);
            prop_assert_eq!(admit(stopped, Request::Create), Verdict::Act);
            prop_assert_eq!(admit(stopped, Request::Run), Verdict::Refuse(Refusal::NotCreated));
        }
    }
}
