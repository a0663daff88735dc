//! What serves a network device's queues.
//!
//! Every queue pair that the driver uses has its own port of the back end. All of them share the I/O thread; between any two waits
//! each moves a bounded number of frames. Nothing is under way while they wait but buffers for frames to come, so stopping is
//! dropping what waits.

use super::allowance::Limiters;
use super::control::Control;
use super::header::accepted;
use super::lane::Lane;
use super::port::Port;
use super::receive::Receiving;
use super::shared::Shared;
use super::transmit::Transmitting;
use super::vhost_user::{Ended, VhostUser, VhostUserSession};
use crate::virtio::{DeviceFault, QueueWorker, Session, VirtQueue};
use futures::future::{LocalBoxFuture, try_join_all};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ};

/// How often queues are looked at whose doorbells somebody else may have taken: a back end that was given up, and lives on.
const LOOK: Duration = Duration::from_millis(20);

/// What serves a network device's queues.
#[derive(Debug)]
pub struct NetWorker {
    pub(super) frames: Frames,
    pub(super) mtu: Option<u16>,
    pub(super) limiters: Limiters,
    pub(super) shared: Arc<Shared>,
}

/// What moves the frames.
#[derive(Debug)]
pub(super) enum Frames {
    /// We do, by a port of the back end for each queue pair.
    Ports(Vec<Port>),
    /// The back end does.
    VhostUser(VhostUser),
    /// Nobody does: the back end is gone, but may still hear the doorbells.
    Lost(Vec<Port>),
}

/// A queue for frames to the driver, and one for those from it.
type Pair<'q> = (&'q mut VirtQueue, &'q mut VirtQueue);

impl QueueWorker for NetWorker {
    async fn run(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        let features = session.features;
        self.prepare(features);
        if session.has(VIRTIO_NET_F_GUEST_ANNOUNCE) && self.shared.announcement.show() {
            session.interrupt.config_changed();
        }
        if let Frames::VhostUser(backend) = &self.frames {
            let shared = &self.shared;
            let ended = VhostUserSession { backend, shared }.run(session).await?;
            if ended == Ended::Stopped {
                return Ok(());
            }
            self.frames = Frames::Lost((0..backend.pairs).map(|_| Port::lost()).collect());
        }
        let mut stop = session.stop.clone();
        let is_lost = matches!(self.frames, Frames::Lost(_));
        loop {
            let served = self.serve(session);
            tokio::select! {
                biased;
                () = stop.requested() => return Ok(()),
                changed = served => changed?,
                () = tokio::time::sleep(LOOK), if is_lost => {}
            }
        }
    }

    fn reset(&mut self) {
        let mut setup = self.shared.setup();
        (setup.pairs, setup.receive_mode) = (1, super::shared::ReceiveMode::default());
        self.shared.announcement.acknowledge();
    }
}

impl NetWorker {
    /// Makes the back end ready for a driver with these features.
    fn prepare(&mut self, features: u64) {
        let Frames::Ports(ports) = &mut self.frames else { return };
        for port in ports {
            if let Err(error) = port.prepare(features) {
                self.shared.link.lose(&error.to_string());
            }
        }
    }

    /// Serves the queue pairs that the driver uses, until it uses another number of them.
    async fn serve(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        let Self { frames, mtu, limiters, shared } = self;
        let (Frames::Ports(ports) | Frames::Lost(ports)) = frames else {
            return std::future::pending().await;
        };
        let Session { queues, memory, features, .. } = session;
        let features = *features;
        let lane = Lane { memory, features, mtu: *mtu, limiters, shared };
        let most = if accepted(features, VIRTIO_NET_F_MQ) { ports.len() } else { 1 };
        let (queues, control) = queues.split_at_mut(2 * most);
        let mut pairs: Vec<Pair<'_>> = queues.chunks_exact_mut(2).map_while(pair).collect();
        let ready = u16::try_from(pairs.len()).expect("few ports");
        let used = usize::from(shared.setup().pairs);
        let mut lanes: Vec<LocalBoxFuture<'_, Result<Infallible, DeviceFault>>> = Vec::new();
        for (index, port) in ports.iter_mut().enumerate() {
            if let Err(error) = port.attach(index < used) {
                shared.link.lose(&error.to_string());
            }
        }
        for ((receive, transmit), port) in pairs.drain(..).zip(ports).take(used) {
            let Port { descriptor, incoming, outgoing } = port;
            lanes.push(Box::pin(Receiving::new(receive, descriptor, incoming, lane).run()));
            lanes.push(Box::pin(Transmitting::new(transmit, descriptor, outgoing, lane).run()));
        }
        let control = control.first_mut().and_then(Option::as_mut);
        let control = control.filter(|_| accepted(features, VIRTIO_NET_F_CTRL_VQ));
        let commands = async {
            match control {
                Some(queue) => Control { queue, memory, features, pairs: ready, shared }.run().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = commands => changed,
            // Frames end with a fault; without queues for them there are only commands.
            Err(fault) = try_join_all(lanes) => Err(fault),
        }
    }
}

/// Two queues that are both ready.
fn pair(queues: &mut [Option<VirtQueue>]) -> Option<Pair<'_>> {
    match queues {
        [Some(receive), Some(transmit)] => Some((receive, transmit)),
        _ => None,
    }
}
