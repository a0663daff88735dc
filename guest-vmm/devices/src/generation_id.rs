//! The VM generation ID (Microsoft, "Virtual Machine Generation ID", 2012): 16 bytes in the guest's memory that tell one guest from
//! another that goes on from the same state.
//!
//! A new guest gets a fresh one, and keeps it through pauses and resets. One that goes on from saved state gets another, and is told
//! of it: its random numbers, and whatever else must not come twice, have to be made anew.
//!
//! Where the bytes are, and where random ones come from, is the host's business ([`GenerationIdHost`]). The device has no registers.

use crate::device::{Stopping, stopped};
use crate::{Device, GenericEventLine, IoDevice};
use inspect::{Inspect, Request};
use processor::PowerRequest;
use save_restore::{NoSavedState, RestoreError, SaveError, SaveRestore};
use std::fmt;
use std::ops::ControlFlow;

/// An identifier: 128 bits of a cryptographically strong random generator.
pub type Id = [u8; 16];

/// What the device has of its host.
pub trait GenerationIdHost: Send {
    /// An identifier that nobody has had.
    fn fresh(&self) -> Id;

    /// Puts the identifier where the guest reads it. Called when it changes, and when memory was reset.
    fn publish(&self, id: Id);
}

/// The identifier of a guest, which is told of a new one through an event.
pub struct GenerationId {
    id: Id,
    host: Box<dyn GenerationIdHost>,
    event: GenericEventLine,
}

impl fmt::Debug for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GenerationId").finish_non_exhaustive()
    }
}

impl GenerationId {
    /// How many bytes it takes in memory.
    pub const BYTES: u64 = size_of::<Id>() as u64;

    /// A fresh identifier, published.
    pub fn new(host: Box<dyn GenerationIdHost>, event: GenericEventLine) -> Self {
        let id = host.fresh();
        host.publish(id);
        Self { id, host, event }
    }
}

impl IoDevice for GenerationId {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _: u64, _: &[u8]) -> ControlFlow<PowerRequest> {
        ControlFlow::Continue(())
    }

    /// The guest is the same, and its memory is empty.
    fn reset(&mut self) {
        self.host.publish(self.id);
    }
}

impl Device for GenerationId {
    fn start(&mut self) {}

    fn stop(&mut self) -> Stopping {
        stopped()
    }

    /// A guest that goes on from saved state is another one than the one that was saved, which may go on as well.
    fn post_restore(&mut self) {
        self.id = self.host.fresh();
        self.host.publish(self.id);
        self.event.raise();
    }
}

/// The identifier is not saved: whoever goes on from the state gets another.
impl SaveRestore for GenerationId {
    type SavedState = NoSavedState;

    fn save(&mut self) -> Result<NoSavedState, SaveError> {
        Ok(NoSavedState {})
    }

    fn restore(&mut self, NoSavedState {}: NoSavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Shows the identifier as sensitive: guests seed their random generators with it.
impl Inspect for GenerationId {
    fn inspect(&self, request: Request<'_>) {
        request.respond().sensitive(|response| {
            response.field_with("id", || format!("{:032x}", u128::from_be_bytes(self.id)));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspected::{inspected, observed};
    use crate::ioapic::tests::ioapic;
    use crate::{GenericEvent, GenericEventDevice, IrqLine};
    use std::sync::atomic::{AtomicU8, Ordering};
    use std::sync::{Arc, Mutex};

    /// Counts identifiers, and keeps what was published.
    #[derive(Clone, Default)]
    struct Host {
        made: Arc<AtomicU8>,
        published: Arc<Mutex<Vec<Id>>>,
    }

    impl GenerationIdHost for Host {
        fn fresh(&self) -> Id {
            [self.made.fetch_add(1, Ordering::Relaxed) + 1; 16]
        }

        fn publish(&self, id: Id) {
            self.published.lock().unwrap().push(id);
        }
    }

    fn device() -> (GenerationId, Host, Arc<Mutex<GenericEventDevice>>) {
        let (host, (ioapic, _)) = (Host::default(), ioapic());
        let events = GenericEventDevice::new(IrqLine::new(ioapic, 9).unwrap());
        let events = Arc::new(Mutex::new(events));
        let line = GenericEventLine::new(&events, GenericEvent::GenerationId);
        (GenerationId::new(Box::new(host.clone()), line), host, events)
    }

    fn pending(events: &Mutex<GenericEventDevice>) -> u8 {
        let mut data = [0];
        events.lock().unwrap().read(0, &mut data);
        data[0]
    }

    #[test]
    fn a_guest_keeps_its_identifier_through_pauses_and_resets() {
        let (mut device, host, events) = device();
        device.start();
        drop(device.stop());
        device.reset();
        assert_eq!(*host.published.lock().unwrap(), [[1; 16], [1; 16]]);
        assert_eq!(pending(&events), 0);
    }

    #[test]
    fn a_restored_guest_has_another_and_is_told_once_all_is_restored() {
        let (mut device, host, events) = device();
        let state = device.save().unwrap();
        device.restore(state).unwrap();
        assert_eq!((host.published.lock().unwrap().len(), pending(&events)), (1, 0));
        device.post_restore();
        assert_eq!(*host.published.lock().unwrap(), [[1; 16], [2; 16]]);
        assert_eq!(pending(&events), GenericEvent::GenerationId.bit());
        device.reset();
        assert_eq!(host.published.lock().unwrap().last(), Some(&[2; 16]));
    }

    #[test]
    fn only_an_operator_sees_it() {
        let (mut device, ..) = device();
        assert_eq!(inspected(&mut device, "id").to_string(), "01010101010101010101010101010101\n");
        assert_eq!(observed(&mut device).to_string(), "");
    }
}
