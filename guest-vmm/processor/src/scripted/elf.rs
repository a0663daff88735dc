//! The smallest ELF64 executable that a PVH boot loader takes: one segment to load and one note.
//!
//! System V ABI, ELF-64 object file format; the note is XEN_ELFNOTE_PHYS32_ENTRY of Xen's `elfnote.h`.

const HEADER_SIZE: u16 = 64;
const PROGRAM_HEADER_SIZE: u16 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const READ_WRITE_EXECUTE: u32 = 7;
const READ: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// An executable that loads the code at `base` and enters it there.
pub(super) fn executable(base: u32, code: &[u8]) -> Vec<u8> {
    let note = note(base);
    let note_offset = u64::from(HEADER_SIZE + 2 * PROGRAM_HEADER_SIZE);
    let code_offset = note_offset + note.len() as u64;
    let mut file = header(base);
    file.extend(program_header(PT_LOAD, READ_WRITE_EXECUTE, code_offset, (base.into(), code.len(), 1)));
    file.extend(program_header(PT_NOTE, READ, note_offset, (0, note.len(), 4)));
    file.extend(note);
    file.extend(code);
    file
}

fn note(entry: u32) -> Vec<u8> {
    let name = *b"Xen\0";
    let lengths = [4u32.to_le_bytes(), 4u32.to_le_bytes()].concat();
    [&*lengths, &XEN_ELFNOTE_PHYS32_ENTRY.to_le_bytes(), &name, &entry.to_le_bytes()].concat()
}

fn header(entry: u32) -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01".to_vec(); // 64 bits, little endian, version 1
    header.resize(16, 0);
    let halves = |values: &[u16]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    header.extend(halves(&[2, 62])); // ET_EXEC, EM_X86_64
    header.extend(1u32.to_le_bytes());
    for offset in [u64::from(entry), u64::from(HEADER_SIZE), 0] {
        header.extend(offset.to_le_bytes()); // entry, program headers, no section headers
    }
    header.extend(0u32.to_le_bytes());
    header.extend(halves(&[HEADER_SIZE, PROGRAM_HEADER_SIZE, 2, 0, 0, 0]));
    header
}

/// A program header; `place` is its address, its size in bytes and its alignment.
fn program_header(kind: u32, flags: u32, offset: u64, place: (u64, usize, u64)) -> Vec<u8> {
    let (address, size, align) = place;
    let size = size as u64;
    let mut header = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
    for value in [offset, address, address, size, size, align] {
        header.extend(value.to_le_bytes());
    }
    header
}
