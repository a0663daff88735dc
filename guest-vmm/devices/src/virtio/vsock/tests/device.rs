//! The device by what a driver sees of it, and its host's side by what streams carry.

use super::super::fake_guest::{EVENT, FakeGuest, RX, TX};
use super::super::packet::SHUTDOWN_BOTH;
use super::super::{Vsock, VsockStream};
use super::*;
use crate::virtio::fake_driver::{Buffer, FakeDriver, PATIENCE};
use guest_saved_state::devices::vsock::VsockState;
use inspect::{Inspection, View};
use save_restore::SavedStateBlob;
use std::ops::{Deref, DerefMut};

/// A guest that gives the device room for packets.
struct Guest(FakeGuest);

impl Deref for Guest {
    type Target = FakeGuest;

    fn deref(&self) -> &FakeGuest {
        &self.0
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut FakeGuest {
        &mut self.0
    }
}

impl Guest {
    fn new() -> Self {
        Self(FakeGuest::ready(64))
    }

    /// A connection of the guest's to a port of the host's, accepted.
    fn connect(&mut self, pair: PortPair) -> VsockStream {
        let listener = self.host.listen(pair.host).unwrap();
        self.send(&packet(pair, Op::Request), &[]);
        let request = wait(listener.next()).unwrap();
        assert_eq!(request.ports(), pair);
        let stream = request.accept().unwrap();
        self.receive_op(Op::Response);
        stream
    }

    fn inspect(&self, path: &str, view: View) -> String {
        let mut device = self.driver.device();
        let inspection = Inspection::start(path, 8, view, |request| device.inspect_mut(request));
        wait(inspection.finish(PATIENCE)).to_json()
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await.expect("in time") })
}

fn read_some(stream: &mut VsockStream) -> Result<Vec<u8>, End> {
    let mut buffer = vec![0; 1 << 20];
    let count = wait(stream.reader.read(&mut buffer))?;
    buffer.truncate(count);
    Ok(buffer)
}

#[test]
fn the_driver_finds_its_address() {
    let guest = Guest::new();
    assert_eq!(guest.driver.config::<u64>(0), GUEST_CID);
    assert_eq!(guest.driver.offered() & 0b111, 1, "streams alone");
}

#[test]
fn bytes_pass_both_ways_and_each_way_ends() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(PAIR);
    guest.send(&packet(PAIR, Op::Rw), b"from the guest");
    assert_eq!(read_some(&mut stream), Ok(b"from the guest".to_vec()));
    wait(stream.writer.write_all(b"to the guest")).unwrap();
    let (header, payload) = guest.receive_op(Op::Rw);
    assert_eq!(payload, b"to the guest");
    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
    assert_eq!((header.src_port, header.dst_port), (PORT, GUEST_PORT));
    assert_eq!(header.fwd_cnt, 14, "what the host has read");
    stream.writer.end();
    assert_eq!(guest.receive_op(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    guest.send(&Header { flags: SHUTDOWN_BOTH, ..packet(PAIR, Op::Shutdown) }, &[]);
    guest.receive_op(Op::Rst);
    assert_eq!(read_some(&mut stream), Ok(vec![]));
}

#[test]
fn the_host_connects() {
    let mut guest = Guest::new();
    let host = guest.host.clone();
    let connecting = std::thread::spawn(move || wait(host.connect(80)));
    let (request, _) = guest.receive_op(Op::Request);
    let pair = PortPair { guest: 80, host: request.src_port };
    assert!(super::super::EPHEMERAL.contains(&pair.host));
    guest.send(&packet(pair, Op::Response), &[]);
    assert_eq!(connecting.join().unwrap().unwrap().ports(), pair);
    // The stream's halves were dropped one after the other, and the first may be told of alone.
    while guest.receive().0.op != Op::Rst as u16 {}
}

#[test]
fn a_host_that_does_not_read_holds_up_nobody_else() {
    let mut guest = Guest::new();
    let _slow = guest.connect(PAIR);
    let other = PortPair { guest: 1, host: PORT + 1 };
    let mut quick = guest.connect(other);
    let window = VsockLimits::default().wide_window as usize;
    for _ in 0..window / 65536 {
        guest.send(&packet(PAIR, Op::Rw), &[1; 65536]);
    }
    guest.send(&packet(other, Op::Rw), b"quick");
    assert_eq!(read_some(&mut quick), Ok(b"quick".to_vec()));
    guest.send(&packet(PAIR, Op::Rw), b"!");
    let (reset, _) = guest.receive_op(Op::Rst);
    assert_eq!(reset.dst_port, PAIR.guest, "credit is not a suggestion");
}

#[test]
fn a_guest_without_room_for_packets_is_waited_for() {
    let mut guest = Guest(FakeGuest::ready(0));
    let listener = guest.host.listen(PORT).unwrap();
    guest.send(&packet(PAIR, Op::Request), &[]);
    let mut stream = wait(listener.next()).unwrap().accept().unwrap();
    wait(stream.writer.write_all(&[9; 10_000])).unwrap();
    guest.provide(8);
    guest.receive_op(Op::Response);
    let pieces: Vec<_> = (0..3).map(|_| guest.receive_op(Op::Rw).1.len()).collect();
    assert_eq!(pieces, [4052, 4052, 1896]);
    wait(stream.writer.flush()).unwrap();
}

#[test]
fn malformed_packets_do_not_end_the_device() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(PAIR);
    guest.driver.request(TX, &[Buffer::Out(&[0; 43])]);
    guest.driver.request(TX, &[Buffer::In(100)]);
    let lying = Header { len: u32::MAX, ..packet(PortPair { guest: 7, ..PAIR }, Op::Rw) };
    guest.driver.request(TX, &[Buffer::Out(&lying.to_bytes())]);
    guest.receive_op(Op::Rst);
    guest.send(&packet(PAIR, Op::Rw), b"alive");
    assert_eq!(read_some(&mut stream), Ok(b"alive".to_vec()));
    assert!(!guest.driver.needs_reset());
    assert_eq!(guest.host.counters().malformed_packets, 2);
}

#[test]
fn a_buffer_too_small_for_any_packet_asks_for_a_reset() {
    let mut guest = Guest(FakeGuest::ready(0));
    guest.driver.send(RX, &[Buffer::In(44)]);
    guest.send(&packet(PAIR, Op::Request), &[]);
    guest.driver.wait_needs_reset();
    guest.driver.initialize(0);
    guest.provide(4);
    guest.connect(PAIR);
}

#[test]
fn a_pause_keeps_connections_and_a_reset_ends_them() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(PAIR);
    guest.driver.stop();
    wait(stream.writer.write_all(b"while it rests")).unwrap();
    guest.driver.start();
    assert_eq!(guest.receive_op(Op::Rw).1, b"while it rests");
    guest.driver.initialize(0);
    assert_eq!(read_some(&mut stream), Err(End::Reset));
    assert_eq!(wait(stream.writer.write(b"x")), Err(End::Reset));
    drop(stream);
    guest.provide(8);
    guest.connect(PAIR);
}

#[test]
fn a_restored_driver_hears_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(PAIR);
    guest.driver.send(EVENT, &[Buffer::In(4)]);
    guest.driver.stop();
    let state = guest.driver.save();
    let (spec, host) = Vsock::spec("vsock", VsockLimits::default());
    let mut restored = FakeGuest { driver: FakeDriver::stopped(spec), host };
    restored.driver.restore(&guest.driver, state).unwrap();
    restored.driver.start();
    let used = restored.driver.wait_used(EVENT);
    assert_eq!((used.written, restored.driver.take(&used).data), (4, vec![0; 4]));
    guest.driver.start();
    guest.send(&packet(PAIR, Op::Rw), b"what was saved goes on");
    assert_eq!(read_some(&mut stream), Ok(b"what was saved goes on".to_vec()));
    assert!(guest.driver.poll(EVENT).is_none());
}

#[test]
fn a_restore_in_place_resets_connections_and_refuses_another_address() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(PAIR);
    guest.driver.stop();
    let state = guest.driver.save();
    guest.driver.device().restore_blob(state).unwrap();
    assert_eq!(read_some(&mut stream), Err(End::Reset));
    let mut mmio: guest_saved_state::devices::virtio::VirtioState = guest.driver.save().parse().unwrap();
    mmio.device = Some(SavedStateBlob::new(&VsockState { guest_cid: 4 }));
    let error = guest.driver.device().restore_blob(SavedStateBlob::new(&mmio)).unwrap_err();
    assert_eq!(error.to_string(), "guest_cid is 4, which is not valid");
}

#[test]
fn the_end_of_the_guest_is_the_end_of_everything() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(PAIR);
    let listener = guest.host.listen(PORT + 1).unwrap();
    let host = guest.host.clone();
    let waiting = std::thread::spawn(move || wait(listener.next()).is_none());
    drop(guest);
    assert!(waiting.join().unwrap());
    assert_eq!(read_some(&mut stream), Err(End::Reset));
    assert!(host.listen(1).is_err());
    assert!(wait(host.connect(1)).is_err());
}

#[test]
fn it_shows_its_connections_to_those_who_may_see_them() {
    let mut guest = Guest::new();
    let _stream = guest.connect(PAIR);
    let _listener = guest.host.listen(7).unwrap();
    guest.send(&packet(PAIR, Op::Rw), b"12345");
    assert_eq!(guest.inspect("device/connection_count", View::WithoutSensitive), "1");
    assert_eq!(guest.inspect("device/listeners/7/waiting_requests", View::WithoutSensitive), "0");
    let path = "device/connections/guest-5000-host-1024/waiting_for_host_bytes";
    assert_eq!(guest.inspect(path, View::Everything), "5");
    assert_ne!(guest.inspect(path, View::WithoutSensitive), "5");
}
