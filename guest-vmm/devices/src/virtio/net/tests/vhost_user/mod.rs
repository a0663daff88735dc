//! Back ends in other processes: a good one, made with the library for them, and bad ones.

mod hostile;
mod scripted;

use super::*;
use crate::virtio::fake_back_end::{FakeBackEnd, OFFERED, PROTOCOL, QUEUES};
use crate::virtio::net::{VhostUser, VhostUserError};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// Where the control queue is behind all pairs of the back end.
const CONTROL: usize = QUEUES;

fn agree(socket: UnixStream, pairs: u16) -> Result<VhostUser, VhostUserError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(VhostUser::connect(socket.into(), pairs))
}

/// A back end that offers this, and what comes of agreeing with it.
fn connect(
    offered: u64,
    protocol: VhostUserProtocolFeatures,
    pairs: u16,
) -> (FakeBackEnd, Result<VhostUser, VhostUserError>) {
    let (back_end, socket) = FakeBackEnd::new(offered, protocol);
    (back_end, agree(socket, pairs))
}

/// A device over what was agreed, whose driver has not looked at it yet.
fn started(backend: VhostUser) -> Bench<UnixStream> {
    let (spec, told) = spec(NetBackend::VhostUser(backend), None);
    let (spec, link) = Net::spec("net0", spec).unwrap();
    Bench { driver: FakeDriver::started(spec), peers: Vec::new(), link, told }
}

/// A device over a back end that offers this.
fn bench_of(offered: u64, features: u64, pairs: u16) -> (Bench<UnixStream>, FakeBackEnd) {
    let (back_end, backend) = connect(offered, PROTOCOL, pairs);
    let mut bench = started(backend.expect("it fits"));
    bench.driver.initialize(features);
    (bench, back_end)
}

impl Bench<UnixStream> {
    /// A frame goes there and comes back.
    fn echoes(&mut self, length: usize, seed: usize) {
        self.transmit(&frame(length, seed));
        assert!(self.received().1 == frame(length, seed), "frame {seed} comes back");
    }

    /// A frame was sent, or dropped: its buffers come back.
    fn has_sent(&mut self) {
        let used = self.driver.wait_used(TRANSMIT);
        assert!(!used.segments.is_empty(), "chain {} comes back once", used.head);
        self.driver.take(&used);
    }

    /// Sends a frame on a queue, without waiting for its buffers.
    fn send(&mut self, queue: usize, length: usize, seed: usize) {
        let text = frame(length, seed);
        self.driver.send(queue, &[Buffer::Out(&[0; HEADER_BYTES]), Buffer::Out(&text)]);
    }
}

#[test]
fn frames_go_both_ways_with_stops_and_resets_between() {
    let (mut bench, back_end) = bench_of(OFFERED, PLAIN, 1);
    bench.offer(40, 2048);
    for seed in 0..40 {
        bench.echoes(60 + 20 * seed, seed);
        if seed % 5 == 0 {
            bench.driver.stop();
            bench.driver.start();
        }
    }
    bench.driver.reset();
    bench.driver.initialize(PLAIN);
    bench.offer(1, 2048);
    bench.echoes(60, 1);
    assert_eq!(shown(&bench.driver, "backend"), "there");
    assert_eq!(back_end.seen().memory, crate::virtio::fake_driver::RAM_BYTES);
}

/// More frames than buffers, and none of the driver's waits: it is the back end's interrupts that tell of all of them.
#[test]
fn a_queue_goes_round_many_times() {
    for features in [PLAIN, PLAIN & !(1 << VIRTIO_RING_F_EVENT_IDX)] {
        let (mut bench, _back_end) = bench_of(OFFERED, features, 1);
        for round in 0..20 {
            bench.offer(50, 2048);
            for seed in 0..50 {
                bench.send(TRANSMIT, 100, 50 * round + seed);
            }
            for seed in 0..50 {
                assert!(bench.received().1 == frame(100, 50 * round + seed), "frame {seed} of round {round}");
                bench.has_sent();
            }
        }
    }
}

#[test]
fn what_is_made_available_while_the_device_stands_is_served_when_it_goes_on() {
    let (mut bench, _back_end) = bench_of(OFFERED, PLAIN, 1);
    for round in 0..20 {
        bench.driver.stop();
        bench.offer(2, 2048);
        bench.send(TRANSMIT, 100, round);
        bench.driver.start();
        assert!(bench.received().1 == frame(100, round));
        bench.has_sent();
        // As if the device had been told, and had not looked.
        bench.send(TRANSMIT, 200, round);
        bench.driver.stop();
        bench.driver.start();
        assert!(bench.received().1 == frame(200, round));
        bench.has_sent();
    }
}

#[test]
fn several_pairs_are_served_once_the_driver_wants_them() {
    let (mut bench, _back_end) = bench_of(OFFERED, ALL & !(1 << VIRTIO_NET_F_MTU), 2);
    assert_eq!(bench.driver.config::<u16>(8), 2);
    bench.offer(8, 2048);
    bench.driver.send(2, &[Buffer::In(2048)]);
    bench.send(3, 100, 1);
    bench.echoes(60, 0);
    assert!(bench.driver.poll(3).is_none(), "the second pair is not used yet");
    let use_pairs = |bench: &mut Bench<UnixStream>, pairs: u16| {
        let head = [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET].map(|word| word.to_le_bytes()[0]);
        let command = [&head[..], &pairs.to_le_bytes()].concat();
        bench.driver.request(CONTROL, &[Buffer::Out(&command), Buffer::In(1)]).data[0]
    };
    assert_eq!(use_pairs(&mut bench, 3), 1, "there are two");
    assert_eq!(use_pairs(&mut bench, 2), 0);
    let used = bench.driver.wait_used(2);
    assert!(bench.filled(&used)[HEADER_BYTES..] == frame(100, 1), "on the pair on which it was sent");
    bench.echoes(60, 2);
    bench.driver.stop();
    bench.driver.start();
    bench.driver.send(2, &[Buffer::In(2048)]);
    bench.send(3, 70, 3);
    // The first answer of the third queue is that of the frame before.
    bench.driver.wait_used(3);
    let used = bench.driver.wait_used(2);
    assert!(bench.filled(&used)[HEADER_BYTES..] == frame(70, 3));
}

#[test]
fn only_what_the_back_end_offers_is_offered() {
    let offloads = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_MRG_RXBUF;
    // Segmentation of UDP is nothing that this device knows of.
    let unknown = 1 << VIRTIO_NET_F_HOST_USO | 1 << 40;
    for (offered, event_idx) in
        [(OFFERED | offloads | unknown, true), (OFFERED & !(1 << VIRTIO_RING_F_EVENT_IDX), false)]
    {
        let (mut bench, back_end) = bench_of(offered, ALL & !(1 << VIRTIO_NET_F_MTU), 1);
        let there = bench.driver.offered();
        let frames = offered & offloads;
        assert_eq!(there & offloads, frames);
        assert_eq!(there & unknown, 0);
        assert_eq!(there >> VIRTIO_RING_F_EVENT_IDX & 1 == 1, event_idx);
        bench.offer(1, 2048);
        bench.echoes(60, 1);
        let transport = there & OFFERED;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(back_end.seen().features, transport | frames | protocol);
    }
}

/// Without acknowledgements, and with the two queues that every back end has.
#[test]
fn a_back_end_without_protocol_features_is_enough() {
    let (_back_end, backend) = connect(OFFERED, VhostUserProtocolFeatures::empty(), 1);
    let mut bench = started(backend.unwrap());
    bench.driver.initialize(PLAIN);
    bench.offer(1, 2048);
    bench.echoes(60, 1);
}

#[test]
fn a_saved_device_goes_on_with_another_back_end() {
    let (mut bench, _back_end) = bench_of(OFFERED, PLAIN, 1);
    bench.offer(10, 2048);
    for seed in 0..7 {
        bench.echoes(100, seed);
    }
    bench.driver.stop();
    bench.send(TRANSMIT, 200, 7);
    let state = bench.driver.save();
    let (_other_end, backend) = connect(OFFERED, PROTOCOL, 1);
    let mut other = started(backend.unwrap());
    other.driver.stop();
    other.driver.restore(&bench.driver, state).unwrap();
    other.driver.start();
    assert!(other.received().1 == frame(200, 7), "it is sent where the guest is now");
    let used = other.driver.wait_used(TRANSMIT);
    other.driver.take(&used);
    other.echoes(60, 8);
    assert!(other.driver.poll(RECEIVE).is_none(), "no frame comes twice");
}

#[test]
fn a_link_that_is_switched_off_has_no_queues() {
    let (mut bench, _back_end) = bench_of(OFFERED, PLAIN, 1);
    bench.offer(3, 2048);
    bench.echoes(60, 0);
    bench.link.set_enabled(false);
    assert_eq!(bench.status(), 0);
    // The switch takes effect on the I/O thread; until then frames still come back.
    bench.driver.stop();
    bench.driver.start();
    bench.send(TRANSMIT, 60, 1);
    bench.driver.stop();
    assert!(bench.driver.poll(RECEIVE).is_none());
    bench.driver.start();
    bench.link.set_enabled(true);
    assert_eq!(bench.status(), VIRTIO_NET_S_LINK_UP);
    // Whether what was sent meanwhile was dropped is the back end's affair: this one keeps it.
    assert!(bench.received().1 == frame(60, 1));
}

#[test]
fn a_back_end_killed_under_load_takes_the_link_and_nothing_else() {
    let (mut bench, back_end) = bench_of(OFFERED, PLAIN, 1);
    for seed in 0..2000 {
        if seed == 1000 {
            back_end.kill();
        }
        bench.driver.send(RECEIVE, &[Buffer::In(2048)]);
        bench.send(TRANSMIT, 60, seed);
        // As many are out as there is room for, so the back end is in the middle of some.
        while bench.driver.ring(TRANSMIT).free_descriptors() < 2 {
            bench.has_sent();
        }
        while let Some(used) = bench.driver.poll(RECEIVE) {
            bench.driver.take(&used);
        }
        if bench.driver.ring(RECEIVE).free_descriptors() == 0 {
            break;
        }
    }
    drop(back_end);
    let told = bench.driver.wait("word of it", || bench.told.lock().unwrap().first().cloned());
    assert_eq!(told, LinkEvent::BackendGone("the vhost-user back end has closed the connection".into()));
    while bench.driver.ring(TRANSMIT).free_descriptors() < 256 {
        bench.has_sent();
    }
    assert!(bench.driver.poll(TRANSMIT).is_none(), "no chain comes back twice");
    bench.is_lost("the vhost-user back end has closed the connection");
}

impl Bench<UnixStream> {
    /// The link is down for good, and the device well.
    fn is_lost(&mut self, reason: &str) {
        self.driver.wait("the link going down", || (self.status() == 0).then_some(()));
        assert_eq!(shown(&self.driver, "backend"), format!("gone: {reason}"));
        self.driver.stop();
        self.driver.start();
        self.driver.reset();
        self.driver.initialize(PLAIN);
        for seed in 0..300 {
            self.transmit(&frame(60, seed));
        }
        assert_eq!(self.status(), 0);
        assert!(!self.driver.needs_reset());
        assert_eq!(self.told.lock().unwrap().len(), 1, "it is told once");
    }
}

#[test]
fn what_a_back_end_lacks_is_named() {
    let refusal = |offered, pairs| connect(offered, PROTOCOL, pairs).1.unwrap_err().to_string();
    let without = |feature: u32| OFFERED & !(1 << feature);
    let lacks = refusal(without(VIRTIO_F_VERSION_1), 1);
    assert_eq!(lacks, "the vhost-user back end has no VIRTIO_F_VERSION_1");
    let lacks = refusal(OFFERED & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), 1);
    assert_eq!(lacks, "the vhost-user back end has no VHOST_USER_F_PROTOCOL_FEATURES");
    assert_eq!(refusal(OFFERED, 3), "the vhost-user back end has 4 queues, not 6");
    let alone = connect(OFFERED, VhostUserProtocolFeatures::REPLY_ACK, 2).1.unwrap_err().to_string();
    assert_eq!(alone, "the vhost-user back end has 2 queues, not 4");
    connect(without(VIRTIO_RING_F_INDIRECT_DESC), PROTOCOL, 2).1.expect("the driver can do without");
}
