//! The emulated machine: QEMU's software CPU with AMD's SVM.

use std::path::Path;
use std::process::{Command, Stdio};

use super::kernel::LabKernel;
use super::tool::Tool;

pub(super) const QEMU: Tool = Tool {
    program: "qemu-system-x86_64",
    package: "qemu-system-x86",
    advice: "the Debian packages qemu-system-x86 and seabios are needed",
};
const MEMORY_MIB: &str = "4096";
/// With two, the emulator loses track of which of its processors is in a guest: the host's kernel then finds a guest's GS base in
/// place of its own, or a guest ends in a triple fault, once in a minute or two on some machines. With one it was not seen.
const PROCESSORS: &str = "1";
/// A processor with SVM. The emulator lets guests write XCR0 unintercepted, so KVM never learns what it is: Linux as a guest
/// warns that XSAVE is inconsistent and goes on without it, unless `noxsave` is on its command line. And it takes a task state
/// segment for valid only while its type is that of one that is not busy, where KVM gives a guest that goes on from saved state
/// the busy one that it has: ring 3 of such a guest may use no ports.
const PROCESSOR: &str = "EPYC,+svm";
/// The emulated TSC is this machine's own, the same on all processors, but does not say so. Only with a host on its TSC
/// does KVM give its guests a clock that they call stable. Nothing speculates in it, so there is nothing to mitigate.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 quiet tsc=reliable mitigations=off";

/// Who is served by the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Serve {
    /// Commands arrive on standard input, answers leave on standard output, the console is standard error.
    Commands,
    /// A person at the terminal of this process.
    Terminal,
}

/// The command that runs the lab.
pub(super) fn command(kernel: &LabKernel, initramfs: &Path, serve: Serve) -> Command {
    let mut qemu = Command::new(QEMU.program);
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", PROCESSOR, "-m", MEMORY_MIB, "-smp", PROCESSORS]);
    qemu.args(["-nographic", "-no-reboot", "-vga", "none", "-net", "none"]);
    qemu.arg("-kernel").arg(kernel.image()).arg("-initrd").arg(initramfs);
    match serve {
        Serve::Commands => qemu.args(["-append", KERNEL_ARGUMENTS]).args(PIPES),
        Serve::Terminal => {
            qemu.args(["-append", &format!("{KERNEL_ARGUMENTS} LAB=shell")]).stdin(Stdio::inherit())
        }
    };
    qemu
}

/// The first serial line is the kernel's console; the second one carries commands and nothing else, so that no message
/// of the kernel's ever stands in the output of a command.
const PIPES: [&str; 10] = [
    "-monitor",
    "none",
    "-chardev",
    "file,id=console,path=/dev/stderr",
    "-serial",
    "chardev:console",
    "-chardev",
    "stdio,id=commands,signal=off",
    "-serial",
    "chardev:commands",
];
