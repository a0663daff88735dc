//! Packets that no driver sends: each ends its own connection at most.

use super::super::connection::State;
use super::super::engine::ANSWER;
use super::*;

const OTHER: PortPair = PortPair { guest: 1, host: PORT };

/// Two connections, one of which is to live.
fn two() -> Bench {
    let mut bench = Bench::new();
    bench.engine.listen(Some(PORT)).unwrap();
    bench.connected_from_guest(OTHER);
    bench.connected_from_guest(PAIR);
    bench
}

fn assert_only_one_lives(bench: &mut Bench) {
    assert_eq!(bench.read(PAIR), Poll::Ready(Err(End::Reset)));
    assert_eq!(bench.read(OTHER), Poll::Pending);
    bench.take_bytes(OTHER, b"alive");
    assert_eq!(bench.read(OTHER), Poll::Ready(Ok(b"alive".to_vec())));
}

#[test]
fn what_makes_no_sense_resets_its_connection() {
    let rw = packet(PAIR, Op::Rw);
    let window = VsockLimits::default().wide_window;
    let too_much = vec![0; window as usize + 1];
    let packets: [(Header, &[u8]); 9] = [
        (Header { len: 5, ..rw }, b"four"),
        (Header { len: u32::MAX, ..rw }, b""),
        (Header { len: window + 1, ..rw }, &too_much),
        (Header { op: 0, ..rw }, b""),
        (Header { op: 8, ..rw }, b""),
        (packet(PAIR, Op::Response), b""),
        (packet(PAIR, Op::Request), b""),
        (Header { len: 1, ..packet(PAIR, Op::CreditUpdate) }, b"x"),
        (Header { fwd_cnt: 1, ..rw }, b""),
    ];
    for (header, payload) in packets {
        let mut bench = two();
        bench.engine.receive(&header, payload, bench.now);
        assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)], "{header:?}");
        assert_eq!(bench.engine.counters().malformed_packets, 1, "{header:?}");
        assert_only_one_lives(&mut bench);
    }
}

#[test]
fn bytes_after_the_end_or_before_the_beginning_are_refused() {
    let mut bench = two();
    bench.take_shutdown(PAIR, SHUTDOWN_SEND);
    bench.take_bytes(PAIR, b"more");
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
    assert_only_one_lives(&mut bench);
    let early = PortPair { guest: 2, ..PAIR };
    bench.take(early, Op::Request);
    bench.take_bytes(early, b"early");
    assert_eq!(bench.all_sent(), [(Op::Rst, early)]);
    assert_eq!(bench.request(PORT), None);
}

#[test]
fn a_window_is_enforced_to_the_byte() {
    let mut bench = two();
    let window = VsockLimits::default().wide_window as usize;
    bench.take_bytes(PAIR, &vec![1; window]);
    assert_eq!(bench.all_sent(), []);
    bench.take_bytes(PAIR, &[]);
    assert_eq!(bench.read(PAIR), Poll::Ready(Ok(vec![1; window])));
    bench.take_bytes(PAIR, &vec![2; window]);
    assert_eq!(bench.read(PAIR), Poll::Ready(Ok(vec![2; window])));
    bench.take_bytes(PAIR, &vec![3; window]);
    bench.take_bytes(PAIR, &[4]);
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
    assert_eq!(bench.read(PAIR), Poll::Ready(Ok(vec![3; window])), "what came before is read");
    assert_only_one_lives(&mut bench);
}

#[test]
fn what_is_for_nobody_is_refused_and_leaves_connections_alone() {
    let mut bench = two();
    let rw = packet(PAIR, Op::Rw);
    bench.engine.receive(&Header { src_cid: 4, ..rw }, &[], bench.now);
    assert_eq!(bench.all_sent(), [], "nobody is there to be told");
    bench.engine.receive(&Header { dst_cid: 1, ..rw }, &[], bench.now);
    let (reset, _) = bench.sent().unwrap();
    assert_eq!((reset.op, reset.src_cid), (Op::Rst as u16, 1));
    bench.engine.receive(&Header { socket_type: 2, ..packet(PAIR, Op::Request) }, &[], bench.now);
    let (reset, _) = bench.sent().unwrap();
    assert_eq!((reset.op, reset.socket_type), (Op::Rst as u16, 2));
    assert_eq!((bench.read(PAIR), bench.read(OTHER)), (Poll::Pending, Poll::Pending));
    assert_eq!(bench.engine.counters().malformed_packets, 3);
}

#[test]
fn a_reset_is_never_answered() {
    let mut bench = Bench::new();
    bench.take(PAIR, Op::Rst);
    bench.engine.receive(&Header { dst_cid: 9, ..packet(PAIR, Op::Rst) }, &[], bench.now);
    assert_eq!(bench.all_sent(), []);
}

#[test]
fn a_guest_that_takes_no_answers_has_its_packets_left_where_they_are() {
    let mut bench = Bench::new();
    let mut count = 0;
    while bench.engine.can_receive() {
        bench.take(PortPair { guest: count, host: 9 }, Op::Rw);
        bench.take(PortPair { guest: count, host: 9 }, Op::Rw);
        count += 1;
        assert!(count <= 1000, "there is a bound");
    }
    assert_eq!(bench.all_sent().len(), count as usize, "one answer for each pair");
    assert!(bench.engine.can_receive());
}

#[test]
fn requests_beyond_the_backlog_are_refused() {
    let mut bench = Bench::new();
    bench.engine.listen(Some(PORT)).unwrap();
    for guest in 0..=128 {
        bench.take(PortPair { guest, ..PAIR }, Op::Request);
    }
    assert_eq!(bench.all_sent(), [(Op::Rst, PortPair { guest: 128, ..PAIR })]);
}

#[test]
fn turns_of_what_has_ended_are_not_kept() {
    let mut bench = Bench::new();
    bench.engine.listen(Some(PORT)).unwrap();
    for guest in 0..10_000 {
        let pair = PortPair { guest, ..PAIR };
        bench.take(pair, Op::Request);
        assert_eq!(bench.request(PORT), Some(pair));
        bench.engine.accept(pair).unwrap();
        bench.take(pair, Op::Rst);
        bench.release(pair);
    }
    assert!(!bench.engine.can_send());
    assert_eq!(bench.engine.connections().count(), 0);
    assert_eq!(bench.engine.deadline(), None);
}

#[test]
fn a_guest_without_room_is_asked_once() {
    let mut bench = Bench::new();
    bench.engine.listen(Some(PORT)).unwrap();
    bench.engine.receive(&Header { buf_alloc: 0, ..packet(PAIR, Op::Request) }, &[], bench.now);
    assert_eq!(bench.request(PORT), Some(PAIR));
    bench.engine.accept(PAIR).unwrap();
    assert_eq!(bench.write(PAIR, &[5; 10]), Poll::Ready(Ok(10)));
    assert_eq!(bench.all_sent(), [(Op::Response, PAIR), (Op::CreditRequest, PAIR)]);
    let none = Header { buf_alloc: 0, ..packet(PAIR, Op::CreditUpdate) };
    bench.engine.receive(&none, &[], bench.now);
    assert_eq!(bench.all_sent(), [], "it says when");
    bench.engine.receive(&Header { buf_alloc: 4, ..none }, &[], bench.now);
    let (header, payload) = bench.sent().unwrap();
    assert_eq!((header.op, payload.len()), (Op::Rw as u16, 4));
    bench.engine.receive(&Header { buf_alloc: 4, fwd_cnt: 4, ..none }, &[], bench.now);
    assert_eq!(bench.sent().map(|(_, payload)| payload.len()), Some(4));
}

#[test]
fn a_window_that_shrinks_below_what_is_under_way_is_no_credit() {
    let mut bench = two();
    assert_eq!(bench.write(PAIR, &[5; 100]), Poll::Ready(Ok(100)));
    assert_eq!(bench.all_sent(), [(Op::Rw, PAIR)]);
    bench.engine.receive(&Header { buf_alloc: 50, ..packet(PAIR, Op::CreditUpdate) }, &[], bench.now);
    assert_eq!(bench.write(PAIR, &[5; 100]), Poll::Ready(Ok(100)));
    assert_eq!(bench.all_sent(), [(Op::CreditRequest, PAIR)]);
}

#[test]
fn random_packets_break_nothing() {
    use proptest::prelude::*;
    let small = prop_oneof![Just(PORT), Just(GUEST_PORT), Just(60000), any::<u32>()];
    let cid = prop_oneof![8 => Just(3), 8 => Just(2), 1 => any::<u64>()];
    let count = prop_oneof![Just(0), 0..100u32, any::<u32>()];
    let header =
        (cid.clone(), cid, small.clone(), small, 0..10u16, count.clone(), 0..5u32, count.clone(), count);
    let packets = prop::collection::vec((header, 0..4u8), 1..200);
    proptest!(|(packets in packets)| {
        let mut bench = Bench::with(VsockLimits { connections: 4, ephemeral: 60000..=60001, ..VsockLimits::default() });
        bench.engine.listen(Some(PORT)).unwrap();
        let mut held = Vec::new();
        for ((src_cid, dst_cid, src_port, dst_port, op, len, flags, buf_alloc, fwd_cnt), act) in packets {
            let payload = vec![0; len.min(1000) as usize];
            let header = Header { src_cid, dst_cid, src_port, dst_port, len, op, flags, buf_alloc, fwd_cnt, ..packet(PAIR, Op::Rw) };
            bench.engine.receive(&header, &payload, bench.now);
            match act {
                0 => { bench.all_sent(); }
                1 => held.extend(bench.engine.connect(GUEST_PORT, bench.now)),
                2 => if let Some(pair) = bench.request(PORT) {
                    held.push(pair);
                    let _ = bench.engine.accept(pair);
                    let _ = bench.write(pair, b"hello");
                },
                _ => if let Some(pair) = held.pop() {
                    let _ = bench.read(pair);
                    bench.release(pair);
                },
            }
            prop_assert!(bench.engine.connections().count() <= 4);
        }
        for pair in held {
            bench.release(pair);
        }
        bench.all_sent();
        bench.pass(ANSWER);
        bench.pass(ANSWER);
        bench.all_sent();
        // A shutdown that the guest has no credit for waits for as long as the guest lives; all else is gone.
        let waits = |state| matches!(state, State::Established);
        prop_assert!(bench.engine.connections().all(|(_, connection)| waits(connection.state)));
        bench.engine.shut_down();
        prop_assert_eq!(bench.engine.connections().count(), 0);
    });
}
