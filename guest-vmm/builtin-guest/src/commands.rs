/// Every command of the guest with what it does, in the order of `help`.
///
/// The guest is built from this very list: its `help` prints one line per entry, `NAME ARGUMENTS: what it does`.
/// The first word of an entry is what its command is called.
pub const COMMANDS: &[(&str, &str)] = &[
    ("help", "this list"),
    ("echo TEXT", "answers TEXT"),
    ("keep [TEXT]", "keeps TEXT in memory, 64 bytes at the most, or says what is kept"),
    ("memory", "the sum of the RAM in bytes and the memory map"),
    ("touch MIB", "writes one byte to every page of that much free RAM"),
    ("cmdline", "the command line the guest was started with"),
    ("modules", "address, bytes and FNV-1a of each module (the initrd)"),
    ("time", "date and time of the CMOS clock"),
    ("vps", "starts every VP of the ACPI tables that is not up and counts all"),
    ("count", "lets every started VP increment one counter 1000 times"),
    ("spin [N]", "loops N million times, or for ever"),
    ("burst N", "prints N KiB of numbered 64-byte lines"),
    ("exit-loop N", "writes N thousand times to port 0x80"),
    ("ports", "reads and writes every I/O port except those that end the guest or its console"),
    ("mmio", "reads and writes addresses without memory below 4 GiB, and the IOAPIC"),
    ("int3", "a breakpoint in ring 0"),
    ("crash", "a triple fault"),
    ("halt", "halts all VPs for ever, interrupts off"),
    ("reset", "resets through the keyboard controller"),
    ("debug-exit N", "writes N to the debug-exit port, which ends a guest that has one"),
    ("poweroff", "switches off through the ACPI sleep control register"),
];
