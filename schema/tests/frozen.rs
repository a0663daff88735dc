//! Ordinals and type ids do not change: an old client keeps working with a new service.
//!
//! `frozen.txt` lists every node of the schema with its id, and every field, enumerant and method with its ordinal. Lines may be
//! added (`GUESTD_REGENERATE=1` writes the list anew); a line that is gone or changed breaks a peer.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use capnp::message::ReaderOptions;
use capnp::schema_capnp::{code_generator_request, field, node};

/// What the compiler tells its plug-ins: `cat` as the plug-in hands it on.
fn code_generator_request() -> capnp::message::Reader<capnp::serialize::OwnedSegments> {
    let schema = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("capnp")
        .args(["compile", "-I/usr/include", "-o-", "--src-prefix"])
        .arg(schema)
        .args(
            ["common", "block", "config", "snapshot", "guest", "host", "vmm"]
                .map(|f| schema.join(format!("{f}.capnp"))),
        )
        .output()
        .expect("the Cap'n Proto compiler is needed (packages capnproto, libcapnp-dev)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    capnp::serialize::read_message(&mut &output.stdout[..], ReaderOptions::new()).expect("a request")
}

fn members(node: node::Reader<'_>) -> capnp::Result<Vec<String>> {
    let mut members = Vec::new();
    match node.which()? {
        node::Struct(node) => {
            for field in node.get_fields()?.iter() {
                let place = match field.get_ordinal().which()? {
                    field::ordinal::Explicit(ordinal) => format!("@{ordinal}"),
                    field::ordinal::Implicit(()) => "group".to_owned(),
                };
                let offset = match field.which()? {
                    field::Slot(slot) => format!(" offset {}", slot.get_offset()),
                    field::Group(_) => String::new(),
                };
                members.push(format!("{} {place}{offset}", field.get_name()?.to_str()?));
            }
        }
        node::Enum(node) => {
            for (ordinal, enumerant) in node.get_enumerants()?.iter().enumerate() {
                members.push(format!("{} @{ordinal}", enumerant.get_name()?.to_str()?));
            }
        }
        node::Interface(node) => {
            for (ordinal, method) in node.get_methods()?.iter().enumerate() {
                members.push(format!("{} @{ordinal}", method.get_name()?.to_str()?));
            }
        }
        node::Const(_) | node::Annotation(_) | node::File(()) => {}
    }
    Ok(members)
}

fn lines() -> capnp::Result<BTreeSet<String>> {
    let message = code_generator_request();
    let request: code_generator_request::Reader<'_> = message.get_root()?;
    let mut lines = BTreeSet::new();
    for node in request.get_nodes()?.iter() {
        let name = node.get_display_name()?.to_str()?;
        if !name.contains("/capnp/") && !name.starts_with("capnp/") {
            lines.insert(format!("{name} {:#018x}", node.get_id()));
            lines.extend(members(node)?.into_iter().map(|member| format!("{name} {member}")));
        }
    }
    Ok(lines)
}

#[test]
fn ordinals_and_type_ids_are_frozen() {
    let now = lines().expect("a well-formed request");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/frozen.txt");
    if std::env::var_os("GUESTD_REGENERATE").is_some() {
        let text: String = now.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, text).expect("frozen.txt can be written");
    }
    let text = std::fs::read_to_string(&path).expect("frozen.txt is checked in");
    let frozen: BTreeSet<String> = text.lines().map(str::to_owned).collect();
    let broken: Vec<&String> = frozen.difference(&now).collect();
    assert!(broken.is_empty(), "gone or changed: {broken:#?}");
    let unlisted: Vec<&String> = now.difference(&frozen).collect();
    assert!(unlisted.is_empty(), "not yet in frozen.txt (run with GUESTD_REGENERATE=1): {unlisted:#?}");
}
