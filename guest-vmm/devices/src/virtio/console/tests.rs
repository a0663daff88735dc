//! The console, by what a driver and the host see of it.

use super::control::{DEVICE_READY, PORT_OPEN, PORT_READY};
use super::{Console, ConsoleHandle, ConsoleSize, NamedPort};
use crate::INPUT_CAPACITY;
use crate::inspected::inspected;
use crate::virtio::VirtioSpec;
use crate::virtio::fake_driver::{Buffer, FakeDriver};
use futures::FutureExt;
use guest_saved_state::devices::console::{ConsolePortState, ConsoleState};
use guest_saved_state::devices::virtio::VirtioState;
use save_restore::{RestoreError, SavedStateBlob};
use std::sync::{Arc, Mutex};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

const ALL_FEATURES: u64 = u64::MAX;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
const AGENT_RECEIVE: usize = 4;
const AGENT_TRANSMIT: usize = 5;
const SIZE: ConsoleSize = ConsoleSize { columns: 132, rows: 43 };

/// What a port has sent.
#[derive(Debug, Clone, Default)]
struct Sent(Arc<Mutex<Vec<u8>>>);

impl Sent {
    fn sink(&self) -> Arc<dyn crate::ByteSink> {
        let sent = self.0.clone();
        Arc::new(move |bytes: &[u8]| sent.lock().unwrap().extend(bytes))
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

/// A console and what its ports have sent: itself, and those that are named.
struct Ends {
    handle: ConsoleHandle,
    sent: Vec<Sent>,
}

fn spec(names: &[&str]) -> (VirtioSpec, Ends) {
    let sent: Vec<Sent> = (0..=names.len()).map(|_| Sent::default()).collect();
    let port = |(name, sent): (&&str, &Sent)| NamedPort { name: (*name).to_owned(), output: sent.sink() };
    let further = names.iter().zip(&sent[1..]).map(port).collect();
    let (spec, handle) = Console::spec("console", sent[0].sink(), further);
    (spec, Ends { handle, sent })
}

fn plain() -> (FakeDriver, Ends) {
    let (spec, ends) = spec(&[]);
    (FakeDriver::ready(spec, ALL_FEATURES), ends)
}

/// A console with the ports "agent" and "log", of which the driver knows nothing yet.
fn several() -> (FakeDriver, Ends) {
    let (spec, ends) = spec(&["agent", "log"]);
    (FakeDriver::ready(spec, ALL_FEATURES), ends)
}

fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

fn tell(driver: &mut FakeDriver, port: u32, event: u16, value: u16) {
    driver.request(CONTROL_TRANSMIT, &[Buffer::Out(&message(port, event, value))]);
}

/// The next message that the driver is told: port, event, value, details.
fn told(driver: &mut FakeDriver) -> (u32, u16, u16, Vec<u8>) {
    let reply = driver.request(CONTROL_RECEIVE, &[Buffer::In(256)]);
    let bytes = &reply.data[..usize::try_from(reply.written).unwrap()];
    let [port, event, value] = [&bytes[..4], &bytes[4..6], &bytes[6..8]]
        .map(|bytes| bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)));
    (port, u16::try_from(event).unwrap(), u16::try_from(value).unwrap(), bytes[8..].to_vec())
}

/// Reads so many bytes of a port.
fn read(driver: &mut FakeDriver, queue: usize, bytes: usize) -> Vec<u8> {
    let mut read = Vec::new();
    while read.len() < bytes {
        let reply = driver.request(queue, &[Buffer::In(1000), Buffer::In(3096)]);
        assert_ne!(reply.written, 0);
        read.extend(&reply.data[..usize::try_from(reply.written).unwrap()]);
    }
    read
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..=250).cycle().take(bytes).collect()
}

#[test]
fn bytes_go_both_ways() {
    for features in [0, ALL_FEATURES] {
        let (spec, Ends { handle, sent }) = spec(&[]);
        let mut driver = FakeDriver::ready(spec, features);
        driver.request(TRANSMIT, &[Buffer::Out(b"login"), Buffer::Out(b": ")]);
        driver.request(TRANSMIT, &[Buffer::Out(b"$ ")]);
        assert_eq!(sent[0].bytes(), b"login: $ ");
        driver.send(RECEIVE, &[Buffer::In(3), Buffer::In(16)]);
        assert_eq!(driver.poll(RECEIVE), None);
        assert_eq!(handle.input().push(b"root\n"), Some(5));
        let used = driver.wait_used(RECEIVE);
        let reply = driver.take(&used);
        assert_eq!((reply.written, &reply.data[..5]), (5, &b"root\n"[..]));
        assert_eq!(handle.input().push(b"ls"), Some(2));
        assert_eq!(driver.request(RECEIVE, &[Buffer::In(1)]).data, b"l");
        assert_eq!(driver.request(RECEIVE, &[Buffer::In(1)]).data, b"s");
    }
}

#[test]
fn the_longest_output_is_taken_whole() {
    let (mut driver, Ends { sent, .. }) = plain();
    let bytes = pattern(1 << 20);
    driver.request(TRANSMIT, &[Buffer::Out(&bytes[..70_000]), Buffer::Out(&bytes[70_000..])]);
    assert_eq!(sent[0].bytes(), bytes);
    driver.request(TRANSMIT, &[Buffer::In(10)]);
    assert_eq!(sent[0].bytes().len(), bytes.len(), "a buffer that is none of the driver's bytes");
}

#[test]
fn a_full_queue_takes_no_more_and_its_sender_learns_of_room() {
    let (mut driver, Ends { handle, .. }) = plain();
    let (bytes, input) = (pattern(INPUT_CAPACITY + 7), handle.input());
    assert_eq!(input.push(&bytes), Some(INPUT_CAPACITY));
    assert_eq!(input.push(&bytes), Some(0));
    let mut room = Box::pin(input.room());
    assert_eq!(room.as_mut().now_or_never(), None);
    let mut got = read(&mut driver, RECEIVE, 4096);
    futures::executor::block_on(room);
    assert_eq!(input.push(&bytes[INPUT_CAPACITY..]), Some(7));
    got.extend(read(&mut driver, RECEIVE, bytes.len() - got.len()));
    assert_eq!(got, bytes);
}

#[test]
fn a_sender_learns_that_the_console_is_gone() {
    let (driver, Ends { handle, .. }) = plain();
    let input = handle.input();
    assert_eq!(input.push(&pattern(INPUT_CAPACITY)), Some(INPUT_CAPACITY));
    let mut room = Box::pin(input.room());
    assert_eq!(room.as_mut().now_or_never(), None);
    drop(driver);
    futures::executor::block_on(room);
    assert_eq!(input.push(b"x"), None);
}

#[test]
fn a_stopped_console_holds_bytes_back_in_both_directions() {
    let (mut driver, Ends { handle, sent }) = plain();
    driver.send(RECEIVE, &[Buffer::In(16)]);
    driver.stop();
    handle.input().push(b"in");
    driver.send(TRANSMIT, &[Buffer::Out(b"out")]);
    assert_eq!((driver.poll(RECEIVE), driver.poll(TRANSMIT), sent[0].bytes()), (None, None, vec![]));
    driver.start();
    let used = driver.wait_used(RECEIVE);
    assert_eq!(driver.take(&used).data[..2], *b"in");
    driver.wait_used(TRANSMIT);
    assert_eq!(sent[0].bytes(), b"out");
}

#[test]
fn a_single_console_learns_its_size_from_the_configuration() {
    let (driver, Ends { handle, .. }) = plain();
    assert_eq!(driver.offered() & 0b111, 0b101, "no ports, no control messages");
    assert_eq!((driver.config::<u16>(0), driver.config::<u16>(2), driver.config::<u32>(4)), (0, 0, 1));
    driver.acknowledge();
    handle.resize(SIZE);
    assert_eq!(driver.acknowledge(), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!((driver.config::<u16>(0), driver.config::<u16>(2)), (132, 43));
    driver.reset();
    assert_eq!((driver.config::<u16>(0), handle.size()), (132, SIZE), "the size is the host's");
}

#[test]
fn characters_are_written_without_a_queue() {
    let (spec, Ends { sent, .. }) = spec(&[]);
    let driver = FakeDriver::stopped(spec);
    driver.write_config(8, u32::from(b'!'));
    driver.write_config(8, 0xffff_ff3f_u32);
    driver.write_config(4, u32::from(b'n'));
    assert_eq!(sent[0].bytes(), b"!?");
}

#[test]
fn the_driver_is_told_of_the_ports_in_order() {
    let (mut driver, Ends { handle, .. }) = several();
    assert_eq!(driver.config::<u32>(4), 3);
    tell(&mut driver, 0, DEVICE_READY, 1);
    for port in 0..3 {
        assert_eq!(told(&mut driver), (port, 1, 1, vec![]));
    }
    handle.resize(SIZE);
    tell(&mut driver, 1, PORT_READY, 1);
    assert_eq!(told(&mut driver), (1, 7, 1, b"agent".to_vec()));
    assert_eq!(told(&mut driver), (1, 6, 1, vec![]));
    tell(&mut driver, 0, PORT_READY, 1);
    assert_eq!(told(&mut driver), (0, 4, 1, vec![]));
    assert_eq!(told(&mut driver), (0, 5, 1, vec![132, 0, 43, 0]));
    assert_eq!(told(&mut driver), (0, 6, 1, vec![]));
    // One buffer waits; of two sizes the latter is told.
    driver.stop();
    handle.resize(ConsoleSize { columns: 1, rows: 2 });
    handle.resize(ConsoleSize { columns: 80, rows: 25 });
    driver.start();
    assert_eq!(told(&mut driver), (0, 5, 1, vec![80, 0, 25, 0]));
    driver.send(CONTROL_RECEIVE, &[Buffer::In(256)]);
    assert_eq!(driver.poll(CONTROL_RECEIVE), None);
    handle.resize(SIZE);
    let used = driver.wait_used(CONTROL_RECEIVE);
    assert_eq!(driver.take(&used).data[..12], [0, 0, 0, 0, 5, 0, 1, 0, 132, 0, 43, 0]);
}

/// A console whose driver knows all its ports and has been told everything.
fn introduced() -> (FakeDriver, Ends) {
    let (mut driver, ends) = several();
    tell(&mut driver, 0, DEVICE_READY, 1);
    for port in 0..3 {
        tell(&mut driver, port, PORT_READY, 1);
    }
    for _ in 0..3 + 2 + 2 + 2 {
        told(&mut driver);
    }
    (driver, ends)
}

#[test]
fn a_port_gets_its_input_while_it_is_open() {
    let (mut driver, Ends { handle, sent }) = introduced();
    let agent = handle.port_input("agent").unwrap();
    assert!(handle.port_input("none").is_none());
    driver.send(AGENT_RECEIVE, &[Buffer::In(4)]);
    agent.push(b"ping");
    handle.input().push(b"console");
    driver.request(AGENT_TRANSMIT, &[Buffer::Out(b"hello")]);
    assert_eq!((driver.poll(AGENT_RECEIVE), sent[1].bytes()), (None, b"hello".to_vec()));
    tell(&mut driver, 1, PORT_OPEN, 1);
    let used = driver.wait_used(AGENT_RECEIVE);
    assert_eq!(driver.take(&used).data, b"ping");
    agent.push(b"pong");
    // The worker looks for a buffer, and finds one only after the port was closed.
    tell(&mut driver, 1, PORT_OPEN, 0);
    driver.send(AGENT_RECEIVE, &[Buffer::In(4)]);
    driver.request(AGENT_TRANSMIT, &[Buffer::Out(b"!")]);
    assert_eq!(driver.poll(AGENT_RECEIVE), None);
    tell(&mut driver, 1, PORT_OPEN, 1);
    let used = driver.wait_used(AGENT_RECEIVE);
    assert_eq!(driver.take(&used).data, b"pong");
    assert_eq!((sent[0].bytes(), sent[2].bytes()), (vec![], vec![]));
    tell(&mut driver, 0, PORT_OPEN, 1);
    assert_eq!(read(&mut driver, RECEIVE, 7), b"console");
}

#[test]
fn a_driver_without_ports_has_the_console_alone() {
    let (spec, Ends { handle, sent }) = spec(&["agent"]);
    let mut driver = FakeDriver::ready(spec, 0);
    handle.input().push(b"in");
    handle.port_input("agent").unwrap().push(b"nobody");
    assert_eq!(read(&mut driver, RECEIVE, 2), b"in");
    driver.request(TRANSMIT, &[Buffer::Out(b"out")]);
    assert_eq!(sent[0].bytes(), b"out");
    driver.send(CONTROL_TRANSMIT, &[Buffer::Out(&message(0, DEVICE_READY, 1))]);
    driver.send(AGENT_RECEIVE, &[Buffer::In(16)]);
    driver.request(TRANSMIT, &[Buffer::Out(b"!")]);
    assert_eq!((driver.poll(CONTROL_TRANSMIT), driver.poll(AGENT_RECEIVE)), (None, None));
}

#[test]
fn a_reset_forgets_the_driver_and_keeps_the_input() {
    let (mut driver, Ends { handle, .. }) = introduced();
    let agent = handle.port_input("agent").unwrap();
    tell(&mut driver, 1, PORT_OPEN, 1);
    agent.push(b"kept");
    driver.initialize(ALL_FEATURES);
    driver.send(AGENT_RECEIVE, &[Buffer::In(4)]);
    tell(&mut driver, 1, PORT_OPEN, 1);
    assert_eq!(driver.poll(AGENT_RECEIVE), None, "the new driver has not said that it is ready for the port");
    tell(&mut driver, 1, PORT_READY, 1);
    tell(&mut driver, 1, PORT_OPEN, 1);
    let used = driver.wait_used(AGENT_RECEIVE);
    assert_eq!(driver.take(&used).data, b"kept");
}

#[test]
fn messages_that_make_no_sense_are_counted() {
    let (mut driver, _ends) = introduced();
    for (port, event) in [(3, PORT_READY), (u32::MAX, PORT_OPEN), (0, 1), (0, 8), (1, u16::MAX)] {
        tell(&mut driver, port, event, 1);
    }
    assert!(!driver.needs_reset());
    assert_eq!(inspected(&mut *driver.device(), "device/ignored_messages").to_string(), "5\n");
}

#[test]
fn a_driver_that_never_listens_costs_nothing() {
    let (mut driver, _ends) = several();
    for _ in 0..10_000 {
        tell(&mut driver, 1, PORT_READY, 1);
    }
    assert_eq!(told(&mut driver), (1, 7, 1, b"agent".to_vec()));
    assert_eq!(told(&mut driver), (1, 6, 1, vec![]));
    driver.send(CONTROL_RECEIVE, &[Buffer::In(256)]);
    tell(&mut driver, 9, PORT_READY, 1);
    assert_eq!(driver.poll(CONTROL_RECEIVE), None);
}

#[test]
fn buffers_that_cannot_be_used_need_a_reset() {
    type Shape = (&'static str, usize, Vec<Buffer<'static>>);
    let shapes: [Shape; 4] = [
        ("no room for input", RECEIVE, vec![Buffer::Out(b"read only")]),
        ("half a message", CONTROL_TRANSMIT, vec![Buffer::Out(&[0; 7])]),
        ("no message", CONTROL_TRANSMIT, vec![Buffer::In(8)]),
        ("no room for a message", CONTROL_RECEIVE, vec![Buffer::In(7)]),
    ];
    for (what, queue, buffers) in shapes {
        let (mut driver, Ends { handle, sent }) = introduced();
        tell(&mut driver, 0, PORT_OPEN, 1);
        handle.input().push(b"still there");
        handle.resize(SIZE);
        driver.send(queue, &buffers);
        driver.wait_needs_reset();
        assert_eq!(driver.poll(queue), None, "{what}");
        driver.initialize(0);
        assert_eq!(read(&mut driver, RECEIVE, 11), b"still there", "{what}");
        driver.request(TRANSMIT, &[Buffer::Out(b"well")]);
        assert_eq!(sent[0].bytes(), b"well", "{what}");
    }
}

#[test]
fn a_saved_console_goes_on_in_another() {
    let (mut old, Ends { handle, .. }) = introduced();
    tell(&mut old, 1, PORT_OPEN, 1);
    handle.resize(SIZE);
    handle.port_input("agent").unwrap().push(b"on its way");
    handle.port_input("log").unwrap().push(b"unread");
    old.stop();
    let state = old.save();
    let (spec, ends) = spec(&["agent", "log"]);
    let mut new = FakeDriver::stopped(spec);
    let input = ends.handle.port_input("log").unwrap();
    assert_eq!(input.push(&pattern(INPUT_CAPACITY)), Some(INPUT_CAPACITY));
    let mut room = Box::pin(input.room());
    assert_eq!(room.as_mut().now_or_never(), None);
    new.restore(&old, state.clone()).unwrap();
    assert_eq!(room.now_or_never(), Some(()), "the restored queue has room");
    assert_eq!((new.save(), ends.handle.size()), (state, SIZE));
    new.start();
    assert_eq!(told(&mut new), (0, 5, 1, vec![132, 0, 43, 0]), "what was not told yet");
    assert_eq!(read(&mut new, AGENT_RECEIVE, 10), b"on its way");
    tell(&mut new, 2, PORT_OPEN, 1);
    assert_eq!(read(&mut new, 6, 6), b"unread");
}

/// What a console with the port "agent" says of such a state; the state that it has is as it was.
fn refused(change: impl FnOnce(&mut ConsoleState)) -> String {
    let (spec, _ends) = spec(&["agent"]);
    let driver = FakeDriver::stopped(spec);
    let before = driver.save();
    let mut transport: VirtioState = before.parse().unwrap();
    let mut state: ConsoleState = transport.device.take().unwrap().parse().unwrap();
    change(&mut state);
    transport.device = Some(SavedStateBlob::new(&state));
    let error = driver.device().restore_blob(SavedStateBlob::new(&transport)).expect_err("refused");
    assert_eq!(driver.save(), before);
    match error {
        RestoreError::Invalid { field, value } => format!("{field}: {value}"),
        other => panic!("{other}"),
    }
}

#[test]
fn a_state_that_the_console_cannot_have_is_refused() {
    assert_eq!(refused(|state| state.columns = 0x1_0000), "columns: 0x10000");
    assert_eq!(refused(|state| state.rows = u32::MAX), "rows: 0xffffffff");
    assert_eq!(refused(|state| drop(state.ports.pop())), "ports: 1 ports long");
    assert_eq!(refused(|state| state.ports.push(ConsolePortState::default())), "ports: 3 ports long");
    assert_eq!(refused(|state| state.ports[1].name = "spy".into()), "ports[1].name: \"spy\"");
    assert_eq!(refused(|state| state.ports[1].open = true), "ports[1].open: true");
    assert_eq!(refused(|state| state.ports[1].notices = 1 << 7), "ports[1].notices: 0x80");
    let long = |state: &mut ConsoleState| state.ports[0].queued_input = vec![0; INPUT_CAPACITY + 1];
    assert_eq!(refused(long), "ports[0].queued_input: 65537 bytes long");
    let ready = |port: usize, notices| {
        move |state: &mut ConsoleState| {
            (state.ports[port].ready, state.ports[port].notices) = (true, notices);
        }
    };
    assert_eq!(refused(ready(1, 1 << 4)), "ports[1].notices: 0x10", "a port that is no console");
    assert_eq!(refused(ready(0, 1 << 7)), "ports[0].notices: 0x80", "the console has no name");
    assert_eq!(refused(ready(0, 1 << 8)), "ports[0].notices: 0x100", "no such event");
}

#[test]
fn it_shows_its_ports() {
    let (mut driver, Ends { handle, .. }) = introduced();
    handle.resize(SIZE);
    handle.port_input("agent").unwrap().push(b"four");
    driver.request(TRANSMIT, &[Buffer::Out(b"six...")]);
    let shown = inspected(&mut *driver.device(), "device").to_string();
    for line in
        ["size: 132x43", "    name: agent", "    queued_bytes: 4", "    sent_bytes: 6", "    open: false"]
    {
        assert!(shown.lines().any(|found| found == line), "{line:?} is not in\n{shown}");
    }
}
