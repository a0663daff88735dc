//! What a test needs of the machine it runs on, and which tests are left out.
//!
//! A requirement that is absent makes its tests fail, loudly, unless `GUESTD_SKIP` names it: `GUESTD_SKIP=kvm,lab`
//! leaves out every test that needs one of the two, and they are reported as ignored. `GUESTD_TEST_SCALE` scales the
//! counts of long tests.
//!
//! Test binaries with requirements have `harness = false` and a `main` that calls [`run`] with [`trial`]s.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Trial};

/// Names, comma separated, of the requirements whose tests are left out.
pub const SKIP_VARIABLE: &str = "GUESTD_SKIP";
/// A factor for the counts of long tests, a decimal number above 0; 1 if unset.
pub const SCALE_VARIABLE: &str = "GUESTD_TEST_SCALE";

/// Something that a test needs and a machine may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Requirement {
    /// A `/dev/kvm` of the machine itself that this user may open.
    Kvm,
    /// The lab: a machine with a mainline `/dev/kvm` in software (see [`crate::lab`]).
    Lab,
    /// Debian's gdb.
    Gdb,
}

impl Requirement {
    const ALL: [Requirement; 3] = [Requirement::Kvm, Requirement::Lab, Requirement::Gdb];

    /// The name in `GUESTD_SKIP`.
    pub fn name(self) -> &'static str {
        match self {
            Requirement::Kvm => "kvm",
            Requirement::Lab => "lab",
            Requirement::Gdb => "gdb",
        }
    }

    /// Fails when it is plain already that the requirement is absent. The lab is only known to be there once it has
    /// booted; [`crate::lab::Lab::boot`] says what it lacks.
    fn check(self) -> Result<(), String> {
        match self {
            Requirement::Lab => Ok(()),
            Requirement::Gdb => match Command::new("gdb").arg("--version").stdout(Stdio::null()).status() {
                Ok(status) if status.success() => Ok(()),
                Ok(status) => {
                    Err(format!("gdb --version: {status} ({SKIP_VARIABLE}=gdb leaves this test out)"))
                }
                Err(error) => Err(format!(
                    "gdb: {error}: install the package gdb ({SKIP_VARIABLE}=gdb leaves this test out)"
                )),
            },
            Requirement::Kvm => match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("/dev/kvm: {error} ({SKIP_VARIABLE}=kvm leaves this test out)")),
            },
        }
    }
}

/// A test that needs `requirements`: ignored when one of them is to be skipped, failed when one is absent.
/// An error is shown with all its causes.
///
/// # Panics
/// When `GUESTD_SKIP` names an unknown requirement: a misspelt name must not quietly skip nothing.
pub fn trial(
    name: &str,
    requirements: &'static [Requirement],
    test: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    let skipped = skipped().expect("GUESTD_SKIP must be a list of known requirements");
    let ignored = requirements.iter().any(|requirement| skipped.contains(requirement));
    let checked = move || {
        requirements.iter().try_for_each(|requirement| requirement.check())?;
        test().map_err(|error| format!("{error:#}").into())
    };
    Trial::test(name, checked).with_ignored_flag(ignored)
}

/// Runs `trials` as the arguments of this process ask for, then calls `clean_up`, and returns the exit code. When tests
/// are left out, it says so.
pub fn run(trials: Vec<Trial>, clean_up: impl FnOnce()) -> ExitCode {
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    clean_up();
    if conclusion.num_ignored > 0 {
        let skip = std::env::var(SKIP_VARIABLE).unwrap_or_default();
        println!("skipped: {} tests, {SKIP_VARIABLE}={skip}", conclusion.num_ignored);
    }
    conclusion.exit_code()
}

/// `count` scaled by `GUESTD_TEST_SCALE`, at least 1.
///
/// # Panics
/// When the variable is not a number above 0.
pub fn scaled(count: u32) -> u32 {
    let factor = std::env::var(SCALE_VARIABLE).unwrap_or_else(|_| "1".to_owned());
    scale(count, &factor).expect("GUESTD_TEST_SCALE must be a number above 0")
}

fn scale(count: u32, factor: &str) -> Result<u32, String> {
    let factor: f64 = factor.parse().map_err(|error| format!("{factor:?}: {error}"))?;
    if !factor.is_finite() || factor <= 0.0 {
        return Err(format!("{factor} is not a number above 0"));
    }
    #[expect(clippy::cast_possible_truncation, reason = "clamped to the range of the type")]
    #[expect(clippy::cast_sign_loss, reason = "clamped to the range of the type")]
    let scaled = (f64::from(count) * factor).round().clamp(1.0, f64::from(u32::MAX)) as u32;
    Ok(scaled)
}

fn skipped() -> Result<BTreeSet<Requirement>, String> {
    parse_skip(&std::env::var(SKIP_VARIABLE).unwrap_or_default())
}

fn parse_skip(list: &str) -> Result<BTreeSet<Requirement>, String> {
    let names = list.split(',').map(str::trim).filter(|name| !name.is_empty());
    names.map(requirement).collect()
}

fn requirement(name: &str) -> Result<Requirement, String> {
    let known = Requirement::ALL.into_iter().find(|requirement| requirement.name() == name);
    known.ok_or_else(|| {
        let names = Requirement::ALL.map(Requirement::name).join(", ");
        format!("{SKIP_VARIABLE} names {name:?}; known are {names}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skip_list_is_read() {
        assert_eq!(parse_skip("").unwrap(), BTreeSet::new());
        assert_eq!(parse_skip("lab").unwrap(), BTreeSet::from([Requirement::Lab]));
        assert_eq!(parse_skip("kvm, lab,gdb,").unwrap(), BTreeSet::from(Requirement::ALL));
    }

    #[test]
    fn an_unknown_name_is_refused() {
        let error = parse_skip("kvm,labb").unwrap_err();
        assert_eq!(error, "GUESTD_SKIP names \"labb\"; known are kvm, lab, gdb");
    }

    #[test]
    fn counts_are_scaled_but_never_to_nothing() {
        assert_eq!(scale(1000, "0.2").unwrap(), 200);
        assert_eq!(scale(3, "0.01").unwrap(), 1);
        assert_eq!(scale(7, "1").unwrap(), 7);
        for refused in ["0", "-1", "many", "inf", ""] {
            assert!(scale(7, refused).is_err(), "{refused:?}");
        }
    }
}
