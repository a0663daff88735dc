//! The image is what a loader expects: static, small, with one PVH entry, and no memory both writable and executable.

use builtin_guest::{COMMANDS, IMAGE};

const LOAD: u32 = 1;
const DYNAMIC: u32 = 2;
const INTERPRETER: u32 = 3;
const NOTE: u32 = 4;
const EXECUTE: u32 = 1;
const WRITE: u32 = 2;

struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

fn number(at: usize, bytes: usize) -> u64 {
    IMAGE[at..at + bytes].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("an offset within the image")
}

fn field(at: usize) -> u32 {
    u32::try_from(number(at, 4)).expect("four bytes")
}

fn segments() -> Vec<Segment> {
    let (table, count) = (index(number(32, 8)), index(number(56, 2)));
    let heads = (0..count).map(|nth| table + nth * 56);
    heads
        .map(|at| Segment {
            kind: field(at),
            flags: field(at + 4),
            offset: number(at + 8, 8),
            address: number(at + 24, 8),
            file_bytes: number(at + 32, 8),
            memory_bytes: number(at + 40, 8),
        })
        .collect()
}

fn of_kind(kind: u32) -> Vec<Segment> {
    segments().into_iter().filter(|segment| segment.kind == kind).collect()
}

#[test]
fn is_a_static_executable_for_x86_64() {
    assert_eq!(&IMAGE[..6], b"\x7fELF\x02\x01", "ELF, 64 bits, little endian");
    assert_eq!((number(16, 2), number(18, 2)), (2, 62), "ET_EXEC, EM_X86_64");
    assert!(of_kind(DYNAMIC).is_empty() && of_kind(INTERPRETER).is_empty());
}

#[test]
fn is_small_and_fits_into_two_mib() {
    assert!(IMAGE.len() < 128 << 10, "{} bytes", IMAGE.len());
    let loads = of_kind(LOAD);
    assert!((1..=2).contains(&loads.len()), "{} segments", loads.len());
    for load in loads {
        assert!(
            load.address >= 1 << 20 && load.address + load.memory_bytes <= 3 << 19,
            "{:#x}",
            load.address
        );
        assert!(load.file_bytes <= load.memory_bytes);
        assert!(load.offset + load.file_bytes <= IMAGE.len() as u64);
    }
}

#[test]
fn has_one_pvh_note_whose_entry_is_code() {
    let notes = of_kind(NOTE);
    assert_eq!(notes.len(), 1);
    let at = index(notes[0].offset);
    assert_eq!((field(at), field(at + 4), field(at + 8)), (4, 4, 18));
    assert_eq!(&IMAGE[at + 12..at + 16], b"Xen\0");
    assert_eq!(notes[0].file_bytes, 20, "a single note");
    let entry = u64::from(field(at + 16));
    let within = |load: &Segment| load.address <= entry && entry < load.address + load.file_bytes;
    let code: Vec<_> = of_kind(LOAD).into_iter().filter(within).collect();
    assert_eq!(code.len(), 1);
    assert_eq!(code[0].flags & (EXECUTE | WRITE), EXECUTE);
}

#[test]
fn writes_the_first_byte_of_ready_with_its_third_instruction() {
    let code = of_kind(LOAD).into_iter().find(|load| load.flags & EXECUTE != 0).expect("code");
    let entry = index(number(24, 8) - code.address + code.offset);
    // mov edx, 0x3f8; then per byte: mov al, BYTE; out dx, al
    let mut expected = vec![0xba, 0xf8, 0x03, 0, 0];
    expected.extend(b"READY\n".iter().flat_map(|byte| [0xb0, *byte, 0xee]));
    assert_eq!(&IMAGE[entry..entry + expected.len()], expected);
}

#[test]
fn nothing_is_both_writable_and_executable() {
    for segment in segments() {
        assert_ne!(segment.flags & (WRITE | EXECUTE), WRITE | EXECUTE, "{:#x}", segment.address);
    }
}

#[test]
fn the_image_holds_every_command_and_their_names_differ() {
    for (command, what) in COMMANDS {
        let found = |text: &str| IMAGE.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(found(command) && found(what), "{command}: {what}");
    }
    let mut names: Vec<_> = COMMANDS.iter().filter_map(|(command, _)| command.split(' ').next()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), COMMANDS.len());
}

#[test]
fn the_readme_documents_every_command() {
    let readme = include_str!("../README.md");
    for (command, _) in COMMANDS {
        assert!(readme.contains(&format!("| `{command}` |")), "{command}");
    }
}
