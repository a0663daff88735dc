//! What was released stays readable: no message vanishes, and no field changes its number, name or type.
//!
//! `frozen.txt` lists every message and field of the last released set, and what was added since. `GUESTD_REGENERATE=1 cargo
//! test -p guest-saved-state --test frozen` adds what is new; it takes nothing away, so a line of something that was never
//! released is removed by hand.

use guest_saved_state::FILE_DESCRIPTOR_SET;
use prost_reflect::{Cardinality, DescriptorPool, EnumDescriptor, FieldDescriptor, MessageDescriptor};
use std::collections::BTreeSet;
use std::path::Path;

const HOW_TO_EVOLVE: &str = "\
State that is saved already would be lost or misread. Instead of changing or removing a field, leave it to old states:

    message M {
      reserved 4;               // the number, never to be used again
      reserved \"speed\";         // the name, likewise
      uint64 speed_hertz = 9;   // what replaces it: a new number and a new name
    }

or keep it beside its replacement, and let restore accept either. A message that has vanished has to come back, under its
old package and name; one that changes as a whole becomes a new message.";

/// The lines that `frozen.txt` has to have for these descriptors.
fn lines(pool: &DescriptorPool) -> BTreeSet<String> {
    let ours = |package: &str| package != "google.protobuf";
    let messages = pool.all_messages().filter(|message| ours(message.package_name()));
    let enums = pool.all_enums().filter(|description| ours(description.package_name()));
    messages.flat_map(|message| message_lines(&message)).chain(enums.flat_map(|e| enum_lines(&e))).collect()
}

fn message_lines(message: &MessageDescriptor) -> Vec<String> {
    let name = message.full_name();
    let root = message.parent_pool().get_extension_by_name("save_restore.saved_state_root");
    let is_root = root.is_some_and(|root| message.options().get_extension(&root).as_bool() == Some(true));
    let mut lines = vec![format!("message {name}")];
    lines.extend(is_root.then(|| format!("root {name}")));
    lines.extend(message.fields().map(|field| format!("field {name} {}", field_line(&field))));
    lines
}

fn field_line(field: &FieldDescriptor) -> String {
    let presence = match (field.cardinality(), field.supports_presence()) {
        (Cardinality::Repeated, _) => "repeated ",
        (_, true) => "optional ",
        (_, false) => "",
    };
    let oneof = field.containing_oneof().filter(|oneof| !oneof.is_synthetic());
    let oneof = oneof.map(|oneof| format!(" in {}", oneof.name())).unwrap_or_default();
    format!("{} = {} {presence}{:?}{oneof}", field.name(), field.number(), field.kind())
}

fn enum_lines(description: &EnumDescriptor) -> Vec<String> {
    let name = description.full_name();
    let values =
        description.values().map(|value| format!("value {name} {} = {}", value.name(), value.number()));
    std::iter::once(format!("enum {name}")).chain(values).collect()
}

/// The frozen lines that no longer hold. A field may go once its number and its name are reserved.
fn broken(frozen: &BTreeSet<String>, pool: &DescriptorPool) -> Vec<String> {
    let now = lines(pool);
    let gone = frozen.difference(&now).filter(|line| !is_reserved(line, pool));
    gone.map(|line| match replacement(line, &now) {
        Some(new) => format!("was: {line}\nnow: {new}"),
        None => format!("was: {line}\nnow: gone"),
    })
    .collect()
}

/// The message, name and number of a line that lists a field.
fn parse_field(line: &str) -> Option<(&str, &str, u32)> {
    let mut words = line.strip_prefix("field ")?.split(' ');
    let (message, name) = (words.next()?, words.next()?);
    let number = words.nth(1)?.parse().ok()?;
    Some((message, name, number))
}

fn is_reserved(line: &str, pool: &DescriptorPool) -> bool {
    let Some((message, name, number)) = parse_field(line) else { return false };
    let Some(message) = pool.get_message_by_name(message) else { return false };
    let number = message.reserved_ranges().any(|range| range.contains(&number));
    number && message.reserved_names().any(|reserved| reserved == name)
}

/// The line that has taken the place of a field's: with the same number or, failing that, the same name.
fn replacement<'a>(line: &str, now: &'a BTreeSet<String>) -> Option<&'a String> {
    let (message, name, number) = parse_field(line)?;
    let fields = || now.iter().filter(|line| parse_field(line).is_some_and(|field| field.0 == message));
    let same_number = fields().find(|line| parse_field(line).is_some_and(|field| field.2 == number));
    same_number.or_else(|| fields().find(|line| parse_field(line).is_some_and(|field| field.1 == name)))
}

#[test]
fn what_was_released_has_not_changed() {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the compiler's own output");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/frozen.txt");
    let text = std::fs::read_to_string(&path).expect("frozen.txt is checked in");
    let mut frozen: BTreeSet<String> = text.lines().map(str::to_owned).collect();
    let broken = broken(&frozen, &pool);
    assert!(broken.is_empty(), "the format has changed:\n\n{}\n\n{HOW_TO_EVOLVE}", broken.join("\n"));
    if std::env::var_os("GUESTD_REGENERATE").is_some() {
        frozen.extend(lines(&pool));
        let text: String = frozen.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, text).expect("frozen.txt can be written");
    }
    let unlisted: Vec<String> = lines(&pool).difference(&frozen).cloned().collect();
    assert!(unlisted.is_empty(), "not yet in frozen.txt (run with GUESTD_REGENERATE=1): {unlisted:#?}");
}

/// The descriptors of a file with the given body, in the package `p`.
fn compiled(body: &str) -> DescriptorPool {
    let text = format!("syntax = \"proto3\"; package p; {body}");
    let file = protox::file::File::from_source("p.proto", &text).expect("well-formed");
    let mut pool = DescriptorPool::new();
    pool.add_file_descriptor_proto(file.file_descriptor_proto().clone()).expect("valid");
    pool
}

#[test]
fn every_change_that_breaks_is_found_and_no_other() {
    let released =
        "message M { uint32 a = 1; optional bool b = 2; repeated fixed64 c = 3; } enum E { Z = 0; ONE = 1; }";
    let frozen = lines(&compiled(released));
    let e = "enum E { Z = 0; ONE = 1; }";
    let found = |body: &str| broken(&frozen, &compiled(body));
    for fine in [
        released.to_owned(),
        format!(
            "message M {{ uint32 a = 1; optional bool b = 2; repeated fixed64 c = 3; string d = 4; }} {e}"
        ),
        format!(
            "message M {{ reserved 1; reserved \"a\"; optional bool b = 2; repeated fixed64 c = 3; }} {e}"
        ),
        format!("{released} message New {{ uint32 a = 1; }}"),
    ] {
        assert_eq!(found(&fine), Vec::<String>::new(), "{fine}");
    }
    let rest = "optional bool b = 2; repeated fixed64 c = 3;";
    for (what, body) in [
        ("another number", format!("message M {{ uint32 a = 9; {rest} }} {e}")),
        ("another type", format!("message M {{ uint64 a = 1; {rest} }} {e}")),
        ("another name", format!("message M {{ uint32 x = 1; {rest} }} {e}")),
        ("presence", format!("message M {{ optional uint32 a = 1; {rest} }} {e}")),
        ("repeated", format!("message M {{ repeated uint32 a = 1; {rest} }} {e}")),
        ("in a oneof", format!("message M {{ oneof o {{ uint32 a = 1; }} {rest} }} {e}")),
        ("gone", format!("message M {{ {rest} }} {e}")),
        ("its number alone reserved", format!("message M {{ reserved 1; {rest} }} {e}")),
        ("its name alone reserved", format!("message M {{ reserved \"a\"; {rest} }} {e}")),
    ] {
        assert_eq!(found(&body).len(), 1, "{what}: {:?}", found(&body));
    }
    assert_eq!(found(e).len(), 4, "the message and its fields");
    assert_eq!(found(&format!("message N {{ uint32 a = 1; {rest} }} {e}")).len(), 4, "a renamed message");
    assert_eq!(found(&released.replace("ONE = 1", "ONE = 2")), ["was: value p.E ONE = 1\nnow: gone"]);
}

#[test]
fn a_change_is_told_with_what_it_was() {
    let frozen = lines(&compiled("message M { uint32 a = 1; }"));
    let told = |body| broken(&frozen, &compiled(body));
    let was = "was: field p.M a = 1 uint32\nnow: ";
    assert_eq!(told("message M { sint64 a = 1; }"), [format!("{was}field p.M a = 1 sint64")]);
    assert_eq!(told("message M { uint32 a = 2; }"), [format!("{was}field p.M a = 2 uint32")]);
    assert_eq!(told("message M { }"), [format!("{was}gone")]);
}
