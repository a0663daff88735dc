//! The generated code is what Debian 12's compiler makes of the schema.
//!
//! `GUESTD_REGENERATE=1 cargo test -p guest-schema --test freshness` writes it anew.

use std::path::Path;
use std::process::Command;

/// The compiler whose output is checked in: another version writes other code for the same schema.
const COMPILER: &str = "0.9.2";

const FILES: [&str; 7] = ["common", "block", "config", "snapshot", "guest", "host", "vmm"];

#[test]
fn generated_code_is_fresh() {
    let found = Command::new("capnp").arg("--version").output();
    let version = match &found {
        Ok(output) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Err(error) => {
            panic!("the Cap'n Proto compiler is needed (packages capnproto, libcapnp-dev): {error}")
        }
    };
    if !version.ends_with(COMPILER) {
        println!("skipped: the generated code belongs to capnp {COMPILER}, this is {version:?}");
        return;
    }
    let schema = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().expect("a folder for the output");
    let mut command = capnpc::CompilerCommand::new();
    command.src_prefix(schema).output_path(folder.path()).import_path("/usr/include");
    for file in FILES {
        command.file(schema.join(format!("{file}.capnp")));
    }
    command.run().expect("the schema compiles");
    for file in FILES {
        let name = format!("{file}_capnp.rs");
        let fresh = std::fs::read_to_string(folder.path().join(&name)).expect("the compiler wrote the file");
        let kept = schema.join("src/generated").join(&name);
        if std::env::var_os("GUESTD_REGENERATE").is_some() {
            std::fs::write(&kept, &fresh).expect("the checked-in file can be written");
        }
        let checked_in = std::fs::read_to_string(&kept).expect("the file is checked in");
        assert!(checked_in == fresh, "{} is stale: run with GUESTD_REGENERATE=1", kept.display());
    }
}
