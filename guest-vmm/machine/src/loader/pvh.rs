//! PVH's start info (Xen, `xen/include/public/arch-x86/hvm/start_info.h`, version 1): start info, module list and memory map, one
//! after the other in [`layout::PVH_START_INFO`].

use super::error::{LoadError, Occupant};
use super::{BootInfo, write as write_structure};
use crate::layout::{self, MemoryUse};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use std::ops::Range;
use vm_memory::{ByteValued, GuestMemoryMmap};

const START_INFO: u64 = layout::PVH_START_INFO.start;
const MODULES: u64 = START_INFO + size_of::<hvm_start_info>() as u64;
const MEMORY_MAP: u64 = MODULES + size_of::<hvm_modlist_entry>() as u64;

/// Writes the start info and what it refers to.
pub(super) fn write(memory: &GuestMemoryMmap, boot: &BootInfo) -> Result<(), LoadError> {
    let map: Vec<_> = boot.announced.iter().map(|(range, usage)| entry(range, *usage)).collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(boot.initrd.is_some()),
        modlist_paddr: if boot.initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: layout::COMMAND_LINE.start,
        rsdp_paddr: boot.rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).expect("two ranges more than the memory has"),
        ..hvm_start_info::default()
    };
    let module = boot.initrd.as_ref().map(module).unwrap_or_default();
    let map = map.iter().flat_map(|entry| entry.as_slice()).copied();
    let page: Vec<u8> = info.as_slice().iter().chain(module.as_slice()).copied().chain(map).collect();
    write_structure(memory, Occupant::StartInfo, START_INFO, &page)
}

fn module(initrd: &Range<u64>) -> hvm_modlist_entry {
    hvm_modlist_entry { paddr: initrd.start, size: initrd.end - initrd.start, ..hvm_modlist_entry::default() }
}

fn entry(range: &Range<u64>, usage: MemoryUse) -> hvm_memmap_table_entry {
    let type_ = match usage {
        MemoryUse::Ram => XEN_HVM_MEMMAP_TYPE_RAM,
        MemoryUse::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
    };
    hvm_memmap_table_entry { addr: range.start, size: range.end - range.start, type_, reserved: 0 }
}
