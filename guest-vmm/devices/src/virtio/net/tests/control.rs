//! The control queue, and several queue pairs.

use super::*;

const PAIRS: usize = 2;
/// Where the control queue is with so many pairs.
const CONTROL: usize = 2 * PAIRS;

const ALL_CONTROL: u64 = ALL & !(1 << VIRTIO_NET_F_MTU);

fn command(driver: &mut FakeDriver, queue: usize, class: u32, number: u32, data: &[u8]) -> u8 {
    let head = [class, number].map(|word| word.to_le_bytes()[0]);
    let reply = driver.request(queue, &[Buffer::Out(&head), Buffer::Out(data), Buffer::In(1)]);
    assert_eq!(reply.written, 1);
    reply.data[0]
}

fn use_pairs(bench: &mut Bench<Messages>, pairs: u16) -> u8 {
    let (class, number) = (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    command(&mut bench.driver, CONTROL, class, number, &pairs.to_le_bytes())
}

#[test]
fn several_pairs_carry_frames_once_the_driver_wants_them() {
    let mut bench = Bench::<Messages>::with(ALL_CONTROL, PAIRS, None);
    let receive = 2;
    bench.driver.send(receive, &[Buffer::In(4096)]);
    bench.peers[1].send([0; HEADER_BYTES], &frame(100, 1));
    bench.transmit(&frame(60, 1));
    assert!(bench.driver.poll(receive).is_none(), "the second pair is not used yet");
    assert_eq!(use_pairs(&mut bench, 2), 0);
    let used = bench.driver.wait_used(receive);
    assert!(bench.filled(&used)[HEADER_BYTES..] == frame(100, 1));
    let text = frame(100, 2);
    bench.driver.request(3, &[Buffer::Out(&[0; HEADER_BYTES]), Buffer::Out(&text)]);
    assert!(bench.peers[1].receive().1 == text);
    assert_eq!(bench.peers[0].receive().1.len(), 60);
    assert!(bench.peers[0].is_silent(), "each pair has its port");
}

#[test]
fn a_number_of_pairs_that_cannot_be_is_refused() {
    let mut bench = Bench::<Messages>::with(ALL_CONTROL, PAIRS, None);
    for pairs in [0, 3, u16::MAX] {
        assert_eq!(use_pairs(&mut bench, pairs), 1, "{pairs} pairs");
    }
    assert_eq!(use_pairs(&mut bench, 2), 0);
    assert_eq!(shown(&bench.driver, "used_queue_pairs"), "2");
    assert_eq!(use_pairs(&mut bench, 1), 0);
    bench.transmit(&frame(60, 1));
    bench.driver.reset();
    assert_eq!(shown(&bench.driver, "used_queue_pairs"), "1");
}

/// Without the feature, the control queue is behind the first pair (5.1.2).
#[test]
fn the_control_queue_moves_with_the_feature() {
    let mut bench = Bench::<Messages>::with(ALL_CONTROL & !(1 << VIRTIO_NET_F_MQ), PAIRS, None);
    let answer = command(&mut bench.driver, 2, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, &[1]);
    assert_eq!(answer, 0);
    assert_eq!(shown(&bench.driver, "promiscuous"), "true");
}

#[test]
fn address_and_receive_mode_are_the_drivers() {
    let mut bench = Bench::<Messages>::new(ALL_CONTROL);
    let mut ask = |class, number, data: &[u8]| command(&mut bench.driver, 2, class, number, data);
    let (mac, table) = (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET);
    assert_eq!(ask(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, &[1]), 0);
    assert_eq!(ask(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_NOBCAST, &[1]), 1, "it was not offered");
    assert_eq!(ask(mac, VIRTIO_NET_CTRL_MAC_ADDR_SET, &[2, 9, 9, 9, 9, 9]), 0);
    assert_eq!(ask(mac, VIRTIO_NET_CTRL_MAC_ADDR_SET, &[3, 9, 9, 9, 9, 9]), 1, "multicast");
    assert_eq!(ask(mac, VIRTIO_NET_CTRL_MAC_ADDR_SET, &[2, 9]), 1, "short");
    assert_eq!(ask(mac, table, &[0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 94, 0, 0, 1]), 0);
    assert_eq!(ask(mac, table, &[0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 94, 0, 0, 1]), 1, "longer than it is");
    assert_eq!(ask(mac, table, &[255, 255, 255, 255]), 1);
    assert_eq!(ask(9, 9, &[9]), 1, "no such class");
    assert_eq!(ask(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &[1, 0]), 1, "it was not offered");
    assert_eq!(shown(&bench.driver, "all_multicast"), "true");
    assert_eq!(bench.driver.config::<[u8; 6]>(0), [2, 9, 9, 9, 9, 9]);
    bench.driver.reset();
    assert_eq!(bench.driver.config::<[u8; 6]>(0), MAC, "a reset is for good");
}

#[test]
fn a_command_without_room_for_its_answer_needs_a_reset() {
    let mut bench = Bench::<Messages>::new(ALL_CONTROL);
    bench.driver.send(2, &[Buffer::Out(&[0, 0, 1])]);
    bench.driver.wait_needs_reset();
}
