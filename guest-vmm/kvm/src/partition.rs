//! A virtual machine: memory, local APICs, the routes of the IOAPIC's pins, and how each VP is kicked.

// UNSAFETY: guest memory is handed to the kernel by its address.
#![expect(unsafe_code, reason = "guest memory is handed to the kernel by its address")]

use crate::cpuid;
use crate::error::{Named, io_error};
use crate::hypervisor::{Host, create_vm};
use crate::kick::KickSlot;
use crate::routes::Routes;
use crate::time::{Time, since_1970};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KvmIrqRouting, kvm_cpuid_entry2, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use processor::{
    AccessPartitionState, Clock, DebugCapabilities, ErasedPartitionState, EventFds, IOAPIC_PINS, IrqRoutes,
    MsiRequest, Partition, PartitionConfig, PartitionError, PartitionStateKind, VpIndex, Vtl,
};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// Three pages that VT-x uses for real mode, below the firmware's place where no machine has memory.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// The page below, for the same.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A partition. Dropped, it closes the virtual machine, if all its VPs are gone.
pub(crate) struct KvmPartition {
    // In this order: the machine is closed before its memory goes away.
    pub(crate) vm: VmFd,
    pub(crate) host: Arc<Host>,
    /// What CPUID answers every VP, but for its place.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) vps: Vec<KickSlot>,
    pub(crate) time: Time,
    routes: Mutex<Routes>,
    /// Whether any VP has run or was sent anything: all of them may have changed since.
    touched: AtomicBool,
    _memory: GuestMemoryMmap,
}

impl KvmPartition {
    pub(crate) fn new(host: Arc<Host>, config: &PartitionConfig) -> Result<Self, PartitionError> {
        let vm = create_vm(&host.kvm)?;
        vm.set_tss_address(TSS_ADDRESS).for_partition("KVM_SET_TSS_ADDR")?;
        if host.needs_identity_map() {
            vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).for_partition("KVM_SET_IDENTITY_MAP_ADDR")?;
        }
        // Before any interrupt controller: 0.05 ms then, and 4 to 6 ms after one.
        add_memory(&vm, &config.memory)?;
        split_irqchip(&vm)?;
        let vps = (0..config.vp_count).map(|_| KickSlot::default()).collect();
        let time = Time::new(config.time);
        let cpuid = cpuid::for_guest(&host.cpuid, host.tsc_deadline, &config.cpuid_mask);
        let (routes, touched, _memory) = (Mutex::default(), AtomicBool::new(false), config.memory.clone());
        Ok(Self { vm, host, cpuid, vps, time, routes, touched, _memory })
    }

    /// Takes note that VPs are no longer as they were made.
    pub(crate) fn touch(&self) {
        self.touched.store(true, Ordering::Release);
    }

    pub(crate) fn is_touched(&self) -> bool {
        self.touched.load(Ordering::Acquire)
    }

    /// A panic of another thread leaves the table whole: it is only replaced.
    pub(crate) fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells KVM the routes, if what it knows does not do.
    pub(crate) fn update_routes(&self, routes: &mut Routes) -> Result<(), PartitionError> {
        let Some(needed) = routes.needed() else { return Ok(()) };
        let table =
            KvmIrqRouting::from_entries(&needed.entries()).expect("an entry for each pin fits into a table");
        self.vm.set_gsi_routing(&table).for_partition("KVM_SET_GSI_ROUTING")?;
        routes.told(needed);
        Ok(())
    }
}

fn add_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), PartitionError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let address = region.get_host_address(MemoryRegionAddress(0));
        let address = address.map_err(|error| PartitionError::Call {
            call: "finding a region of guest memory",
            source: io::Error::other(error),
        })?;
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: address.addr() as u64,
            flags: 0,
        };
        // SAFETY: the region is a mapping of this size, and the partition keeps it until the virtual machine is closed.
        let added = unsafe { vm.set_user_memory_region(region) };
        added.for_partition("KVM_SET_USER_MEMORY_REGION")?;
    }
    Ok(())
}

fn split_irqchip(vm: &VmFd) -> Result<(), PartitionError> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    cap.args[0] = IOAPIC_PINS as u64;
    vm.enable_cap(&cap).for_partition("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)")
}

/// There is no such pin.
pub(crate) fn no_pin(pin: u8) -> PartitionError {
    let source = io::Error::other(format!("pin {pin}, and there are {IOAPIC_PINS}"));
    PartitionError::Call { call: "setting an IOAPIC route", source }
}

impl Partition for KvmPartition {
    fn request_yield(&self, vp: VpIndex) {
        if let Some(slot) = self.vps.get(vp.0 as usize) {
            slot.kick();
        }
    }

    /// An interrupt that no local APIC takes is lost, as on hardware, and is no error.
    fn signal_msi(&self, request: MsiRequest) -> Result<(), PartitionError> {
        self.touch();
        let [low, high] = [request.address, request.address >> 32].map(|part| part & u64::from(u32::MAX));
        let halves = [low, high].map(|half| u32::try_from(half).expect("masked"));
        let msi = kvm_msi {
            address_lo: halves[0],
            address_hi: halves[1],
            data: request.data,
            ..Default::default()
        };
        match self.vm.signal_msi(msi) {
            // KVM's answer when there is no such destination is -1, which looks like this.
            Err(error) if error.errno() == libc::EPERM => Ok(()),
            Err(error) => Err(PartitionError::Call { call: "KVM_SIGNAL_MSI", source: io_error(error) }),
            Ok(_) => Ok(()),
        }
    }

    fn set_irq_route(&self, pin: u8, request: Option<MsiRequest>) -> Result<(), PartitionError> {
        let mut routes = self.routes();
        if !routes.set(pin, request) {
            return Err(no_pin(pin));
        }
        self.update_routes(&mut routes)
    }

    fn event_fds(&self) -> Option<&dyn EventFds> {
        Some(self)
    }

    fn inject_nmi(&self, vp: VpIndex) {
        self.touch();
        if let Some(slot) = self.vps.get(vp.0 as usize) {
            slot.send_nmi();
        }
    }

    fn debug_capabilities(&self) -> DebugCapabilities {
        DebugCapabilities { single_step: true, breakpoints: 4, watchpoints: true }
    }

    fn stop_time(&self) -> Result<(), PartitionError> {
        self.time.stop(&self.vm)
    }

    fn start_time(&self) -> Result<(), PartitionError> {
        self.time.start(&self.vm, &self.host)
    }

    fn forget_stopped_time(&self) {
        self.time.forget_stopped();
    }

    fn access_state(&self) -> Box<dyn ErasedPartitionState + '_> {
        Box::new(KvmPartitionState(self))
    }

    fn reset(&self) -> Result<(), PartitionError> {
        let zero = Clock { elapsed: Duration::ZERO, host_time: since_1970() };
        self.time.set_clock(&self.vm, zero)?;
        self.scrub(Vtl::Vtl0)
    }

    fn scrub(&self, vtl: Vtl) -> Result<(), PartitionError> {
        vtl.only_vtl0()?;
        let mut routes = self.routes();
        routes.set_all(&IrqRoutes::default());
        self.update_routes(&mut routes)
    }
}

/// The state of a partition. KVM has all of the table.
struct KvmPartitionState<'a>(&'a KvmPartition);

impl AccessPartitionState for KvmPartitionState<'_> {
    type Error = PartitionError;

    fn supports(&self, _: PartitionStateKind) -> bool {
        true
    }

    fn clock(&mut self) -> Result<Clock, PartitionError> {
        self.0.time.clock(&self.0.vm)
    }

    fn set_clock(&mut self, value: &Clock) -> Result<(), PartitionError> {
        self.0.time.set_clock(&self.0.vm, *value)
    }

    fn irq_routes(&mut self) -> Result<IrqRoutes, PartitionError> {
        Ok(self.0.routes().all())
    }

    fn set_irq_routes(&mut self, value: &IrqRoutes) -> Result<(), PartitionError> {
        let mut routes = self.0.routes();
        routes.set_all(value);
        self.0.update_routes(&mut routes)
    }
}
