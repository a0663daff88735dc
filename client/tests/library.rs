//! The library against a real server of the protocol over a socket pair.

mod fake;

use capnp::traits::HasTypeId;
use capnp_rpc::rpc_capnp::{call, message};
use fake::{HostServer, Machine, TOKEN};
use guest_client::{
    BlockConfig, BlockMode, Callback, ClientError, ConnectError, DevicesConfig, Exit, GuestConfig,
    GuestError, Host, MemoryConfig, OnReset, Outcome, Phase, SerialChunk, VpAffinity, VpState,
};
use guest_schema::common_capnp::byte_stream;
use guest_schema::guest_capnp::{guest, guest_lifecycle};
use guest_schema::host_capnp::guest_host;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

async fn locally<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

fn file_with(bytes: &[u8]) -> std::fs::File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(bytes).expect("written");
    file
}

fn config(kernel: Option<guest_client::FileSource>, cpus: u32) -> GuestConfig {
    GuestConfig {
        saved: None,
        kernel,
        ramdisk: None,
        cmdline: String::new(),
        cpus,
        affinity: VpAffinity::Any,
        cpuid_mask: Vec::new(),
        memory: MemoryConfig::of_bytes(1 << 20),
        on_reset: OnReset::Restart,
        units: Vec::new(),
        devices: DevicesConfig::default(),
        catch_up_time: false,
        debug_exit: false,
    }
}

fn host() -> (Host, Machine) {
    let machine = Machine::new();
    (Host::over(HostServer::start(&machine)).expect("a connection"), machine)
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> guest_client::Failure {
    match answer {
        Err(ClientError::Refused(failure)) => failure,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

async fn all_output(mut chunks: mpsc::Receiver<SerialChunk>) -> Vec<u8> {
    let mut text = Vec::new();
    while let Some(chunk) = chunks.recv().await {
        assert_eq!(chunk.lost, 0);
        text.extend(chunk.bytes);
    }
    text
}

/// A stream socket for the library whose other end shows where each write ended.
fn socket_that_shows_writes() -> (UnixStream, std::os::fd::OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a pair");
    (ours.into(), theirs)
}

fn writes_on(socket: &std::os::fd::OwnedFd) -> Vec<Vec<u8>> {
    let mut writes = Vec::new();
    let mut buffer = vec![0; 256 << 10];
    while let Ok((length, _)) = rustix::net::recv(socket, &mut buffer[..], rustix::net::RecvFlags::DONTWAIT) {
        writes.push(buffer[..length].to_vec());
    }
    writes
}

fn calls_in(mut bytes: &[u8]) -> Vec<&'static str> {
    let mut calls = Vec::new();
    while !bytes.is_empty() {
        let message = capnp::serialize::read_message(&mut bytes, Default::default()).expect("a message");
        calls.push(
            match message.get_root::<message::Reader<'_>>().expect("a root").which().expect("known") {
                message::Bootstrap(_) => "bootstrap",
                message::Call(call) => method(call.expect("a call")),
                _ => "other",
            },
        );
    }
    calls
}

fn method(call: call::Reader<'_>) -> &'static str {
    match (call.get_interface_id(), call.get_method_id()) {
        (guest_host::Client::TYPE_ID, 1) => "launchProxied",
        (guest_lifecycle::Client::TYPE_ID, 0) => "create",
        (guest_lifecycle::Client::TYPE_ID, 1) => "bind",
        (guest_lifecycle::Client::TYPE_ID, 2) => "run",
        (guest::Client::TYPE_ID, 0) => "getSerial",
        (byte_stream::Client::TYPE_ID, 0) => "write",
        _ => "another",
    }
}

#[tokio::test]
async fn a_life_goes_out_in_one_flight_without_an_answer() {
    locally(async {
        let (stream, peer) = socket_that_shows_writes();
        let host = Host::over(stream).expect("a connection");
        let proxied = host.launch_proxied("one");
        let created = proxied.lifecycle.create(&config(None, 1));
        let serial = proxied.lifecycle.bind().serial_input();
        let written = serial.write(b"hello");
        let ended = proxied.lifecycle.run();
        // The peer never answers and nothing is awaited: all of it comes nonetheless, each message in one write.
        let expected = ["bootstrap", "launchProxied", "create", "bind", "getSerial", "write", "run"];
        let mut writes: Vec<Vec<u8>> = Vec::new();
        while writes.iter().flat_map(|write| calls_in(write)).count() < expected.len() {
            tokio::task::yield_now().await;
            writes.extend(writes_on(&peer));
        }
        let calls: Vec<_> = writes.iter().flat_map(|write| calls_in(write)).collect();
        assert_eq!(calls, expected);
        assert!(writes.len() <= expected.len(), "{} writes for {} messages", writes.len(), expected.len());
        drop((created, written, ended));
    })
    .await;
}

#[tokio::test]
async fn calls_that_are_not_awaited_arrive_in_order() {
    locally(async {
        let (host, machine) = host();
        let launched = host.launch("one").expect("sent");
        let lifecycle = launched.lifecycle;
        let (output, chunks) = mpsc::channel(1);
        let created = lifecycle.create(&config(Some(lifecycle.file(file_with(b"READY\n"))), 1));
        let serial = lifecycle.bind().serial(output);
        let control = lifecycle.control();
        let ended = lifecycle.run();
        assert_eq!(launched.id.await.expect("launched"), "one");
        created.await.expect("created");
        serial.opened().await.expect("opened");
        let log = machine.log().into_iter().filter(|call| *call != "getSerial");
        assert_eq!(log.collect::<Vec<_>>(), ["create", "bind", "control", "run"]);
        serial.write(b"hello").await.expect("written");
        serial.write(b"poweroff").await.expect("written");
        serial.end().await.expect("accepted");
        ended.await.expect("a clean end");
        assert_eq!(all_output(chunks).await, b"READY\nhellopoweroff");
        assert_eq!(launched.exit.terminated().await.expect("known"), Exit::clean("powered off"));
        drop(control);
    })
    .await;
}

#[tokio::test]
async fn a_failed_create_is_told_by_everything_that_followed() {
    locally(async {
        let (host, _machine) = host();
        let lifecycle = host.launch("one").expect("sent").lifecycle;
        let created = lifecycle.create(&config(None, 0));
        let guest = lifecycle.bind();
        let serial = guest.serial_input();
        let state = guest.observer().state();
        let control = lifecycle.control();
        let paused = control.pause();
        let ended = lifecycle.run();
        let cause = refusal(created.await);
        assert_eq!((cause.code, &cause.detail[..]), (GuestError::BadConfig, "cpus: 0 is not 1 to 254"));
        for failure in [refusal(guest.bound().await), refusal(control.opened().await), refusal(ended.await)] {
            assert_eq!(failure.code, GuestError::NotCreated);
            assert_eq!(failure.cause.as_deref(), Some(&cause));
        }
        assert_eq!(refusal(serial.opened().await).code, GuestError::NotCreated);
        assert_eq!(refusal(serial.end().await).code, GuestError::NotCreated);
        assert_eq!(refusal(state.await).code, GuestError::NotCreated);
        assert_eq!(refusal(paused.await).code, GuestError::NotCreated);
    })
    .await;
}

#[tokio::test]
async fn a_refused_launch_is_told_by_every_call() {
    locally(async {
        let (host, _machine) = host();
        let launched = host.launch("taken").expect("sent");
        let created = launched.lifecycle.create(&config(None, 1));
        let ended = launched.lifecycle.run();
        for failure in [refusal(created.await), refusal(ended.await), refusal(launched.id.await)] {
            assert_eq!(failure.to_string(), "badConfig: id: \"taken\" is taken");
        }
        assert_eq!(refusal(launched.exit.terminated().await).code, GuestError::BadConfig);
    })
    .await;
}

#[tokio::test]
async fn a_late_reader_gets_all_output_in_order() {
    locally(async {
        let (host, _machine) = host();
        let lifecycle = host.launch("one").expect("sent").lifecycle;
        let text: Vec<u8> = (0..3u32 << 18).flat_map(u32::to_le_bytes).collect();
        let (output, chunks) = mpsc::channel(1);
        let created = lifecycle.create(&config(Some(lifecycle.file(file_with(&text))), 1));
        let guest = lifecycle.bind();
        let _serial = guest.serial(output);
        let ended = lifecycle.run();
        created.await.expect("created");
        // The whole life passes before the first byte is read.
        let stopped = lifecycle.stop();
        assert_eq!(refusal(ended.await).code, GuestError::ControllerForcedHalt);
        stopped.await.expect("stopped");
        assert_eq!(guest.terminated().await.expect("known").outcome, Outcome::Forced);
        assert!(all_output(chunks).await == text, "the output is what the guest printed");
    })
    .await;
}

#[tokio::test]
async fn a_reader_that_goes_away_stops_the_output_only() {
    locally(async {
        let (host, _machine) = host();
        let lifecycle = host.launch("one").expect("sent").lifecycle;
        let (output, chunks) = mpsc::channel(1);
        drop(chunks);
        let created = lifecycle.create(&config(Some(lifecycle.file(file_with(b"nobody reads this"))), 1));
        let guest = lifecycle.bind();
        let _serial = guest.serial(output);
        let ended = lifecycle.run();
        created.await.expect("created");
        let other = Rc::new(std::cell::RefCell::new(Vec::new()));
        let seen = other.clone();
        let serial = guest.serial(Callback::new(move |bytes, _| seen.borrow_mut().extend_from_slice(bytes)));
        drop(_serial);
        serial.opened().await.expect("opened");
        lifecycle.stop().await.expect("stopped");
        refusal(ended.await);
        // The server lets go of the output after the last byte.
        while Rc::strong_count(&other) > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(&other.borrow()[..], b"nobody reads this");
    })
    .await;
}

#[tokio::test]
async fn a_proxied_lifecycle_serves_its_files() {
    locally(async {
        let (host, machine) = host();
        let launched = host.launch_proxied("one");
        let kernel: Vec<u8> = (0..(5u32 << 18) + 3).flat_map(u32::to_le_bytes).collect();
        let file = file_with(&kernel);
        let (output, chunks) = mpsc::channel(4);
        let lifecycle = launched.lifecycle;
        let created = lifecycle.create(&config(Some(lifecycle.file(file)), 1));
        let _serial = lifecycle.bind().serial(output);
        let ended = lifecycle.run();
        created.await.expect("created");
        let reader = tokio::task::spawn_local(all_output(chunks));
        // A pending run does not keep the lease.
        drop(lifecycle);
        let ended = ended.await;
        assert!(matches!(ended, Err(ClientError::Lost(_))), "{ended:?}");
        machine.lease_ended().await;
        assert!(reader.await.expect("no panic") == kernel, "more than one read's worth arrived whole");
        assert_eq!(launched.exit.terminated().await.expect("known").outcome, Outcome::Forced);
    })
    .await;
}

#[tokio::test]
async fn dropping_the_lifecycle_ends_the_lease_and_fails_what_is_pending() {
    locally(async {
        let (host, machine) = host();
        let launched = host.launch("one").expect("sent");
        let lifecycle = launched.lifecycle;
        let created = lifecycle.create(&config(None, 1));
        let guest = lifecycle.bind();
        let ended = lifecycle.run();
        created.await.expect("created");
        let terminated = guest.terminated();
        drop(lifecycle);
        assert!(matches!(ended.await, Err(ClientError::Lost(_))));
        assert!(matches!(terminated.await, Err(ClientError::Lost(_))));
        machine.lease_ended().await;
        assert_eq!(launched.exit.terminated().await.expect("known").outcome, Outcome::Forced);
    })
    .await;
}

#[tokio::test]
async fn a_guest_outlives_the_connection_to_the_service() {
    locally(async {
        let (host, machine) = host();
        let launched = host.launch("one").expect("sent");
        launched.id.await.expect("launched");
        drop((host, launched.exit));
        launched.lifecycle.create(&config(None, 1)).await.expect("created");
        let state = launched.lifecycle.control().observer().state().await.expect("a state");
        assert_eq!((state.phase, &state.vps[..], state.resets), (Phase::Empty, &[VpState::Halted][..], 1));
        assert_eq!(machine.log(), ["create", "control"]);
    })
    .await;
}

/// What a guest of the fake's snapshot is granted: its disk.
fn grants(lifecycle: &guest_client::Lifecycle) -> GuestConfig {
    let image = lifecycle.file(file_with(&[0; 512]));
    let block = vec![BlockConfig::raw(image, BlockMode::VolatileWrite)];
    GuestConfig { devices: DevicesConfig { block, ..DevicesConfig::default() }, ..GuestConfig::new(None, 0) }
}

#[tokio::test]
async fn guests_go_on_from_a_snapshot_after_its_guests_end() {
    locally(async {
        let (host, machine) = host();
        let lifecycle = host.launch("one").expect("sent").lifecycle;
        lifecycle.create(&config(None, 1)).await.expect("created");
        let snapshot = lifecycle.control().snapshot().await.expect("taken");
        assert_eq!(snapshot.token(), TOKEN);
        drop(lifecycle);
        machine.lease_ended().await;
        let info = snapshot.info().await.expect("an info");
        // The capability that came over the guest's channel would say 0.
        assert_eq!((info.vps, &info.disks[..]), (2, &["root".to_owned()][..]));
        let direct = snapshot.launch("two").expect("sent");
        let proxied = snapshot.launch_proxied("three-1").expect("sent");
        // They need neither the snapshot nor, unless they are proxied, the connection.
        drop((snapshot, host));
        for (launched, outcome) in [(proxied, Outcome::Clean), (direct, Outcome::Forced)] {
            let created = launched.lifecycle.create(&grants(&launched.lifecycle));
            let ended = launched.lifecycle.run();
            launched.id.await.expect("launched");
            created.await.expect("created");
            if outcome == Outcome::Forced {
                launched.lifecycle.stop().await.expect("stopped");
            }
            assert_eq!(ended.await.is_ok(), outcome == Outcome::Clean);
            assert_eq!(launched.exit.terminated().await.expect("known").outcome, outcome);
        }
        assert_eq!(machine.forks().len(), 2);
    })
    .await;
}

#[tokio::test]
async fn a_snapshot_without_its_connection_launches_nothing_until_it_is_found_again() {
    locally(async {
        let (host, machine) = host();
        let lifecycle = host.launch("one").expect("sent").lifecycle;
        lifecycle.create(&config(None, 1)).await.expect("created");
        let control = lifecycle.control();
        control.opened().await.expect("opened");
        drop(host);
        let snapshot = control.snapshot().await.expect("taken");
        assert_eq!(snapshot.info().await.expect("an info").vps, 0, "it came over the guest's channel");
        for refused in [snapshot.launch("two").err(), snapshot.launch_proxied("two").err()] {
            match refused {
                Some(ClientError::Local { reason, .. }) => assert!(reason.contains("token"), "{reason}"),
                other => panic!("launched without a connection: {other:?}"),
            }
        }
        let other = Host::over(HostServer::start(&machine)).expect("a connection");
        let found = other.snapshot(snapshot.token()).await.expect("found");
        assert_eq!(found.launch("two").expect("sent").id.await.expect("launched"), "two");
        assert_eq!(refusal(other.snapshot(b"another").await.map(drop)).code, GuestError::BadConfig);
    })
    .await;
}

#[tokio::test]
async fn a_refused_snapshot_and_a_refused_fork_say_why() {
    locally(async {
        let (host, machine) = host();
        let found = host.find("one").await.expect("found");
        // What was found keeps the connection open.
        drop(host);
        let snapshot = found.control.snapshot().await.expect("taken");
        let fork = snapshot.launch("taken").expect("sent");
        let created = fork.lifecycle.create(&grants(&fork.lifecycle));
        assert_eq!(refusal(created.await).code, GuestError::BadConfig);
        assert_eq!(refusal(fork.id.await).code, GuestError::BadConfig);
        let fork = snapshot.launch("fork").expect("sent");
        let created = fork.lifecycle.create(&config(None, 1)).await;
        assert_eq!(refusal(created).detail, "0 disks are not the snapshot's");
        machine.end(Exit::clean("powered off"));
        assert_eq!(refusal(found.control.snapshot().await.map(drop)).code, GuestError::NotRunning);
    })
    .await;
}

#[tokio::test]
async fn a_lost_service_and_what_it_cannot_do_are_told_apart() {
    locally(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        drop(theirs);
        let lost = Host::over(ours).expect("a connection");
        assert!(matches!(lost.list().await, Err(ClientError::Lost(_))));
        let (host, _machine) = host();
        assert_eq!(host.list().await.expect("a list")[0].pid, 4711);
        match host.info().await {
            Err(ClientError::Protocol(text)) => assert!(text.contains("nimplemented"), "{text}"),
            other => panic!("the fake implements no info: {other:?}"),
        }
    })
    .await;
}

#[tokio::test]
async fn a_socket_that_cannot_be_reached_says_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("guestd.sock");
    assert!(matches!(Host::connect(&path).await, Err(ConnectError::Missing { .. })));
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    let error = Host::connect(&path).await.err().expect("nobody listens");
    assert!(matches!(error, ConnectError::NotListening { .. }) && error.nobody_there(), "{error}");
    let plain = folder.path().join("file");
    std::fs::write(&plain, "").expect("written");
    assert!(Host::connect(&plain).await.is_err());
}
