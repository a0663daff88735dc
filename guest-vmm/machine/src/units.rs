//! The state units of a machine: what start, stop, reset, save and restore mean for its memory, partition, devices and VPs, and
//! what each shows of itself. What the guest has put there is marked as sensitive.
//!
//! The memory's state is its size; what is in it is frozen and restored beside the units ([`crate::memory`]). A state that a guest in
//! another machine is to go on from needs the same memory there.

use crate::boot::BootImage;
use crate::layout;
use crate::loader::LoadedGuest;
use crate::memory::{GuestMemory, MemoryOptions};
use crate::vp_set::VpSet;
use devices::Device;
use guest_saved_state::machine::memory::MemoryState;
use guest_saved_state::processor::partition as saved;
use inspect::{Deferred, InspectMut, Request};
use processor::{Partition, PartitionState};
use save_restore::{RestoreError, SaveError, SavedStateBlob};
use state_unit::{SaveSupport, StateUnit, UnitError};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// A part of the machine that starts, stops, resets, saves, restores and shows itself.
///
/// The contract of each method is [`StateUnit`]'s, and for `inspect` [`InspectMut`]'s. A part that saves at all has a state.
pub(crate) trait Part: Send + 'static {
    fn start(&mut self) -> impl Future<Output = Result<(), UnitError>> + Send;
    fn stop(&mut self) -> impl Future<Output = Result<(), UnitError>> + Send;
    fn reset(&mut self) -> impl Future<Output = Result<(), UnitError>> + Send;
    fn can_save(&mut self) -> SaveSupport;
    fn save(&mut self) -> impl Future<Output = Result<SavedStateBlob, SaveError>> + Send;
    fn restore(&mut self, state: SavedStateBlob) -> impl Future<Output = Result<(), RestoreError>> + Send;
    fn post_restore(&mut self) -> impl Future<Output = Result<(), UnitError>> + Send;
    fn inspect(&mut self, request: Request<'_>);
}

/// A [`Part`] as a state unit.
pub(crate) struct PartUnit<P>(pub P);

impl<P: Part> InspectMut for PartUnit<P> {
    fn inspect_mut(&mut self, request: Request<'_>) {
        self.0.inspect(request);
    }
}

impl<P: Part> StateUnit for PartUnit<P> {
    async fn start(&mut self) -> Result<(), UnitError> {
        self.0.start().await
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        self.0.stop().await
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        self.0.reset().await
    }

    fn can_save(&mut self) -> SaveSupport {
        self.0.can_save()
    }

    async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError> {
        self.0.save().await.map(Some)
    }

    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        self.0.restore(state).await
    }

    async fn post_restore(&mut self) -> Result<(), UnitError> {
        self.0.post_restore().await
    }
}

/// The guest's memory. A reset zeroes it and loads the boot image again.
pub(crate) struct MemoryPart {
    pub memory: Arc<GuestMemory>,
    pub image: Arc<BootImage>,
    /// What the image has become in memory; `None` for a guest that goes on from another machine, until it is reset.
    pub loaded: Option<LoadedGuest>,
    pub vps: Arc<VpSet>,
}

impl MemoryPart {
    fn state(&self) -> MemoryState {
        let told = self.memory.bytes();
        let ranges = self.memory.ranges();
        let hotplug = ranges.into_iter().nth(layout::memory_ranges(told).len()).unwrap_or_default();
        MemoryState { bytes: told, hotplug_start: hotplug.start, hotplug_end: hotplug.end }
    }

    fn inspect_boot(&self, request: Request<'_>) {
        let mut response = request.respond();
        match &self.loaded {
            Some(LoadedGuest { protocol, initrd, vp }) => {
                response.display("protocol", protocol).hex("entry", vp.registers.rip);
                response.child("initrd", |request| match initrd {
                    Some(range) => inspect_range(range, request),
                    None => request.value("none"),
                });
            }
            None => drop(response.field("protocol", "restored")),
        }
        response.sensitive(|response| {
            response.field("command_line", &self.image.files.cmdline);
        });
    }
}

/// A range of guest physical addresses.
fn inspect_range(range: &Range<u64>, request: Request<'_>) {
    request.respond().hex("start", range.start).hex("end", range.end);
}

impl Part for MemoryPart {
    async fn start(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        let (memory, image) = (self.memory.clone(), self.image.clone());
        let loaded = tokio::task::spawn_blocking(move || -> Result<_, UnitError> {
            memory.zero()?;
            Ok(image.load(&memory)?)
        });
        let loaded = loaded.await??;
        self.vps.start_with(loaded.vp);
        self.loaded = Some(loaded);
        Ok(())
    }

    fn can_save(&mut self) -> SaveSupport {
        SaveSupport::Saves
    }

    async fn save(&mut self) -> Result<SavedStateBlob, SaveError> {
        Ok(SavedStateBlob::new(&self.state()))
    }

    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        let (saved, here) = (state.parse::<MemoryState>()?, self.state());
        let fields = [
            ("bytes", saved.bytes, here.bytes),
            ("hotplug_start", saved.hotplug_start, here.hotplug_start),
            ("hotplug_end", saved.hotplug_end, here.hotplug_end),
        ];
        let differs = fields.into_iter().find(|(_, saved, here)| saved != here);
        let refused =
            |(name, saved, here)| RestoreError::invalid(name, format!("{saved} (here it is {here})"));
        differs.map_or(Ok(()), |field| Err(refused(field)))
    }

    async fn post_restore(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    fn inspect(&mut self, request: Request<'_>) {
        let MemoryOptions { huge_pages, prefault, lock } = self.memory.options();
        request
            .respond()
            .field_with("bytes", || self.memory.bytes())
            .field("huge_pages", &huge_pages)
            .field("prefault", &prefault)
            .field("lock", &lock)
            .child("ranges", |request| {
                let mut response = request.respond();
                for (index, range) in self.memory.ranges().iter().enumerate() {
                    response.child(&index.to_string(), |request| inspect_range(range, request));
                }
            })
            .child("boot", |request| self.inspect_boot(request));
    }
}

/// The partition: what belongs to the hypervisor and to no VP.
pub(crate) struct PartitionPart {
    pub partition: Arc<dyn Partition>,
    pub vps: u32,
}

impl Part for PartitionPart {
    async fn start(&mut self) -> Result<(), UnitError> {
        Ok(self.partition.start_time()?)
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        Ok(self.partition.stop_time()?)
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        Ok(self.partition.reset()?)
    }

    fn can_save(&mut self) -> SaveSupport {
        SaveSupport::Saves
    }

    async fn save(&mut self) -> Result<SavedStateBlob, SaveError> {
        let state = PartitionState::save(&mut *self.partition.access_state())?;
        Ok(SavedStateBlob::new(&saved::PartitionState::from(&state)))
    }

    /// What the state does not have is as in a new partition. The devices come next, then the VPs.
    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        let state = PartitionState::try_from(state.parse::<saved::PartitionState>()?)?;
        self.partition.reset().map_err(RestoreError::other)?;
        Ok(state.restore(&mut *self.partition.access_state())?)
    }

    async fn post_restore(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    fn inspect(&mut self, request: Request<'_>) {
        let mut response = request.respond();
        response.field("vps", &self.vps);
        response.sensitive(|response| {
            response.child("state", |request| {
                self.partition.access_state().inspect_states(&mut request.respond());
            });
        });
    }
}

/// A device. Its registers are reached through the bus while it runs; the lock is held for one call.
pub(crate) struct DevicePart(pub Arc<Mutex<dyn Device>>);

impl DevicePart {
    /// The device. Waits for an access that is under way.
    fn device(&self) -> MutexGuard<'_, dyn Device + 'static> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part for DevicePart {
    async fn start(&mut self) -> Result<(), UnitError> {
        self.device().start();
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        let stopping = self.device().stop();
        stopping.await;
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        self.device().reset();
        Ok(())
    }

    fn can_save(&mut self) -> SaveSupport {
        SaveSupport::Saves
    }

    async fn save(&mut self) -> Result<SavedStateBlob, SaveError> {
        self.device().save_blob()
    }

    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        self.device().restore_blob(state)
    }

    async fn post_restore(&mut self) -> Result<(), UnitError> {
        self.device().post_restore();
        Ok(())
    }

    /// A device in the middle of an access answers after it. If that access never ends, neither does the wait hold up anybody
    /// else, nor does it outlast the inspection.
    fn inspect(&mut self, request: Request<'_>) {
        match try_lock(&self.0) {
            Some(mut device) => device.inspect_mut(request),
            None => drop(tokio::spawn(inspect_when_free(self.0.clone(), request.defer()))),
        }
    }
}

/// An access takes microseconds; one that takes longer than this is looked for again as often.
const ACCESS: Duration = Duration::from_millis(1);

/// Polls for the device's lock: waiting in it could block the thread for ever.
async fn inspect_when_free(device: Arc<Mutex<dyn Device>>, deferred: Deferred) {
    while deferred.is_awaited() {
        if let Some(mut device) = try_lock(&device) {
            return deferred.inspect_mut(&mut *device);
        }
        tokio::time::sleep(ACCESS).await;
    }
}

/// The device, unless an access is under way.
fn try_lock(device: &Mutex<dyn Device>) -> Option<MutexGuard<'_, dyn Device + 'static>> {
    match device.try_lock() {
        Ok(device) => Some(device),
        Err(TryLockError::Poisoned(device)) => Some(device.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// The VPs.
pub(crate) struct VpsPart(pub Arc<VpSet>);

impl Part for VpsPart {
    async fn start(&mut self) -> Result<(), UnitError> {
        Ok(self.0.start().await?)
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        self.0.stop().await;
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        Ok(self.0.reset().await?)
    }

    fn can_save(&mut self) -> SaveSupport {
        SaveSupport::Saves
    }

    async fn save(&mut self) -> Result<SavedStateBlob, SaveError> {
        self.0.save().await.map(|state| SavedStateBlob::new(&state))
    }

    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        self.0.restore(state.parse()?).await
    }

    async fn post_restore(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    /// What they are as a unit. What each shows of itself is reached past the unit, also while it moves.
    fn inspect(&mut self, request: Request<'_>) {
        request
            .respond()
            .field_with("count", || self.0.count())
            .field_with("running", || self.0.is_running());
    }
}
