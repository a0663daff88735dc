//! A real back end in place of another process: it sends back each frame that it gets, on the pair on which it came.

use crate::virtio::net::{VhostUser, VhostUserError};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// How many queues it has.
pub const QUEUES: usize = 4;

/// What it offers.
pub const OFFERED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What it does with the protocol.
pub const PROTOCOL: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::MQ.union(VhostUserProtocolFeatures::REPLY_ACK);

/// What it was told, for tests to look at.
#[derive(Debug, Default)]
pub struct Seen {
    /// What the driver and it have agreed on.
    pub features: u64,
    /// How much of the guest's memory it has, in bytes.
    pub memory: u64,
}

struct Loopback {
    offered: u64,
    protocol: VhostUserProtocolFeatures,
    event_idx: bool,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Frames with their headers, on their way back, of each pair.
    frames: [Vec<Vec<u8>>; QUEUES / 2],
    seen: Arc<Mutex<Seen>>,
}

impl Loopback {
    /// The next chain; if there is none, the driver is to tell of the next one. A queue that it does not have has none.
    fn next(&self, vring: &VringRwLock) -> Option<Chain> {
        let memory = self.memory.memory();
        let mut vring = vring.get_mut();
        while vring.get_queue().ready() {
            let chain = vring.get_queue_mut().iter(memory.clone()).expect("a queue").next();
            if chain.is_some() || !vring.enable_notification().expect("a queue") {
                return chain;
            }
        }
        None
    }

    fn tell(&self, vring: &VringRwLock) -> io::Result<()> {
        if !self.event_idx || vring.needs_notification().expect("a queue") {
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}

type Chain = virtio_queue::DescriptorChain<<GuestMemoryAtomic<GuestMemoryMmap> as GuestAddressSpace>::T>;

impl VhostUserBackendMut for Loopback {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn acked_features(&mut self, features: u64) {
        self.seen.lock().unwrap().features = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.seen.lock().unwrap().memory = memory.memory().iter().map(GuestMemoryRegion::len).sum();
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&mut self, event: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        let pair = usize::from(event) / 2;
        let [receive, transmit] = [&vrings[2 * pair], &vrings[2 * pair + 1]];
        while let Some(chain) = self.next(transmit) {
            let (head, memory) = (chain.head_index(), self.memory.memory());
            let mut frame = Vec::new();
            chain.reader(&*memory).expect("readable").read_to_end(&mut frame).expect("read");
            self.frames[pair].push(frame);
            transmit.add_used(head, 0).expect("a queue");
        }
        self.tell(transmit)?;
        while !self.frames[pair].is_empty()
            && let Some(chain) = self.next(receive)
        {
            let (head, memory) = (chain.head_index(), self.memory.memory());
            let frame = self.frames[pair].remove(0);
            chain.writer(&*memory).expect("writable").write_all(&frame).expect("room");
            receive.add_used(head, frame.len().try_into().expect("short")).expect("a queue");
        }
        self.tell(receive)
    }
}

type Daemon = VhostUserDaemon<Arc<Mutex<Loopback>>>;

/// A back end at work. It ends when it is dropped, or killed.
pub struct BackEnd {
    daemon: Daemon,
    pub seen: Arc<Mutex<Seen>>,
}

impl BackEnd {
    /// What ends its connection, as its death would.
    pub fn killer(&self) -> ShutdownHandle {
        self.daemon.shutdown_handle().expect("it is connected")
    }
}

/// A back end that offers this, on its way, and our end of its socket.
fn listening(offered: u64, protocol: VhostUserProtocolFeatures) -> (JoinHandle<BackEnd>, UnixStream) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let mut listener = Listener::new(&path, true).expect("a socket");
    let socket = UnixStream::connect(&path).expect("it listens");
    let back_end = std::thread::spawn(move || {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let (event_idx, frames, seen) = (false, Default::default(), Arc::<Mutex<Seen>>::default());
        let loopback =
            Loopback { offered, protocol, event_idx, memory: memory.clone(), frames, seen: seen.clone() };
        let loopback = Arc::new(Mutex::new(loopback));
        let mut daemon = VhostUserDaemon::new("loopback".into(), loopback, memory).expect("a back end");
        daemon.start(&mut listener).expect("a connection");
        BackEnd { daemon, seen }
    });
    (back_end, socket)
}

/// A back end that offers this, and what comes of agreeing with it.
pub fn connect(
    offered: u64,
    protocol: VhostUserProtocolFeatures,
    pairs: u16,
) -> (BackEnd, Result<VhostUser, VhostUserError>) {
    let (back_end, socket) = listening(offered, protocol);
    let agreed = super::agree(socket, pairs);
    (back_end.join().expect("it does not panic"), agreed)
}
