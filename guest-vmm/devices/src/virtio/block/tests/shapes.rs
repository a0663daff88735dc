//! What no driver sends: the device needs a reset, and works after it.

use super::*;
use crate::virtio::fake_driver::{RAM_BYTES, Segment};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// Address, length, flags, next.
type Raw = (u64, u32, u32, u16);

/// Makes these descriptors, of which the first begins the chain, available.
fn send(stage: &mut Stage, descriptors: &[Raw]) {
    let mut ring = stage.driver.ring(0).clone();
    for (index, &(address, length, flags, next)) in (0..).zip(descriptors) {
        ring.write_descriptor(stage.driver.ram(), index, address, length, flags, next);
    }
    ring.make_available(stage.driver.ram(), 0);
    *stage.driver.ring(0) = ring;
    stage.driver.ring_doorbell(0);
}

/// Chains around a header at this address that asks for sector 0.
fn broken(header: u64) -> Vec<(&'static str, Vec<Raw>)> {
    let (next, write) = (VRING_DESC_F_NEXT, VRING_DESC_F_WRITE);
    let chain = |data: Raw| vec![(header, 16, next, 1), data, (header + 512, 1, write, 0)];
    vec![
        ("no status", vec![(header, 16, 0, 0)]),
        ("no header", vec![(header, 1, write, 0)]),
        ("half a header", vec![(header, 15, next, 1), (header + 512, 1, write, 0)]),
        ("data beyond memory", chain((RAM_BYTES - 256, 512, next | write, 2))),
        ("data nowhere", chain((u64::MAX - 511, 512, next | write, 2))),
        ("4 GiB of data", chain((0, u32::MAX, next | write, 2))),
        ("no data at all", chain((0x1000, 0, next | write, 2))),
        ("a loop", chain((0x1000, 512, next | write, 1))),
        (
            "a status that is read",
            vec![(header, 16, next, 1), (0x1000, 512, next | write, 2), (header, 1, 0, 0)],
        ),
        ("a descriptor that is not there", chain((0x1000, 512, next | write, 999))),
        ("a table in a chain", chain((0x1000, 24, VRING_DESC_F_INDIRECT, 0))),
    ]
}

#[test]
fn broken_requests_need_a_reset_and_then_all_is_well() {
    let mut stage = Stage::new();
    for what in 0..broken(0).len() {
        let place = stage.driver.ram().allocate(1024);
        stage.driver.ram().write(place, &header(VIRTIO_BLK_T_IN, 0));
        let (name, descriptors) = broken(place).swap_remove(what);
        send(&mut stage, &descriptors);
        stage.driver.wait_needs_reset();
        assert_eq!(stage.driver.poll(0), None, "{name}");
        stage.driver.initialize(EVENT_IDX);
        stage.works();
    }
    assert!(stage.on_file(0, SECTORS) == pattern(0, SECTORS));
}

#[test]
fn a_broken_request_behind_good_ones_leaves_nothing_under_way() {
    let mut stage = Stage::new();
    for _ in 0..20 {
        for sector in 0..20 {
            let header = header(VIRTIO_BLK_T_IN, sector);
            stage.driver.send(0, &[Buffer::Out(&header), Buffer::In(4096), Buffer::In(1)]);
        }
        stage.driver.send(0, &[Buffer::In(1)]);
        stage.driver.wait_needs_reset();
        stage.driver.initialize(EVENT_IDX);
        stage.works();
    }
}

#[test]
fn a_request_over_its_own_queue_ends() {
    let mut stage = Stage::new();
    let head = stage.driver.ram().allocate(16);
    stage.driver.ram().write(head, &header(VIRTIO_BLK_T_IN, 0));
    let used = stage.driver.ring(0).used;
    // The disk's bytes and the device's own go to the same place; neither is lost in the host.
    let segment = |address, length, writable| Segment { address, length, writable };
    let segments = [segment(head, 16, false), segment(used & !511, 512, true), segment(used + 2, 1, true)];
    stage.driver.add(0, &segments);
    stage.driver.ring_doorbell(0);
    stage.driver.wait("the read", || (stage.driver.ram().read(used & !511, 512) != [0; 512]).then_some(()));
    stage.driver.reset();
    stage.driver.initialize(EVENT_IDX);
    stage.works();
}
