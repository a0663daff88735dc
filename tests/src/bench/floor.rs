//! The floor: the fewest ioctls that start the built-in guest, in this process, and what it costs to spawn a process at all.
//!
//! A guest that goes on from a file is measured likewise: the file mapped privately, its registers set, up to its next byte.
//! The order is the one that is fast: the memory slot before any interrupt controller, which is split.

// UNSAFETY: guest memory is handed to the kernel by its address.
#![expect(unsafe_code, reason = "guest memory is handed to the kernel by its address")]

use std::fs::File;
use std::io::{Cursor, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::{Elf, KernelLoader};
use tempfile::TempDir;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use super::figure::{Definition, Samples};
use super::{Group, MEMORY_BYTES, Rounds, Setting};

pub(super) const IN_PROCESS: &str = "floor-in-process";
pub(super) const COLD: &str = "floor-cold";
pub(super) const SPAWN: &str = "floor-spawn";
pub(super) const CLOSE: &str = "floor-close";

/// What [`IN_PROCESS`] is, for those who measure it beside their own figures.
pub(super) const OF_IN_PROCESS: Definition =
    Definition::time(IN_PROCESS, "bare ioctls, in process: opening /dev/kvm → first byte", None);

pub(super) static GROUP: Group = Group {
    figures: &[
        OF_IN_PROCESS,
        Definition::time(SPAWN, "spawn and exit of an empty static binary (cc -static)", None),
        Definition::time(COLD, "both of them, one after the other", None),
        Definition::time(CLOSE, "bare closing of VP, VM and memory", None),
    ],
    open: |_: &Setting| async { Ok(Box::new(Floor::new()?) as Box<dyn Rounds>) }.boxed_local(),
};

struct Floor {
    empty: EmptyProgram,
}

/// How long it takes from bare ioctls to a guest's first byte.
pub(super) fn in_process() -> anyhow::Result<Duration> {
    Ok(timed_boot()?.1)
}

fn timed_boot() -> anyhow::Result<(BareVm, Duration)> {
    let begin = Instant::now();
    let vm = BareVm::boot()?;
    Ok((vm, begin.elapsed()))
}

impl Floor {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { empty: EmptyProgram::build()? })
    }

    fn measure(&self, samples: &mut Samples) -> anyhow::Result<()> {
        let spawn = self.empty.spawn()?;
        let (vm, booted) = timed_boot()?;
        let begin = Instant::now();
        drop(vm);
        samples.time(CLOSE, begin.elapsed());
        samples.time(SPAWN, spawn);
        samples.time(IN_PROCESS, booted);
        samples.time(COLD, spawn + booted);
        Ok(())
    }
}

impl Rounds for Floor {
    fn round<'a>(&'a mut self, samples: &'a mut Samples) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        async { self.measure(samples) }.boxed_local()
    }
}

/// A program that does nothing, linked statically.
pub(super) struct EmptyProgram(TempDir);

impl EmptyProgram {
    pub fn build() -> anyhow::Result<Self> {
        let folder = TempDir::with_prefix("guestd-bench-")?;
        let mut compiler = Command::new("cc")
            .args(["-static", "-O2", "-x", "c", "-", "-o"])
            .arg(folder.path().join("empty"))
            .stdin(Stdio::piped())
            .spawn()
            .context("the floor is an empty program that cc builds: cc")?;
        let source = b"int main(void) { return 0; }\n";
        compiler.stdin.take().expect("piped above").write_all(source).context("cc")?;
        let status = compiler.wait()?;
        ensure!(status.success(), "cc -static: {status}; the floor is an empty static program");
        Ok(Self(folder))
    }

    pub fn spawn(&self) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let status = Command::new(self.0.path().join("empty")).status()?;
        let spent = begin.elapsed();
        ensure!(status.success(), "the empty program: {status}");
        Ok(spent)
    }
}

/// A guest that has written its first byte. Closed in the order of its fields.
struct BareVm {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl BareVm {
    fn boot() -> anyhow::Result<Self> {
        Self::boot_in(|| {
            Ok(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(MEMORY_BYTES)?)])?)
        })
    }

    /// In memory that is mapped when it is its turn.
    fn boot_in(map: impl FnOnce() -> anyhow::Result<GuestMemoryMmap>) -> anyhow::Result<Self> {
        Self::enter(map, |vcpu, memory| {
            let image = Elf::load(memory, None, &mut Cursor::new(builtin_guest::IMAGE), None)?;
            enter_protected_mode(vcpu, image.kernel_load.raw_value())
        })
    }

    /// Runs to the first byte from the state that `begin` gives it.
    fn enter(
        map: impl FnOnce() -> anyhow::Result<GuestMemoryMmap>,
        begin: impl FnOnce(&VcpuFd, &GuestMemoryMmap) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        vm.set_tss_address(0xfffb_d000)?;
        let memory = map()?;
        set_memory(&vm, &memory)?;
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = 24;
        vm.enable_cap(&split)?;
        let mut vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        begin(&vcpu, &memory)?;
        run_to_first_byte(&mut vcpu)?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }
}

/// A guest at its first byte: its memory in a file, and its registers.
pub(super) struct BareSnapshot {
    file: File,
    system: kvm_sregs,
    registers: kvm_regs,
}

impl BareSnapshot {
    /// Of a guest whose memory is this file, which is made as long as that is.
    pub fn take(file: File) -> anyhow::Result<Self> {
        file.set_len(MEMORY_BYTES)?;
        let vm = BareVm::boot_in(|| mapped(&file, libc::MAP_SHARED))?;
        let (system, registers) = (vm.vcpu.get_sregs()?, vm.vcpu.get_regs()?);
        Ok(Self { file, system, registers })
    }

    /// How long it takes from bare ioctls, with a private mapping of the file, to the first byte of a guest that goes on from here.
    pub fn restore(&self) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let _vm = BareVm::enter(
            || mapped(&self.file, libc::MAP_PRIVATE),
            |vcpu, _| {
                vcpu.set_sregs(&self.system)?;
                Ok(vcpu.set_regs(&self.registers)?)
            },
        )?;
        Ok(begin.elapsed())
    }
}

fn mapped(file: &File, sharing: i32) -> anyhow::Result<GuestMemoryMmap> {
    let (file, length) = (FileOffset::new(file.try_clone()?, 0), usize::try_from(MEMORY_BYTES)?);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let region = MmapRegion::build(Some(file), length, protection, sharing | libc::MAP_NORESERVE)?;
    let region = GuestRegionMmap::new(region, GuestAddress(0)).context("the memory ends too high")?;
    Ok(GuestMemoryMmap::from_regions(vec![region])?)
}

fn set_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> anyhow::Result<()> {
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY_BYTES,
        userspace_addr: memory.get_host_address(GuestAddress(0))?.addr() as u64,
        ..Default::default()
    };
    // SAFETY: the region is a mapping of this size, which `BareVm` unmaps after it has closed the machine.
    Ok(unsafe { vm.set_user_memory_region(region) }?)
}

/// Flat segments without paging, as the PVH boot protocol wants it.
fn enter_protected_mode(vcpu: &VcpuFd, entry: u64) -> anyhow::Result<()> {
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    let mut system = vcpu.get_sregs()?;
    system.cs = flat(8, 11);
    let data = flat(16, 3);
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.cr0 = 1;
    vcpu.set_sregs(&system)?;
    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rflags) = (entry, 2);
    Ok(vcpu.set_regs(&registers)?)
}

fn run_to_first_byte(vcpu: &mut VcpuFd) -> anyhow::Result<()> {
    match vcpu.run()? {
        // The second byte is the first one of a guest that goes on from there.
        VcpuExit::IoOut(0x3f8, b"R" | b"E") => Ok(()),
        other => bail!("the guest's first exit is {other:?}"),
    }
}
