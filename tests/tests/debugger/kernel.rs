//! A kernel that never waits and stays in ring 0: a host without VT-x and SVM can step and break there alone.

use processor::scripted::Script;

/// The value of EBX at which it ends.
pub const END: u32 = 42;

const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;

/// Writes `READY`, compares EBX with [`END`] and jumps back until it is that, then writes `over` and powers itself off. 32-bit code,
/// as PVH starts it.
pub fn counting() -> Vec<u8> {
    let mut code = says(b"READY\n");
    // cmp ebx, END; jne to it.
    code.extend([0x83, 0xfb, END.to_le_bytes()[0], 0x75, 0xfb]);
    code.extend(says(b"over\n"));
    code.extend(to_port(SLEEP_CONTROL));
    // mov al, 0x34; out dx, al; jmp to itself.
    code.extend([0xb0, 0x34, 0xee, 0xeb, 0xfe]);
    elf(&code)
}

/// mov dx, PORT
fn to_port(port: u16) -> [u8; 4] {
    let [low, high] = port.to_le_bytes();
    [0x66, 0xba, low, high]
}

/// mov al, BYTE; out dx, al for each of them.
fn says(text: &[u8]) -> Vec<u8> {
    let writes = text.iter().flat_map(|byte| [0xb0, *byte, 0xee]);
    to_port(SERIAL).into_iter().chain(writes).collect()
}

/// The executable of a script, with this in the script's place: it is as long.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut script = Script::new();
    script.out(0, code);
    let mut elf = script.to_elf();
    let at = elf.windows(script.code().len()).position(|part| part == script.code());
    let at = at.expect("a script's executable holds the script");
    elf[at..at + code.len()].copy_from_slice(code);
    elf
}
