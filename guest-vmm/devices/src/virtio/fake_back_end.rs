//! A vhost-user back end of network devices, made with the library for such: it sends back each frame that it gets, on the queue pair
//! on which it came. On threads of its own, in place of another process; for tests.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// How many queues it has: two pairs.
pub const QUEUES: usize = 4;

/// The features of VIRTIO's that a good one offers.
pub const OFFERED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The protocol's features that a good one offers.
pub const PROTOCOL: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::MQ.union(VhostUserProtocolFeatures::REPLY_ACK);

/// What a back end has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// What the driver and it have agreed on.
    pub features: u64,
    /// How much of the guest's memory it has, in bytes.
    pub memory: u64,
    /// How many frames it has sent back.
    pub frames: u64,
}

struct Loopback {
    offered: u64,
    protocol: VhostUserProtocolFeatures,
    event_idx: bool,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Frames with their headers, on their way back, of each pair.
    frames: [Vec<Vec<u8>>; QUEUES / 2],
    seen: Arc<Mutex<Seen>>,
    /// It touches nothing any more.
    is_dead: bool,
}

impl Loopback {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

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
        self.seen().features = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.seen().memory = memory.memory().iter().map(GuestMemoryRegion::len).sum();
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&mut self, event: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        if self.is_dead {
            return Ok(());
        }
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
            self.seen().frames += 1;
        }
        self.tell(receive)
    }
}

/// A back end at work. Its connection and its threads end with it.
pub struct FakeBackEnd {
    daemon: VhostUserDaemon<Arc<Mutex<Loopback>>>,
    loopback: Arc<Mutex<Loopback>>,
    seen: Arc<Mutex<Seen>>,
}

impl FakeBackEnd {
    /// A back end that offers these features of VIRTIO's and of the protocol's, and the other end of its socket.
    pub fn new(offered: u64, protocol: VhostUserProtocolFeatures) -> (Self, UnixStream) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = Listener::new(&path, true).expect("a socket");
        let socket = UnixStream::connect(&path).expect("it listens");
        (Self::accept(listener, offered, protocol), socket)
    }

    /// A good back end that waits for a connection to this path, on a thread that gives it back then.
    pub fn listening(path: &Path) -> JoinHandle<Self> {
        let listener = Listener::new(path, true).expect("a socket");
        std::thread::spawn(move || Self::accept(listener, OFFERED, PROTOCOL))
    }

    fn accept(mut listener: Listener, offered: u64, protocol: VhostUserProtocolFeatures) -> Self {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let (event_idx, frames, seen) = (false, Default::default(), Arc::<Mutex<Seen>>::default());
        let loopback = Loopback {
            offered,
            protocol,
            event_idx,
            memory: memory.clone(),
            frames,
            seen: seen.clone(),
            is_dead: false,
        };
        let loopback = Arc::new(Mutex::new(loopback));
        let mut daemon =
            VhostUserDaemon::new("loopback".into(), loopback.clone(), memory).expect("a back end");
        daemon.start(&mut listener).expect("a connection");
        Self { daemon, loopback, seen }
    }

    /// What it has seen so far.
    pub fn seen(&self) -> Seen {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it as its death would: it touches no queue any more, and then its connection ends.
    pub fn kill(&self) {
        self.loopback.lock().unwrap_or_else(PoisonError::into_inner).is_dead = true;
        self.daemon.request_shutdown();
    }
}

impl fmt::Debug for FakeBackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FakeBackEnd").field(&self.seen()).finish()
    }
}
