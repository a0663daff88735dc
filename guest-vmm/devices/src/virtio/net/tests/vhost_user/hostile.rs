//! Back ends that do not keep to the protocol, or do not answer.

use super::scripted::{
    Answer, GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_VRING_BASE, SET_MEM_TABLE,
    SET_VRING_ENABLE, back_end, honest,
};
use super::*;
use std::time::Duration;

/// Less than a VP waits for a driver's reset; more than a back end is waited for.
const BOUND: Duration = Duration::from_secs(5);

fn refusal(script: impl FnMut(u32, &[u8]) -> Answer + Send + 'static) -> String {
    let (thread, socket) = back_end(script);
    let begun = Instant::now();
    let refusal = agree(socket, 2).unwrap_err().to_string();
    assert!(begun.elapsed() < BOUND, "it is waited for no longer");
    thread.join().expect("the connection has ended");
    refusal
}

/// A device over a back end that answers `request` in this way, and all others as a good one.
fn bench_of(request: u32, mut answer: impl FnMut(&[u8]) -> Answer + Send + 'static) -> Bench<UnixStream> {
    let script = move |asked, body: &[u8]| if asked == request { answer(body) } else { honest(asked, body) };
    let (_thread, socket) = back_end(script);
    started(agree(socket, 1).unwrap())
}

#[test]
fn a_back_end_that_never_answers_is_given_up() {
    for silent in [GET_FEATURES, GET_QUEUE_NUM] {
        let script = move |asked, body: &[u8]| {
            if asked == silent { Answer::Silence } else { honest(asked, body) }
        };
        assert_eq!(refusal(script), "the vhost-user back end has not answered within 3s");
    }
}

/// It takes nothing from its socket, so that not even a request gets through.
#[test]
fn a_back_end_that_never_reads_is_given_up() {
    let (ours, _its) = UnixStream::pair().unwrap();
    let mut filled = ours.try_clone().unwrap();
    filled.set_nonblocking(true).unwrap();
    while filled.write(&[0; 4096]).is_ok() {}
    let refusal = agree(ours, 1).unwrap_err().to_string();
    assert_eq!(refusal, "the vhost-user back end has not answered within 3s");
}

#[test]
fn a_socket_that_is_closed_is_no_back_end() {
    let (ours, its) = UnixStream::pair().unwrap();
    drop(its);
    let refusal = agree(ours, 1).unwrap_err();
    assert!(matches!(refusal, VhostUserError::Backend(_)), "{refusal:?}");
}

#[test]
fn answers_that_cannot_be_are_refused() {
    let header = |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_le_bytes).concat();
    let value = |head: Vec<u8>| [&head[..], &u64::MAX.to_le_bytes()].concat();
    for (request, bytes) in [
        (GET_FEATURES, vec![0xff; 20]),
        (GET_FEATURES, value(header(GET_QUEUE_NUM, 5, 8))),
        (GET_FEATURES, value(header(GET_FEATURES, 1, 8))),
        (GET_FEATURES, value(header(GET_FEATURES, 5, u32::MAX))),
        (GET_PROTOCOL_FEATURES, value(header(GET_PROTOCOL_FEATURES, 4, 8))),
        // More queues than there can be.
        (GET_QUEUE_NUM, value(header(GET_QUEUE_NUM, 5, 8))),
    ] {
        let script = move |asked, body: &[u8]| {
            if asked == request { Answer::Bytes(bytes.clone()) } else { honest(asked, body) }
        };
        let refusal = refusal(script);
        assert!(refusal.starts_with("the vhost-user back end fails: "), "{request}: {refusal}");
    }
}

/// All bits of all features: what is not known is not asked for.
#[test]
fn features_that_cannot_be_are_ignored() {
    let (sender, told) = std::sync::mpsc::channel();
    let script = move |asked, body: &[u8]| {
        sender.send((asked, body.to_vec())).unwrap();
        match asked {
            GET_FEATURES | GET_PROTOCOL_FEATURES => Answer::Value(u64::MAX),
            _ => honest(asked, body),
        }
    };
    let (_thread, socket) = back_end(script);
    agree(socket, 2).unwrap();
    let set_protocol_features = 16;
    let (_, body) = told.iter().find(|(asked, _)| *asked == set_protocol_features).expect("it was asked");
    assert_eq!(body, PROTOCOL.bits().to_le_bytes());
}

#[test]
fn a_back_end_that_refuses_the_memory_is_lost() {
    let mut bench = bench_of(SET_MEM_TABLE, |_| Answer::Value(1));
    bench.driver.initialize(PLAIN);
    bench.is_lost("the vhost-user back end fails: vhost-user: backend internal error");
}

#[test]
fn a_back_end_that_falls_silent_is_lost() {
    for request in [SET_VRING_ENABLE, GET_VRING_BASE] {
        let mut bench = bench_of(request, |_| Answer::Silence);
        bench.driver.initialize(PLAIN);
        let begun = Instant::now();
        bench.driver.stop();
        assert!(begun.elapsed() < BOUND, "the unit is not held up for longer");
        bench.driver.start();
        bench.is_lost("the vhost-user back end has not answered within 3s");
    }
}

/// What the back end says of the second queue, and what comes of it. The driver has made two chains available there.
#[test]
fn a_queue_taken_to_where_it_is_not_loses_the_link() {
    for (next, is_possible) in
        [(0, true), (1, true), (2, true), (3, false), (0xffff, false), (0x1_0000, false), (u32::MAX, false)]
    {
        let base = move |body: &[u8]| {
            let queue = u64::from(body[0]);
            Answer::Value(if queue == 1 { queue | u64::from(next) << 32 } else { queue })
        };
        let mut bench = bench_of(GET_VRING_BASE, base);
        bench.driver.initialize(PLAIN);
        bench.send(TRANSMIT, 60, 1);
        bench.send(TRANSMIT, 60, 2);
        bench.driver.stop();
        if is_possible {
            assert_eq!(shown(&bench.driver, "backend"), "there", "{next}");
            continue;
        }
        let reason = format!("the vhost-user back end has taken queue 1 to {next}, which is not from 0 to 2");
        assert_eq!(shown(&bench.driver, "backend"), format!("gone: {reason}"));
        bench.driver.start();
        // What it has not given back is given back.
        for _ in 0..2 {
            let used = bench.driver.wait_used(TRANSMIT);
            bench.driver.take(&used);
        }
        bench.is_lost(&reason);
    }
}

/// Of what it says without being asked nothing is read, and it is not taken for an answer.
#[test]
fn a_back_end_that_speaks_unasked_is_lost() {
    let mut bench = bench_of(SET_VRING_ENABLE, |body| {
        let head = [SET_VRING_ENABLE, 5, 8].map(u32::to_le_bytes).concat();
        let answer = [&head[..], &0u64.to_le_bytes()].concat();
        // The first queue's answer three times over.
        Answer::Bytes(if body[0] == 0 { answer.repeat(3) } else { answer })
    });
    bench.driver.initialize(PLAIN);
    bench.driver.wait("the link going down", || (bench.status() == 0).then_some(()));
    let shown = shown(&bench.driver, "backend");
    bench.is_lost(shown.strip_prefix("gone: ").expect("it is gone"));
}
