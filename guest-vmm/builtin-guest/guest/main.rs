//! The built-in guest, ring 3: a command interpreter on the serial port of a machine without an operating system.
//!
//! Parts: `entry.s` and `gates.s` are ring 0 (entry, start of VPs, exceptions, the gate), `gate` calls it; `console`
//! is the serial port, `commands` the interpreter, the rest what the commands need.
//!
//! Limits: one console, one command at a time; no allocation but whole pages that are never returned.
//!
//! UNSAFETY: this program is alone on its machine. It owns every port, every address and every table by itself.
#![no_std]
#![no_main]

mod acpi;
mod address_space;
mod apic;
mod clock;
mod commands;
mod console;
mod gate;
mod memory_functions;
mod port;
mod probe;
mod ram;
mod start_info;
mod vps;

use core::arch::global_asm;
use core::fmt::Write;
use core::panic::PanicInfo;

use console::Console;
use start_info::StartInfo;

global_asm!(include_str!("entry.s"), include_str!("gates.s"), options(att_syntax, raw));

unsafe extern "C" {
    static mut boot_task: [u8; 104 + 8192 + 1];
    static mut bss_start: u8;
    static bss_end: u8;
}

/// The boot VP's ring 3, where `entry.s` ends: sets up what it left, then interprets commands for ever.
#[unsafe(no_mangle)]
extern "C" fn boot_main(start_info: u64) -> ! {
    clear_bss();
    permit_all_ports();
    address_space::map_first_4_gib();
    let mut console = Console::open();
    // SAFETY: the boot protocol passes the address of start_info, and the first 4 GiB are mapped.
    let start_info = unsafe { StartInfo::read(start_info) };
    commands::interpret(&mut console, &start_info)
}

/// Loaders differ in whether they clear what the file does not hold, and on a reset old data may be there.
fn clear_bss() {
    // SAFETY: the linker script's bounds; nothing in .bss is in use yet, this stack is elsewhere.
    unsafe {
        let start = &raw mut bss_start;
        start.write_bytes(0, (&raw const bss_end).addr() - start.addr());
    }
}

/// Clears the I/O permission bitmap behind the boot VP's task; its last byte must be all ones.
fn permit_all_ports() {
    // SAFETY: entry.s reserves exactly this for the task, and only the processor reads it.
    unsafe {
        let bitmap = (&raw mut boot_task).cast::<u8>().add(104);
        bitmap.write_bytes(0, 8192);
        bitmap.add(8192).write_volatile(0xff);
    }
}

/// Where an unexpected exception on any VP ends: tells, and halts.
#[unsafe(no_mangle)]
extern "C" fn fault_main(vector: u64, error: u64, instruction: u64, address: u64) -> ! {
    let _ = writeln!(Console, "fault {vector} error {error:#x} at {instruction:#x} address {address:#x}");
    gate::halt()
}

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    Console.print("panic\n");
    gate::halt()
}
