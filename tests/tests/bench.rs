//! The benchmark measures every figure and writes what it measured in the shape that is agreed.

use std::process::{Command, ExitCode, Output};
use std::time::Duration;

use anyhow::{Context, ensure};
use guest_tests::bench::figure::Definition;
use guest_tests::bench::{definitions, memory, snapshot, units, vps};
use guest_tests::lab::{DebianKernel, Lab};
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
        trial("state_units_are_measured_in_every_graph", &[], state_units),
        trial("graphs_of_state_units_are_not_empty", &[], empty_graphs),
        trial("vps_are_measured_in_every_count", kvm, virtual_processors),
        trial("vps_beyond_what_a_guest_can_have_are_refused", &[], too_many_vps),
        trial("memory_is_frozen_and_restored_beside_bare_calls", &[], frozen_memory),
        trial("snapshots_are_measured_beside_bare_calls", kvm, snapshots),
        trial("the_state_of_vps_is_kept_on_mainline_kvm", &[Requirement::Lab], mainline_kvm),
    ];
    run(trials, || {})
}

/// All of a VP's state, its own time-stamp counter included, is saved and restored where KVM is the mainline's: a build for tests
/// reads back what it has restored, and fails where that differs.
fn mainline_kvm() -> Story {
    const LIMIT: Duration = Duration::from_secs(200);
    ensure!(cfg!(debug_assertions), "only a build for tests compares");
    let lab = Lab::boot(DebianKernel::Cloud, &[env!("CARGO_BIN_EXE_guest-bench").into()])?;
    let done = lab.run("guest-bench vps --counts 1,2 --rounds 2 --allow-debug", LIMIT)?;
    ensure!(done.status == 0, "{}", done.output);
    assert!(done.output.contains("setting a VP's state"), "{}", done.output);
    Ok(())
}

fn bench(arguments: &[&str]) -> anyhow::Result<(Output, Vec<Map<String, Value>>)> {
    let folder = TempDir::new()?;
    let json = folder.path().join("figures.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_guest-bench"));
    command.args(arguments).args(["--allow-debug", "--rounds", "2", "--json"]).arg(&json);
    let output = command.output()?;
    let rows = std::fs::read(&json).ok().map(|text| serde_json::from_slice(&text)).transpose()?;
    Ok((output, rows.unwrap_or_default()))
}

fn names(rows: &[Map<String, Value>]) -> Vec<&str> {
    rows.iter().filter_map(|row| row["name"].as_str()).collect()
}

fn every_figure() -> Story {
    let (output, rows) = bench(&["life"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected: Vec<_> = definitions().map(|figure| figure.name).collect();
    assert_eq!(names(&rows), expected);
    rows.iter().try_for_each(|row| well_formed(row, &rows))?;
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(expected.iter().all(|name| table.contains(name)), "{table}");
    Ok(())
}

fn frozen_memory() -> Story {
    let (output, rows) = bench(&["memory"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected: Vec<_> = memory::definitions().iter().map(|figure| figure.name).collect();
    assert_eq!(names(&rows), expected);
    rows.iter().try_for_each(|row| well_formed(row, &rows))
}

fn snapshots() -> Story {
    let (output, rows) = bench(&["snapshot", "--most", "128"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected: Vec<_> = snapshot::definitions(128).iter().map(|figure| figure.name).collect();
    assert_eq!(names(&rows), expected);
    let all = snapshot::definitions(usize::MAX).len();
    assert!(all > expected.len(), "larger guests are left out");
    rows.iter().try_for_each(|row| well_formed(row, &rows))
}

fn well_formed(row: &Map<String, Value>, rows: &[Map<String, Value>]) -> Story {
    assert!(row.len() == KEYS.len() && KEYS.iter().all(|key| row.contains_key(*key)), "{row:?}");
    let median = row["median"].as_f64().context("a median")?;
    assert!(median > 0.0 && row["p99"].as_f64() >= Some(median), "{row:?}");
    assert!(["µs", "KiB", "MiB/s"].contains(&row["unit"].as_str().context("a unit")?), "{row:?}");
    let reference = rows.iter().find(|other| other["name"] == row["reference"]);
    assert_eq!(reference.is_none(), row["reference"].is_null(), "{row:?}");
    let ratio = reference.and_then(|other| Some(median / other["median"].as_f64()?));
    let error = row["ratio"].as_f64().zip(ratio).map(|(told, is)| (told - is).abs() / is);
    assert_eq!(error.is_none(), reference.is_none(), "{row:?}");
    assert!(error.is_none_or(|error| error < 1e-6), "{row:?}");
    Ok(())
}

fn chosen_figures() -> Story {
    let (output, rows) = bench(&["life", "rpc-d"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(names(&rows), ["socket", "rpc-direct"]);
    Ok(())
}

fn unknown_figure() -> Story {
    let (output, rows) = bench(&["life", "speed"])?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && rows.is_empty());
    assert!(error.contains("no figure begins with \"speed\"; there are floor-in-process"), "{error}");
    Ok(())
}

fn state_units() -> Story {
    let (output, rows) = bench(&["units", "--counts", "10,40"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8_lossy(&output.stdout);
    assert_eq!(table.lines().count(), 1 + rows.len(), "{table}");
    let mut rest = rows.iter().zip(table.lines().skip(1));
    for graph in ["flat", "chain", "layers"] {
        for units in [10, 40] {
            for figure in &units::FIGURES {
                let (row, line) = rest.next().context("a row for every figure of every graph")?;
                assert_eq!((&row["graph"], &row["units"]), (&graph.into(), &units.into()), "{row:?}");
                assert_eq!(row["name"], figure.name, "{row:?}");
                assert!([graph, figure.name].iter().all(|word| line.contains(word)), "{line}");
                well_formed_transition(row, &rows)?;
            }
        }
    }
    assert_eq!(rest.next(), None);
    Ok(())
}

fn well_formed_transition(row: &Map<String, Value>, rows: &[Map<String, Value>]) -> Story {
    const KEYS: [&str; 11] =
        ["graph", "units", "name", "unit", "median", "p99", "ratio", "bar", "met", "growth", "linear"];
    assert!(row.len() == KEYS.len() && KEYS.iter().all(|key| row.contains_key(*key)), "{row:?}");
    let median = row["median"].as_f64().context("a median")?;
    assert!(median > 0.0 && row["p99"].as_f64() >= Some(median) && row["unit"] == "µs", "{row:?}");
    let other = |units: &Value, name: &Value| {
        let found = rows.iter().find(|other| {
            other["graph"] == row["graph"] && other["units"] == *units && other["name"] == *name
        });
        found.and_then(|other| other["median"].as_f64()).context("a row to compare with")
    };
    let is_bare = row["name"] == units::BARE;
    let ratio =
        (!is_bare).then(|| Ok::<_, anyhow::Error>(median / other(&row["units"], &units::BARE.into())?));
    assert_near(row["ratio"].as_f64(), ratio.transpose()?, row);
    let grown = row["units"] == 40;
    let growth = grown.then(|| Ok::<_, anyhow::Error>(median / 4.0 / other(&10.into(), &row["name"])?));
    assert_near(row["growth"].as_f64(), growth.transpose()?, row);
    assert_eq!(row["linear"].is_boolean(), grown && !is_bare, "{row:?}");
    let has_bar = row["graph"] == "flat" && !grown && !is_bare;
    assert_eq!((row["bar"].is_number(), row["met"].is_boolean()), (has_bar, has_bar), "{row:?}");
    Ok(())
}

fn assert_near(told: Option<f64>, is: Option<f64>, row: &Map<String, Value>) {
    let error = told.zip(is).map(|(told, is)| (told - is).abs() / is);
    assert_eq!((told.is_some(), error.is_some()), (is.is_some(), is.is_some()), "{row:?}");
    assert!(error.is_none_or(|error| error < 1e-6), "{row:?}");
}

fn empty_graphs() -> Story {
    let (output, rows) = bench(&["units", "--counts", "0"])?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && rows.is_empty());
    assert!(error.contains("'0'") && error.contains("--counts"), "{error}");
    Ok(())
}

fn virtual_processors() -> Story {
    let (output, rows) = bench(&["vps", "--counts", "1,3"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let many = [1, 3].into_iter().flat_map(|vps| vps::OF_MANY.iter().map(move |figure| (vps, figure)));
    let expected: Vec<_> = many.chain(vps::OF_ONE.iter().map(|figure| (1, figure))).collect();
    let table = String::from_utf8_lossy(&output.stdout);
    // How many rounds there were, and the head of the table.
    assert_eq!((rows.len(), table.lines().count()), (expected.len(), 2 + rows.len()), "{table}");
    for (((vps, figure), row), line) in expected.into_iter().zip(&rows).zip(table.lines().skip(2)) {
        let words: Vec<_> = line.split_whitespace().take(2).collect();
        assert_eq!(words, [&vps.to_string(), figure.name], "{line}");
        well_formed_vps(vps, figure, row, &rows)?;
    }
    Ok(())
}

fn well_formed_vps(
    vps: i32,
    figure: &Definition,
    row: &Map<String, Value>,
    rows: &[Map<String, Value>],
) -> Story {
    assert_eq!((&row["vps"], &row["name"]), (&vps.into(), &figure.name.into()), "{row:?}");
    let same_count = rows.iter().filter(|other| other["vps"] == vps).map(without_vps);
    let row = without_vps(row);
    well_formed(&row, &same_count.collect::<Vec<_>>())?;
    assert_eq!(row["bar"].as_f64(), figure.bar, "{row:?}");
    let met = row["ratio"].as_f64().zip(figure.bar).map(|(ratio, bar)| ratio <= bar);
    assert_eq!(row["met"].as_bool(), met, "{row:?}");
    Ok(())
}

/// The figure itself.
fn without_vps(row: &Map<String, Value>) -> Map<String, Value> {
    row.iter().filter(|(key, _)| *key != "vps").map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn too_many_vps() -> Story {
    let (output, rows) = bench(&["vps", "--counts", "255"])?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && rows.is_empty());
    assert!(error.contains("255") && error.contains("--counts"), "{error}");
    Ok(())
}
