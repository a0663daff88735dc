//! The loaders, over images made here: what a kernel finds when it starts, and what is refused.

use super::*;
use crate::layout::{COMMAND_LINE, PVH_START_INFO, ZERO_PAGE};
use crate::memory::{GuestMemory, MemoryOptions};
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, fstat, memfd_create};
use std::io::{Seek, SeekFrom, Write};
use vm_memory::GuestMemoryBackend;

const MIB: u64 = 1 << 20;
const RSDP: GuestAddress = GuestAddress(0xe_0000);
const CODE: &[u8] = b"the kernel's code";
const DATA: &[u8] = b"the kernel's data";

fn memory(mib: u64) -> GuestMemory {
    GuestMemory::new(mib * MIB, MemoryOptions::default()).unwrap()
}

/// A memfd with its file offset somewhere else, as a file that others use too.
fn file(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(3)).unwrap();
    file
}

fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.view().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn untouched(memory: &GuestMemory) -> bool {
    fstat(memory.file()).unwrap().st_blocks == 0
}

fn boot(
    memory: &GuestMemory,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
) -> Result<InitialVpState, LoadError> {
    let (kernel, initrd) = (file(kernel), initrd.map(file));
    let source = BootSource { kernel: &kernel, initrd: initrd.as_ref(), cmdline };
    Ok(load(memory, &source, RSDP)?.vp)
}

/// The error of a load into 16 MiB, which must not have touched them.
fn refused(kernel: &[u8]) -> String {
    let memory = memory(16);
    let error = boot(&memory, kernel, None, "").unwrap_err();
    assert!(untouched(&memory), "refused after writing: {error}");
    error.to_string()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// An ELF kernel: code at 1 MiB, data with some zeros after it at 1 MiB + 4 KiB, and a note if there is an address for it.
fn elf(note: Option<u64>) -> Vec<u8> {
    let mut bytes = vec![0; 0x300];
    put(&mut bytes, 0, b"\x7fELF\x02\x01\x01");
    put(&mut bytes, 16, &[2, 0, 62, 0, 1]);
    put(&mut bytes, 24, &(MIB + 4).to_le_bytes());
    put(&mut bytes, 32, &64u64.to_le_bytes());
    put(&mut bytes, 52, &[64, 0, 56, 0, 3]);
    program(&mut bytes, 0, 1, (0x200, CODE.len() as u64), (MIB, CODE.len() as u64));
    program(&mut bytes, 1, 1, (0x240, DATA.len() as u64), (MIB + 0x1000, 0x2000));
    program(&mut bytes, 2, 4, (0x280, 0x40), (0, 0));
    put(&mut bytes, 0x200, CODE);
    put(&mut bytes, 0x240, DATA);
    // A note of somebody else's comes first.
    put(&mut bytes, 0x280, b"\x04\0\0\0\x02\0\0\0\x01\0\0\0GNU\0\xaa\xbb");
    if let Some(address) = note {
        put(&mut bytes, 0x294, b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0");
        put(&mut bytes, 0x2a4, &address.to_le_bytes());
    }
    bytes
}

fn program(bytes: &mut [u8], number: usize, kind: u32, file: (u64, u64), memory: (u64, u64)) {
    let at = 64 + 56 * number;
    put(bytes, at, &kind.to_le_bytes());
    put(bytes, at + 8, &file.0.to_le_bytes());
    put(bytes, at + 24, &memory.0.to_le_bytes());
    put(bytes, at + 32, &file.1.to_le_bytes());
    put(bytes, at + 40, &memory.1.to_le_bytes());
}

/// A bzImage: one setup sector, a kernel of 0x1000 bytes that prefers 2 MiB and needs 1 MiB there.
fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0; 0x400 + 0x1000];
    bytes[0x1f1] = 1;
    put(&mut bytes, 0x1f4, &0x100u32.to_le_bytes());
    put(&mut bytes, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut bytes, 0x202, b"HdrS\x0f\x02");
    bytes[0x211] = 1;
    put(&mut bytes, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut bytes, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut bytes, 0x236, &[1, 0]);
    put(&mut bytes, 0x238, &100u32.to_le_bytes());
    put(&mut bytes, 0x258, &(2 * MIB).to_le_bytes());
    put(&mut bytes, 0x260, &(1u32 << 20).to_le_bytes());
    put(&mut bytes, 0x600, CODE);
    bytes
}

fn changed(mut bytes: Vec<u8>, at: usize, value: &[u8]) -> Vec<u8> {
    put(&mut bytes, at, value);
    bytes
}

#[test]
fn a_pvh_kernel_finds_its_start_info() {
    let memory = memory(16);
    let state = boot(&memory, &elf(Some(MIB)), Some(b"initrd"), "console=ttyS0").unwrap();
    assert_eq!(read(&memory, MIB, CODE.len()), CODE);
    assert_eq!(read(&memory, MIB + 0x1000, DATA.len()), DATA);
    let info: hvm_start_info = memory.view().read_obj(GuestAddress(state.registers.rbx)).unwrap();
    assert_eq!((info.magic, info.version, info.rsdp_paddr), (0x336e_c578, 1, RSDP.0));
    assert_eq!(read(&memory, info.cmdline_paddr, 14), b"console=ttyS0\0");
    assert_eq!(info.nr_modules, 1);
    let module: hvm_modlist_entry = memory.view().read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (16 * MIB - 4096, 6));
    assert_eq!(read(&memory, module.paddr, 6), b"initrd");
    let map = (0..info.memmap_entries).map(|n| {
        let at = GuestAddress(info.memmap_paddr + 24 * u64::from(n));
        let entry: hvm_memmap_table_entry = memory.view().read_obj(at).unwrap();
        (entry.addr, entry.size, entry.type_)
    });
    assert_eq!(map.collect::<Vec<_>>(), [(0, 0xa_0000, 1), (0xe_0000, 0x2_0000, 2), (MIB, 15 * MIB, 1)]);
}

#[test]
fn a_pvh_kernel_starts_in_protected_mode() {
    let state = boot(&memory(16), &elf(Some(MIB)), None, "").unwrap();
    assert_eq!(state.registers.rip, MIB);
    assert_eq!(state.registers.rbx, PVH_START_INFO.start);
    assert_eq!(state.registers.rflags, 2);
    let system = state.system_registers;
    assert_eq!((system.cr0, system.cr4, system.efer), (0x11, 0, 0));
    assert_eq!(system.cs.attributes & (1 << 13 | 1 << 14), 1 << 14, "32 bits");
    assert_eq!((system.cs.limit, system.ds.limit, system.tr.limit), (u32::MAX, u32::MAX, 0x67));
}

#[test]
fn a_pvh_note_with_a_32_bit_address_serves_too() {
    let mut kernel = elf(Some(MIB + 1));
    kernel[0x298] = 4;
    assert_eq!(boot(&memory(16), &kernel, None, "").unwrap().registers.rip, MIB + 1);
}

fn boot_params(memory: &GuestMemory) -> boot_params {
    memory.view().read_obj(GuestAddress(ZERO_PAGE.start)).unwrap()
}

fn e820(params: &boot_params) -> Vec<(u64, u64, u32)> {
    let table = params.e820_table;
    table[..usize::from(params.e820_entries)].iter().map(|e| (e.addr, e.size, e.r#type)).collect()
}

#[test]
fn a_vmlinux_finds_its_zero_page() {
    let memory = memory(3 * 1024 + 64);
    let state = boot(&memory, &elf(None), Some(b"initrd"), "quiet").unwrap();
    assert_eq!((state.registers.rip, state.registers.rsi), (MIB + 4, ZERO_PAGE.start));
    let system = state.system_registers;
    assert_eq!((system.cr0, system.cr3, system.cr4, system.efer), (0x8000_0011, 0x9000, 0x20, 0x500));
    assert_eq!(system.cs.attributes & (1 << 13 | 1 << 14), 1 << 13, "64 bits");
    let params = boot_params(&memory);
    let rsdp = params.acpi_rsdp_addr;
    assert_eq!(rsdp, RSDP.0);
    let (flag, magic, cmdline) = (params.hdr.boot_flag, params.hdr.header, params.hdr.cmd_line_ptr);
    assert_eq!((flag, magic, u64::from(cmdline)), (0xaa55, 0x5372_6448, COMMAND_LINE.start));
    assert_eq!(read(&memory, COMMAND_LINE.start, 6), b"quiet\0");
    let (initrd, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    assert_eq!((initrd, size), (0x8000_0000 - 4096, 6), "below what Linux can reach");
    assert_eq!(read(&memory, initrd.into(), 6), b"initrd");
    let high = (4096 * MIB, 64 * MIB, 1);
    let low = (MIB, 3071 * MIB, 1);
    assert_eq!(e820(&params), [(0, 0xa_0000, 1), (0xe_0000, 0x2_0000, 2), low, high]);
}

#[test]
fn a_bzimage_starts_at_its_64_bit_entry() {
    let memory = memory(16);
    let state = boot(&memory, &bzimage(), Some(b"initrd"), "quiet").unwrap();
    assert_eq!((state.registers.rip, state.registers.rsi), (2 * MIB + 0x200, ZERO_PAGE.start));
    assert_eq!(state.system_registers.efer, 0x500);
    assert_eq!(read(&memory, 2 * MIB + 0x200, CODE.len()), CODE);
    let params = boot_params(&memory);
    let (version, alignment, loader) =
        (params.hdr.version, params.hdr.kernel_alignment, params.hdr.type_of_loader);
    assert_eq!(
        (version, alignment, loader),
        (0x20f, 0x20_0000, 0xff),
        "the file's header and the loader's part"
    );
    let (initrd, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    assert_eq!((u64::from(initrd), size), (16 * MIB - 4096, 6));
}

#[test]
fn what_follows_the_setup_header_is_not_copied() {
    let memory = memory(16);
    // The jump says that the header ends at 0x260, before init_size.
    boot(&memory, &changed(bzimage(), 0x201, &[0x5e]), None, "").unwrap();
    let params = boot_params(&memory);
    let (preferred, needed) = (params.hdr.pref_address, params.hdr.init_size);
    assert_eq!((preferred, needed), (2 * MIB, 0));
}

#[test]
fn a_bzimage_without_a_64_bit_entry_starts_in_protected_mode() {
    let memory = memory(16);
    let state = boot(&memory, &changed(bzimage(), 0x236, &[0]), None, "").unwrap();
    assert_eq!((state.registers.rip, state.registers.rsi), (2 * MIB, ZERO_PAGE.start));
    assert_eq!((state.system_registers.cr0, state.system_registers.efer), (0x11, 0));
    assert_eq!((state.system_registers.cs.selector, state.system_registers.ds.selector), (0x10, 0x18));
}

#[test]
fn an_old_bzimage_goes_to_the_first_megabyte() {
    let memory = memory(16);
    let state = boot(&memory, &changed(bzimage(), 0x206, &[6, 2]), None, "").unwrap();
    assert_eq!(state.registers.rip, MIB);
    assert_eq!(read(&memory, MIB + 0x200, CODE.len()), CODE);
}

#[test]
fn an_initrd_stays_clear_of_a_kernel_that_unpacks_itself() {
    let memory = memory(3);
    let kernel = changed(bzimage(), 0x260, &(1u32 << 20).to_le_bytes());
    boot(&memory, &kernel, Some(b"initrd"), "").unwrap();
    let initrd = boot_params(&memory).hdr.ramdisk_image;
    assert_eq!(initrd, 0x1f_f000);
}

#[test]
fn files_that_are_no_kernel_are_refused() {
    assert_eq!(refused(b""), "kernel: the file is empty");
    assert_eq!(refused(b"MZ\x90"), "kernel: neither an ELF file nor a bzImage: it begins with [4d, 5a, 90]");
    assert_eq!(
        refused(&[0; 4096]),
        format!("kernel: neither an ELF file nor a bzImage: it begins with {:02x?}", [0u8; 8])
    );
}

#[test]
fn files_that_are_not_regular_are_refused() {
    let kernel = file(&elf(Some(MIB)));
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    let directory = File::open("/").unwrap();
    for (kernel, initrd, text) in [
        (&pipe, None, "kernel: a pipe cannot be loaded, only a regular file or a memfd"),
        (&kernel, Some(&pipe), "initrd: a pipe cannot be loaded, only a regular file or a memfd"),
        (&directory, None, "kernel: a directory cannot be loaded, only a regular file or a memfd"),
    ] {
        let error = load(&memory(16), &BootSource { kernel, initrd, cmdline: "" }, RSDP).unwrap_err();
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn faults_of_elf_kernels_are_named() {
    let elf = || elf(Some(MIB));
    let cases: [(Vec<u8>, &str); 16] = [
        (elf()[..20].to_vec(), "kernel: truncated: the ELF header ends at byte 64, the file at byte 20"),
        (
            elf()[..100].to_vec(),
            "kernel: truncated: the program header table ends at byte 232, the file at byte 100",
        ),
        (elf()[..0x208].to_vec(), "kernel: truncated: a segment ends at byte 529, the file at byte 520"),
        (elf()[..0x290].to_vec(), "kernel: truncated: a note segment ends at byte 704, the file at byte 656"),
        (changed(elf(), 4, &[1]), "kernel: ELF field EI_CLASS is 0x1: only 64-bit kernels can be loaded"),
        (
            changed(elf(), 5, &[2]),
            "kernel: ELF field EI_DATA is 0x2: only little-endian kernels can be loaded",
        ),
        (changed(elf(), 16, &[1]), "kernel: ELF field e_type is 0x1: only executables can be loaded"),
        (
            changed(elf(), 18, &[0xb7]),
            "kernel: ELF field e_machine is 0xb7: only kernels for x86-64 (0x3e) can be loaded",
        ),
        (
            changed(elf(), 54, &[32]),
            "kernel: ELF field e_phentsize is 0x20: a 64-bit program header has 56 bytes",
        ),
        (
            changed(elf(), 56, &[0]),
            "kernel: ELF field e_phnum is 0x0: from 1 to 128 program headers can be loaded",
        ),
        (
            changed(changed(elf(), 64, &[4]), 120, &[4]),
            "kernel: ELF field e_phnum is 0x3: no program header loads anything",
        ),
        (changed(elf(), 96, &[0xff]), "kernel: ELF field p_filesz is 0xff: larger than p_memsz"),
        (
            changed(elf(), 88, &[0xff; 8]),
            "kernel: ELF field p_memsz is 0x11: the segment goes beyond the last address",
        ),
        (changed(elf(), 0x298, &[5]), "kernel: ELF field n_descsz is 0x5: a PVH note holds 4 or 8 bytes"),
        (
            changed(elf(), 0x2a8, &[1]),
            "kernel: ELF field PHYS32_ENTRY is 0x100100000: a PVH entry is below 4 GiB",
        ),
        (changed(elf(), 0x2a6, &[0x20]), "kernel: entry 0x200000 is in no loaded segment"),
    ];
    for (kernel, text) in cases {
        assert_eq!(refused(&kernel), text);
    }
}

#[test]
fn segments_have_to_lie_in_memory_and_apart() {
    let at = |address: u64| changed(elf(None), 88, &address.to_le_bytes());
    let usable = "usable memory is 0x0..0xa0000 and 0x100000..0x1000000";
    assert_eq!(refused(&at(16 * MIB)), format!("kernel: entry {:#x} is in no loaded segment", MIB + 4));
    let entry = |kernel: Vec<u8>, address: u64| changed(kernel, 24, &address.to_le_bytes());
    let outside = |address: u64| refused(&entry(at(address), address));
    assert_eq!(outside(16 * MIB), format!("kernel segment 0 needs 0x1000000..0x1000011, {usable}"));
    assert_eq!(outside(0x9_fff8), format!("kernel segment 0 needs 0x9fff8..0xa0009, {usable}"));
    assert_eq!(outside(RSDP.0), format!("kernel segment 0 needs 0xe0000..0xe0011, {usable}"));
    assert_eq!(
        outside(0x7ff8),
        "kernel segment 0 needs 0x7ff8..0x8009, but 0x7000..0x8000 holds the zero page"
    );
    assert_eq!(outside(0x500), "kernel segment 0 needs 0x500..0x511, but 0x500..0x530 holds the first GDT");
    assert_eq!(
        outside(0xe000),
        "kernel segment 0 needs 0xe000..0xe011, but 0x9000..0xf000 holds the first page tables"
    );
    assert_eq!(
        outside(0x2_0000),
        "kernel segment 0 needs 0x20000..0x20011, but 0x20000..0x20001 holds the command line"
    );
    let overlap = "kernel segment 1 needs 0x101000..0x103000, but 0x102ff0..0x103001 holds kernel segment 0";
    assert_eq!(outside(0x10_2ff0), overlap);
}

#[test]
fn faults_of_bzimages_are_named() {
    let cases: [(Vec<u8>, &str); 9] = [
        (
            bzimage()[..0x210].to_vec(),
            "kernel: truncated: the setup header ends at byte 620, the file at byte 528",
        ),
        (
            bzimage()[..0x13ff].to_vec(),
            "kernel: truncated: the kernel ends at byte 5120, the file at byte 5119",
        ),
        (
            changed(bzimage(), 0x1f1, &[200]),
            "kernel: truncated: the kernel ends at byte 107008, the file at byte 5120",
        ),
        (changed(bzimage(), 0x1fe, &[0]), "kernel: bzImage field boot_flag is 0xaa00: it has to be 0xaa55"),
        (
            changed(bzimage(), 0x206, &[5]),
            "kernel: bzImage field version is 0x205: protocol 2.06 is the oldest that can be loaded",
        ),
        (
            changed(bzimage(), 0x211, &[0]),
            "kernel: bzImage field loadflags is 0x0: a zImage cannot be loaded",
        ),
        (
            changed(bzimage(), 0x25a, &[0]),
            "kernel: bzImage field pref_address is 0x0: from 1 MiB to 4 GiB is where a kernel can be loaded",
        ),
        (
            changed(bzimage(), 0x263, &[1]),
            "the kernel needs 0x200000..0x1300000, usable memory is 0x0..0xa0000 and 0x100000..0x1000000",
        ),
        (
            changed(bzimage()[..0x500].to_vec(), 0x1f4, &[1, 0]),
            "kernel: entry 0x200200 is in no loaded segment",
        ),
    ];
    for (kernel, text) in cases {
        assert_eq!(refused(&kernel), text);
    }
}

#[test]
fn initrds_that_cannot_be_loaded_are_refused() {
    let memory = memory(4);
    let error = boot(&memory, &bzimage(), Some(b""), "").unwrap_err();
    assert_eq!(error.to_string(), "initrd: the file is empty");
    let error = boot(&memory, &bzimage(), Some(&[1; (1 << 20) + 1]), "").unwrap_err();
    let text =
        "initrd: 1048577 bytes do not fit below 0x80000000: the largest free range there has 1048576 bytes";
    assert_eq!(error.to_string(), text);
    assert!(untouched(&memory));
    boot(&memory, &bzimage(), Some(&[1; 1 << 20]), "").unwrap();
}

#[test]
fn command_lines_that_the_kernel_cannot_take_are_refused() {
    let text = |kernel: &[u8], bytes: usize| {
        boot(&memory(16), kernel, None, &"x".repeat(bytes)).map_err(|e| e.to_string())
    };
    for (kernel, limit) in [(bzimage(), 100), (elf(None), 2047), (elf(Some(MIB)), 65535)] {
        assert!(text(&kernel, limit).is_ok());
        let refused = format!("command line: {} bytes, the kernel takes {limit}", limit + 1);
        assert_eq!(text(&kernel, limit + 1), Err(refused));
    }
    let error = boot(&memory(16), &bzimage(), None, "quiet\0splash").unwrap_err();
    assert_eq!(error.to_string(), "command line: NUL at byte 5");
}

#[test]
fn a_guest_of_one_megabyte_boots_a_kernel_below_it() {
    let memory = memory(1);
    let mut kernel = elf(Some(0x4_0000));
    put(&mut kernel, 88, &0x4_0000u64.to_le_bytes());
    put(&mut kernel, 144, &0x5_0000u64.to_le_bytes());
    let state = boot(&memory, &kernel, Some(b"initrd"), "").unwrap();
    assert_eq!(state.registers.rip, 0x4_0000);
    assert_eq!(read(&memory, 0x9_f000, 6), b"initrd");
}

/// A valid image with some bits flipped in its headers, cut somewhere.
fn damaged(image: Vec<u8>, headers: Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    let flips = prop::collection::vec((headers, 0u8..8), 0..6);
    let length = prop_oneof![4 => Just(image.len()), 1 => 0..image.len()];
    (flips, length).prop_map(move |(flips, length)| {
        let mut image = image.clone();
        for (at, bit) in flips {
            image[at] ^= 1 << bit;
        }
        image.truncate(length);
        image
    })
}

/// Loads an image, which may fail, but then before anything is written; if it succeeds, the kernel starts in memory.
fn survives(image: &[u8]) -> Result<(), TestCaseError> {
    let memory = memory(8);
    match boot(&memory, image, Some(b"initrd"), "console=ttyS0") {
        Ok(state) => prop_assert!(memory.view().address_in_range(GuestAddress(state.registers.rip))),
        Err(error) => prop_assert!(untouched(&memory), "refused after writing: {}", error),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn damaged_pvh_kernels_do_no_harm(image in damaged(elf(Some(MIB)), 0..0x2b0)) {
        survives(&image)?;
    }

    #[test]
    fn damaged_vmlinux_kernels_do_no_harm(image in damaged(elf(None), 0..0xe8)) {
        survives(&image)?;
    }

    #[test]
    fn damaged_bzimages_do_no_harm(image in damaged(bzimage(), 0x1f1..0x26c)) {
        survives(&image)?;
    }

    #[test]
    fn random_bytes_do_no_harm(
        mut image in prop::collection::vec(any::<u8>(), 0..0x400), magic in 0..3,
    ) {
        match magic {
            1 if image.len() >= 4 => put(&mut image, 0, b"\x7fELF"),
            2 if image.len() >= 0x206 => put(&mut image, 0x202, b"HdrS"),
            _ => {}
        }
        survives(&image)?;
    }
}
