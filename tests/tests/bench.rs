//! The benchmark measures every figure and writes what it measured in the shape that is agreed.

use std::process::{Command, ExitCode, Output};

use anyhow::{Context, ensure};
use guest_tests::bench::definitions;
use guest_tests::requirements::{Requirement, run, trial};
use guest_tests::stage::Story;
use serde_json::{Map, Value};
use tempfile::TempDir;

const KEYS: [&str; 8] = ["name", "unit", "median", "p99", "reference", "ratio", "bar", "met"];

fn main() -> ExitCode {
    let kvm: &[Requirement] = &[Requirement::Kvm];
    let trials = vec![
        trial("every_figure_is_measured_and_written", kvm, every_figure),
        trial("figures_are_chosen_by_name", kvm, chosen_figures),
        trial("an_unknown_figure_is_refused", kvm, unknown_figure),
    ];
    run(trials, || {})
}

fn bench(arguments: &[&str]) -> anyhow::Result<(Output, Vec<Map<String, Value>>)> {
    let folder = TempDir::new()?;
    let json = folder.path().join("figures.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_guest-bench"));
    command.args(["--allow-debug", "--rounds", "2", "--json"]).arg(&json).args(arguments);
    let output = command.output()?;
    let rows = std::fs::read(&json).ok().map(|text| serde_json::from_slice(&text)).transpose()?;
    Ok((output, rows.unwrap_or_default()))
}

fn names(rows: &[Map<String, Value>]) -> Vec<&str> {
    rows.iter().filter_map(|row| row["name"].as_str()).collect()
}

fn every_figure() -> Story {
    let (output, rows) = bench(&[])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected: Vec<_> = definitions().map(|figure| figure.name).collect();
    assert_eq!(names(&rows), expected);
    rows.iter().try_for_each(|row| well_formed(row, &rows))?;
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(expected.iter().all(|name| table.contains(name)), "{table}");
    Ok(())
}

fn well_formed(row: &Map<String, Value>, rows: &[Map<String, Value>]) -> Story {
    assert!(row.len() == KEYS.len() && KEYS.iter().all(|key| row.contains_key(*key)), "{row:?}");
    let median = row["median"].as_f64().context("a median")?;
    assert!(median > 0.0 && row["p99"].as_f64() >= Some(median), "{row:?}");
    assert!(["µs", "KiB"].contains(&row["unit"].as_str().context("a unit")?), "{row:?}");
    let reference = rows.iter().find(|other| other["name"] == row["reference"]);
    assert_eq!(reference.is_none(), row["reference"].is_null(), "{row:?}");
    let ratio = reference.and_then(|other| Some(median / other["median"].as_f64()?));
    let error = row["ratio"].as_f64().zip(ratio).map(|(told, is)| (told - is).abs() / is);
    assert_eq!(error.is_none(), reference.is_none(), "{row:?}");
    assert!(error.is_none_or(|error| error < 1e-6), "{row:?}");
    Ok(())
}

fn chosen_figures() -> Story {
    let (output, rows) = bench(&["rpc-d"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(names(&rows), ["socket", "rpc-direct"]);
    Ok(())
}

fn unknown_figure() -> Story {
    let (output, rows) = bench(&["speed"])?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && rows.is_empty());
    assert!(error.contains("no figure begins with \"speed\"; there are floor-in-process"), "{error}");
    Ok(())
}
