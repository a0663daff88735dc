//! The acceptance list: listening, ports, quarantine, and every order of closing.

use super::super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE};
use super::super::ports::{PortError, QUARANTINE};
use super::*;

fn listening() -> Bench {
    let mut bench = Bench::new();
    bench.engine.listen(Some(PORT)).unwrap();
    bench
}

#[test]
fn listen_unlisten_and_listen_again() {
    let mut bench = listening();
    bench.engine.unlisten(Some(PORT));
    bench.take(PAIR, Op::Request);
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)], "nobody listens");
    bench.engine.listen(Some(PORT)).unwrap();
    bench.connected_from_guest(PAIR);
}

#[test]
fn two_listeners_on_a_port_are_one_too_many() {
    let mut bench = listening();
    assert_eq!(bench.engine.listen(Some(PORT)), Err(PortError::AlreadyBound(PORT)));
    bench.engine.listen(Some(PORT + 1)).unwrap();
}

#[test]
fn a_port_stays_active_while_its_connections_live() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    bench.engine.unlisten(Some(PORT));
    assert_eq!(bench.engine.listen(Some(PORT)), Err(PortError::AlreadyBound(PORT)));
    bench.take_bytes(PAIR, b"still here");
    assert_eq!(bench.read(PAIR), Poll::Ready(Ok(b"still here".to_vec())));
    bench.close_cleanly(PAIR);
    bench.engine.listen(Some(PORT)).unwrap();
}

#[test]
fn what_waits_for_a_listener_that_goes_is_refused() {
    let mut bench = listening();
    bench.take(PAIR, Op::Request);
    bench.engine.unlisten(Some(PORT));
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
    bench.engine.listen(Some(PORT)).unwrap();
    assert_eq!(bench.request(PORT), None);
    bench.connected_from_guest(PAIR);
}

#[test]
fn a_request_that_is_let_go_of_is_refused() {
    let mut bench = listening();
    bench.take(PAIR, Op::Request);
    let pair = bench.request(PORT).unwrap();
    bench.release(pair);
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
    bench.connected_from_guest(PAIR);
}

#[test]
fn a_request_that_the_guest_takes_back_cannot_be_accepted() {
    let mut bench = listening();
    bench.take(PAIR, Op::Request);
    let pair = bench.request(PORT).unwrap();
    bench.take(PAIR, Op::Rst);
    assert_eq!(bench.engine.accept(pair), Err(End::Refused));
    bench.release(pair);
    assert_eq!(bench.all_sent(), []);
}

#[test]
fn a_request_that_nobody_answers_is_refused_in_time() {
    let mut bench = listening();
    bench.take(PAIR, Op::Request);
    bench.pass(super::super::ANSWER);
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
    assert_eq!(bench.request(PORT), None);
}

#[test]
fn a_clean_close_does_not_quarantine() {
    let mut bench = listening();
    for _ in 0..3 {
        bench.connected_from_guest(PAIR);
        bench.close_cleanly(PAIR);
        bench.connected_from_guest(PAIR);
        bench.take_shutdown(PAIR, SHUTDOWN_BOTH);
        assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
        bench.release(PAIR);
    }
    assert_eq!((bench.engine.quarantined(), bench.engine.counters().resets), (0, 0));
}

#[test]
fn an_unclean_end_quarantines_the_pair_for_ten_seconds() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    bench.take(PAIR, Op::Rst);
    assert_eq!(bench.read(PAIR), Poll::Ready(Err(End::Reset)));
    bench.release(PAIR);
    bench.pass(QUARANTINE - Duration::from_millis(1));
    bench.take(PAIR, Op::Request);
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)], "it has to rest");
    let other = PortPair { guest: GUEST_PORT + 1, ..PAIR };
    bench.connected_from_guest(other);
    bench.pass(Duration::from_millis(1));
    bench.connected_from_guest(PAIR);
}

#[test]
fn the_hosts_own_reset_quarantines_too() {
    let mut bench = Bench::new();
    let pair = bench.connected_from_host(80);
    bench.release(pair);
    assert_eq!(bench.all_sent(), [(Op::Rst, pair)]);
    assert_eq!(bench.engine.quarantined(), 1);
}

#[test]
fn ephemeral_ports_run_out_and_come_back() {
    let mut bench = Bench::with(VsockLimits { ephemeral: 60000..=60002, ..VsockLimits::default() });
    bench.engine.listen(Some(60001)).unwrap();
    let first = bench.connected_from_host(80);
    let second = bench.connected_from_host(80);
    assert_eq!([first.host, second.host], [60000, 60002]);
    let refused = bench.engine.connect(80, bench.now);
    assert_eq!(refused, Err(PortError::NoResources { connections: 2 }));
    bench.close_cleanly_beside(first);
    assert_eq!(bench.connected_from_host(80), first);
    bench.release(first);
    bench.all_sent();
    let resting = bench.engine.connect(80, bench.now);
    assert_eq!(resting, Err(PortError::NoResources { connections: 1 }), "its pair has to rest");
    assert_eq!(bench.connected_from_host(81).host, 60000, "with another port it is another pair");
}

impl Bench {
    /// Closes one of several connections.
    fn close_cleanly_beside(&mut self, pair: PortPair) {
        self.end(pair);
        self.release(pair);
        assert_eq!(self.all_sent(), [(Op::Shutdown, pair)]);
        self.take(pair, Op::Rst);
    }
}

#[test]
fn connections_are_counted() {
    let mut bench = Bench::with(VsockLimits { connections: 2, ..VsockLimits::default() });
    bench.engine.listen(Some(PORT)).unwrap();
    bench.connected_from_guest(PAIR);
    bench.connected_from_host(80);
    assert_eq!(bench.engine.connect(80, bench.now), Err(PortError::NoResources { connections: 2 }));
    let third = PortPair { guest: 1, ..PAIR };
    bench.take(third, Op::Request);
    assert_eq!(bench.all_sent(), [(Op::Rst, third)]);
}

#[test]
fn a_pair_in_use_is_refused() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    bench.take(PAIR, Op::Request);
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
    assert_eq!(bench.read(PAIR), Poll::Ready(Err(End::Reset)), "neither end can know which is meant");
    bench.take(PAIR, Op::Request);
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)], "the host has it still");
}

#[test]
fn the_guest_refuses_or_does_not_answer() {
    let mut bench = Bench::new();
    let pair = bench.engine.connect(80, bench.now).unwrap();
    let connected = |bench: &mut Bench, pair| bench.engine.with(pair, |it| it.poll_connected(&context()));
    bench.pass(Duration::from_secs(100));
    assert_eq!(connected(&mut bench, pair), Poll::Pending, "a driver that is not there yet is waited for");
    assert_eq!(bench.all_sent(), [(Op::Request, pair)]);
    bench.take(pair, Op::Rst);
    assert_eq!(connected(&mut bench, pair), Poll::Ready(Err(End::Refused)));
    bench.release(pair);
    assert_eq!(bench.engine.quarantined(), 0);

    let pair = bench.engine.connect(80, bench.now).unwrap();
    assert_eq!(bench.all_sent(), [(Op::Request, pair)]);
    bench.pass(super::super::ANSWER);
    assert_eq!(connected(&mut bench, pair), Poll::Ready(Err(End::TimedOut)));
    assert_eq!(bench.all_sent(), [(Op::Rst, pair)]);
}

#[test]
fn the_guest_ends_first_and_the_host_goes_on() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    bench.take_bytes(PAIR, b"question");
    bench.take_shutdown(PAIR, SHUTDOWN_SEND);
    assert_eq!(bench.read(PAIR), Poll::Ready(Ok(b"question".to_vec())));
    assert_eq!(bench.read(PAIR), Poll::Ready(Ok(Vec::new())), "the end");
    assert_eq!(bench.write(PAIR, b"answer"), Poll::Ready(Ok(6)));
    bench.end(PAIR);
    let (header, payload) = bench.sent().unwrap();
    assert_eq!((header.op, payload), (Op::Rw as u16, b"answer".to_vec()));
    let (header, _) = bench.sent().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown as u16, SHUTDOWN_SEND));
    bench.take(PAIR, Op::Rst);
    bench.release(PAIR);
    assert_eq!((bench.all_sent(), bench.engine.quarantined()), (vec![], 0));
}

#[test]
fn the_host_ends_first_and_the_guest_goes_on() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    bench.end(PAIR);
    let (header, _) = bench.sent().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown as u16, SHUTDOWN_SEND));
    bench.take_bytes(PAIR, b"late");
    bench.take_shutdown(PAIR, SHUTDOWN_BOTH);
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)], "the guest need not wait until the host has read");
    assert_eq!(bench.read(PAIR), Poll::Ready(Ok(b"late".to_vec())));
    assert_eq!(bench.read(PAIR), Poll::Ready(Ok(Vec::new())));
    bench.release(PAIR);
    assert_eq!(bench.engine.connections().count(), 0);
}

#[test]
fn a_guest_that_reads_no_more_is_written_no_more() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    assert_eq!(bench.write(PAIR, b"unwanted"), Poll::Ready(Ok(8)));
    bench.take_shutdown(PAIR, SHUTDOWN_RECEIVE);
    assert_eq!(bench.write(PAIR, b"more"), Poll::Ready(Err(End::Clean)));
    let flushed = bench.engine.with(PAIR, |it| it.poll_flush(&context()));
    assert_eq!(flushed, Poll::Ready(Err(End::Clean)), "what was written is lost");
    bench.take_bytes(PAIR, b"but speaks");
    assert_eq!(bench.read(PAIR), Poll::Ready(Ok(b"but speaks".to_vec())));
    assert_eq!(bench.all_sent(), []);
}

#[test]
fn a_host_that_reads_no_more_lets_bytes_on_their_way_fall() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    bench.engine.with(PAIR, |it| it.shut_down(SHUTDOWN_RECEIVE));
    bench.take_bytes(PAIR, &[7; 100]);
    let (header, _) = bench.sent().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown as u16, SHUTDOWN_RECEIVE));
    assert_eq!(header.fwd_cnt, 100, "they count as taken");
    assert_eq!(bench.engine.counters().malformed_packets, 0);
}

#[test]
fn both_close_at_once() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    bench.end(PAIR);
    bench.release(PAIR);
    assert_eq!(bench.all_sent(), [(Op::Shutdown, PAIR)]);
    bench.take_shutdown(PAIR, SHUTDOWN_BOTH);
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
    bench.take(PAIR, Op::Rst);
    assert_eq!((bench.all_sent(), bench.engine.quarantined()), (vec![], 0));
}

#[test]
fn a_close_that_the_guest_does_not_confirm_is_forced_once_it_is_silent() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    bench.end(PAIR);
    bench.release(PAIR);
    assert_eq!(bench.all_sent(), [(Op::Shutdown, PAIR)]);
    bench.pass(Duration::from_secs(9));
    bench.take(PAIR, Op::CreditUpdate);
    bench.pass(Duration::from_secs(9));
    assert_eq!(bench.all_sent(), [], "it spoke");
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
    assert_eq!((bench.engine.connections().count(), bench.engine.quarantined()), (0, 1));
}

#[test]
fn what_was_written_goes_out_after_the_host_has_let_go() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    assert_eq!(bench.write(PAIR, &[1; 5000]), Poll::Ready(Ok(5000)));
    bench.end(PAIR);
    bench.release(PAIR);
    let kinds: Vec<_> = bench.all_sent().into_iter().map(|(op, _)| op).collect();
    assert_eq!(kinds, [Op::Shutdown, Op::Rw, Op::Rw, Op::Shutdown], "first that it reads no more");
}

#[test]
fn a_pause_does_not_count_as_silence() {
    let mut bench = listening();
    bench.take(PAIR, Op::Request);
    bench.now += Duration::from_secs(3600);
    bench.engine.restart_deadlines(bench.now);
    bench.pass(Duration::from_secs(9));
    assert_eq!(bench.all_sent(), []);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.all_sent(), [(Op::Rst, PAIR)]);
}

#[test]
fn a_guest_that_forgets_everything_resets_all_but_what_it_never_heard_of() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    let known = bench.connected_from_host(80);
    let unknown = bench.engine.connect(81, bench.now).unwrap();
    bench.engine.reset_guest();
    assert_eq!(bench.read(PAIR), Poll::Ready(Err(End::Reset)));
    assert_eq!(bench.read(known), Poll::Ready(Err(End::Reset)));
    assert_eq!(bench.all_sent(), [(Op::Request, unknown)]);
    bench.release(PAIR);
    bench.connected_from_guest(PAIR);
}

#[test]
fn hundreds_of_connections_take_turns() {
    let mut bench = listening();
    let pairs: Vec<_> = (0..500).map(|guest| PortPair { guest, ..PAIR }).collect();
    for pair in &pairs {
        bench.connected_from_guest(*pair);
    }
    for pair in &pairs {
        assert_eq!(bench.write(*pair, &[0; 12 << 10]), Poll::Ready(Ok(12 << 10)));
    }
    for _ in 0..3 {
        let turn: Vec<_> = (0..500).map(|_| bench.sent().unwrap().0.dst_port).collect();
        assert_eq!(turn, (0..500).collect::<Vec<_>>());
    }
    assert!(bench.sent().is_none());
}

#[test]
fn ports_that_nobody_claims_go_to_one_listener() {
    let mut bench = listening();
    bench.engine.listen(None).unwrap();
    assert_eq!(bench.engine.listen(None), Err(PortError::AllBound));
    let other = PortPair { guest: 1, host: 9 };
    bench.take(other, Op::Request);
    bench.take(PAIR, Op::Request);
    assert_eq!(bench.request(PORT), Some(PAIR));
    assert_eq!(bench.engine.poll_request(None, &context()), Poll::Ready(Some(other)));
    bench.engine.accept(other).unwrap();
    bench.take(PortPair { guest: 2, host: 9 }, Op::Request);
    bench.engine.unlisten(None);
    assert_eq!(bench.all_sent(), [(Op::Response, other), (Op::Rst, PortPair { guest: 2, host: 9 })]);
}

#[test]
fn a_guest_that_has_used_up_its_credit_hears_of_room() {
    let mut bench = listening();
    bench.connected_from_guest(PAIR);
    let window = VsockLimits::default().wide_window;
    bench.take_bytes(PAIR, &vec![1; window as usize]);
    assert_eq!(bench.all_sent(), [], "there is no room yet");
    assert!(bench.read(PAIR).is_ready());
    let (header, _) = bench.sent().unwrap();
    assert_eq!((header.op, header.fwd_cnt), (Op::CreditUpdate as u16, window));
}
