//! Drivers that do what no driver should.

use super::*;
use crate::virtio::fake_driver::{RAM_BYTES, Segment};
use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// Frames that cannot be are dropped: the next one is sent.
#[test]
fn frames_that_cannot_be_are_dropped() {
    let mut bench = Bench::<Messages>::new(PLAIN);
    let header = [0; HEADER_BYTES];
    let long = frame(65_554, 1);
    let bad: [&[Buffer<'_>]; 6] = [
        &[Buffer::Out(&[0])],
        &[Buffer::Out(&[0; HEADER_BYTES - 1])],
        &[Buffer::Out(&header)],
        &[Buffer::Out(&header), Buffer::Out(&[1; 13])],
        &[Buffer::Out(&header), Buffer::Out(&long)],
        &[Buffer::In(100)],
    ];
    for buffers in bad {
        assert_eq!(bench.driver.request(TRANSMIT, buffers).written, 0);
    }
    let text = frame(61, 3);
    bench.driver.request(TRANSMIT, &[Buffer::Out(&header), Buffer::Out(&text), Buffer::In(10)]);
    assert!(bench.peer().receive().1 == text, "a writable buffer behind it is left alone");
    assert_eq!(shown(&bench.driver, "transmitted"), "frames: 1\nbytes: 61\ndropped: 6");
    assert!(!bench.driver.needs_reset());
}

/// However the driver cuts it, header and frame are what they are (2.7.4).
#[test]
fn a_frame_may_be_cut_anywhere() {
    let mut bench = Bench::<UnixStream>::new(PLAIN);
    let text = [vec![0; HEADER_BYTES], frame(100, 1)].concat();
    for cut in [1, 5, 11, 12, 13, 50, 111] {
        let (first, second) = text.split_at(cut);
        bench.driver.request(TRANSMIT, &[Buffer::Out(first), Buffer::Out(second)]);
        assert!(bench.peer().receive().1 == frame(100, 1), "cut at {cut}");
    }
    let bytes: Vec<_> = text.chunks(1).map(Buffer::Out).collect();
    bench.driver.request(TRANSMIT, &bytes);
    assert!(bench.peer().receive().1 == frame(100, 1), "in single bytes");
    let room: Vec<_> = (0..112).map(|_| Buffer::In(1)).collect();
    bench.driver.send(RECEIVE, &room);
    bench.peer().send([0; HEADER_BYTES], &frame(100, 2));
    assert!(bench.received().1 == frame(100, 2), "to single bytes");
}

#[test]
fn buffers_that_cannot_hold_a_header_need_a_reset() {
    for segments in
        [vec![Buffer::In(11)], vec![Buffer::Out(&[1; 100])], vec![Buffer::Out(&[1]), Buffer::In(100)]]
    {
        for features in [PLAIN, MERGED] {
            let mut bench = Bench::<Messages>::new(features);
            bench.driver.send(RECEIVE, &segments);
            bench.peer().send([0; HEADER_BYTES], &frame(60, 1));
            bench.driver.wait_needs_reset();
            bench.driver.initialize(features);
            bench.transmit(&frame(60, 2));
            assert!(bench.peer().receive().1 == frame(60, 2), "all is well after a reset");
        }
    }
}

#[test]
fn frames_without_room_in_a_buffer_are_dropped() {
    let mut bench = Bench::<Messages>::new(PLAIN);
    bench.offer(2, 100);
    bench.peer().send([0; HEADER_BYTES], &frame(89, 1));
    bench.peer().send([0; HEADER_BYTES], &frame(88, 2));
    assert!(bench.received().1 == frame(88, 2));
    assert_eq!(shown(&bench.driver, "received/dropped"), "1");

    let mut bench = Bench::<UnixStream>::new(PLAIN);
    bench.offer(2, 100);
    bench.peer().send([0; HEADER_BYTES], &frame(89, 1));
    bench.peer().send([0; HEADER_BYTES], &frame(88, 2));
    assert!(bench.received().1 == frame(88, 2));
    assert_eq!(shown(&bench.driver, "received/dropped"), "1");
}

/// The whole queue of merged buffers is shorter than the frame: it is dropped, not waited for forever.
#[test]
fn frames_without_room_in_the_queue_are_dropped() {
    let mut bench = Bench::<UnixStream>::new(MERGED);
    bench.offer(256, 20);
    bench.peer().send([0; HEADER_BYTES], &frame(6000, 1));
    bench.peer().send([0; HEADER_BYTES], &frame(60, 2));
    assert!(bench.received().1 == frame(60, 2));
    assert_eq!(shown(&bench.driver, "received/dropped"), "1");
}

#[test]
fn broken_chains_need_a_reset_on_every_queue() {
    for queue in [RECEIVE, TRANSMIT, 2] {
        for (address, length, flags) in [
            (RAM_BYTES, 100, VRING_DESC_F_WRITE),
            (RAM_BYTES - 10, 100, 0),
            (u64::MAX - 10, 100, 0),
            (0x1000, 0, 0),
            (0x1000, 0xffff_f000, 0),
            (0x1000, 100, VRING_DESC_F_NEXT),
        ] {
            let mut bench = Bench::<Messages>::new(PLAIN);
            bench.break_chain(queue, address, length, flags);
            bench.peer().send([0; HEADER_BYTES], &frame(60, 1));
            bench.driver.wait_needs_reset();
        }
    }
}

impl<P: Peer> Bench<P> {
    /// Makes descriptor 0 as given, and available.
    fn break_chain(&mut self, queue: usize, address: u64, length: u32, flags: u32) {
        let head = self.driver.add(queue, &[Segment { address, length, writable: false }]);
        let ring = self.driver.ring(queue).clone();
        ring.write_descriptor(self.driver.ram(), head, address, length, flags, head);
        self.driver.ring_doorbell(queue);
    }
}

#[test]
fn an_index_that_jumps_needs_a_reset() {
    for queue in [RECEIVE, TRANSMIT, 2] {
        let mut bench = Bench::<Messages>::new(PLAIN);
        let mut ring = bench.driver.ring(queue).clone();
        ring.set_available_index(bench.driver.ram(), 0x7fff);
        bench.driver.ring_doorbell(queue);
        bench.peer().send([0; HEADER_BYTES], &frame(60, 1));
        bench.driver.wait_needs_reset();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever header the driver writes, the frame is sent or dropped, and the next one is sent.
    #[test]
    fn any_header_is_sent_or_dropped(header: [u8; 12], length in 14..2000_usize) {
        let mut bench = Bench::<Messages>::new(ALL & !(1 << VIRTIO_NET_F_MTU));
        bench.transmit_with(header, &frame(length, 1));
        bench.transmit(&frame(60, 2));
        let mut received = bench.peer().receive().1;
        if received.len() == length && length != 60 {
            received = bench.peer().receive().1;
        }
        prop_assert!(received == frame(60, 2) || length == 60);
        prop_assert!(!bench.driver.needs_reset());
    }
}
