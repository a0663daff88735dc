//! The state units of a machine: what start, stop and reset mean for its memory, partition, devices and VPs.
//!
//! Saved state comes with snapshots; until then every unit refuses to be saved, by name.

use crate::boot::BootImage;
use crate::memory::GuestMemory;
use crate::vp_set::VpSet;
use devices::Device;
use inspect::{InspectMut, Request};
use processor::Partition;
use save_restore::{RestoreError, SaveError, SavedStateBlob};
use state_unit::{SaveSupport, StateUnit, UnitError};
use std::sync::{Arc, Mutex, PoisonError};

/// A part of the machine that starts, stops and resets.
///
/// The contract of each method is [`StateUnit`]'s.
pub(crate) trait Part: Send + 'static {
    fn start(&mut self) -> impl Future<Output = Result<(), UnitError>> + Send;
    fn stop(&mut self) -> impl Future<Output = Result<(), UnitError>> + Send;
    fn reset(&mut self) -> impl Future<Output = Result<(), UnitError>> + Send;
}

/// A [`Part`] as a state unit.
pub(crate) struct PartUnit<P>(pub P);

const NO_SAVED_STATE: &str = "saving is not supported yet";

impl<P: Part> InspectMut for PartUnit<P> {
    fn inspect_mut(&mut self, request: Request<'_>) {
        request.respond();
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
        SaveSupport::Refused(NO_SAVED_STATE.into())
    }

    async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError> {
        Err(SaveError::not_supported(NO_SAVED_STATE))
    }

    async fn restore(&mut self, _: SavedStateBlob) -> Result<(), RestoreError> {
        Err(RestoreError::not_supported(NO_SAVED_STATE))
    }
}

/// The guest's memory. A reset zeroes it and loads the boot image again.
pub(crate) struct MemoryPart {
    pub memory: Arc<GuestMemory>,
    pub image: Arc<BootImage>,
    pub vps: Arc<VpSet>,
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
        self.vps.start_with(loaded.await??);
        Ok(())
    }
}

/// The partition: what belongs to the hypervisor and to no VP.
pub(crate) struct PartitionPart(pub Arc<dyn Partition>);

impl Part for PartitionPart {
    async fn start(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        Ok(self.0.reset()?)
    }
}

/// A device. Its registers are reached through the bus while it runs; the lock is held for one call.
pub(crate) struct DevicePart(pub Arc<Mutex<dyn Device>>);

impl Part for DevicePart {
    async fn start(&mut self) -> Result<(), UnitError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).start();
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).stop();
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).reset();
        Ok(())
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
}

/// What a unit of its own, added to a machine on purpose, fails at: faults injected by tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InjectedFault {
    /// It cannot start.
    Start,
    /// It cannot stop.
    Stop,
    /// It cannot be reset.
    Reset,
    /// It never answers when it is to stop.
    StopHangs,
}

impl Part for InjectedFault {
    async fn start(&mut self) -> Result<(), UnitError> {
        self.fail_at(Self::Start)
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        if *self == Self::StopHangs {
            std::future::pending::<()>().await;
        }
        self.fail_at(Self::Stop)
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        self.fail_at(Self::Reset)
    }
}

impl InjectedFault {
    fn fail_at(self, operation: Self) -> Result<(), UnitError> {
        if self == operation { Err(format!("injected fault at {operation:?}").into()) } else { Ok(()) }
    }
}
