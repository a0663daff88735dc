//! ELF kernels (System V ABI, chapters 4 and 5, AMD64 supplement): 64-bit x86, loaded to the physical addresses of their segments.
//!
//! A kernel with Xen's PHYS32_ENTRY note starts by PVH, any other by Linux's boot protocol at its entry address.

use super::error::{CMDLINE_MAX, LoadError, Occupant};
use super::file::ImageFile;
use super::kernel::{Fields, Kernel, Protocol, Segment};
use super::zero_page;
use crate::layout;
use linux_loader::loader::bootparam::setup_header;

const MAGIC: &[u8] = b"\x7fELF";
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PROGRAM_LOAD: u32 = 1;
const PROGRAM_NOTE: u32 = 4;

/// More program headers than any kernel has; keeps a hostile file from costing time.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// The most bytes of notes that are looked through.
const MAX_NOTE_BYTES: u64 = 64 * 1024;

const NOTE_HEADER_BYTES: usize = 12;
const NOTE_XEN: &[u8] = b"Xen\0";
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Linux's own limits, which a vmlinux does not tell: COMMAND_LINE_SIZE without the NUL, and the default of initrd_addr_max.
const LINUX_CMDLINE_MAX: u64 = 2047;
const LINUX_INITRD_END: u64 = 0x8000_0000;

pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

fn bad_field(field: &'static str, value: impl Into<u64>, reason: &'static str) -> LoadError {
    LoadError::Field { format: "ELF", field, value: value.into(), reason }
}

/// A program header.
struct Program {
    kind: u32,
    offset: u64,
    physical: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

pub(super) fn parse(file: &ImageFile<'_>, head: &[u8]) -> Result<Kernel, LoadError> {
    let programs = programs(file, head)?;
    let segments = segments(file, &programs)?;
    let kernel = match pvh_entry(file, &programs)? {
        Some(entry) => Kernel {
            protocol: Protocol::Pvh,
            entry,
            segments,
            cmdline_max: CMDLINE_MAX,
            initrd_end: layout::LOW_MEMORY_END,
            header: setup_header::default(),
        },
        None => Kernel {
            protocol: Protocol::Linux64,
            entry: Fields(head).u64(24),
            segments,
            cmdline_max: LINUX_CMDLINE_MAX,
            initrd_end: LINUX_INITRD_END,
            header: zero_page::header_without_image(),
        },
    };
    check_entry(&kernel)?;
    Ok(kernel)
}

/// Checks the file's header and reads the program headers.
fn programs(file: &ImageFile<'_>, head: &[u8]) -> Result<Vec<Program>, LoadError> {
    file.check(0, HEADER_BYTES as u64, "the ELF header")?;
    let header = Fields(head);
    check_identity(&header)?;
    let (offset, size, count) = (header.u64(32), header.u16(54), header.u16(56));
    if size != PROGRAM_HEADER_BYTES {
        return Err(bad_field("e_phentsize", size, "a 64-bit program header has 56 bytes"));
    }
    if count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(bad_field("e_phnum", count, "from 1 to 128 program headers can be loaded"));
    }
    let bytes = usize::from(size) * usize::from(count);
    let table = usize::try_from(offset).ok().and_then(|at| head.get(at..at.checked_add(bytes)?));
    let table = match table {
        Some(table) => table.to_vec(),
        None => file.read(offset, bytes, "the program header table")?,
    };
    Ok(table.chunks_exact(usize::from(size)).map(program).collect())
}

fn check_identity(header: &Fields<'_>) -> Result<(), LoadError> {
    let (class, encoding, kind, machine) = (header.u8(4), header.u8(5), header.u16(16), header.u16(18));
    if class != CLASS_64 {
        return Err(bad_field("EI_CLASS", class, "only 64-bit kernels can be loaded"));
    }
    if encoding != LITTLE_ENDIAN {
        return Err(bad_field("EI_DATA", encoding, "only little-endian kernels can be loaded"));
    }
    if kind != TYPE_EXECUTABLE && kind != TYPE_SHARED {
        return Err(bad_field("e_type", kind, "only executables can be loaded"));
    }
    if machine != MACHINE_X86_64 {
        return Err(bad_field("e_machine", machine, "only kernels for x86-64 (0x3e) can be loaded"));
    }
    Ok(())
}

fn program(bytes: &[u8]) -> Program {
    let fields = Fields(bytes);
    Program {
        kind: fields.u32(0),
        offset: fields.u64(8),
        physical: fields.u64(24),
        file_bytes: fields.u64(32),
        memory_bytes: fields.u64(40),
    }
}

fn segments(file: &ImageFile<'_>, programs: &[Program]) -> Result<Vec<Segment>, LoadError> {
    let loads = programs.iter().enumerate().filter(|(_, p)| p.kind == PROGRAM_LOAD && p.memory_bytes > 0);
    let segments: Vec<_> =
        loads.map(|(number, program)| segment(file, number, program)).collect::<Result<_, _>>()?;
    if segments.is_empty() {
        return Err(bad_field("e_phnum", programs.len() as u64, "no program header loads anything"));
    }
    Ok(segments)
}

fn segment(file: &ImageFile<'_>, number: usize, program: &Program) -> Result<Segment, LoadError> {
    let Program { offset, physical, file_bytes, memory_bytes, .. } = *program;
    if file_bytes > memory_bytes {
        return Err(bad_field("p_filesz", file_bytes, "larger than p_memsz"));
    }
    if physical.checked_add(memory_bytes).is_none() {
        return Err(bad_field("p_memsz", memory_bytes, "the segment goes beyond the last address"));
    }
    file.check(offset, file_bytes, "a segment")?;
    let what = Occupant::Segment(number);
    Ok(Segment { what, file_offset: offset, file_bytes, address: physical, memory_bytes })
}

fn check_entry(kernel: &Kernel) -> Result<(), LoadError> {
    let entry = kernel.entry;
    let inside = |s: &Segment| s.address <= entry && entry < s.address + s.memory_bytes;
    if kernel.segments.iter().any(inside) { Ok(()) } else { Err(LoadError::EntryOutside { entry }) }
}

/// The address in the PVH note, if there is one.
fn pvh_entry(file: &ImageFile<'_>, programs: &[Program]) -> Result<Option<u64>, LoadError> {
    for program in programs.iter().filter(|program| program.kind == PROGRAM_NOTE) {
        if program.file_bytes > MAX_NOTE_BYTES {
            return Err(bad_field("p_filesz", program.file_bytes, "a note segment has at most 65536 bytes"));
        }
        let length = usize::try_from(program.file_bytes).expect("just limited");
        let notes = file.read(program.offset, length, "a note segment")?;
        if let Some(entry) = find_pvh_note(&notes)? {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Looks through notes, whose names and descriptions are padded to four bytes. What follows a broken note is not looked at.
fn find_pvh_note(mut notes: &[u8]) -> Result<Option<u64>, LoadError> {
    while notes.len() >= NOTE_HEADER_BYTES {
        let header = Fields(notes);
        let (name_bytes, description_bytes, kind) = (header.u32(0), header.u32(4), header.u32(8));
        let Some((name, rest)) = split_padded(&notes[NOTE_HEADER_BYTES..], name_bytes) else {
            return Ok(None);
        };
        let Some((description, rest)) = split_padded(rest, description_bytes) else { return Ok(None) };
        if kind == NOTE_PHYS32_ENTRY && name == NOTE_XEN {
            return pvh_address(description).map(Some);
        }
        notes = rest;
    }
    Ok(None)
}

/// The first `count` bytes, and what follows their padding.
fn split_padded(bytes: &[u8], count: u32) -> Option<(&[u8], &[u8])> {
    let count = usize::try_from(count).ok()?;
    let padded = count.checked_next_multiple_of(4)?;
    let taken = bytes.get(..count)?;
    Some((taken, bytes.get(padded..).unwrap_or_default()))
}

/// The note's description is a pointer of the kernel's size; the entry is below 4 GiB, as it runs in 32 bits.
fn pvh_address(description: &[u8]) -> Result<u64, LoadError> {
    let address = match description.len() {
        4 => u64::from(Fields(description).u32(0)),
        8 => Fields(description).u64(0),
        length => return Err(bad_field("n_descsz", length as u64, "a PVH note holds 4 or 8 bytes")),
    };
    if address > u64::from(u32::MAX) {
        return Err(bad_field("PHYS32_ENTRY", address, "a PVH entry is below 4 GiB"));
    }
    Ok(address)
}
