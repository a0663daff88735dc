//! Transitions as a table, and as a trace for a viewer.

use guest_client::{Transition, UnitStep};
use serde_json::json;

/// A table for people: one block a pass, one line a unit, times in µs since the pass began.
pub fn table(passes: &[Transition]) -> String {
    passes.iter().map(block).collect::<Vec<_>>().join("\n")
}

fn block(pass: &Transition) -> String {
    let heads = ["UNIT", "READY", "BEGUN", "ENDED", "OUTCOME"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(heads).chain(pass.units.iter().map(cells)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let [a, b, c, d] = [0, 1, 2, 3].map(width);
    let line = |[name, ready, begun, ended, outcome]: &[String; 5]| {
        format!("  {name:a$}  {ready:>b$}  {begun:>c$}  {ended:>d$}  {outcome}\n")
    };
    format!("{}:\n{}", pass.operation, rows.iter().map(line).collect::<String>())
}

fn cells(step: &UnitStep) -> [String; 5] {
    let time = |us: Option<u64>| us.map_or("-".to_owned(), |us| us.to_string());
    let detail = if step.detail.is_empty() { String::new() } else { format!(": {}", step.detail) };
    [
        step.name.clone(),
        time(step.ready_us),
        time(step.begun_us),
        time(step.ended_us),
        format!("{}{detail}", step.outcome.name()),
    ]
}

/// The Chrome trace event format, a JSON object: a row for each unit, a bar for each answer, from the request to its end.
pub fn trace(passes: &[Transition]) -> String {
    let mut rows: Vec<&str> = Vec::new();
    let mut events = Vec::new();
    for pass in passes {
        for step in &pass.units {
            let row = rows.iter().position(|name| *name == step.name).unwrap_or_else(|| {
                rows.push(&step.name);
                rows.len() - 1
            });
            let Some(begun) = step.begun_us.or(step.ready_us) else { continue };
            let took = step.ended_us.unwrap_or(begun).saturating_sub(begun);
            events.push(json!({
                "name": pass.operation, "cat": "unit", "ph": "X", "pid": 1, "tid": row,
                "ts": pass.began_at_us.saturating_add(begun), "dur": took,
                "args": {"outcome": step.outcome.name(), "detail": step.detail},
            }));
        }
    }
    let names = rows.iter().enumerate().map(
        |(row, name)| json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}),
    );
    events.extend(names);
    format!("{}\n", json!({"traceEvents": events, "displayTimeUnit": "ms"}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_client::StepOutcome;

    fn step(name: &str, times: [Option<u64>; 3], outcome: StepOutcome, detail: &str) -> UnitStep {
        let [ready_us, begun_us, ended_us] = times;
        UnitStep { name: name.into(), ready_us, begun_us, ended_us, outcome, detail: detail.into() }
    }

    fn start() -> [Transition; 1] {
        let units = vec![
            step("memory", [Some(0), Some(2), Some(10)], StepOutcome::Done, ""),
            step("vps", [None; 3], StepOutcome::Waiting, "memory"),
        ];
        [Transition { operation: "start".into(), began_at_us: 1000, units }]
    }

    #[test]
    fn the_table_is_aligned() {
        let expected = "\
start:
  UNIT    READY  BEGUN  ENDED  OUTCOME
  memory      0      2     10  done
  vps         -      -      -  waiting: memory
";
        assert_eq!(table(&start()), expected);
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn the_trace_has_a_bar_for_what_has_begun() {
        let trace: serde_json::Value = serde_json::from_str(&trace(&start())).expect("JSON");
        let events = trace["traceEvents"].as_array().expect("a list");
        let bars: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!(bars.len(), 1, "{trace}");
        assert_eq!((&bars[0]["ts"], &bars[0]["dur"]), (&json!(1002), &json!(8)));
        assert_eq!(events.iter().filter(|event| event["ph"] == "M").count(), 2);
    }
}
