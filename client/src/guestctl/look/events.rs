//! Events as lines for people and for programs.

use guest_client::{Event, EventKind, Panic, PanicReport};
use serde_json::{Value, json};

/// One line for people: when (UTC), and what.
pub fn line(event: &Event) -> String {
    let missed = match event.missed {
        0 => String::new(),
        count => format!("({count} events were missed)\n"),
    };
    format!("{missed}{}  {:>5}  {}\n", time_of_day(event.at_us), event.sequence, what(&event.kind))
}

fn what(kind: &EventKind) -> String {
    match kind {
        EventKind::Phase(phase) => phase.name().to_owned(),
        EventKind::Transition(end) => {
            let how = end.failure.as_ref().map_or("done".to_owned(), |failure| failure.chain());
            format!("{} ({} µs): {how}", end.operation, end.duration_us)
        }
        EventKind::Terminated(exit) => {
            let detail = if exit.detail.is_empty() { String::new() } else { format!(": {}", exit.detail) };
            format!("terminated, {}{detail}", exit.outcome.name())
        }
        EventKind::Panic(PanicReport { panic, count: 1 }) => format!("panic: {}", panic.name()),
        EventKind::Panic(PanicReport { panic, count }) => format!("panic: {}, {count} reports", panic.name()),
        EventKind::PowerButton => "power button pressed".to_owned(),
    }
}

fn time_of_day(at_us: u64) -> String {
    let (seconds, micros) = (at_us / 1_000_000, at_us % 1_000_000);
    format!("{:02}:{:02}:{:02}.{micros:06}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

/// One JSON object on one line.
pub fn as_json(event: &Event) -> String {
    let mut object = json!({"sequence": event.sequence, "missed": event.missed, "at_us": event.at_us});
    object["event"] = match &event.kind {
        EventKind::Phase(phase) => json!({"phase": phase.name()}),
        EventKind::Transition(end) => json!({
            "transition": end.operation,
            "duration_us": end.duration_us,
            "failure": end.failure.as_ref().map_or(Value::Null, |failure| json!(failure.chain())),
        }),
        EventKind::Terminated(exit) => json!({
            "terminated": exit.outcome.name(), "detail": exit.detail, "panic": exit.panic.map(Panic::name),
            "panics": exit.panics, "debug_exit": exit.debug_exit,
        }),
        EventKind::Panic(report) => json!({"panic": report.panic.name(), "count": report.count}),
        EventKind::PowerButton => json!({"power_button": "pressed"}),
    };
    format!("{object}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_client::{Exit, Failure, GuestError, Phase, TransitionEnd};

    fn event(kind: EventKind) -> Event {
        Event { sequence: 4, missed: 0, at_us: 3_723_000_042, kind }
    }

    #[test]
    fn lines_say_when_and_what() {
        let failure = Failure::new(GuestError::TransitionTimedOut, "serial is late");
        let end = TransitionEnd { operation: "pause".into(), duration_us: 9, failure: Some(failure.clone()) };
        let cases = [
            (EventKind::Phase(Phase::Running), "01:02:03.000042      4  running\n".to_owned()),
            (
                EventKind::Transition(end),
                format!("01:02:03.000042      4  pause (9 µs): {}\n", failure.chain()),
            ),
            (
                EventKind::Terminated(Exit::clean("it powered off")),
                "01:02:03.000042      4  terminated, clean: it powered off\n".to_owned(),
            ),
            (EventKind::PowerButton, "01:02:03.000042      4  power button pressed\n".to_owned()),
            (
                EventKind::Panic(PanicReport { panic: Panic::Panicked, count: 1 }),
                "01:02:03.000042      4  panic: panicked\n".to_owned(),
            ),
            (
                EventKind::Panic(PanicReport { panic: Panic::CrashLoaded, count: 3 }),
                "01:02:03.000042      4  panic: crashLoaded, 3 reports\n".to_owned(),
            ),
        ];
        for (kind, expected) in cases {
            assert_eq!(line(&event(kind)), expected);
        }
    }

    #[test]
    fn a_gap_is_told() {
        let event = Event { missed: 7, ..event(EventKind::Phase(Phase::Paused)) };
        assert!(line(&event).starts_with("(7 events were missed)\n"));
    }

    #[test]
    fn json_is_one_object_a_line() {
        let text = as_json(&event(EventKind::Phase(Phase::Paused)));
        let value: Value = serde_json::from_str(&text).expect("JSON");
        let expected =
            json!({"sequence": 4, "missed": 0, "at_us": 3_723_000_042u64, "event": {"phase": "paused"}});
        assert_eq!(value, expected);
        assert_eq!(text.matches('\n').count(), 1);
    }
}
