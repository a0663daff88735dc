//! The tree itself: what lies at its top, what every folder says of itself, what no file may name or declare.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Everything that may lie at the top. Something new has to be worth a line here.
const TOP: [&str; 17] = [
    ".ci",
    ".gitignore",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "client",
    "deny.toml",
    "fuzz",
    "guest-vmm",
    "rustfmt.toml",
    "schema",
    "service",
    "tests",
];

/// Folders in which one machine keeps its own files. Split, so that this file does not hold them.
const MACHINE_PATHS: [&str; 3] = [concat!("/wo", "rk/"), concat!("/tm", "p/h"), concat!("/ho", "me/")];

fn top() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The tracked files, and those that would be tracked by the next commit.
fn files() -> Vec<String> {
    let mut command = Command::new("git");
    command.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(top());
    let output = command.output().expect("the tree is checked through git");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).unwrap();
    // A tracked file that was removed since the last commit is still listed.
    let names = names.split_terminator('\0').filter(|name| top().join(name).exists());
    names.map(str::to_owned).collect()
}

#[test]
fn only_known_things_lie_at_the_top() {
    let files = files();
    let entries: BTreeSet<&str> = files.iter().filter_map(|file| file.split('/').next()).collect();
    let unknown: Vec<_> = entries.into_iter().filter(|entry| !TOP.contains(entry)).collect();
    assert!(unknown.is_empty(), "at the top of the tree: {unknown:?}");
}

#[test]
fn every_folder_of_the_workspace_has_a_readme() {
    let files = files();
    let crates = files.iter().filter_map(|file| file.strip_suffix("Cargo.toml"));
    let missing: Vec<_> = crates.filter(|folder| !files.contains(&format!("{folder}README.md"))).collect();
    assert!(missing.is_empty(), "no README.md in {missing:?}");
}

#[test]
fn no_file_names_a_path_of_one_machine() {
    let found: Vec<String> = files().iter().flat_map(|file| machine_paths(file)).collect();
    assert!(found.is_empty(), "paths of one machine:\n{}", found.join("\n"));
}

/// Saved state is a format: a message that a component is saved into is generated from the schema, where its fields are frozen.
/// Tests, benchmarks, examples and the crate of the trait itself may declare their own with `saved_state_root!`.
#[test]
fn saved_state_is_generated_from_the_schema() {
    let exempt = ["schema/saved_state/src/generated/", "guest-vmm/save-restore/src/", "tests/src/bench/"];
    let files = files().into_iter().filter(|file| file.ends_with(".rs"));
    let mut read = 0;
    for file in files.filter(|file| !exempt.iter().any(|folder| file.starts_with(folder))) {
        let source = std::fs::read_to_string(top().join(&file)).unwrap();
        let mut lines = source.lines().map(str::trim_start);
        let by_hand = |line: &str| line.starts_with("impl") && line.contains("SavedStateRoot for ");
        assert!(!lines.clone().any(by_hand), "{file}: SavedStateRoot is never implemented by hand");
        let declares = file.contains("/src/") && lines.any(|line| line.contains("saved_state_root!"));
        assert!(!declares, "{file}: the message belongs into schema/saved_state");
        read += 1;
    }
    assert!(read > 50, "only {read} files were looked at");
}

fn machine_paths(file: &str) -> Vec<String> {
    let bytes = std::fs::read(top().join(Path::new(file))).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    let lines =
        text.lines().enumerate().filter(|(_, line)| MACHINE_PATHS.iter().any(|path| names(line, path)));
    lines.map(|(number, line)| format!("{file}:{}: {line}", number + 1)).collect()
}

/// Whether `line` holds `path` at the beginning of a path, not in the middle of a longer one.
fn names(line: &str, path: &str) -> bool {
    let longer = |character: char| character.is_alphanumeric() || "._-}$/".contains(character);
    line.match_indices(path).any(|(start, _)| !line[..start].ends_with(longer))
}

#[test]
fn paths_are_found_where_they_begin() {
    let path = MACHINE_PATHS[0];
    assert!(names(&format!("see {path}x"), path));
    assert!(names(&format!("\"{path}\""), path));
    assert!(!names(&format!("target{path}x"), path));
    assert!(!names(&format!("$folder{path}x"), path));
}
