//! Stop, reset, save and restore in the middle of frames.

use super::*;
use guest_saved_state::devices::net::NetState;
use guest_saved_state::devices::virtio::VirtioState;
use save_restore::SavedStateBlob;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

#[test]
fn a_stop_gives_buffers_back_and_a_start_goes_on() {
    let mut bench = Bench::<UnixStream>::new(MERGED);
    bench.offer(100, 2048);
    for seed in 0..50 {
        bench.peer().send([0; HEADER_BYTES], &frame(500, seed));
        if seed % 7 == 0 {
            bench.driver.stop();
            bench.transmit_later(seed);
            bench.driver.start();
            assert!(bench.peer().receive().1 == frame(60, seed), "it is sent after the start");
        }
    }
    for seed in 0..50 {
        assert!(bench.received().1 == frame(500, seed), "no frame is lost by a pause");
    }
}

impl<P: Peer> Bench<P> {
    /// A frame that nobody takes yet.
    fn transmit_later(&mut self, seed: usize) {
        let text = frame(60, seed);
        self.driver.send(TRANSMIT, &[Buffer::Out(&[0; HEADER_BYTES]), Buffer::Out(&text)]);
    }
}

#[test]
fn a_reset_in_the_middle_is_a_new_beginning() {
    let mut bench = Bench::<Messages>::new(MERGED);
    for round in 0..10 {
        bench.offer(60, 2048);
        bench.peer().send([0; HEADER_BYTES], &frame(100, round));
        bench.transmit_later(round);
        bench.driver.reset();
        bench.driver.initialize(MERGED);
    }
    while !bench.peer().is_silent() {
        bench.peer().receive();
    }
    bench.transmit(&frame(70, 1));
    assert!(bench.peer().receive().1 == frame(70, 1));
}

/// What was available and unused is so in another device, with another back end.
#[test]
fn a_saved_device_goes_on_in_another() {
    let mut bench = Bench::<Messages>::new(ALL & !(1 << VIRTIO_NET_F_MTU));
    bench.offer(40, 2048);
    bench.peer().send([0; HEADER_BYTES], &frame(100, 1));
    bench.received();
    let head = [VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET].map(|word| word.to_le_bytes()[0]);
    let command = [&head[..], &[2, 1, 1, 1, 1, 1]].concat();
    assert_eq!(bench.driver.request(2, &[Buffer::Out(&command), Buffer::In(1)]).data, [0]);
    bench.driver.stop();
    bench.transmit_later(5);
    let state = bench.driver.save();

    let mut other = Bench::<Messages>::started(1, None);
    other.driver.stop();
    other.driver.restore(&bench.driver, state).unwrap();
    assert_eq!(other.driver.config::<[u8; 6]>(0), [2, 1, 1, 1, 1, 1]);
    other.driver.start();
    assert!(other.peer().receive().1 == frame(60, 5), "it is sent where the guest is now");
    other.peer().send([0; HEADER_BYTES], &frame(100, 2));
    assert!(other.received().1 == frame(100, 2));
    // The driver is asked to tell the network where the guest is, until it has.
    other.driver.wait("the request", || (other.status() & VIRTIO_NET_S_ANNOUNCE != 0).then_some(()));
    assert_ne!(other.driver.acknowledge() & VIRTIO_MMIO_INT_CONFIG, 0);
    let head = [VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK].map(|word| word.to_le_bytes()[0]);
    assert_eq!(other.driver.request(2, &[Buffer::Out(&head), Buffer::In(1)]).data, [0]);
    assert_eq!(other.status(), VIRTIO_NET_S_LINK_UP);
}

#[test]
fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
    let good = NetState { mac: MAC.to_vec(), queue_pairs: 2, promiscuous: true, all_multicast: false };
    let bad = [
        ("mac", NetState { mac: vec![2; 5], ..good.clone() }),
        ("mac", NetState { mac: vec![1; 6], ..good.clone() }),
        ("queue_pairs: 0", NetState { queue_pairs: 0, ..good.clone() }),
        ("queue_pairs: 3", NetState { queue_pairs: 3, ..good.clone() }),
        ("queue_pairs: 65537", NetState { queue_pairs: 65_537, ..good.clone() }),
    ];
    let bench = Bench::<Messages>::started(2, None);
    bench.driver.stop();
    let whole: VirtioState = bench.driver.save().parse().unwrap();
    let restore = |state: &NetState| {
        let device = Some(SavedStateBlob::new(state));
        bench.driver.device().restore_blob(SavedStateBlob::new(&VirtioState { device, ..whole.clone() }))
    };
    for (field, state) in bad {
        let refusal = restore(&state).unwrap_err().to_string();
        assert!(refusal.contains(field.split(':').next().unwrap()), "{field}: {refusal}");
    }
    assert_eq!(shown(&bench.driver, "promiscuous"), "false");
    restore(&good).unwrap();
    assert_eq!(shown(&bench.driver, "promiscuous"), "true");
    assert_eq!(shown(&bench.driver, "used_queue_pairs"), "2");
}
