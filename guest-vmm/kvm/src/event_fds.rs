//! Doorbells (ioeventfds) and interrupts (irqfds): the guest and KVM speak with eventfds, and no thread of the VMM's is between them.

// UNSAFETY: an eventfd that somebody else has made becomes one of the KVM library's.
#![expect(unsafe_code, reason = "an eventfd that somebody else has made becomes one of the KVM library's")]

use crate::error::Named;
use crate::partition::{KvmPartition, no_pin};
use kvm_ioctls::IoEventAddress;
use processor::{EventFds, PartitionError};
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use vmm_sys_util::eventfd::EventFd;

/// A descriptor of our own of an eventfd, as the KVM library takes it.
fn event_fd(of: BorrowedFd<'_>) -> Result<EventFd, PartitionError> {
    let own = of.try_clone_to_owned();
    let own = own.map_err(|source| PartitionError::Call { call: "duplicating an eventfd", source })?;
    // SAFETY: the descriptor is open and owned, and its ownership goes to the new value.
    Ok(unsafe { EventFd::from_raw_fd(own.into_raw_fd()) })
}

impl EventFds for KvmPartition {
    fn add_doorbell(&self, address: u64, value: u32, bell: BorrowedFd<'_>) -> Result<(), PartitionError> {
        let bell = event_fd(bell)?;
        self.vm.register_ioevent(&bell, &IoEventAddress::Mmio(address), value).for_partition("KVM_IOEVENTFD")
    }

    fn add_irqfd(&self, pin: u8, trigger: BorrowedFd<'_>) -> Result<(), PartitionError> {
        let trigger = event_fd(trigger)?;
        let mut routes = self.routes();
        if !routes.set_irqfd(pin) {
            return Err(no_pin(pin));
        }
        self.vm.register_irqfd(&trigger, pin.into()).for_partition("KVM_IRQFD")?;
        self.update_routes(&mut routes)
    }
}
