//! The balloon, by what a driver and the host see of it.

use super::{Balloon, BalloonHandle, MemoryStatistic, PAGE_BYTES, StatisticsError, TooManyPages};
use crate::inspected::inspected;
use crate::virtio::fake_driver::{Buffer, FakeDriver, RAM_BYTES};
use std::time::Duration;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

const ALL_FEATURES: u64 = u64::MAX;
const PATIENCE: Duration = Duration::from_secs(30);
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const REPORTING: usize = 3;

fn ready(features: u64) -> (FakeDriver, BalloonHandle) {
    let (spec, handle) = Balloon::spec("balloon", RAM_BYTES);
    (FakeDriver::ready(spec, features), handle)
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn statistics(pairs: &[(u16, u64)]) -> Vec<u8> {
    pairs.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}

#[test]
fn inflated_pages_go_back_to_the_host_neighbours_together() {
    let (mut driver, _) = ready(0);
    driver.request(
        INFLATE,
        &[Buffer::Out(&numbers(&[0x400, 0x401, 0x402])), Buffer::Out(&numbers(&[0x403, 0x500]))],
    );
    let page = |number: u64| number * PAGE_BYTES;
    assert_eq!(driver.ram().discarded(), [(page(0x400), page(4)), (page(0x500), page(1))]);
    driver.request(DEFLATE, &[Buffer::Out(&numbers(&[0x400]))]);
    assert_eq!(driver.ram().discarded().len(), 2, "what is deflated needs nothing");
    assert_eq!(inspected(&mut *driver.device(), "device/discarded_bytes").to_string(), "20480\n");
}

#[test]
fn a_page_that_is_none_needs_a_reset() {
    let last = u32::try_from(RAM_BYTES / PAGE_BYTES).unwrap() - 1;
    for (page, is_memory) in [(last, true), (last + 1, false), (u32::MAX, false)] {
        let (mut driver, _) = ready(0);
        driver.send(INFLATE, &[Buffer::Out(&numbers(&[page]))]);
        if is_memory {
            driver.wait_used(INFLATE);
        } else {
            driver.wait_needs_reset();
            assert_eq!(driver.ram().discarded(), []);
        }
    }
}

#[test]
fn free_pages_that_are_reported_go_back_to_the_host() {
    let (mut driver, _) = ready(ALL_FEATURES);
    driver.request(REPORTING, &[Buffer::In(8192), Buffer::In(4096 - 512), Buffer::In(12288)]);
    let discarded = driver.ram().discarded();
    assert!(discarded.iter().all(|(start, bytes)| start % PAGE_BYTES == 0 && bytes % PAGE_BYTES == 0));
    // The buffers lie where the fake driver has room, so the first and the last lose a page at most.
    let bytes: u64 = discarded.iter().map(|(_, bytes)| bytes).sum();
    assert!((12288..=20480).contains(&bytes), "{discarded:?}");
}

#[test]
fn the_host_asks_for_pages_and_the_driver_says_how_many_there_are() {
    let (driver, handle) = ready(0);
    let limit = u32::try_from(RAM_BYTES / PAGE_BYTES).unwrap();
    assert_eq!(handle.request_pages(limit + 1), Err(TooManyPages { pages: limit + 1, limit }));
    assert_eq!(driver.acknowledge(), 0);
    handle.request_pages(limit).unwrap();
    assert_eq!(driver.acknowledge(), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!((driver.config::<u32>(0), driver.config::<u32>(4)), (limit, 0));
    driver.write_config(4, 77u32);
    driver.write_config(0, 5u32);
    assert_eq!((handle.requested_pages(), handle.actual_pages()), (limit, 77));
    driver.reset();
    assert_eq!((handle.requested_pages(), handle.actual_pages()), (limit, 0));
}

#[tokio::test]
async fn statistics_are_those_of_now() {
    let (mut driver, handle) = ready(ALL_FEATURES);
    driver.send(STATISTICS, &[Buffer::Out(&statistics(&[(4, 1)]))]);
    let asking = tokio::spawn(async move { (handle.statistics(PATIENCE).await, handle) });
    let fresh = tokio::task::spawn_blocking(move || {
        driver.wait_used(STATISTICS);
        driver.send(STATISTICS, &[Buffer::Out(&statistics(&[(4, 2), (5, u64::MAX)])), Buffer::Out(b"half")]);
        driver
    });
    let driver = fresh.await.unwrap();
    let (answer, handle) = asking.await.unwrap();
    let expected = [(4, 2), (5, u64::MAX)].map(|(tag, value)| MemoryStatistic { tag, value });
    assert_eq!(answer, Ok(expected.to_vec()));
    let stopped = tokio::task::spawn_blocking(move || {
        driver.stop();
        driver
    });
    let _driver = stopped.await.unwrap();
    let short = Duration::from_millis(1);
    assert_eq!(handle.statistics(short).await, Err(StatisticsError::Unanswered(short)));
}

#[test]
fn a_pause_leaves_the_driver_its_buffer() {
    let (mut driver, handle) = ready(ALL_FEATURES);
    driver.send(STATISTICS, &[Buffer::Out(&statistics(&[(4, 1)]))]);
    driver.stop();
    let state = driver.save();
    let (spec, restored) = Balloon::spec("balloon", RAM_BYTES);
    handle.request_pages(9).unwrap();
    let mut other = FakeDriver::stopped(spec);
    other.restore(&driver, state).unwrap();
    other.start();
    assert_eq!((restored.requested_pages(), other.poll(STATISTICS)), (0, None));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    std::thread::scope(|scope| {
        let asking = scope.spawn(move || runtime.block_on(restored.statistics(PATIENCE)));
        other.wait_used(STATISTICS);
        other.send(STATISTICS, &[Buffer::Out(&statistics(&[(4, 3)]))]);
        assert_eq!(asking.join().unwrap(), Ok(vec![MemoryStatistic { tag: 4, value: 3 }]));
    });
}
