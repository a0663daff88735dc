//! The device: opening it, what the host can do, and the partitions it makes.

// UNSAFETY: a descriptor that somebody else has opened becomes the device.
#![expect(unsafe_code, reason = "a descriptor that somebody else has opened becomes the device")]

use crate::error::{KvmError, Named, io_error};
use crate::partition::KvmPartition;
use crate::tsc;
use crate::unavailable::cannot_open;
use crate::vp::KvmBinder;
use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use processor::{Hypervisor, NewPartition, PartitionConfig, PartitionError, VpIndex};
use std::fs::OpenOptions;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// As many VPs as have a local APIC ID of eight bits that is not the broadcast, and one to spare for an IOAPIC.
const MAX_VPS: u32 = 254;

/// What every guest needs.
const REQUIRED: [(Cap, &str); 18] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::EnableCapVm, "KVM_CAP_ENABLE_CAP_VM"),
];

/// What is known of the host. It does not change, so it is asked for once.
pub(crate) struct Host {
    pub(crate) kvm: Kvm,
    /// What KVM can offer a guest.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) tsc_deadline: bool,
    pub(crate) run_size: usize,
    /// In bytes.
    pub(crate) xsave_size: usize,
    /// Whether interrupts can be held back from a VP that is single-stepped.
    pub(crate) debug_blocks_interrupts: bool,
    /// The MSRs of a VP that can be read; known, as all that follows, when the first VP has been bound.
    pub(crate) msrs: OnceLock<Vec<u32>>,
    /// The flags with which a VP's events are reported.
    pub(crate) event_flags: OnceLock<u32>,
    tsc: OnceLock<HostTsc>,
}

/// What a new VP's time-stamp counter is like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostTsc {
    pub(crate) khz: u32,
    /// Whether it is not the host's own.
    pub(crate) is_virtual: bool,
}

impl Host {
    fn new(kvm: Kvm) -> Result<Self, PartitionError> {
        check(&kvm)?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).for_partition("KVM_GET_SUPPORTED_CPUID")?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            run_size: kvm.get_vcpu_mmap_size().for_partition("KVM_GET_VCPU_MMAP_SIZE")?,
            xsave_size: usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0),
            debug_blocks_interrupts: blocks_interrupts(&kvm),
            msrs: OnceLock::new(),
            event_flags: OnceLock::new(),
            tsc: OnceLock::new(),
            kvm,
        })
    }

    /// What a new VP's time-stamp counter is like, read from the first.
    pub(crate) fn learn_tsc(&self, vcpu: &VcpuFd) -> Result<HostTsc, KvmError> {
        match self.tsc.get() {
            Some(known) => Ok(*known),
            None => {
                let khz = tsc::frequency(vcpu)?;
                // Another VP may have been first; it has read the same.
                Ok(*self.tsc.get_or_init(|| HostTsc { khz, is_virtual: tsc::is_virtual(vcpu) }))
            }
        }
    }

    /// The frequency of a VP's time-stamp counter that nobody has set, in kHz. 0 before a VP was bound.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc.get().map_or(0, |tsc| tsc.khz)
    }

    /// Whether a VP's time-stamp counter is not the host's own. False before a VP was bound.
    pub(crate) fn has_virtual_tsc(&self) -> bool {
        self.tsc.get().is_some_and(|tsc| tsc.is_virtual)
    }

    /// The CPU's vendor as CPUID spells it.
    pub(crate) fn vendor(&self) -> [u8; 12] {
        let mut vendor = [0; 12];
        if let Some(leaf) = self.cpuid.iter().find(|leaf| leaf.function == 0) {
            let parts = [leaf.ebx, leaf.edx, leaf.ecx];
            vendor.as_chunks_mut().0.iter_mut().zip(parts).for_each(|(to, part)| *to = part.to_le_bytes());
        }
        vendor
    }

    /// Whether a triple fault ends in an INIT before it is reported, as AMD's SVM has it.
    pub(crate) fn resets_on_triple_fault(&self) -> bool {
        matches!(&self.vendor(), b"AuthenticAMD" | b"HygonGenuine")
    }

    /// Whether the host needs pages of the guest's for its own use, as VT-x has it.
    pub(crate) fn needs_identity_map(&self) -> bool {
        &self.vendor() == b"GenuineIntel"
    }
}

fn blocks_interrupts(kvm: &Kvm) -> bool {
    let flags = kvm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
    u32::try_from(flags).is_ok_and(|flags| flags & KVM_GUESTDBG_BLOCKIRQ != 0)
}

fn check(kvm: &Kvm) -> Result<(), PartitionError> {
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        let text = format!(
            "the device answers KVM_GET_API_VERSION with {version}, not {KVM_API_VERSION}: it is not KVM"
        );
        return Err(PartitionError::Unavailable(text));
    }
    let missing = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap));
    missing.map_or(Ok(()), |(_, name)| Err(PartitionError::Missing(name)))
}

/// KVM. Cheap to clone; all clones share what is known of the host.
#[derive(Clone)]
pub struct KvmHypervisor(Arc<Host>);

impl KvmHypervisor {
    /// Opens /dev/kvm.
    ///
    /// [`PartitionError::Unavailable`] says why it cannot be had and what to do; [`PartitionError::Missing`] names what this
    /// host's KVM lacks.
    pub fn open() -> Result<Self, PartitionError> {
        Self::open_at(Path::new("/dev/kvm"))
    }

    /// Opens KVM at another path.
    pub fn open_at(path: &Path) -> Result<Self, PartitionError> {
        let device = OpenOptions::new().read(true).write(true).open(path);
        Self::from_device(device.map_err(|error| cannot_open(path, &error))?.into())
    }

    /// Takes a descriptor of the device that somebody else has opened.
    pub fn from_device(device: OwnedFd) -> Result<Self, PartitionError> {
        // SAFETY: the descriptor is open and owned, and its ownership goes to the new value. Whether it is KVM's is asked before
        // anything else, and asking is harmless on any descriptor.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        Ok(Self(Arc::new(Host::new(kvm)?)))
    }
}

impl Hypervisor for KvmHypervisor {
    type Binder = KvmBinder;

    fn max_vps(&self) -> Result<u32, PartitionError> {
        let host = self.0.kvm.get_max_vcpus();
        Ok(u32::try_from(host).map_or(MAX_VPS, |host| host.min(MAX_VPS)))
    }

    fn build(&self, config: &PartitionConfig) -> Result<NewPartition<KvmBinder>, PartitionError> {
        let wanted = config.vp_count;
        let limit = self.max_vps()?;
        if wanted > limit {
            return Err(PartitionError::TooManyVps { wanted, limit });
        }
        let partition = Arc::new(KvmPartition::new(self.0.clone(), config)?);
        let processors = (0..wanted).map(|n| KvmBinder::new(VpIndex(n), partition.clone())).collect();
        Ok(NewPartition { partition, processors })
    }
}

/// Makes a virtual machine. KVM_CREATE_VM answers EINTR when a signal comes, and is asked again.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<kvm_ioctls::VmFd, PartitionError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => {
                return Err(PartitionError::Call { call: "KVM_CREATE_VM", source: io_error(error) });
            }
            Ok(vm) => return Ok(vm),
        }
    }
}
