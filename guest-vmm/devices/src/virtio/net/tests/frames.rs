//! Frames in both directions.

use super::*;

fn frames_go_both_ways<P: Peer>(features: u64) {
    let mut bench = Bench::<P>::new(features);
    for (index, length) in [14, 60, 1514, 9000, 65_000].into_iter().enumerate() {
        let there = frame(length, index);
        bench.transmit(&there);
        assert_eq!(bench.peer().receive(), ([0; HEADER_BYTES], there));
        let back = frame(length, index + 100);
        bench.offer(1, 66_000);
        bench.peer().send([0; HEADER_BYTES], &back);
        let (header, received) = bench.received();
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "one buffer");
        assert!(received == back, "{length} bytes arrive as they were sent");
    }
    assert_eq!(shown(&bench.driver, "received"), "frames: 5\nbytes: 75588\ndropped: 0");
    assert_eq!(shown(&bench.driver, "transmitted"), "frames: 5\nbytes: 75588\ndropped: 0");
}

#[test]
fn frames_go_both_ways_over_tap() {
    frames_go_both_ways::<Messages>(PLAIN);
    frames_go_both_ways::<Messages>(MERGED);
}

#[test]
fn frames_go_both_ways_over_a_stream() {
    frames_go_both_ways::<UnixStream>(PLAIN);
    frames_go_both_ways::<UnixStream>(MERGED);
    frames_go_both_ways::<UnixStream>(0);
}

#[test]
fn only_what_the_back_end_can_do_is_offered() {
    let offloads =
        [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO6];
    let offloads = offloads.iter().fold(0, |all, feature| all | 1_u64 << feature);
    let offered = Bench::<Messages>::started(1, None).driver.offered();
    assert_eq!(offered & offloads, offloads);
    assert_eq!(offered & (1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_MTU), 0);
    let offered = Bench::<UnixStream>::started(1, Some(1400)).driver.offered();
    assert_eq!(offered & offloads, 0);
    assert_ne!(offered & 1 << VIRTIO_NET_F_MTU, 0);
    assert_ne!(Bench::<Messages>::started(2, None).driver.offered() & 1 << VIRTIO_NET_F_MQ, 0);
}

#[test]
fn the_configuration_tells_address_link_pairs_and_mtu() {
    let bench = Bench::<Messages>::with(ALL, 3, Some(1400));
    assert_eq!(bench.driver.config::<[u8; 6]>(0), MAC);
    assert_eq!(bench.status(), VIRTIO_NET_S_LINK_UP);
    assert_eq!(bench.driver.config::<[u8; 4]>(8), [3, 0, 0x78, 5]);
    assert_eq!(bench.driver.config::<u64>(12), 0, "there is no more");
}

fn a_frame_is_spread_over_buffers<P: Peer>() {
    let mut bench = Bench::<P>::new(MERGED);
    bench.offer(100, 1024);
    let sent = [frame(5000, 1), frame(60, 2), frame(1012, 3), frame(1013, 4), frame(60_000, 5)];
    for frame in &sent {
        bench.peer().send([0; HEADER_BYTES], frame);
    }
    for (expected, buffers) in sent.iter().zip([5, 1, 1, 2, 59]) {
        let (header, received) = bench.received();
        assert_eq!(u16::from_le_bytes([header[10], header[11]]), buffers);
        assert!(received == *expected);
    }
}

#[test]
fn frames_are_spread_over_merged_buffers() {
    a_frame_is_spread_over_buffers::<Messages>();
    a_frame_is_spread_over_buffers::<UnixStream>();
}

fn frames_wait_for_buffers<P: Peer>(features: u64) {
    let mut bench = Bench::<P>::new(features);
    for seed in 0..20 {
        bench.peer().send([0; HEADER_BYTES], &frame(1000, seed));
    }
    for seed in 0..20 {
        bench.offer(1, 1600);
        assert!(bench.received().1 == frame(1000, seed), "frame {seed} comes once there is a buffer");
    }
    assert_eq!(shown(&bench.driver, "received/dropped"), "0");
}

#[test]
fn frames_wait_in_the_back_end_for_buffers() {
    frames_wait_for_buffers::<Messages>(PLAIN);
    frames_wait_for_buffers::<Messages>(MERGED);
    frames_wait_for_buffers::<UnixStream>(PLAIN);
    frames_wait_for_buffers::<UnixStream>(MERGED);
}

/// A frame that is longer than what is there of merged buffers waits for more of them.
#[test]
fn a_long_frame_waits_for_enough_buffers() {
    let mut bench = Bench::<Messages>::new(MERGED);
    bench.offer(3, 1024);
    bench.peer().send([0; HEADER_BYTES], &frame(5000, 1));
    bench.driver.ring_doorbell(RECEIVE);
    bench.offer(2, 1024);
    assert!(bench.received().1 == frame(5000, 1));
}

fn a_slow_peer_holds_up_nothing_else<P: Peer>(count: usize) {
    let mut bench = Bench::<P>::new(PLAIN);
    let header = [0; HEADER_BYTES];
    let mut answered = 0;
    for seed in 0..count {
        if bench.driver.ring(TRANSMIT).free_descriptors() < 2 {
            answered +=
                usize::from(bench.driver.poll(TRANSMIT).map(|used| bench.driver.take(&used)).is_some());
        }
        if bench.driver.ring(TRANSMIT).free_descriptors() < 2 {
            break;
        }
        bench.driver.send(TRANSMIT, &[Buffer::Out(&header), Buffer::Out(&frame(9000, seed))]);
    }
    bench.offer(1, 1600);
    bench.peer().send(header, &frame(100, 7));
    assert!(bench.received().1 == frame(100, 7), "the other direction goes on");
    // A stop comes at once, though the peer reads nothing, and nothing is lost or sent twice.
    bench.driver.stop();
    bench.driver.start();
    let sent = shown(&bench.driver, "transmitted/frames").parse::<usize>().unwrap();
    assert!(sent < 128 + answered, "the peer's slowness reaches the driver: {sent} frames were taken");
    let outstanding = 128;
    for seed in 0..outstanding {
        assert!(bench.peer().receive().1 == frame(9000, seed), "frame {seed}");
    }
}

#[test]
fn frames_wait_for_a_slow_peer() {
    a_slow_peer_holds_up_nothing_else::<UnixStream>(128);
    a_slow_peer_holds_up_nothing_else::<Messages>(128);
}

/// Offloads pass as the driver asks for them, in both directions; what was not accepted does not.
#[test]
fn headers_pass_over_tap_as_far_as_they_were_accepted() {
    let tso = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    let mut bench = Bench::<Messages>::new(ALL);
    bench.transmit_with(tso, &frame(64_000, 1));
    assert_eq!(bench.peer().receive().0, tso);
    bench.offer(1, 66_000);
    bench.peer().send(tso, &frame(64_000, 2));
    let mut expected = tso;
    expected[10] = 1;
    assert_eq!(bench.received().0, expected);

    let mut bench = Bench::<Messages>::new(PLAIN);
    bench.offer(1, 66_000);
    bench.peer().send([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &frame(100, 3));
    assert_eq!(bench.received().0, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    bench.transmit_with(tso, &frame(1000, 4));
    bench.transmit(&frame(60, 5));
    assert!(bench.peer().receive().1 == frame(60, 5), "what was not accepted is dropped");
    assert_eq!(shown(&bench.driver, "transmitted/dropped"), "1");
}

#[test]
fn frames_beyond_the_mtu_are_dropped() {
    let mtu = 1 << VIRTIO_NET_F_MTU;
    for features in [PLAIN | mtu, MERGED | mtu] {
        let mut bench = Bench::<Messages>::with(features, 1, Some(1400));
        bench.offer(50, 4096);
        for length in [1419, 1418] {
            bench.peer().send([0; HEADER_BYTES], &frame(length, length));
        }
        assert!(bench.received().1 == frame(1418, 1418));
        assert_eq!(shown(&bench.driver, "received/dropped"), "1");
    }
}

/// The driver keeps 60 frames under way in each direction.
#[test]
fn many_frames_keep_their_order() {
    for features in [MERGED, MERGED & !(1 << VIRTIO_RING_F_EVENT_IDX)] {
        let mut bench = Bench::<UnixStream>::new(features);
        bench.offer(60, 2048);
        let mut echo = bench.peer().try_clone().unwrap();
        let echo = std::thread::spawn(move || {
            for _ in 0..3000 {
                let (header, frame) = Peer::receive(&mut echo);
                Peer::send(&mut echo, header, &frame);
            }
        });
        let (mut sent, mut received) = (0, 0);
        while received < 3000 {
            while sent < 3000 && sent - received < 60 {
                while let Some(used) = bench.driver.poll(TRANSMIT) {
                    bench.driver.take(&used);
                }
                let text = frame(60 + sent % 1400, sent);
                bench.driver.send(TRANSMIT, &[Buffer::Out(&[0; HEADER_BYTES]), Buffer::Out(&text)]);
                sent += 1;
            }
            assert!(bench.received().1 == frame(60 + received % 1400, received), "frame {received}");
            bench.offer(1, 2048);
            received += 1;
        }
        echo.join().unwrap();
    }
}

/// The socket takes a part of the only frame there is: the rest follows by itself.
#[test]
fn the_rest_of_a_frame_needs_no_other_frame() {
    for switched_off in [false, true] {
        let (ours, its) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&its, 8192).unwrap();
        let (spec, told) = spec(NetBackend::Stream(its.into()), None);
        let (spec, link) = Net::spec("net0", spec).unwrap();
        let mut bench = Bench { driver: FakeDriver::ready(spec, MERGED), peers: vec![ours], link, told };
        bench.transmit(&frame(60_000, 1));
        // A frame that was begun is ended, whatever becomes of the link.
        bench.link.set_enabled(!switched_off);
        assert!(bench.peer().receive().1 == frame(60_000, 1));
        bench.link.set_enabled(true);
        bench.transmit(&frame(60, 2));
        assert!(bench.peer().receive().1 == frame(60, 2));
    }
}
