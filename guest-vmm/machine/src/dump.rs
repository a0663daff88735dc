//! A core dump of the guest: its VPs' registers and its memory, as an ELF file that debuggers read.
//!
//! The file is computed as it is read: a head with the notes, then the guest's memory in the order of its ranges. Each VP has a note
//! of the kind that processes' core files have (NT_PRSTATUS, the VP's number and one as its thread), and one with its segment and
//! control registers as QEMU writes them, by which tools for Linux kernels find the page tables. Memory is at its guest physical
//! addresses, which is what they are to be taken for where a program header has virtual ones.
//!
//! Sources: System V ABI, chapter 5; Linux `elfcore.h` and `user_64.h` for NT_PRSTATUS; QEMU's `dump-guest-memory` for the other.

use crate::layout::PAGE_BYTES;
use crate::machine::MachineView;
use crate::memory::GuestMemory;
use object::elf::{
    EM_X86_64, ET_CORE, FileFlags, NT_PRSTATUS, NoteType, PF_R, PF_W, PF_X, PT_LOAD, PT_NOTE, ProgramFlags,
};
use object::write::elf::{FileHeader, ProgramHeader, Writer};
use processor::{Registers, Segment, SystemRegisters, Table, VpIndex, VpState, VpStateKind};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Why there is no core dump, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// A VP did not say what is in its registers, in time or at all.
    #[error("VP {vp} does not show its registers{}", why.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    Vp {
        /// The VP.
        vp: VpIndex,
        /// What it said, if anything.
        why: Option<String>,
    },
    /// The machine is gone.
    #[error("the machine is gone")]
    Gone,
    /// The memory could not be read.
    #[error("guest memory could not be read")]
    Memory(#[source] io::Error),
}

/// A core dump: the registers as they were when it was begun, the memory as it is when it is read. Does not keep the machine.
pub struct CoreDump {
    head: Vec<u8>,
    memory: Weak<GuestMemory>,
    memory_bytes: u64,
}

impl CoreDump {
    /// The size of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.head.len() as u64 + self.memory_bytes
    }

    /// At most `count` bytes from `offset` on, fewer only at the end of the file. Memory that the guest has never touched reads as
    /// zeros, and stays untouched.
    pub fn read(&self, offset: u64, count: usize) -> Result<Vec<u8>, DumpError> {
        let left = usize::try_from(self.bytes().saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; count.min(left)];
        let head = usize::try_from(offset).ok().and_then(|start| self.head.get(start..)).unwrap_or_default();
        let (from_head, from_memory) = bytes.split_at_mut(head.len().min(count));
        from_head.copy_from_slice(&head[..from_head.len()]);
        if !from_memory.is_empty() {
            let memory = self.memory.upgrade().ok_or(DumpError::Gone)?;
            let start = (offset + from_head.len() as u64) - self.head.len() as u64;
            memory.read(start, from_memory).map_err(DumpError::Memory)?;
        }
        Ok(bytes)
    }
}

impl MachineView {
    /// Begins a core dump. VPs that run leave the guest for a moment to show their registers; one that does not within the given
    /// time is an error that names it.
    pub async fn dump(&self, within: Duration) -> Result<CoreDump, DumpError> {
        let states = self.vps.collect(within, |state| VpState::save_some(state, is_dumped)).await;
        let mut vps = Vec::new();
        for (vp, state) in (0..).map(VpIndex).zip(states) {
            let state = state.map_err(|why| DumpError::Vp { vp, why })?;
            vps.push(state.map_err(|error| DumpError::Vp { vp, why: Some(error.to_string()) })?);
        }
        let memory = self.target.memory.upgrade().ok_or(DumpError::Gone)?;
        Ok(CoreDump::new(&vps, &memory))
    }
}

fn is_dumped(kind: VpStateKind) -> bool {
    matches!(kind, VpStateKind::Registers | VpStateKind::SystemRegisters | VpStateKind::Msrs)
}

impl CoreDump {
    fn new(vps: &[VpState], memory: &Arc<GuestMemory>) -> Self {
        let ranges = memory.ranges();
        let memory_bytes = ranges.iter().map(|range| range.end - range.start).sum();
        Self { head: head(&notes(vps), &ranges), memory: Arc::downgrade(memory), memory_bytes }
    }
}

/// The file's headers and the notes, up to the page at which memory begins.
fn head(notes: &[u8], ranges: &[Range<u64>]) -> Vec<u8> {
    let mut head = Vec::new();
    let mut writer = Writer::new(object::Endianness::Little, true, &mut head);
    writer.reserve_file_header();
    writer.reserve_program_headers(u32::try_from(1 + ranges.len()).expect("a few ranges"));
    let notes_at = writer.reserve(notes.len() as u64, 4);
    let memory_at = writer.reserve(0, PAGE_BYTES);
    writer
        .write_file_header(&FileHeader {
            os_abi: object::elf::ELFOSABI_NONE,
            abi_version: 0,
            e_type: ET_CORE,
            e_machine: EM_X86_64,
            e_entry: 0,
            e_flags: FileFlags(0),
        })
        .expect("a vector takes everything");
    writer.write_align_program_headers();
    writer.write_program_header(&ProgramHeader {
        p_type: PT_NOTE,
        p_flags: ProgramFlags(0),
        p_offset: notes_at,
        p_vaddr: 0,
        p_paddr: 0,
        p_filesz: notes.len() as u64,
        p_memsz: 0,
        p_align: 4,
    });
    let mut offset = memory_at;
    for range in ranges {
        let bytes = range.end - range.start;
        writer.write_program_header(&ProgramHeader {
            p_type: PT_LOAD,
            p_flags: PF_R | PF_W | PF_X,
            p_offset: offset,
            p_vaddr: range.start,
            p_paddr: range.start,
            p_filesz: bytes,
            p_memsz: bytes,
            p_align: PAGE_BYTES,
        });
        offset += bytes;
    }
    writer.pad_until(notes_at);
    writer.write(notes);
    writer.pad_until(memory_at);
    head
}

fn notes(vps: &[VpState]) -> Vec<u8> {
    let mut notes = Vec::new();
    for (index, state) in (1_u32..).zip(vps) {
        let general = state.registers.unwrap_or_default();
        let system = state.system_registers.unwrap_or_default();
        put_note(&mut notes, b"CORE\0", NT_PRSTATUS, &process_status(index, &general, &system));
        const KERNEL_GS_BASE: u32 = 0xc000_0102;
        let kernel_gs = state.msrs.as_ref().and_then(|msrs| msrs.get(KERNEL_GS_BASE)).unwrap_or(0);
        put_note(&mut notes, b"QEMU\0", NoteType(0), &processor_state(&general, &system, kernel_gs));
    }
    notes
}

/// A note: the sizes of its name and description, its type, both padded to four bytes.
fn put_note(notes: &mut Vec<u8>, name: &[u8], kind: NoteType, description: &[u8]) {
    let size = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a few hundred bytes").to_le_bytes();
    notes.extend([size(name), size(description), kind.0.to_le_bytes()].concat());
    for part in [name, description] {
        notes.extend(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

/// `struct elf_prstatus`: nothing but the thread's number and its registers is there to be told.
fn process_status(thread: u32, general: &Registers, system: &SystemRegisters) -> Vec<u8> {
    const PID: usize = 32;
    const REGISTERS: usize = 112;
    const BYTES: usize = 336;
    let &Registers { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, .. } = general;
    let &Registers { r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags, .. } = general;
    let SystemRegisters { cs, ds, es, fs, gs, ss, .. } = system;
    let selector = |segment: &Segment| u64::from(segment.selector);
    // As `struct user_regs_struct` has them, RAX twice: the second is a system call's number, of which there is none.
    let registers = [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        u64::MAX,
        rip,
        selector(cs),
        rflags,
        rsp,
        selector(ss),
        fs.base,
        gs.base,
        selector(ds),
        selector(es),
        selector(fs),
        selector(gs),
    ];
    let mut status = vec![0; PID];
    status.extend(thread.to_le_bytes());
    status.resize(REGISTERS, 0);
    status.extend(registers.into_iter().flat_map(u64::to_le_bytes));
    status.resize(BYTES, 0);
    status
}

/// QEMU's `QEMUCPUState`, version 1.
fn processor_state(general: &Registers, system: &SystemRegisters, kernel_gs_base: u64) -> Vec<u8> {
    const VERSION: u32 = 1;
    let &Registers { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, .. } = general;
    let &Registers { r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags, .. } = general;
    let SystemRegisters { cs, ds, es, fs, gs, ss, tr, ldtr, gdtr, idtr, cr0, cr2, cr3, cr4, .. } = system;
    let general = [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags];
    let mut rest = general.map(u64::to_le_bytes).concat();
    for Segment { base, limit, selector, attributes } in [cs, ds, es, fs, gs, ss, ldtr, tr] {
        let words = [(*selector).into(), *limit, u32::from(*attributes) << 8, 0];
        rest.extend(words.into_iter().flat_map(u32::to_le_bytes));
        rest.extend(base.to_le_bytes());
    }
    for Table { base, limit } in [gdtr, idtr] {
        rest.extend([0, (*limit).into(), 0, 0].into_iter().flat_map(u32::to_le_bytes));
        rest.extend(base.to_le_bytes());
    }
    rest.extend([*cr0, 0, *cr2, *cr3, *cr4, kernel_gs_base].into_iter().flat_map(u64::to_le_bytes));
    let size = u32::try_from(rest.len() + 8).expect("a few hundred bytes");
    [&VERSION.to_le_bytes()[..], &size.to_le_bytes(), &rest].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryOptions;
    use object::Endianness;
    use object::elf::FileHeader64;
    use object::read::elf::{FileHeader as _, ProgramHeader as _};
    use vm_memory::{Bytes, GuestAddress};

    fn vp(rip: u64) -> VpState {
        let registers = Registers { rip, rax: 7, r15: 15, ..Registers::default() };
        let cs = Segment { base: 0, limit: 0xffff_ffff, selector: 0x10, attributes: 0xa09b };
        let system = SystemRegisters { cs, cr3: 0x9000, ..SystemRegisters::default() };
        VpState { registers: Some(registers), system_registers: Some(system), ..VpState::default() }
    }

    fn number<const N: usize>(bytes: &[u8], offset: usize) -> u64 {
        let mut number = [0; 8];
        number[..N].copy_from_slice(&bytes[offset..offset + N]);
        u64::from_le_bytes(number)
    }

    #[test]
    fn a_dump_is_a_core_file_with_registers_and_memory() {
        let memory = Arc::new(GuestMemory::new(4 << 20, MemoryOptions::default()).unwrap());
        memory.view().write_obj(0x1122_3344_u32, GuestAddress(0x12_3458)).unwrap();
        let dump = CoreDump::new(&[vp(0x1000), vp(0x2000)], &memory);
        let file = dump.read(0, usize::MAX).unwrap();
        assert_eq!(file.len() as u64, dump.bytes());

        let header = FileHeader64::<Endianness>::parse(&file[..]).unwrap();
        let endian = header.endian().unwrap();
        assert_eq!((header.e_type(endian), header.e_machine(endian)), (ET_CORE, EM_X86_64));
        let segments = header.program_headers(endian, &file[..]).unwrap();
        let load = segments.iter().find(|segment| segment.p_type(endian) == PT_LOAD).unwrap();
        assert_eq!((load.p_paddr(endian), load.p_filesz(endian)), (0, 4 << 20));
        let memory = load.data(endian, &file[..]).unwrap();
        assert_eq!(number::<4>(memory, 0x12_3458), 0x1122_3344);

        let mut notes = segments[0].notes(endian, &file[..]).unwrap().unwrap();
        for (thread, rip) in [(1, 0x1000), (2, 0x2000)] {
            let status = notes.next().unwrap().unwrap();
            assert_eq!((status.name(), status.n_type(endian)), (&b"CORE"[..], NT_PRSTATUS));
            assert_eq!(status.desc().len(), 336);
            assert_eq!(number::<4>(status.desc(), 32), thread);
            // R15, RAX, RIP and CS.
            let register = |index: usize| number::<8>(status.desc(), 112 + 8 * index);
            assert_eq!([0, 10, 16, 17].map(register), [15, 7, rip, 0x10]);
            let state = notes.next().unwrap().unwrap();
            assert_eq!(state.name(), b"QEMU");
            let desc = state.desc();
            assert_eq!((number::<4>(desc, 0), number::<4>(desc, 4)), (1, desc.len() as u64));
            assert_eq!((number::<8>(desc, 8), number::<8>(desc, 8 + 16 * 8)), (7, rip));
            assert_eq!((number::<4>(desc, 8 + 18 * 8), number::<4>(desc, 16 + 18 * 8)), (0x10, 0xa0_9b00));
            assert_eq!(number::<8>(desc, desc.len() - 3 * 8), 0x9000, "CR3");
        }
        assert!(notes.next().unwrap().is_none());
    }

    #[test]
    fn any_part_of_a_dump_is_that_part_of_the_file() {
        let memory = Arc::new(GuestMemory::new(1 << 20, MemoryOptions::default()).unwrap());
        memory.view().write_slice(&[0x5a; 100], GuestAddress(0)).unwrap();
        let dump = CoreDump::new(&[vp(1)], &memory);
        let file = dump.read(0, usize::MAX).unwrap();
        let head = dump.head.len();
        for (offset, count) in
            [(0, 64), (head - 3, 10), (head, 100), (head + 50, 1 << 20), (file.len() - 1, 9)]
        {
            let end = file.len().min(offset + count);
            assert_eq!(dump.read(offset as u64, count).unwrap(), file[offset..end]);
        }
        assert_eq!(dump.read(file.len() as u64, 10).unwrap(), []);
        assert_eq!(dump.read(u64::MAX, 10).unwrap(), []);
        drop(memory);
        assert!(dump.read(0, 10).is_ok(), "the head is there");
        assert!(matches!(dump.read(head as u64, 10), Err(DumpError::Gone)));
    }
}
