//! A connection over a socket pair: descriptors arrive with their messages, and a hostile peer is cut off.

use capnp::message::Builder;
use capnp_rpc::rpc_capnp::message;
use capnp_rpc::rpc_twoparty_capnp::Side;
use guest_schema::common_capnp::file;
use guest_schema::{Failure, GuestError};
use guest_transport::{Connection, ConnectionError, Descriptors, Limit, Limits, broken, failure_of};
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::task::{JoinHandle, LocalSet, spawn_local};

/// A `File` whose contents is behind a descriptor: `read(n)` answers what the descriptor numbered n holds.
struct Shelf(Descriptors);

impl file::Server for Shelf {
    async fn read(
        self: Rc<Self>,
        params: file::ReadParams,
        mut results: file::ReadResults,
    ) -> capnp::Result<()> {
        let number = params.get()?.get_offset();
        let taken = self.0.take(number).map_err(|error| capnp::Error::failed(error.to_string()))?;
        let mut text = Vec::new();
        std::fs::File::from(taken).read_to_end(&mut text)?;
        results.get().set_bytes(&text);
        Ok(())
    }

    async fn size(self: Rc<Self>, _: file::SizeParams, _: file::SizeResults) -> capnp::Result<()> {
        std::future::pending().await
    }
}

type Served = JoinHandle<Result<(), ConnectionError>>;

fn serve(limits: Limits) -> (UnixStream, Served) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let connection = Connection::server(ours, limits, |descriptors| {
        let shelf: file::Client = capnp_rpc::new_client(Shelf(descriptors.clone()));
        shelf.client
    });
    (theirs, spawn_local(connection.expect("a socket").run()))
}

fn client(stream: UnixStream) -> (file::Client, Descriptors, Served) {
    let mut connection = Connection::client(stream, Limits::default()).expect("a socket");
    let file = connection.bootstrap(Side::Server);
    let descriptors = connection.descriptors();
    (file, descriptors, spawn_local(connection.run()))
}

fn pipe_with(text: &str) -> OwnedFd {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    writer.write_all(text.as_bytes()).expect("short texts fit");
    reader.into()
}

async fn locally<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

#[tokio::test]
async fn descriptors_arrive_with_the_message_that_names_them() {
    locally(async {
        let (stream, _served) = serve(Limits::default());
        let (file, descriptors, _running) = client(stream);
        let mut answers = Vec::new();
        for round in 0..500u32 {
            let mut request = file.read_request();
            request.get().set_offset(descriptors.push(pipe_with(&format!("text {round}"))));
            answers.push((round, request.send().promise));
            if round % 37 == 0 {
                tokio::task::yield_now().await;
            }
        }
        for (round, answer) in answers {
            let answer = answer.await.expect("the descriptor was there");
            let bytes = answer.get().and_then(|results| results.get_bytes()).expect("bytes");
            assert_eq!(bytes, format!("text {round}").as_bytes());
        }
    })
    .await;
}

#[tokio::test]
async fn answers_that_no_socket_takes_at_once_arrive_whole() {
    locally(async {
        let (stream, _served) = serve(Limits::default());
        let (file, descriptors, _running) = client(stream);
        for round in 0..3u8 {
            let text = vec![round; 1 << 20];
            let mut large = tempfile::tempfile().expect("a file");
            large.write_all(&text).and_then(|()| large.rewind()).expect("written");
            let mut request = file.read_request();
            request.get().set_offset(descriptors.push(large.into()));
            let answer = tokio::time::timeout(Duration::from_secs(60), request.send().promise).await;
            let answer = answer.expect("room is waited for, and noticed").expect("an answer");
            let bytes = answer.get().and_then(|results| results.get_bytes()).expect("bytes");
            assert!(bytes == text, "round {round}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_descriptor_is_there_once() {
    locally(async {
        let (stream, _served) = serve(Limits::default());
        let (file, _, _running) = client(stream);
        let mut request = file.read_request();
        request.get().set_offset(7);
        let error = request.send().promise.await.err().expect("nothing was sent");
        assert!(error.extra.contains("descriptor 7 was not handed over"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_floods_descriptors_is_cut_off() {
    locally(async {
        let (stream, served) = serve(Limits::default());
        let (file, descriptors, _running) = client(stream);
        for _ in 0..600 {
            descriptors.push(pipe_with("x"));
        }
        // One more call that needs none of them carries them over.
        file.size_request().send().promise.await.err().expect("the connection ends");
        assert!(matches!(served.await.expect("no panic"), Err(ConnectionError::Failed(_))));
    })
    .await;
}

#[tokio::test]
async fn a_broken_capability_tells_its_failure() {
    locally(async {
        let failure = Failure::new(GuestError::BadConfig, "memory.bytes: 0 is below 1 MiB");
        let file: file::Client = broken(&failure);
        let error = file.size_request().send().promise.await.err().expect("broken");
        assert_eq!(failure_of(&error), Some(failure));
    })
    .await;
}

#[tokio::test]
async fn ten_thousand_unanswered_calls_are_too_many() {
    locally(async {
        let (stream, served) = serve(Limits::default());
        let (file, _, _running) = client(stream);
        let calls: Vec<_> = (0..10_000).map(|_| file.size_request().send().promise).collect();
        let cut = served.await.expect("no panic").expect_err("cut off");
        assert!(matches!(cut, ConnectionError::Exceeded(Limit::Calls)), "{cut}");
        for call in calls {
            call.await.err().expect("no call is left unanswered");
        }
    })
    .await;
}

fn bytes_of(fill: impl FnOnce(message::Builder<'_>)) -> Vec<u8> {
    let mut builder = Builder::new_default();
    fill(builder.init_root());
    let mut bytes = Vec::new();
    capnp::serialize::write_message(&mut bytes, &builder).expect("written to memory");
    bytes
}

/// A peer that writes what it likes.
fn raw(limits: Limits) -> (tokio::net::UnixStream, Served) {
    let (stream, served) = serve(limits);
    stream.set_nonblocking(true).expect("a socket");
    (tokio::net::UnixStream::from_std(stream).expect("a socket"), served)
}

async fn send_raw(bytes: &[u8], limits: Limits) -> Result<(), ConnectionError> {
    let (mut stream, served) = raw(limits);
    stream.write_all(bytes).await.expect("the socket takes it");
    stream.shutdown().await.expect("half closed");
    served.await.expect("no panic")
}

#[tokio::test]
async fn garbage_half_a_message_and_huge_headers_end_the_connection() {
    locally(async {
        let whole = bytes_of(|message| message.init_bootstrap().set_question_id(0));
        let mut huge = vec![0, 0, 0, 0];
        huge.extend((8u32 << 20).to_le_bytes());
        for (what, bytes) in [
            ("garbage", &b"GET / HTTP/1.1\r\n\r\n"[..]),
            ("half a message", &whole[..whole.len() / 2]),
            ("a header that claims 64 MiB", &huge),
        ] {
            assert!(send_raw(bytes, Limits::default()).await.is_err(), "{what}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_stays_silent_is_cut_off() {
    locally(async {
        tokio::time::pause();
        let limits = Limits { handshake: Some(Duration::from_secs(10)), ..Limits::default() };
        let (_silent, served) = serve(limits);
        let cut = served.await.expect("no panic").expect_err("cut off");
        assert!(matches!(cut, ConnectionError::Exceeded(Limit::Handshake)), "{cut}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_cut_off() {
    locally(async {
        let limits = Limits { queued_soft: usize::MAX, queued_hard: 1 << 20, ..Limits::default() };
        let (mut stream, served) = raw(limits);
        let mut question = 0;
        while !served.is_finished() {
            let ask = bytes_of(|message| message.init_bootstrap().set_question_id(question));
            let finish = bytes_of(|message| {
                let mut finish = message.init_finish();
                finish.set_question_id(question);
                finish.set_release_result_caps(true);
            });
            question += 1;
            if stream.write_all(&[ask, finish].concat()).await.is_err() {
                break;
            }
        }
        let cut = served.await.expect("no panic").expect_err("cut off");
        assert!(matches!(cut, ConnectionError::Exceeded(Limit::Queued)), "{cut}");
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_is_dropped_is_closed_though_capabilities_are_held() {
    locally(async {
        let (stream, served) = serve(Limits::default());
        let (file, _, running) = client(stream);
        let _call = file.size_request().send().promise;
        tokio::task::yield_now().await;
        running.abort();
        served.await.expect("no panic").expect("a peer that goes away is no error");
    })
    .await;
}
