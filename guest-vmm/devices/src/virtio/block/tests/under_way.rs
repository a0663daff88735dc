//! Many requests at once: stopped, reset, saved, dropped and held back in the middle.

use super::*;
use crate::virtio::fake_driver::Used;
use crate::virtio::rate_limit::Rate;
use save_restore::SavedStateBlob;
use std::collections::BTreeMap;
use std::time::Instant;

/// Sends reads of so many sectors, each of four; by their first descriptors, the sector.
pub(super) fn send_reads(stage: &mut Stage, sectors: impl IntoIterator<Item = u64>) -> BTreeMap<u16, u64> {
    let mut send = |sector| {
        let header = header(VIRTIO_BLK_T_IN, sector);
        let head = stage.driver.send(0, &[Buffer::Out(&header), Buffer::In(2048), Buffer::In(1)]);
        (head, sector)
    };
    sectors.into_iter().map(&mut send).collect()
}

pub(super) fn check(stage: &mut Stage, sent: &mut BTreeMap<u16, u64>, used: &Used) {
    let sector = sent.remove(&used.head).expect("answered once");
    let reply = stage.driver.take(used);
    assert_eq!((reply.data[2048], &reply.data[..2048]), (OK, &pattern(sector, 4)[..]));
}

#[test]
fn each_of_many_is_answered_once() {
    let mut stage = Stage::new();
    for features in [u64::MAX, !EVENT_IDX] {
        stage.driver.initialize(features);
        for _ in 0..20 {
            let mut sent = send_reads(&mut stage, (0..64).map(|at| at * 7));
            while !sent.is_empty() {
                let used = stage.driver.wait_used(0);
                check(&mut stage, &mut sent, &used);
            }
            assert_eq!(stage.driver.poll(0), None);
        }
    }
}

#[test]
fn stops_and_starts_in_the_middle_lose_nothing() {
    let mut stage = Stage::new();
    for round in 0..50 {
        let mut sent = send_reads(&mut stage, 0..64);
        stage.driver.stop();
        while let Some(used) = stage.driver.poll(0) {
            check(&mut stage, &mut sent, &used);
        }
        assert_eq!(stage.driver.poll(0), None, "nothing is answered while stopped, round {round}");
        stage.driver.start();
        while !sent.is_empty() {
            let used = stage.driver.wait_used(0);
            check(&mut stage, &mut sent, &used);
        }
    }
}

#[test]
fn resets_in_the_middle_leave_memory_alone() {
    let mut stage = Stage::new();
    for _ in 0..50 {
        send_reads(&mut stage, 0..64);
        stage.driver.reset();
        let before = stage.driver.ram().read(0, 1 << 20);
        stage.driver.start();
        assert!(stage.driver.ram().read(0, 1 << 20) == before, "nothing is written after a reset");
        stage.driver.initialize(EVENT_IDX);
        stage.works();
    }
}

#[test]
fn a_device_that_goes_away_in_the_middle_waits_for_its_requests() {
    for _ in 0..20 {
        let mut stage = Stage::new();
        send_reads(&mut stage, 0..64);
    }
}

#[test]
fn what_was_saved_goes_on_in_another_device() {
    let mut old = Stage::new();
    old.handle.set_capacity(SECTORS * 256).expect("half");
    old.driver.write_config(32, 0u8);
    let mut sent = send_reads(&mut old, 0..32);
    old.driver.stop();
    sent.extend(send_reads(&mut old, 32..64));
    let state = old.driver.save();
    let file = patterned_file(SECTORS);
    let image = image(&file, true);
    let mut new = Stage::stopped(file, image, Shape::default(), RateLimits::default());
    new.driver.restore(&old.driver, state.clone()).expect("the same device");
    assert_eq!(new.driver.save(), state);
    assert_eq!((new.driver.config::<u64>(0), new.driver.config::<u8>(32)), (SECTORS / 2, 0));
    new.driver.start();
    while !sent.is_empty() {
        let used = new.driver.wait_used(0);
        check(&mut new, &mut sent, &used);
    }
}

#[test]
fn a_capacity_that_the_image_does_not_have_is_not_restored() {
    let old = Stage::new();
    old.driver.stop();
    let state = old.driver.save();
    let file = patterned_file(8);
    let image = image(&file, true);
    let mut new = Stage::stopped(file, image, Shape::default(), RateLimits::default());
    let before = new.driver.save();
    let error = new.driver.restore(&old.driver, state).expect_err("too large").to_string();
    assert!(error.contains("capacity_sectors") && error.contains("2048"), "{error}");
    assert_eq!(new.driver.save(), before, "nothing has changed");
    let nonsense = SavedStateBlob::from_parts("devices.virtio.VirtioState", [0x80]);
    assert!(new.driver.restore(&old.driver, nonsense).is_err());
}

#[test]
fn rates_hold_requests_back_and_stops_do_not_wait_for_them() {
    let file = patterned_file(SECTORS);
    let image = image(&file, true);
    // One at once, and the next in a thousand years.
    let rates = RateLimits::new(Rate { per_second: 1, burst: 1 }, Rate::default());
    let mut stage = Stage::stopped(file, image, Shape::default(), rates);
    stage.driver.start();
    stage.driver.initialize(EVENT_IDX);
    let mut sent = send_reads(&mut stage, 0..8);
    let used = stage.driver.wait_used(0);
    check(&mut stage, &mut sent, &used);
    let begin = Instant::now();
    stage.driver.stop();
    assert!(begin.elapsed().as_secs() < 5, "the stop waited for a rate");
    assert_eq!(stage.driver.poll(0), None);
    stage.driver.start();
    assert_eq!(stage.driver.poll(0), None);
    update(&mut stage, "device/limits/bytes_per_second", "0");
    while !sent.is_empty() {
        let used = stage.driver.wait_used(0);
        check(&mut stage, &mut sent, &used);
    }
}

fn update(stage: &mut Stage, path: &str, value: &str) {
    let update = inspect::Update::start(path, value, |request| stage.driver.device().inspect_mut(request));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(update.finish(std::time::Duration::ZERO)).expect("taken");
}
