//! The memory device, by what a driver and the host see of it.

use super::{Geometry, GeometryError, Mem, MemHandle, SizeError};
use crate::virtio::fake_driver::{Buffer, FakeDriver, RAM_BYTES};
use proptest::prelude::*;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
/// The last half of the fake driver's memory, so that what is given back can be seen.
const REGION: u64 = RAM_BYTES / 2;
const BLOCKS: u64 = REGION / BLOCK;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

fn geometry() -> Geometry {
    Geometry::new(REGION..RAM_BYTES, BLOCK).unwrap()
}

fn ready() -> (FakeDriver, MemHandle) {
    let (spec, handle) = Mem::spec("mem", geometry());
    (FakeDriver::ready(spec, u64::MAX), handle)
}

/// The response's type and state.
fn ask(driver: &mut FakeDriver, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
    let mut request = [0; 24];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&address.to_le_bytes());
    request[16..18].copy_from_slice(&blocks.to_le_bytes());
    let reply = driver.request(0, &[Buffer::Out(&request), Buffer::In(10)]);
    assert_eq!(reply.written, 10);
    let word = |at: usize| u16::from_le_bytes([reply.data[at], reply.data[at + 1]]);
    (word(0), word(8))
}

fn block(number: u64) -> u64 {
    REGION + number * BLOCK
}

#[test]
fn the_driver_reads_what_there_is_and_what_is_wanted() {
    let (driver, handle) = ready();
    handle.request(3 * BLOCK).unwrap();
    assert_eq!(driver.acknowledge(), VIRTIO_MMIO_INT_CONFIG);
    let fields = [0, 16, 24, 32, 40, 48].map(|offset| driver.config::<u64>(offset));
    assert_eq!(fields, [BLOCK, REGION, RAM_BYTES - REGION, RAM_BYTES - REGION, 0, 3 * BLOCK]);
}

#[test]
fn blocks_are_plugged_as_far_as_they_are_wanted_and_given_back() {
    let (mut driver, handle) = ready();
    assert_eq!(ask(&mut driver, PLUG, block(0), 1).0, NACK, "nothing is wanted");
    handle.request(3 * BLOCK).unwrap();
    assert_eq!(ask(&mut driver, PLUG, block(1), 2).0, ACK);
    assert_eq!(ask(&mut driver, PLUG, block(4), 2).0, NACK, "one more is wanted");
    assert_eq!(ask(&mut driver, PLUG, block(2), 1).0, ERROR, "plugged already");
    assert_eq!(handle.plugged_bytes(), 2 * BLOCK);
    let states = [(0, 1), (1, 2), (0, 3)].map(|(at, count)| ask(&mut driver, STATE, block(at), count));
    assert_eq!(states, [(ACK, 1), (ACK, 0), (ACK, 2)]);
    assert_eq!(ask(&mut driver, UNPLUG, block(0), 2).0, ERROR, "one of them is not plugged");
    assert_eq!(ask(&mut driver, UNPLUG, block(2), 1).0, ACK);
    assert_eq!(driver.ram().discarded(), [(block(2), BLOCK)]);
    assert_eq!(driver.config::<u64>(40), BLOCK);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(handle.plugged_bytes(), 0);
}

#[test]
fn requests_for_what_is_not_there_are_errors() {
    let (mut driver, handle) = ready();
    handle.request(RAM_BYTES - REGION).unwrap();
    let last = block(BLOCKS - 1);
    for (address, blocks) in
        [(block(0) - BLOCK, 1), (block(0) + 4096, 1), (last, 2), (block(0), 0), (u64::MAX, 1), (0, 1)]
    {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(
                ask(&mut driver, kind, address, blocks).0,
                ERROR,
                "{kind} of {blocks} at {address:#x}"
            );
        }
    }
    assert_eq!(ask(&mut driver, 4, block(0), 1).0, ERROR, "an unknown request");
    assert_eq!((driver.ram().discarded(), handle.plugged_bytes()), (vec![], 0));
    driver.send(0, &[Buffer::Out(&[0; 23]), Buffer::In(10)]);
    driver.wait_needs_reset();
}

#[test]
fn sizes_are_whole_blocks_of_the_region() {
    let (_driver, handle) = ready();
    let (bytes, region_bytes) = (RAM_BYTES - REGION + BLOCK, RAM_BYTES - REGION);
    assert_eq!(handle.request(bytes), Err(SizeError::TooLarge { bytes, region_bytes }));
    assert_eq!(handle.request(4096), Err(SizeError::NotWhole { bytes: 4096, block_bytes: BLOCK }));
    assert_eq!(handle.requested_bytes(), 0);
    assert_eq!(Geometry::new(0..BLOCK, 3 * MIB), Err(GeometryError::BlockBytes(3 * MIB)));
    assert_eq!(Geometry::new(0..BLOCK, 2048), Err(GeometryError::BlockBytes(2048)));
    for region in [0..0, 4096..BLOCK + 4096, 0..BLOCK + 4096] {
        assert!(matches!(Geometry::new(region, BLOCK), Err(GeometryError::Region { .. })));
    }
    assert_eq!(Geometry::new(0..1 << 40, 4096), Err(GeometryError::TooMany(1 << 28)));
}

#[test]
fn plugged_memory_outlives_a_driver_and_no_machine() {
    let (mut driver, handle) = ready();
    handle.request(2 * BLOCK).unwrap();
    assert_eq!(ask(&mut driver, PLUG, block(3), 2).0, ACK);
    driver.initialize(0);
    assert_eq!(ask(&mut driver, STATE, block(3), 2), (ACK, 0));
    driver.stop();
    driver.device().reset();
    assert_eq!((handle.plugged_bytes(), handle.requested_bytes()), (0, 2 * BLOCK));
}

#[test]
fn a_saved_device_has_its_blocks_in_another() {
    let (mut old, handle) = ready();
    handle.request(2 * BLOCK).unwrap();
    assert_eq!(ask(&mut old, PLUG, block(3), 2).0, ACK);
    old.stop();
    let (spec, restored) = Mem::spec("mem", geometry());
    let mut new = FakeDriver::stopped(spec);
    new.restore(&old, old.save()).unwrap();
    new.start();
    assert_eq!((restored.plugged_bytes(), restored.requested_bytes()), (2 * BLOCK, 2 * BLOCK));
    assert_eq!(ask(&mut new, STATE, block(3), 2), (ACK, 0));
    let (other, _) = Mem::spec("mem", Geometry::new(REGION..RAM_BYTES, 2 * BLOCK).unwrap());
    new.stop();
    let error = FakeDriver::stopped(other).restore(&new, new.save()).unwrap_err();
    assert_eq!(error.to_string(), "block_bytes is 0x200000, which is not valid");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    /// Against a set of plugged blocks.
    #[test]
    fn requests_do_what_they_say(requests in prop::collection::vec((0u16..4, 0..BLOCKS + 1, 0u16..5), 1..60)) {
        let (mut driver, handle) = ready();
        let wanted = BLOCKS / 2;
        handle.request(wanted * BLOCK).unwrap();
        let mut plugged = std::collections::BTreeSet::new();
        for (kind, first, count) in requests {
            let (response, state) = ask(&mut driver, kind, block(first), count);
            let blocks = first..first + u64::from(count);
            let valid = count > 0 && blocks.end <= BLOCKS;
            let there = blocks.clone().filter(|block| plugged.contains(block)).count();
            let expected = match kind {
                UNPLUG_ALL => { plugged.clear(); ACK }
                _ if !valid => ERROR,
                PLUG if there > 0 => ERROR,
                PLUG if plugged.len() as u64 + u64::from(count) > wanted => NACK,
                PLUG => { plugged.extend(blocks); ACK }
                UNPLUG if there < usize::from(count) => ERROR,
                UNPLUG => { blocks.for_each(|block| { plugged.remove(&block); }); ACK }
                _ => ACK,
            };
            prop_assert_eq!(response, expected);
            if kind == STATE && valid {
                let expected = if there == 0 { 1 } else if there == usize::from(count) { 0 } else { 2 };
                prop_assert_eq!(state, expected);
            }
            prop_assert_eq!(handle.plugged_bytes(), plugged.len() as u64 * BLOCK);
        }
    }
}
