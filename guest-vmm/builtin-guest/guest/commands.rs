//! The command interpreter: one line, one command, its answer.

use core::arch::asm;
use core::fmt::Write;

use crate::console::{Console, LINE_BYTES};
use crate::ram::{PAGE, Ram};
use crate::start_info::{Range, StartInfo, load};
use crate::vps::{self, Vps};
use crate::{clock, gate, port, probe};

include!("../src/commands.rs");

const KEYBOARD_CONTROLLER: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;
/// ACPI 6.5, 4.8.3.7: SLP_TYP 5 in bits 2 to 4, SLP_EN.
const SLEEP_CONTROL: u16 = 0x600;
const SLEEP_S5: u8 = 5 << 2 | 0x20;
const POST_CODE: u16 = 0x80;
/// QEMU's isa-debug-exit, where there is one.
const DEBUG_EXIT: u16 = 0xf4;

const KIB: usize = 1024;
const BURST_LINE: usize = 64;
/// The most of a line that is kept; what follows is dropped.
const KEPT_BYTES: usize = 64;

/// What the commands share.
struct Guest<'s> {
    start_info: &'s StartInfo,
    ram: Ram<'s>,
    vps: Vps,
    /// What the guest was told to keep, and how long that is.
    kept: ([u8; KEPT_BYTES], usize),
}

/// Reads and answers commands for ever.
pub fn interpret(console: &mut Console, start_info: &StartInfo) -> ! {
    let mut guest = Guest {
        start_info,
        ram: Ram::new(start_info),
        vps: Vps::new(),
        kept: ([0; KEPT_BYTES], 0),
    };
    let mut buffer = [0; LINE_BYTES];
    loop {
        let line = console.read_line(&mut buffer).trim_ascii();
        if !line.is_empty() {
            guest.answer(console, line);
        }
    }
}

impl Guest<'_> {
    fn answer(&mut self, console: &mut Console, line: &[u8]) {
        let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
        let (name, argument) = line.split_at(end);
        let argument = argument.trim_ascii();
        match name {
            b"help" => help(console),
            b"echo" => print_line(console, "", argument),
            b"keep" => self.keep(console, argument),
            b"memory" => self.memory(console),
            b"touch" => with_number(console, argument, |console, mib| self.touch(console, mib)),
            b"cmdline" => print_line(console, "", self.start_info.command_line()),
            b"modules" => self.modules(console),
            b"time" => time(console),
            b"vps" => self.start_vps(console),
            b"count" => say(console, format_args!("count {}", vps::count())),
            b"spin" => spin(console, argument),
            b"burst" => with_number(console, argument, burst),
            b"exit-loop" => with_number(console, argument, exit_loop),
            b"ports" => {
                probe::ports();
                console.print("ports done\n");
            }
            b"mmio" => {
                probe::mmio(self.start_info);
                console.print("mmio done\n");
            }
            b"int3" => {
                gate::breakpoint();
                console.print("int3 done\n");
            }
            b"crash" => gate::crash(),
            b"halt" => {
                console.print("halting\n");
                vps::halt_all()
            }
            b"reset" => end_by(KEYBOARD_CONTROLLER, PULSE_RESET),
            b"debug-exit" => with_number(console, argument, debug_exit),
            b"poweroff" => end_by(SLEEP_CONTROL, SLEEP_S5),
            _ => {
                console.print("unknown command: ");
                console.print_bytes(name);
                console.print("; try help\n");
            }
        }
    }

    /// Keeps the text, if there is one, and answers what is kept.
    fn keep(&mut self, console: &mut Console, text: &[u8]) {
        let (kept, length) = &mut self.kept;
        if !text.is_empty() {
            *length = text.len().min(KEPT_BYTES);
            kept[..*length].copy_from_slice(&text[..*length]);
        }
        print_line(console, "kept ", &kept[..*length]);
    }

    fn memory(&self, console: &mut Console) {
        let map = self.start_info.memory_map.all();
        let ram = map.iter().filter(|range| range.is_ram());
        say(console, format_args!("memory {}", ram.map(Range::bytes).fold(0, u64::saturating_add)));
        for range in map {
            let Range { start, end, kind } = range;
            say(console, format_args!("  {start:#x}-{end:#x} {}", kind_name(*kind)));
        }
    }

    fn touch(&mut self, console: &mut Console, mib: u64) {
        let touched = self.ram.touch(mib.saturating_mul((1 << 20) / PAGE));
        say(console, format_args!("touched {touched} pages"));
    }

    fn modules(&self, console: &mut Console) {
        let modules = self.start_info.modules.all();
        say(console, format_args!("modules {}", modules.len()));
        for module in modules {
            let (start, bytes) = (module.start, module.bytes());
            match fnv1a(module) {
                Some(hash) => say(console, format_args!("  {start:#x} {bytes} bytes fnv1a {hash:016x}")),
                None => say(console, format_args!("  {start:#x} {bytes} bytes out of reach")),
            }
        }
    }

    fn start_vps(&mut self, console: &mut Console) {
        match self.vps.start_all(self.start_info.rsdp, &mut self.ram) {
            None => console.print("vps: no RAM for their stacks\n"),
            Some(tally) if tally.up == tally.asked => say(console, format_args!("vps {}", tally.up)),
            Some(tally) => say(console, format_args!("vps {} of {}", tally.up, tally.asked)),
        }
    }
}

fn help(console: &mut Console) {
    for (command, what) in COMMANDS {
        say(console, format_args!("{command}: {what}"));
    }
}

fn time(console: &mut Console) {
    match clock::read() {
        Some(time) => say(console, format_args!("time {time}")),
        None => console.print("time: no clock\n"),
    }
}

fn spin(console: &mut Console, argument: &[u8]) {
    if !argument.is_empty() {
        return with_number(console, argument, |console, millions| {
            count_down(millions.saturating_mul(1_000_000));
            console.print("spun\n");
        });
    }
    console.print("spinning\n");
    loop {
        count_down(u64::MAX);
    }
}

fn count_down(iterations: u64) {
    if iterations > 0 {
        // SAFETY: changes its own register only.
        unsafe { asm!("2: sub {0}, 1", "jnz 2b", inout(reg) iterations => _, options(nomem, nostack)) }
    }
}

fn burst(console: &mut Console, kib: u64) {
    let mut block = [0; KIB];
    let mut number = 0_u64;
    for _ in 0..kib {
        for line in block.chunks_exact_mut(BURST_LINE) {
            burst_line(line, number);
            number += 1;
        }
        console.print_bytes(&block);
    }
    console.print("burst done\n");
}

/// `burst`, the number in 16 decimal digits, and the alphabet up to the line's end.
fn burst_line(line: &mut [u8], mut number: u64) {
    for (place, letter) in line.iter_mut().zip((b'a'..=b'z').cycle()) {
        *place = letter;
    }
    line[..6].copy_from_slice(b"burst ");
    for digit in line[6..22].iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
    line[22] = b' ';
    line[BURST_LINE - 1] = b'\n';
}

fn exit_loop(console: &mut Console, thousands: u64) {
    for _ in 0..thousands.saturating_mul(1000) {
        port::write_u8(POST_CODE, 0);
    }
    console.print("done\n");
}

/// Ends this guest if it has such a port.
fn debug_exit(console: &mut Console, value: u64) {
    port::write_u32(DEBUG_EXIT, value as u32);
    console.print("no debug-exit port\n");
}

/// The write that ends this guest; a VMM that goes on with it gets the wish again.
fn end_by(port: u16, value: u8) -> ! {
    loop {
        port::write_u8(port, value);
        count_down(1_000_000);
    }
}

fn with_number(console: &mut Console, argument: &[u8], command: impl FnOnce(&mut Console, u64)) {
    match core::str::from_utf8(argument).ok().and_then(|text| text.parse().ok()) {
        Some(number) => command(console, number),
        None => print_line(console, "not a number: ", argument),
    }
}

fn print_line(console: &mut Console, before: &str, bytes: &[u8]) {
    console.print(before);
    console.print_bytes(bytes);
    console.print("\n");
}

fn say(console: &mut Console, words: core::fmt::Arguments) {
    // The console takes everything.
    let _ = console.write_fmt(words);
    console.print("\n");
}

fn kind_name(kind: u32) -> &'static str {
    match kind {
        1 => "ram",
        2 => "reserved",
        3 => "acpi",
        4 => "nvs",
        5 => "unusable",
        6 => "disabled",
        7 => "persistent",
        _ => "other",
    }
}

/// FNV-1a, 64 bits; `None` if not all of the range is mapped.
fn fnv1a(range: &Range) -> Option<u64> {
    (range.start..range.end).try_fold(0xcbf2_9ce4_8422_2325, |hash: u64, address| {
        Some((hash ^ u64::from(load::<u8>(address)?)).wrapping_mul(0x100_0000_01b3))
    })
}
