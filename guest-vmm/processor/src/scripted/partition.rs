//! What the VPs of a scripted partition share: memory, and what each is told from outside.

use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::{
    AccessPartitionState, DebugCapabilities, ErasedPartitionState, IOAPIC_PINS, IrqRoutes, MsiRequest,
    Partition, PartitionConfig, PartitionError, PartitionStateKind, VpIndex, Vtl,
};
use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// The local APIC ID that means all VPs.
const BROADCAST: u32 = 0xff;

/// A scripted partition.
pub(super) struct ScriptedPartition {
    pub(super) memory: GuestMemoryMmap,
    vps: Vec<Mailbox>,
    routes: Mutex<IrqRoutes>,
}

/// What one VP is told from outside.
#[derive(Default)]
pub(super) struct Mailbox {
    signals: Mutex<Signals>,
    changed: Condvar,
}

/// What a VP has not looked at yet.
#[derive(Default)]
pub(super) struct Signals {
    pub(super) yield_requested: bool,
    /// The vectors of interrupts, the highest first.
    pub(super) interrupts: BTreeSet<u8>,
    /// Where it is to start, if it waits for that.
    pub(super) start: Option<u64>,
}

impl Mailbox {
    /// A panic of another thread leaves the signals whole: they are only set and taken.
    pub(super) fn lock(&self) -> MutexGuard<'_, Signals> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: impl FnOnce(&mut Signals)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Takes what `ready` finds, waiting for it until there is a request to yield.
    pub(super) fn wait<T>(&self, mut ready: impl FnMut(&mut Signals) -> Option<T>) -> Option<T> {
        let mut signals = self.lock();
        while !signals.yield_requested {
            if let Some(found) = ready(&mut signals) {
                return Some(found);
            }
            signals = self.changed.wait(signals).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Lets some time go by, but not if there is a request to yield. Less, if the VP is told something else.
    pub(super) fn pause(&self, time: Duration) {
        let signals = self.lock();
        if !signals.yield_requested {
            drop(self.changed.wait_timeout(signals, time));
        }
    }
}

impl ScriptedPartition {
    pub(super) fn new(config: &PartitionConfig) -> Self {
        let vps = (0..config.vp_count).map(|_| Mailbox::default()).collect();
        Self { memory: config.memory.clone(), vps, routes: Mutex::default() }
    }

    /// What a VP of this partition is told.
    pub(super) fn mailbox(&self, vp: VpIndex) -> Option<&Mailbox> {
        self.vps.get(vp.0 as usize)
    }

    /// Tells a VP to start at the address, should it wait for that.
    pub(super) fn start_vp(&self, vp: VpIndex, target: u64) {
        if let Some(mailbox) = self.mailbox(vp) {
            mailbox.tell(|signals| signals.start = Some(target));
        }
    }

    /// A panic of another thread leaves the routes whole: they are only set.
    fn routes(&self) -> MutexGuard<'_, IrqRoutes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether some pin of the IOAPIC sends level-triggered interrupts with this vector.
    pub(super) fn is_level_triggered(&self, vector: u8) -> bool {
        let routes = self.routes();
        routes.0.iter().flatten().any(|route| route.level_triggered() && vector_of(route) == vector)
    }
}

/// The vector that a non-maskable interrupt has, whatever its message says.
const NMI_VECTOR: u8 = 2;

fn vector_of(request: &MsiRequest) -> u8 {
    if request.is_nmi() { NMI_VECTOR } else { request.data.to_le_bytes()[0] }
}

/// The state of a scripted partition. It has no clock.
struct ScriptedPartitionState<'a>(&'a ScriptedPartition);

impl AccessPartitionState for ScriptedPartitionState<'_> {
    type Error = PartitionError;

    fn supports(&self, kind: PartitionStateKind) -> bool {
        kind == PartitionStateKind::IrqRoutes
    }

    fn irq_routes(&mut self) -> Result<IrqRoutes, PartitionError> {
        Ok(*self.0.routes())
    }

    fn set_irq_routes(&mut self, value: &IrqRoutes) -> Result<(), PartitionError> {
        *self.0.routes() = *value;
        Ok(())
    }
}

impl Partition for ScriptedPartition {
    fn request_yield(&self, vp: VpIndex) {
        if let Some(mailbox) = self.mailbox(vp) {
            mailbox.tell(|signals| signals.yield_requested = true);
        }
    }

    /// To the VP whose number is the destination (address bits 12 to 19), or to all of them.
    fn signal_msi(&self, request: MsiRequest) -> Result<(), PartitionError> {
        let destination = u32::from((request.address >> 12).to_le_bytes()[0]);
        for (vp, mailbox) in (0..).zip(&self.vps) {
            if destination == vp || destination == BROADCAST {
                mailbox.tell(|signals| signals.interrupts.extend([vector_of(&request)]));
            }
        }
        Ok(())
    }

    fn set_irq_route(&self, pin: u8, request: Option<MsiRequest>) -> Result<(), PartitionError> {
        let mut routes = self.routes();
        let Some(route) = routes.0.get_mut(usize::from(pin)) else {
            let source = std::io::Error::other(format!("pin {pin}, and there are {IOAPIC_PINS}"));
            return Err(PartitionError::Call { call: "setting an IOAPIC route", source });
        };
        *route = request;
        Ok(())
    }

    fn inject_nmi(&self, vp: VpIndex) {
        if let Some(mailbox) = self.mailbox(vp) {
            mailbox.tell(|signals| signals.interrupts.extend([NMI_VECTOR]));
        }
    }

    fn debug_capabilities(&self) -> DebugCapabilities {
        DebugCapabilities { single_step: true, breakpoints: 4, watchpoints: false }
    }

    /// There is no clock to stop.
    fn stop_time(&self) -> Result<(), PartitionError> {
        Ok(())
    }

    fn start_time(&self) -> Result<(), PartitionError> {
        Ok(())
    }

    fn forget_stopped_time(&self) {}

    fn access_state(&self) -> Box<dyn ErasedPartitionState + '_> {
        Box::new(ScriptedPartitionState(self))
    }

    fn reset(&self) -> Result<(), PartitionError> {
        self.scrub(Vtl::Vtl0)
    }

    fn scrub(&self, vtl: Vtl) -> Result<(), PartitionError> {
        vtl.only_vtl0()?;
        *self.routes() = IrqRoutes::default();
        Ok(())
    }
}
