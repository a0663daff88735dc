//! VPs on bare threads: channels, KVM_RUN, `immediate_exit` and a signal.

// UNSAFETY: guest memory is handed to the kernel by its address, and a byte of `kvm_run` is shared between threads.
#![expect(unsafe_code, reason = "memory is shared with the kernel by its address")]

use std::hint::black_box;
use std::mem::offset_of;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_enable_cap, kvm_mp_state,
    kvm_run, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMAX, register_signal_handler};

use super::program::{self, Program};

/// What a thread is to do with its VP.
enum Command {
    /// Run it until it is kicked, or has written to a port once more than that.
    Run { exits: Option<u32> },
    /// Call this with it.
    Call(Box<dyn FnOnce(&mut VcpuFd) + Send>),
}

/// What a thread says of its VP.
enum Answer {
    /// It is about to run.
    Starts,
    /// It is out of the guest.
    Out(anyhow::Result<Run>),
}

/// A VP's run.
struct Run {
    /// When it wrote to a port first.
    first_exit: Option<Instant>,
    /// When it was out of the guest for good.
    ended: Instant,
}

struct BareVp {
    commands: Sender<Command>,
    exit: ImmediateExit,
    thread: JoinHandle<()>,
}

impl BareVp {
    /// Has the VP leave the guest.
    fn kick(&self) -> anyhow::Result<()> {
        self.exit.ask();
        Ok(self.thread.kill(SIGRTMAX())?)
    }
}

/// A virtual machine with all its VPs on threads of their own.
pub(in crate::bench) struct BareVps {
    vps: Vec<BareVp>,
    answers: Receiver<Answer>,
    vm: Arc<VmFd>,
    pub(in crate::bench) memory: GuestMemoryMmap,
}

impl BareVps {
    /// Makes the VPs, about to begin with the program.
    pub(in crate::bench) fn new(count: u32, program: Program) -> anyhow::Result<Self> {
        install_handler()?;
        let kvm = Arc::new(Kvm::new()?);
        let memory = program.load()?;
        let vm = Arc::new(create_vm(&kvm, &memory)?);
        let (answer, answers) = channel();
        let mut all = Self { vps: Vec::new(), answers, vm, memory };
        for vp in 0..count {
            all.vps.push(spawn(&kvm, &all.vm, vp, answer.clone())?);
        }
        Ok(all)
    }

    /// Has all VPs run.
    pub(in crate::bench) fn start(&self) -> anyhow::Result<()> {
        self.run(None)?;
        self.vps.iter().try_for_each(|_| match self.answers.recv()? {
            Answer::Starts => Ok(()),
            Answer::Out(run) => Err(run.err().unwrap_or_else(|| anyhow!("a VP stopped by itself"))),
        })
    }

    fn run(&self, exits: Option<u32>) -> anyhow::Result<()> {
        let mut vps = self.vps.iter();
        vps.try_for_each(|vp| vp.commands.send(Command::Run { exits }).ok().context("a VP's thread is gone"))
    }

    /// Stops all VPs that run, and says when the last answer's VP was out of the guest.
    pub(in crate::bench) fn stop(&self) -> anyhow::Result<Instant> {
        self.vps.iter().try_for_each(BareVp::kick)?;
        let mut last = None;
        for _ in &self.vps {
            last = Some(self.ended()?.ended);
        }
        last.context("there are no VPs")
    }

    /// Runs the only VP for so many exits, and says when the first was there and when they were over.
    pub(in crate::bench) fn run_exits(&self, exits: u32) -> anyhow::Result<(Instant, Instant)> {
        self.run(Some(exits))?;
        let run = self.ended()?;
        Ok((run.first_exit.context("the VP wrote nothing")?, run.ended))
    }

    fn ended(&self) -> anyhow::Result<Run> {
        loop {
            if let Answer::Out(run) = self.answers.recv()? {
                return run;
            }
        }
    }

    /// Calls `work` with the first VP, which is stopped, on its thread.
    pub(in crate::bench) fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut VcpuFd) -> R + Send + 'static,
    ) -> anyhow::Result<R> {
        let (sender, result) = channel();
        let call = Command::Call(Box::new(move |vcpu| drop(sender.send(work(vcpu)))));
        let vp = self.vps.first().context("there are no VPs")?;
        vp.commands.send(call).ok().context("a VP's thread is gone")?;
        Ok(result.recv()?)
    }
}

impl Drop for BareVps {
    fn drop(&mut self) {
        for BareVp { commands, exit, thread } in self.vps.drain(..) {
            // It looks for the next command once it is out of the guest, and there is none.
            drop(commands);
            exit.ask();
            // Refused if it has ended already.
            let _ = thread.kill(SIGRTMAX());
            let _ = thread.join();
        }
    }
}

fn create_vm(kvm: &Kvm, memory: &GuestMemoryMmap) -> anyhow::Result<VmFd> {
    let vm = kvm.create_vm()?;
    vm.set_tss_address(0xfffb_d000)?;
    let region = kvm_userspace_memory_region {
        memory_size: u64::try_from(program::MEMORY_BYTES)?,
        userspace_addr: memory.get_host_address(GuestAddress(0))?.addr() as u64,
        ..Default::default()
    };
    // SAFETY: the region is a mapping of this size, which `BareVps` unmaps after it has closed the machine.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = 24;
    vm.enable_cap(&split)?;
    Ok(vm)
}

fn spawn(kvm: &Arc<Kvm>, vm: &Arc<VmFd>, vp: u32, answers: Sender<Answer>) -> anyhow::Result<BareVp> {
    let (commands, receiver) = channel();
    let (made, is_made) = channel();
    let (kvm, vm) = (kvm.clone(), vm.clone());
    let thread = std::thread::Builder::new().name(format!("bare-{vp}")).spawn(move || {
        let made_vp = create_vp(&kvm, &vm, vp);
        drop(vm);
        match made_vp {
            Ok((mut vcpu, exit)) => {
                let _ = made.send(Ok(exit));
                serve(&mut vcpu, &receiver, &answers);
            }
            Err(error) => drop(made.send(Err(error))),
        }
    })?;
    let exit = is_made.recv()??;
    Ok(BareVp { commands, exit, thread })
}

fn create_vp(kvm: &Kvm, vm: &VmFd, vp: u32) -> anyhow::Result<(VcpuFd, ImmediateExit)> {
    let vcpu = vm.create_vcpu(vp.into())?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut system = vcpu.get_sregs()?;
    (system.cs.base, system.cs.selector) = (0, 0);
    vcpu.set_sregs(&system)?;
    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rflags) = (program::CODE, 2);
    vcpu.set_regs(&registers)?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
    let exit = ImmediateExit::map(&vcpu, kvm.get_vcpu_mmap_size()?)?;
    Ok((vcpu, exit))
}

/// Does what is asked until nobody can ask any more. Whoever went away needs no answer.
fn serve(vcpu: &mut VcpuFd, commands: &Receiver<Command>, answers: &Sender<Answer>) {
    for command in commands {
        match command {
            Command::Run { exits } => {
                let _ = answers.send(Answer::Starts);
                let run = run(vcpu, exits);
                vcpu.set_kvm_immediate_exit(0);
                let _ = answers.send(Answer::Out(run));
            }
            Command::Call(call) => call(vcpu),
        }
    }
}

/// The bare loop.
fn run(vcpu: &mut VcpuFd, exits: Option<u32>) -> anyhow::Result<Run> {
    let (mut seen, mut first_exit) = (0, None);
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                black_box((port, data));
                if seen == 0 {
                    first_exit = Some(Instant::now());
                }
                if Some(seen) == exits {
                    return Ok(Run { first_exit, ended: Instant::now() });
                }
                seen += 1;
            }
            Err(error) if error.errno() == Errno::INTR.raw_os_error() => {
                return Ok(Run { first_exit, ended: Instant::now() });
            }
            other => bail!("the guest's exit is {other:?}"),
        }
    }
}

/// A VP's `immediate_exit`, for threads other than its own.
struct ImmediateExit {
    page: NonNull<kvm_run>,
    size: usize,
}

// SAFETY: the only thing that is done with the page is an atomic store.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn map(vcpu: &VcpuFd, size: usize) -> anyhow::Result<Self> {
        // SAFETY: it is open for as long as it is borrowed here.
        let descriptor =
            unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(vcpu)) };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe { mmap(null_mut(), size, protection, MapFlags::SHARED, descriptor, 0) }?;
        Ok(Self { page: NonNull::new(page.cast()).context("kvm_run is mapped nowhere")?, size })
    }

    fn ask(&self) {
        let byte = offset_of!(kvm_run, immediate_exit);
        // SAFETY: the byte is in the mapping, which lives as long as `self`; elsewhere it is written by the VP's thread, while the
        // VP is out of the guest.
        let byte = unsafe { AtomicU8::from_ptr(self.page.as_ptr().cast::<u8>().add(byte)) };
        byte.store(1, Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nothing refers to it but `self`. An error would leave it mapped.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), self.size) };
    }
}

/// The signal that gets VPs out of the guest does nothing else. It is the last of its kind; the crate `kvm` takes the first.
fn install_handler() -> anyhow::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: OnceLock<Result<(), vmm_sys_util::errno::Error>> = OnceLock::new();
    Ok((*INSTALLED.get_or_init(|| register_signal_handler(SIGRTMAX(), nothing)))?)
}
