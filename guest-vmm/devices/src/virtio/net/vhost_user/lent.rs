//! Queues that a back end has.

// UNSAFETY: the protocol's library takes eventfds of a type that is made from a number.
#![expect(unsafe_code, reason = "eventfds by number")]

use super::VhostUserError;
use crate::virtio::{EventFd, Interrupt, VirtQueue};
use futures::future::join_all;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::sync::Arc;
use tokio::io::unix::AsyncFd;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// A queue that a back end has, or is to have.
#[derive(Clone)]
pub(super) struct Lent {
    pub index: usize,
    /// Up to which available index chains were taken.
    next: u16,
    size: u16,
    /// The queue's parts as addresses of this process.
    descriptors: u64,
    available: u64,
    used: u64,
    /// Signalled by the back end for an interrupt.
    pub call: Arc<EventFd>,
    /// Signalled by the driver.
    bell: Arc<EventFd>,
}

impl Lent {
    pub(super) fn new(index: usize, queue: &VirtQueue, memory: &GuestMemoryMmap) -> io::Result<Self> {
        let state = queue.state();
        let address = |guest: u64| {
            let host = memory.get_host_address(GuestAddress(guest));
            host.map(|host| host.addr() as u64).map_err(io::Error::other)
        };
        Ok(Self {
            index,
            next: state.next_avail,
            size: state.size,
            descriptors: address(state.desc_table)?,
            available: address(state.avail_ring)?,
            used: address(state.used_ring)?,
            call: Arc::new(EventFd::new()?),
            bell: queue.bell(),
        })
    }

    /// Hands it to the back end, disabled.
    pub(super) fn set_up(&self, frontend: &mut Frontend) -> Result<(), VhostUserError> {
        let Self { index, next, size, descriptors, available, used, ref call, ref bell } = *self;
        let addresses = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: descriptors,
            used_ring_addr: used,
            avail_ring_addr: available,
            log_addr: None,
        };
        frontend.set_vring_num(index, size)?;
        frontend.set_vring_addr(index, &addresses)?;
        frontend.set_vring_base(index, next)?;
        frontend.set_vring_call(index, &duplicate(call)?)?;
        frontend.set_vring_kick(index, &duplicate(bell)?)?;
        Ok(())
    }

    /// Lets the back end serve it, or not.
    pub(super) fn enable(&self, frontend: &mut Frontend, enabled: bool) -> Result<(), VhostUserError> {
        frontend.set_vring_enable(self.index, enabled)?;
        if enabled {
            // For what was made available while nobody looked: whoever looked last may have silenced the bell.
            self.bell.signal();
        }
        Ok(())
    }
}

/// The same eventfd, as the library has it.
fn duplicate(eventfd: &EventFd) -> Result<vmm_sys_util::eventfd::EventFd, VhostUserError> {
    let duplicate = eventfd.as_fd().try_clone_to_owned().map_err(VhostUserError::Host)?;
    // SAFETY: the descriptor is an eventfd, and nobody else's.
    Ok(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(duplicate.into_raw_fd()) })
}

/// The back end's interrupts, on their way to the driver.
pub(super) struct Calls(Vec<AsyncFd<Arc<EventFd>>>);

impl Calls {
    /// Those of these queues. On the I/O thread.
    pub(super) fn of(lent: &[Lent]) -> Result<Self, VhostUserError> {
        let calls = lent.iter().map(|lent| lent.call.clone().watch());
        calls.collect::<io::Result<_>>().map(Self).map_err(VhostUserError::Host)
    }

    /// Passes them on, for as long as it is polled.
    pub(super) async fn relay(&self, interrupt: &Interrupt) -> Infallible {
        let relay = |call| async move {
            let call: &AsyncFd<Arc<EventFd>> = call;
            // The runtime is there for as long as its tasks.
            while let Ok(mut ready) = call.readable().await {
                ready.clear_ready();
                if call.get_ref().take() {
                    interrupt.used_buffers();
                }
            }
        };
        join_all(self.0.iter().map(relay)).await;
        std::future::pending().await
    }

    /// Passes on those that are there.
    pub(super) fn flush(&self, interrupt: &Interrupt) {
        // Each is to be silenced.
        let called = self.0.iter().filter(|call| call.get_ref().take()).count();
        if called > 0 {
            interrupt.used_buffers();
        }
    }
}
