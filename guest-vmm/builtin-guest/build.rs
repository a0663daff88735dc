//! Builds the guest's image: its sources are one crate without `std`, compiled by the same rustc, linked by `cc`.
//!
//! rustc is called directly, because a nested cargo would wait for the lock of the target folder. The `core` of the
//! build's own target serves: the guest's Rust runs in ring 3, where SSE may be used.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What makes the archive independent of an operating system, and small.
const CODEGEN: [&str; 7] = [
    "panic=abort",
    "relocation-model=static",
    "opt-level=s",
    "codegen-units=1",
    "lto=fat",
    "force-frame-pointers=no",
    "debuginfo=0",
];

fn main() {
    let out = PathBuf::from(variable("OUT_DIR"));
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=src/commands.rs");
    println!("cargo::rerun-if-env-changed=CC");
    let target = variable("TARGET");
    if !target.to_string_lossy().starts_with("x86_64-") || !target.to_string_lossy().contains("-linux-") {
        println!("cargo::error=guestd runs on Linux on x86-64 only, not on {}", target.display());
        return;
    }
    compile(&out.join("libguest.a"));
    link(&out.join("libguest.a"), &out.join("guest.elf"));
}

/// Compiles the guest's crate, assembly included, to an archive with everything of `core` that it may need.
fn compile(archive: &Path) {
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args([
        "--edition=2024",
        "--crate-type=staticlib",
        "--crate-name=guest",
        "guest/main.rs",
        "--target",
    ]);
    rustc.arg(variable("TARGET")).arg("-o").arg(archive);
    rustc.args(["-Funsafe-op-in-unsafe-fn", "-Wmissing-docs"]);
    for option in CODEGEN {
        rustc.args(["-C", option]);
    }
    run(&mut rustc);
}

/// Links the archive at the addresses of `image.ld`, without anything of the host.
fn link(archive: &Path, image: &Path) {
    let mut cc = Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()));
    cc.args(["-nostdlib", "-static", "-no-pie", "-s", "-Wl,-T,guest/image.ld,--build-id=none,--gc-sections"]);
    cc.args(["-Wl,-z,max-page-size=4096,-z,noexecstack,--undefined=pvh_entry,--fatal-warnings"]);
    cc.arg("-o").arg(image).arg(archive);
    run(&mut cc);
}

/// Runs one step; its failure fails the build with the step's own words above.
fn run(step: &mut Command) {
    let status = step.status().unwrap_or_else(|error| panic!("cannot run {step:?}: {error}"));
    assert!(status.success(), "{status} from {step:?}");
}

/// A variable that cargo sets for every build script.
fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: not run by cargo"))
}
