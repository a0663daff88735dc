//! The endpoint's calls, with a guest that consists of a fake driver on a thread of its own.

use super::*;
use devices::virtio::vsock::fake_guest::{FakeGuest, packet};
use devices::virtio::vsock::{Header, Op, PortPair, VsockLimits};
use std::cell::RefCell;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::LocalSet;

const PATIENCE: Duration = Duration::from_secs(30);
const PAIR: PortPair = PortPair { guest: 5000, host: 1024 };

type Endpoint = host_vsock_endpoint::Client;

/// A test with a guest and the endpoint of its host.
fn story<F: Future<Output = ()>>(tell: impl FnOnce(Guest, Endpoint) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let guest = FakeGuest::ready(64);
    let endpoint = capnp_rpc::new_client(VsockEndpoint::new(guest.host.clone()));
    let told = async { tokio::time::timeout(PATIENCE, tell(Guest(Some(guest)), endpoint)).await };
    LocalSet::new().block_on(&runtime, told).expect("in time");
}

/// The guest, which waits on another thread.
struct Guest(Option<FakeGuest>);

impl Guest {
    async fn does<T: Send + 'static>(&mut self, act: impl FnOnce(&mut FakeGuest) -> T + Send + 'static) -> T {
        let mut guest = self.0.take().expect("it does one thing at a time");
        let done = tokio::task::spawn_blocking(move || {
            let result = act(&mut guest);
            (guest, result)
        });
        let (guest, result) = done.await.expect("no panic");
        self.0 = Some(guest);
        result
    }

    async fn sends(&mut self, header: Header, payload: &'static [u8]) {
        self.does(move |guest| guest.send(&header, payload)).await;
    }

    async fn gets(&mut self, op: Op) -> (Header, Vec<u8>) {
        self.does(move |guest| guest.receive_op(op)).await
    }
}

/// Notes what it is written, and how it ends.
#[derive(Default)]
struct Written {
    bytes: RefCell<Vec<u8>>,
    ended: Cell<bool>,
    dropped: Cell<bool>,
    changed: Notify,
    /// Nothing is taken while this is set.
    held: Cell<bool>,
}

struct Sink(Rc<Written>);

impl byte_stream::Server for Sink {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> capnp::Result<()> {
        while self.0.held.get() {
            self.0.changed.notified().await;
        }
        self.0.bytes.borrow_mut().extend(params.get()?.get_bytes()?);
        self.0.changed.notify_waiters();
        Ok(())
    }

    async fn end(self: Rc<Self>, _: byte_stream::EndParams, _: byte_stream::EndResults) -> capnp::Result<()> {
        self.0.ended.set(true);
        self.0.changed.notify_waiters();
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.0.dropped.set(true);
        self.0.changed.notify_waiters();
    }
}

impl Written {
    async fn until(&self, is_so: impl Fn(&Self) -> bool) {
        while !is_so(self) {
            self.changed.notified().await;
        }
    }
}

fn sink() -> (byte_stream::Client, Rc<Written>) {
    let written = Rc::new(Written::default());
    (capnp_rpc::new_client(Sink(written.clone())), written)
}

/// Accepts what comes on port 1024 and refuses the rest.
#[derive(Default)]
struct Acceptor {
    accepted: RefCell<Vec<(u32, byte_stream::Client, Rc<Written>)>>,
}

struct Accepting(Rc<Acceptor>);

impl vsock_acceptor::Server for Accepting {
    async fn accept(
        self: Rc<Self>,
        params: vsock_acceptor::AcceptParams,
        mut results: vsock_acceptor::AcceptResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        assert_eq!(params.get_src_cid(), 3);
        if params.get_port() == PAIR.host {
            let (client, written) = sink();
            results.get().set_output(client);
            self.0.accepted.borrow_mut().push((params.get_src_port(), params.get_input()?, written));
        }
        Ok(())
    }
}

impl Acceptor {
    fn client(self: &Rc<Self>) -> vsock_acceptor::Client {
        capnp_rpc::new_client(Accepting(self.clone()))
    }

    fn take(&self) -> (byte_stream::Client, Rc<Written>) {
        let (_, input, written) = self.accepted.borrow_mut().pop().expect("it was asked");
        (input, written)
    }
}

async fn listen(
    endpoint: &Endpoint,
    port: u32,
    acceptor: vsock_acceptor::Client,
) -> Result<vsock_listener::Client, Failure> {
    let mut request = endpoint.listen_request();
    request.get().set_port(port);
    request.get().set_acceptor(acceptor);
    let answer = request.send().promise.await.unwrap();
    let answer = answer.get().unwrap();
    match answer.has_error() {
        true => Err(Failure::read(answer.get_error().unwrap()).unwrap()),
        false => Ok(answer.get_listener().unwrap()),
    }
}

async fn write(stream: &byte_stream::Client, bytes: &[u8]) -> capnp::Result<()> {
    let mut request = stream.write_request();
    request.get().set_bytes(bytes);
    request.send().await
}

async fn end(stream: &byte_stream::Client) -> capnp::Result<()> {
    stream.end_request().send().promise.await.map(drop)
}

/// A connection of the guest's, accepted.
async fn accepted(
    guest: &mut Guest,
    endpoint: &Endpoint,
) -> (vsock_listener::Client, byte_stream::Client, Rc<Written>) {
    let acceptor = Rc::new(Acceptor::default());
    let listener = listen(endpoint, PAIR.host, acceptor.client()).await.unwrap();
    guest.sends(packet(PAIR, Op::Request), &[]).await;
    guest.gets(Op::Response).await;
    let (input, written) = acceptor.take();
    (listener, input, written)
}

#[test]
fn an_accepted_stream_carries_bytes_both_ways_to_their_ends() {
    story(async |mut guest, endpoint| {
        let (_listener, input, written) = accepted(&mut guest, &endpoint).await;
        guest.sends(packet(PAIR, Op::Rw), b"question").await;
        guest.sends(Header { flags: 2, ..packet(PAIR, Op::Shutdown) }, &[]).await;
        written.until(|written| written.ended.get()).await;
        assert_eq!(*written.bytes.borrow(), b"question");
        write(&input, b"answer").await.unwrap();
        end(&input).await.unwrap();
        // The host wants no more bytes either, once the guest has said that none come.
        let mut seen = (Vec::new(), 0);
        while seen.1 != 3 {
            let (header, bytes) = guest.does(FakeGuest::receive).await;
            seen.0.extend(bytes);
            seen.1 |= if header.op == Op::Shutdown as u16 { header.flags } else { 0 };
        }
        assert_eq!(seen.0, b"answer");
    });
}

#[test]
fn the_guests_reset_is_an_end_without_end() {
    story(async |mut guest, endpoint| {
        let (_listener, input, written) = accepted(&mut guest, &endpoint).await;
        guest.sends(packet(PAIR, Op::Rw), b"part").await;
        guest.sends(packet(PAIR, Op::Rst), &[]).await;
        written.until(|written| written.dropped.get()).await;
        assert!(!written.ended.get());
        assert_eq!(*written.bytes.borrow(), b"part");
        let wrote = write(&input, b"x").await.and(end(&input).await);
        assert!(wrote.is_err());
    });
}

#[test]
fn a_client_that_drops_a_stream_resets_it() {
    story(async |mut guest, endpoint| {
        let (_listener, input, written) = accepted(&mut guest, &endpoint).await;
        drop(input);
        guest.gets(Op::Rst).await;
        written.until(|written| written.dropped.get()).await;
        assert!(!written.ended.get());
    });
}

#[test]
fn a_client_that_does_not_read_holds_the_guest_up_by_its_credit() {
    story(async |mut guest, endpoint| {
        let (_listener, _input, written) = accepted(&mut guest, &endpoint).await;
        written.held.set(true);
        let window = VsockLimits::default().wide_window as usize;
        const PIECE: &[u8] = &[7; 32 << 10];
        // Whatever is taken on the way to the client, more than that and a window never is.
        let sent = guest.does(move |guest| {
            let (mut sent, mut taken) = (0, 0);
            while sent - taken + PIECE.len() <= window && sent < 100 * window {
                guest.send(&packet(PAIR, Op::Rw), PIECE);
                sent += PIECE.len();
                while let Some((header, _)) = guest.poll() {
                    taken = header.fwd_cnt as usize;
                }
            }
            sent
        });
        let sent = sent.await;
        assert!(sent < 4 * window, "{sent} bytes were taken for a client that takes none");
        written.held.set(false);
        written.changed.notify_waiters();
        written.until(|written| written.bytes.borrow().len() == sent).await;
    });
}

#[test]
fn requests_are_refused_by_port_and_by_dropping_the_listener() {
    story(async |mut guest, endpoint| {
        let acceptor = Rc::new(Acceptor::default());
        let listener = listen(&endpoint, 9, acceptor.client()).await.unwrap();
        let other = PortPair { host: 9, ..PAIR };
        guest.sends(packet(other, Op::Request), &[]).await;
        guest.gets(Op::Rst).await;
        let taken = listen(&endpoint, 9, acceptor.client()).await.err().unwrap();
        assert_eq!(taken.code, GuestError::AlreadyBound);
        drop(listener);
        while listen(&endpoint, 9, acceptor.client()).await.is_err() {
            tokio::task::yield_now().await;
        }
        let null = endpoint.listen_request().send().promise.await.unwrap();
        let failure = Failure::read(null.get().unwrap().get_error().unwrap()).unwrap();
        assert_eq!((failure.code, &*failure.detail), (GuestError::BadConfig, "acceptor: none was given"));
    });
}

#[test]
fn the_host_connects_or_learns_why_not() {
    story(async |mut guest, endpoint| {
        let connect = |port| {
            let (client, written) = sink();
            let mut request = endpoint.connect_request();
            request.get().set_guest_port(port);
            request.get().set_output(client);
            // A call in this process begins once somebody waits for it.
            (spawn_local(request.send().promise), written)
        };
        let (sent, _) = connect(80);
        let (request, _) = guest.gets(Op::Request).await;
        guest.sends(packet(PortPair { guest: 80, host: request.src_port }, Op::Rst), &[]).await;
        let answer = sent.await.unwrap().unwrap();
        let failure = Failure::read(answer.get().unwrap().get_error().unwrap()).unwrap();
        assert_eq!(failure.code, GuestError::ConnectionRefused);
        assert_eq!(failure.detail, "port 80 of the guest: the connection was refused");

        let (sent, written) = connect(81);
        let (request, _) = guest.gets(Op::Request).await;
        let pair = PortPair { guest: 81, host: request.src_port };
        guest.sends(packet(pair, Op::Response), &[]).await;
        let answer = sent.await.unwrap().unwrap();
        assert_eq!(answer.get().unwrap().get_host_port(), pair.host);
        guest.sends(packet(pair, Op::Rw), b"hello").await;
        written.until(|written| *written.bytes.borrow() == b"hello").await;

        let (sent, _) = connect(82);
        drop(guest);
        let answer = sent.await.unwrap().unwrap();
        assert!(answer.get().unwrap().has_error(), "a guest that ends answers nobody");
        written.until(|written| written.dropped.get()).await;
        let gone = listen(&endpoint, 1, Rc::new(Acceptor::default()).client()).await.err().unwrap();
        assert_eq!(gone.code, GuestError::NotRunning);
    });
}
