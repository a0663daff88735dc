//! What the workspace depends on: licences and sources as `deny.toml` allows them, and members that share their
//! licence, version and lints. `cargo deny check licenses sources` checks the same file.

use std::path::{Path, PathBuf};

use cargo_metadata::{Metadata, MetadataCommand, Package};
use spdx::{Expression, ParseMode};

fn workspace() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn read_toml(path: impl AsRef<Path>) -> toml::Table {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.parse().unwrap()
}

fn strings(table: &toml::Table, section: &str, key: &str) -> Vec<String> {
    let values = table[section][key].as_array().unwrap();
    values.iter().map(|value| value.as_str().unwrap().to_owned()).collect()
}

/// The packages for the targets that `deny.toml` names.
fn metadata() -> Metadata {
    let deny = read_toml(workspace().join("deny.toml"));
    let mut options = vec!["--locked".to_owned()];
    for target in strings(&deny, "graph", "targets") {
        options.extend(["--filter-platform".to_owned(), target]);
    }
    let mut command = MetadataCommand::new();
    command.manifest_path(workspace().join("Cargo.toml")).other_options(options).exec().unwrap()
}

fn third_party(metadata: &Metadata) -> Vec<&Package> {
    let members = metadata.workspace_packages();
    metadata.packages.iter().filter(|package| !members.iter().any(|member| member.id == package.id)).collect()
}

/// Whether `licence`, an SPDX expression, can be satisfied with licences of `allowed` alone.
fn satisfies(licence: &str, allowed: &[String]) -> Result<bool, String> {
    let expression = Expression::parse_mode(licence, ParseMode::LAX).map_err(|error| error.to_string())?;
    Ok(expression.evaluate(|requirement| allowed.contains(&requirement.to_string())))
}

#[test]
fn every_licence_is_allowed() {
    let allowed = strings(&read_toml(workspace().join("deny.toml")), "licenses", "allow");
    let metadata = metadata();
    let packages = third_party(&metadata);
    assert!(packages.len() > 20, "only {} packages were looked at", packages.len());
    let refused: Vec<String> =
        packages.into_iter().filter_map(|package| refusal(package, &allowed)).collect();
    assert!(refused.is_empty(), "not allowed by deny.toml:\n{}", refused.join("\n"));
}

fn refusal(package: &Package, allowed: &[String]) -> Option<String> {
    let said = package.license.as_deref().ok_or_else(|| "no licence expression".to_owned());
    match said.and_then(|licence| satisfies(licence, allowed).map(|satisfied| (licence, satisfied))) {
        Ok((_, true)) => None,
        Ok((licence, false)) => Some(format!("{} {}: {licence}", package.name, package.version)),
        Err(error) => Some(format!("{} {}: {error}", package.name, package.version)),
    }
}

#[test]
fn expressions_are_judged_as_a_whole() {
    let allowed = ["MIT".to_owned(), "Apache-2.0".to_owned(), "Apache-2.0 WITH LLVM-exception".to_owned()];
    for good in ["MIT", "MIT/Apache-2.0", "GPL-2.0-only OR MIT", "Apache-2.0 WITH LLVM-exception AND MIT"] {
        assert_eq!(satisfies(good, &allowed), Ok(true), "{good}");
    }
    for bad in ["GPL-3.0-only", "MIT AND GPL-2.0-only", "BSD-3-Clause"] {
        assert_eq!(satisfies(bad, &allowed), Ok(false), "{bad}");
    }
    assert!(satisfies("no licence at all", &allowed).is_err());
}

#[test]
fn every_source_is_the_default_registry() {
    let metadata = metadata();
    let elsewhere: Vec<String> = third_party(&metadata)
        .into_iter()
        .filter(|package| !package.source.as_ref().is_some_and(|source| source.is_crates_io()))
        .map(|package| format!("{} {}: {:?}", package.name, package.version, package.source))
        .collect();
    assert!(elsewhere.is_empty(), "not from the default registry:\n{}", elsewhere.join("\n"));
}

/// The registry of saved state is for tools: the process of a guest decodes what is its own, and nothing by reflection.
#[test]
fn a_guests_process_knows_saved_state_without_reflection() {
    let manifest = workspace().join("Cargo.toml");
    let tree = ["tree", "--locked", "--package=guest-vmm", "--edges=normal", "--prefix=none", "--format={p}"];
    let cargo =
        std::process::Command::new(env!("CARGO")).args(tree).arg("--manifest-path").arg(manifest).output();
    let output = cargo.expect("cargo runs the tests");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let packages = String::from_utf8(output.stdout).unwrap();
    let has = |name: &str| packages.lines().any(|line| line.split(' ').next() == Some(name));
    assert!(has("guest-saved-state") && has("prost"), "{packages}");
    assert!(!has("prost-reflect"), "{packages}");
}

#[test]
fn members_inherit_what_the_workspace_decides() {
    let metadata = metadata();
    for member in metadata.workspace_packages() {
        let manifest = read_toml(&member.manifest_path);
        for key in ["version", "edition", "rust-version", "license", "publish"] {
            assert!(inherits(&manifest["package"], key), "{}: package.{key}.workspace", member.name);
        }
        assert!(inherits(&manifest.into(), "lints"), "{}: lints.workspace", member.name);
    }
}

fn inherits(table: &toml::Value, key: &str) -> bool {
    table.get(key).and_then(|value| value.get("workspace")).and_then(toml::Value::as_bool) == Some(true)
}

#[test]
fn versions_stand_in_the_workspace_alone() {
    let metadata = metadata();
    for member in metadata.workspace_packages() {
        let manifest = read_toml(&member.manifest_path);
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(section).and_then(toml::Value::as_table) else { continue };
            for name in dependencies.keys() {
                assert!(inherits(&manifest[section], name), "{}: {section}.{name}.workspace", member.name);
            }
        }
    }
}
