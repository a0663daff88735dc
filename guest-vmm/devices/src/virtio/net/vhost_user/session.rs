//! A vhost-user back end at work: from the driver's start to its stop, or to the back end's end.

use super::lent::{Calls, Lent};
use super::{VhostUser, VhostUserError, lend};
use crate::virtio::net::control::Control;
use crate::virtio::net::header::accepted;
use crate::virtio::net::shared::Shared;
use crate::virtio::{DeviceFault, Interrupt, Session, Stop, VirtQueue};
use std::pin::pin;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use vm_memory::GuestMemoryMmap;

/// A back end with what is shared of its device.
pub(in crate::virtio::net) struct VhostUserSession<'a> {
    pub backend: &'a VhostUser,
    pub shared: &'a Shared,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::virtio::net) enum Ended {
    /// As it was asked to.
    Stopped,
    /// The back end is gone: the link is lost.
    BackendGone,
}

/// The driver's commands meanwhile, which are the device's own business.
struct Commands<'a> {
    queue: Option<&'a mut VirtQueue>,
    memory: &'a GuestMemoryMmap,
    features: u64,
    /// How many queue pairs are ready.
    pairs: u16,
    shared: &'a Shared,
}

impl Commands<'_> {
    /// Answers commands until one changes the number of queue pairs. May be cancelled at any time.
    async fn changed(&mut self) -> Result<(), DeviceFault> {
        let &mut Self { ref mut queue, memory, features, pairs, shared } = self;
        match queue {
            Some(queue) => Control { queue, memory, features, pairs, shared }.run().await,
            None => std::future::pending().await,
        }
    }
}

/// How the back end's work ended: up to where it has taken each queue, and what the driver has done that it may not.
struct Finished {
    next: Vec<u32>,
    fault: Option<DeviceFault>,
}

impl VhostUserSession<'_> {
    /// Lends the queues to the back end until it is to stop, and takes them back. In between it answers the control queue.
    pub(in crate::virtio::net) async fn run(self, session: &mut Session) -> Result<Ended, DeviceFault> {
        let Session { queues, memory, ram, features, stop, interrupt, .. } = session;
        let features = *features;
        let most = if accepted(features, VIRTIO_NET_F_MQ) { usize::from(self.backend.pairs) } else { 1 };
        let (data, control) = queues.split_at_mut(2 * most);
        let ready = data.iter().take_while(|queue| queue.is_some()).count() / 2;
        let queue = control.first_mut().and_then(Option::as_mut);
        let queue = queue.filter(|_| accepted(features, VIRTIO_NET_F_CTRL_VQ));
        let pairs = u16::try_from(ready).expect("few pairs");
        let commands = Commands { queue, memory, features, pairs, shared: self.shared };
        let lent = match lend(data, memory) {
            Ok(lent) => lent,
            Err(error) => return self.lose(data, &error, interrupt),
        };
        let memory = match ram.share() {
            Ok(memory) => memory,
            Err(error) => return self.lose(data, &VhostUserError::Host(error), interrupt),
        };
        match self.serve(&lent, &memory, commands, stop, interrupt).await {
            Ok(Finished { next, fault }) => match take_back(data, &lent, &next)? {
                Some(error) => self.lose(data, &error, interrupt),
                None => fault.map_or(Ok(Ended::Stopped), Err),
            },
            Err(error) => self.lose(data, &error, interrupt),
        }
    }

    /// The back end at work.
    async fn serve(
        &self,
        lent: &[Lent],
        memory: &GuestMemoryMmap,
        mut commands: Commands<'_>,
        stop: &mut Stop,
        interrupt: &Interrupt,
    ) -> Result<Finished, VhostUserError> {
        let calls = Calls::of(lent)?;
        self.backend.begin(commands.features, memory, lent.to_vec(), self.enabled()).await?;
        let fault = {
            let (mut relay, mut closed) = (pin!(calls.relay(interrupt)), pin!(self.backend.closed()));
            loop {
                tokio::select! {
                    biased;
                    () = stop.requested() => break None,
                    error = &mut closed => return Err(error),
                    () = self.shared.link.switched() => {}
                    changed = commands.changed() => match changed {
                        Ok(()) => {}
                        Err(fault) => break Some(fault),
                    },
                    never = &mut relay => match never {},
                }
                self.backend.enable(lent.to_vec(), self.enabled()).await?;
            }
        };
        let next = self.backend.finish(lent).await?;
        calls.flush(interrupt);
        Ok(Finished { next, fault })
    }

    /// How many queues the back end is to serve, from the first on.
    fn enabled(&self) -> usize {
        if self.shared.link.is_enabled() { 2 * usize::from(self.shared.setup().pairs) } else { 0 }
    }

    /// The back end is gone. What it has not given back is taken anew.
    fn lose(
        &self,
        queues: &mut [Option<VirtQueue>],
        error: &VhostUserError,
        interrupt: &Interrupt,
    ) -> Result<Ended, DeviceFault> {
        self.shared.link.lose(&error.to_string());
        for queue in queues.iter_mut().flatten() {
            let (used, _) = queue.indices()?;
            queue.resume(used, used);
        }
        // What it has given back without a word.
        interrupt.used_buffers();
        Ok(Ended::BackendGone)
    }
}

/// The queues go on from where the back end has taken them to, if that can be.
fn take_back(
    queues: &mut [Option<VirtQueue>],
    lent: &[Lent],
    next: &[u32],
) -> Result<Option<VhostUserError>, DeviceFault> {
    for (&Lent { index, .. }, &next) in lent.iter().zip(next) {
        let Some(queue) = &mut queues[index] else { continue };
        let (used, available) = queue.indices()?;
        let between = |next: &u16| next.wrapping_sub(used) <= available.wrapping_sub(used);
        match u16::try_from(next).ok().filter(between) {
            Some(next) => queue.resume(next, used),
            None => return Ok(Some(VhostUserError::Index { queue: index, next, used, available })),
        }
    }
    Ok(None)
}
