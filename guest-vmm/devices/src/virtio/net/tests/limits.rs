//! Rate limits: what they hold back waits, in order, and only in its direction.

use super::*;
use inspect::Update;

/// What passes at once, and next to nothing after it.
fn slow(burst: u64) -> Rate {
    Rate { per_second: 1, burst }
}

fn limited<P: Peer>(bytes: Rate, operations: Rate, pairs: usize) -> Bench<P> {
    let (backend, peers) = P::pairs(pairs);
    let (spec, told) = spec(backend, None);
    let spec = NetSpec { rates: Arc::new(RateLimits::new(bytes, operations)), ..spec };
    let (spec, link) = Net::spec("net0", spec).unwrap();
    Bench { driver: FakeDriver::ready(spec, MERGED), peers, link, told }
}

fn lift<P>(bench: &Bench<P>, node: &str) {
    let path = format!("device/limits/{node}");
    let update = Update::start(&path, "0", |request| bench.driver.device().inspect_mut(request));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(update.finish(PATIENCE)).expect("taken");
}

fn queue_frames<P>(bench: &mut Bench<P>, count: usize, length: usize) {
    for seed in 0..count {
        let frame = frame(length, seed);
        bench.driver.send(TRANSMIT, &[Buffer::Out(&[0; HEADER_BYTES]), Buffer::Out(&frame)]);
    }
}

fn frames_from_the_driver_are_held_back<P: Peer>() {
    let mut bench = limited::<P>(slow(1_000_000), Rate::default(), 1);
    queue_frames(&mut bench, 60, 50_000);
    for seed in 0..20 {
        assert!(bench.peer().receive().1 == frame(50_000, seed));
    }
    for _ in 0..20 {
        bench.driver.wait_used(TRANSMIT);
    }
    // By when frames have come in several times, the device has had its turns for those going out.
    bench.offer(3, 2048);
    for seed in 0..3 {
        bench.peer().send([0; HEADER_BYTES], &frame(60, seed));
        assert!(bench.received().1 == frame(60, seed));
    }
    assert_holds_back(&mut bench, 20);
    // A stop does not wait for them, and they are still there after it.
    bench.driver.stop();
    assert_holds_back(&mut bench, 20);
    bench.driver.start();
    lift(&bench, "bytes_per_second");
    for seed in 20..60 {
        assert!(bench.peer().receive().1 == frame(50_000, seed));
        bench.driver.wait_used(TRANSMIT);
    }
}

fn assert_holds_back<P: Peer>(bench: &mut Bench<P>, passed: usize) {
    assert!(bench.peer().is_silent());
    assert_eq!(bench.driver.poll(TRANSMIT), None);
    bench.await_shown("transmitted/frames", &passed.to_string());
}

#[test]
fn frames_to_a_tap_device_are_held_back() {
    frames_from_the_driver_are_held_back::<Messages>();
}

#[test]
fn frames_to_a_stream_are_held_back() {
    frames_from_the_driver_are_held_back::<UnixStream>();
}

/// The last that passes is paid for before the next one, so one more than the burst gets through.
fn frames_to_the_driver_are_held_back<P: Peer>() {
    let mut bench = limited::<P>(Rate::default(), slow(5), 1);
    bench.offer(30, 2048);
    for seed in 0..20 {
        bench.peer().send([0; HEADER_BYTES], &frame(100, seed));
    }
    for seed in 0..6 {
        assert!(bench.received().1 == frame(100, seed));
    }
    assert_eq!(bench.driver.poll(RECEIVE), None);
    // The other way is not held back: it has the rates for itself.
    bench.transmit(&frame(60, 1));
    assert!(bench.peer().receive().1 == frame(60, 1));
    lift(&bench, "operations_per_second");
    for seed in 6..20 {
        assert!(bench.received().1 == frame(100, seed));
    }
    assert_eq!(shown(&bench.driver, "received/dropped"), "0");
}

#[test]
fn frames_from_a_tap_device_are_held_back() {
    frames_to_the_driver_are_held_back::<Messages>();
}

#[test]
fn frames_from_a_stream_are_held_back() {
    frames_to_the_driver_are_held_back::<UnixStream>();
}
