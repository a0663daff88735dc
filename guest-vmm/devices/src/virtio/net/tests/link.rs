//! The link: switched by the host, and lost with the back end.

use super::*;
use inspect::Update;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

#[test]
fn the_host_switches_the_link() {
    let mut bench = Bench::<Messages>::new(MERGED);
    bench.offer(50, 2048);
    bench.driver.acknowledge();
    bench.link.set_enabled(false);
    assert_eq!(bench.driver.acknowledge() & VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(bench.status(), 0);
    // What is sent meanwhile is lost, and nobody waits.
    bench.transmit(&frame(60, 1));
    bench.peer().send([0; HEADER_BYTES], &frame(60, 2));
    bench.await_shown("received/dropped", "1");
    assert!(bench.peer().is_silent());

    bench.link.set_enabled(true);
    bench.link.set_enabled(true);
    assert_eq!(bench.driver.acknowledge() & VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(bench.status(), VIRTIO_NET_S_LINK_UP);
    bench.transmit(&frame(60, 3));
    assert!(bench.peer().receive().1 == frame(60, 3));
    bench.peer().send([0; HEADER_BYTES], &frame(60, 4));
    assert!(bench.received().1 == frame(60, 4));
    assert_eq!(*bench.told.lock().unwrap(), [], "only what happens by itself is told");
}

#[test]
fn the_link_is_a_writable_node() {
    let bench = Bench::<Messages>::new(PLAIN);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let update = |text| {
        let update = Update::start("device/link", text, |request| bench.driver.device().inspect_mut(request));
        runtime.block_on(update.finish(PATIENCE))
    };
    assert_eq!(update("false"), Ok(false.into()));
    assert!(!bench.link.is_up());
    assert_eq!(shown(&bench.driver, "link"), "false");
    assert!(update("down").is_err());
    assert_eq!(update("true"), Ok(true.into()));
    assert!(bench.link.is_up());
}

fn a_back_end_that_goes_takes_the_link<P: Peer>(reason: &str) {
    let mut bench = Bench::<P>::new(MERGED);
    bench.transmit(&frame(60, 1));
    bench.peer().receive();
    bench.peers.clear();
    let told = bench.driver.wait("word of it", || bench.told.lock().unwrap().first().cloned());
    assert_eq!(told, LinkEvent::BackendGone(reason.into()));
    assert_eq!(bench.status(), 0);
    assert_eq!(shown(&bench.driver, "backend"), format!("gone: {reason}"));
    // The driver still gets its buffers back, and the device is otherwise well.
    for seed in 0..300 {
        bench.transmit(&frame(60, seed));
    }
    bench.link.set_enabled(true);
    assert_eq!(bench.status(), 0, "it stays down");
    bench.driver.stop();
    bench.driver.start();
    bench.transmit(&frame(60, 9));
    bench.driver.reset();
    bench.driver.initialize(MERGED);
    bench.transmit(&frame(60, 9));
    assert_eq!(bench.status(), 0);
    assert!(!bench.driver.needs_reset());
    assert_eq!(bench.told.lock().unwrap().len(), 1, "it is told once");
}

#[test]
fn a_tap_device_that_goes_takes_the_link() {
    a_back_end_that_goes_takes_the_link::<Messages>("it was closed");
}

#[test]
fn a_stream_that_ends_takes_the_link() {
    a_back_end_that_goes_takes_the_link::<UnixStream>("it has closed the connection");
}

/// The driver has no buffers for frames, so nobody reads: a write finds out.
#[test]
fn a_stream_that_ends_is_noticed_by_a_frame_to_it() {
    let mut bench = Bench::<UnixStream>::new(PLAIN);
    bench.peer().send([0; HEADER_BYTES], &frame(60, 1));
    bench.peers.clear();
    bench.transmit(&frame(60, 2));
    bench.transmit(&frame(60, 3));
    bench.driver.wait("the link going down", || (!bench.link.is_up()).then_some(()));
}

#[test]
fn a_stream_out_of_step_is_given_up() {
    for length in [u32::MAX, 65_554] {
        let mut bench = Bench::<UnixStream>::new(MERGED);
        bench.peer().write_all(&length.to_be_bytes()).unwrap();
        bench.driver.wait("the link going down", || (bench.status() == 0).then_some(()));
        let reason = bench.link.gone().unwrap();
        assert!(reason.contains(&length.to_string()), "{reason}");
    }
}

/// Frames that are too short for Ethernet are dropped, and the stream stays in step.
#[test]
fn short_frames_are_dropped() {
    let mut bench = Bench::<UnixStream>::new(MERGED);
    bench.offer(50, 2048);
    for length in [0, 13, 14] {
        bench.peer().send([0; HEADER_BYTES], &frame(length, 1));
    }
    assert!(bench.received().1 == frame(14, 1));
    assert_eq!(shown(&bench.driver, "received/dropped"), "2");
}

/// A stream comes in pieces as its sender likes.
#[test]
fn a_stream_in_pieces_is_put_together() {
    let mut bench = Bench::<UnixStream>::new(MERGED);
    bench.offer(50, 2048);
    let mut bytes = Vec::new();
    for seed in 0..20 {
        bytes.extend(100_u32.to_be_bytes());
        bytes.extend(frame(100, seed));
    }
    for piece in bytes.chunks(7) {
        bench.peer().write_all(piece).unwrap();
        std::thread::yield_now();
    }
    for seed in 0..20 {
        assert!(bench.received().1 == frame(100, seed));
    }
}
