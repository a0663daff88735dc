//! Tests of saved state: a board of restored devices goes on as the one that was saved, and a state that no device can be in is
//! refused and changes nothing.

use crate::ioapic::tests::{Driver, Recorder, Told, ioapic};
use crate::rtc::tests::Hand;
use crate::{
    AcpiPower, DebugExit, Device, GenericEvent, GenericEventDevice, GenericEventLine, GuestPanic, IoApic,
    IrqLine, PIN_COUNT, Pvpanic, Rtc, SerialInput, SerialPort,
};
use guest_saved_state::devices::generic_event::GenericEventState;
use guest_saved_state::devices::i8042::I8042State;
use guest_saved_state::devices::ioapic::IoApicState;
use guest_saved_state::devices::rtc::RtcState;
use guest_saved_state::devices::serial::SerialPortState;
use processor::{MsiRequest, PowerRequest};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use save_restore::{NoSavedState, RestoreError, SavedStateBlob, SavedStateRoot};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

const SERIAL_PIN: u8 = 4;
const EVENT_PIN: u8 = 9;
/// The pin of a line that is driven by nobody but the test.
const OTHER_PIN: u8 = 10;

/// The devices, in the order of [`Board::devices`]. The generation ID is none of them: restored, it is meant to differ.
const IOAPIC: usize = 0;
const SERIAL: usize = 1;
const RTC: usize = 2;
const KEYBOARD: usize = 3;
const ACPI_POWER: usize = 4;
const EVENTS: usize = 5;
const PVPANIC: usize = 6;
const DEBUG_EXIT: usize = 7;
const DEVICES: usize = 8;

/// What happens to a board.
#[derive(Debug, Clone)]
enum Event {
    Read { device: usize, offset: u64, width: usize },
    Write { device: usize, offset: u64, data: Vec<u8> },
    Input(Vec<u8>),
    Line(bool),
    Raise(GenericEvent),
    EndOfInterrupt(u8),
    Wait { nanoseconds: u64 },
    Reset(usize),
}

/// What can be told from outside.
#[derive(Debug, PartialEq)]
struct Seen {
    read: Vec<u8>,
    power: Option<PowerRequest>,
    accepted: Option<usize>,
    told: Vec<Told>,
    sent: Vec<u8>,
    panics: Vec<GuestPanic>,
}

struct Board {
    devices: [Arc<Mutex<dyn Device>>; DEVICES],
    input: SerialInput,
    line: IrqLine,
    events: Arc<Mutex<GenericEventDevice>>,
    ioapic: Arc<Mutex<IoApic>>,
    routing: Recorder,
    routes: BTreeMap<u8, MsiRequest>,
    output: Arc<Mutex<Vec<u8>>>,
    panics: Arc<Mutex<Vec<GuestPanic>>>,
    clock: Hand,
}

impl Board {
    /// A board that runs, at the host's time. The interrupts of the serial port and of events arrive.
    fn new(clock: &Hand) -> Self {
        let (ioapic, routing) = ioapic();
        Driver(ioapic.clone()).set_entry(SERIAL_PIN, 0x34);
        Driver(ioapic.clone()).set_entry(EVENT_PIN, 0x35);
        let output = Arc::new(Mutex::new(Vec::new()));
        let sink = output.clone();
        let sink = Arc::new(move |bytes: &[u8]| sink.lock().unwrap().extend_from_slice(bytes));
        let serial_line = IrqLine::new(ioapic.clone(), SERIAL_PIN).unwrap();
        let serial = Arc::new(Mutex::new(SerialPort::new(serial_line, sink)));
        let (input, line) = (SerialInput::new(&serial), IrqLine::new(ioapic.clone(), OTHER_PIN).unwrap());
        let event_line = IrqLine::new(ioapic.clone(), EVENT_PIN).unwrap();
        let events = Arc::new(Mutex::new(GenericEventDevice::new(event_line)));
        let panics = Arc::new(Mutex::new(Vec::new()));
        let heard = panics.clone();
        let pvpanic = Pvpanic::new(Arc::new(move |panic| heard.lock().unwrap().push(panic)));
        let devices: [Arc<Mutex<dyn Device>>; DEVICES] = [
            ioapic.clone(),
            serial,
            Arc::new(Mutex::new(Rtc::new(Box::new(clock.clone())))),
            Arc::new(Mutex::new(crate::I8042::new())),
            Arc::new(Mutex::new(AcpiPower)),
            events.clone(),
            Arc::new(Mutex::new(pvpanic)),
            Arc::new(Mutex::new(DebugExit)),
        ];
        let (routes, clock) = (BTreeMap::new(), clock.clone());
        let mut board = Self { devices, input, line, events, ioapic, routing, routes, output, panics, clock };
        board.each(|device| device.start());
        board.told();
        board
    }

    /// A board to which all of this has happened.
    fn after(events: &[Event], clock: &Hand) -> Self {
        let mut board = Self::new(clock);
        events.iter().for_each(|event| drop(board.apply(event)));
        board
    }

    fn each<T>(&self, mut act: impl FnMut(&mut dyn Device) -> T) -> Vec<T> {
        self.devices.iter().map(|device| act(&mut *device.lock().unwrap())).collect()
    }

    /// What the routing was told since it was asked last.
    fn told(&mut self) -> Vec<Told> {
        let told = self.routing.take();
        for told in &told {
            match *told {
                Told::Route(pin, Some(request)) => drop(self.routes.insert(pin, request)),
                Told::Route(pin, None) => drop(self.routes.remove(&pin)),
                Told::Assert(..) => {}
            }
        }
        told
    }

    fn apply(&mut self, event: &Event) -> Seen {
        let (mut read, mut power, mut accepted) = (Vec::new(), None, None);
        match event {
            Event::Read { device, offset, width } => {
                read = vec![0x55; *width];
                self.devices[*device].lock().unwrap().read(*offset, &mut read);
            }
            Event::Write { device, offset, data } => {
                if let ControlFlow::Break(request) =
                    self.devices[*device].lock().unwrap().write(*offset, data)
                {
                    power = Some(request);
                }
            }
            Event::Input(bytes) => accepted = self.input.push(bytes),
            Event::Line(asserted) => self.line.set_level(*asserted),
            Event::Raise(event) => GenericEventLine::new(&self.events, *event).raise(),
            Event::EndOfInterrupt(vector) => self.ioapic.lock().unwrap().end_of_interrupt(*vector),
            Event::Wait { nanoseconds } => self.clock.advance(*nanoseconds),
            Event::Reset(device) => self.devices[*device].lock().unwrap().reset(),
        }
        let sent = std::mem::take(&mut *self.output.lock().unwrap());
        let panics = std::mem::take(&mut *self.panics.lock().unwrap());
        Seen { read, power, accepted, told: self.told(), sent, panics }
    }

    fn stop(&self) {
        self.each(|device| device.stop());
    }

    fn save(&self) -> Vec<SavedStateBlob> {
        self.each(|device| device.save_blob().expect("every device can be saved"))
    }

    fn restore(&self, states: &[SavedStateBlob]) {
        for (device, state) in self.devices.iter().zip(states) {
            let restored = device.lock().unwrap().restore_blob(state.clone());
            restored.unwrap_or_else(|error| panic!("what was saved is refused: {error}: {state:?}"));
        }
    }
}

/// Accesses at offsets that have registers, and beyond.
fn access(device: usize, offsets: Vec<u64>, value: BoxedStrategy<u64>) -> BoxedStrategy<Event> {
    let offset = prop_oneof![20 => select(offsets), 1 => 0u64..0x50];
    let width = prop_oneof![10 => Just(if device == IOAPIC { 4 } else { 1 }), 1 => select(vec![1, 2, 4, 8])];
    (offset, width, value, any::<bool>())
        .prop_map(move |(offset, width, value, writes)| match writes {
            true => Event::Write { device, offset, data: value.to_le_bytes()[..width].to_vec() },
            false => Event::Read { device, offset, width },
        })
        .boxed()
}

/// Registers to select, and halves of entries: few vectors, so that ends of interrupts meet them; mostly fixed delivery.
fn ioapic_value() -> BoxedStrategy<u64> {
    let mode = prop_oneof![6 => Just(0u64), 1 => 0u64..8];
    let low = (0x30u64..0x34, mode, any::<[bool; 3]>()).prop_map(|(vector, mode, [level, mask, logical])| {
        vector | mode << 8 | u64::from(logical) << 11 | u64::from(level) << 15 | u64::from(mask) << 16
    });
    let registers = select(vec![0, 0x18, 0x19, 0x24, 0x25]);
    prop_oneof![4 => registers, 4 => low, 1 => 0u64..0x42, 1 => any::<u64>()].boxed()
}

fn event() -> impl Strategy<Value = Event> {
    let byte = || any::<u64>().boxed();
    // The interrupts enabled, loopback, the divisor latch: each on and off, and anything.
    let serial = prop_oneof![3 => select(vec![0, 1, 2, 3, 0x10, 0x80]), 1 => any::<u64>()].boxed();
    // Registers of the clock to select, the formats and the set bit, digits.
    let rtc =
        prop_oneof![4 => 0u64..0x0e, 2 => select(vec![0x32, 0x82, 0x86, 0x80]), 2 => 0u64..0x60, 1 => byte()];
    prop_oneof![
        6 => access(IOAPIC, vec![0, 0x10, 0x10, 0x10, 0x40], ioapic_value()),
        8 => access(SERIAL, (0..8).collect(), serial),
        6 => access(RTC, vec![0, 1, 1], rtc.boxed()),
        2 => access(KEYBOARD, vec![0, 1, 1, 4], byte()),
        1 => access(ACPI_POWER, vec![0, 1, 2], select(vec![0x34, 1, 0]).boxed()),
        2 => access(EVENTS, vec![0], byte()),
        1 => access(PVPANIC, vec![0], byte()),
        1 => access(DEBUG_EXIT, vec![0, 2], byte()),
        2 => select(vec![GenericEvent::PowerButton, GenericEvent::GenerationId]).prop_map(Event::Raise),
        2 => vec(any::<u8>(), 0..200).prop_map(Event::Input),
        2 => any::<bool>().prop_map(Event::Line),
        2 => (0x30u8..0x34).prop_map(Event::EndOfInterrupt),
        1 => (0u64..3_000_000_000).prop_map(|nanoseconds| Event::Wait { nanoseconds }),
        1 => (0..DEVICES).prop_map(Event::Reset),
    ]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    vec(event(), 0..150)
}

/// 2024-02-29T23:59:58Z.
fn clock() -> Hand {
    let clock = Hand::default();
    clock.set(1_709_251_198, 0);
    clock
}

proptest! {
    /// Whatever the restored board was before, and whatever happens to both afterwards.
    #[test]
    fn a_restored_board_goes_on_as_the_saved_one(before in events(), other in events(), after in events()) {
        let clock = clock();
        let mut saved = Board::after(&before, &clock);
        let mut restored = Board::after(&other, &clock);
        saved.stop();
        restored.stop();
        let states = saved.save();
        prop_assert_eq!(&saved.save(), &states, "saving changes nothing");
        prop_assert_eq!(saved.told(), []);

        restored.restore(&states);
        prop_assert_eq!(restored.told(), [], "nobody is told before all are restored");
        restored.each(|device| device.post_restore());
        prop_assert!(restored.told().iter().all(|told| matches!(told, Told::Route(..))), "nothing interrupts");
        prop_assert_eq!(&restored.routes, &saved.routes);
        prop_assert_eq!(restored.save(), states);
        prop_assert_eq!(&*restored.output.lock().unwrap(), &[0u8; 0], "nothing is sent again");

        for board in [&saved, &restored] {
            board.each(|device| device.start());
        }
        prop_assert_eq!(saved.told(), restored.told());
        for event in &after {
            // The boards share the host's clock: time passes once.
            let expected = saved.apply(event);
            if !matches!(event, Event::Wait { .. }) {
                prop_assert_eq!(restored.apply(event), expected, "{:?}", event);
            }
        }
        prop_assert_eq!(saved.save(), restored.save());
    }

    /// A state is either what the device is saved as next, and then it lives with it, or it is refused and nothing has changed.
    #[test]
    fn any_state_is_taken_whole_or_not_at_all(
        before in events(), (device, state) in any_state(), after in events(),
    ) {
        let mut board = Board::after(&before, &clock());
        board.stop();
        let (device, old) = (board.devices[device].clone(), board.save());
        let restored = device.lock().unwrap().restore_blob(state.clone());
        match restored {
            Ok(()) => prop_assert_eq!(device.lock().unwrap().save_blob().unwrap(), state),
            Err(error) => {
                prop_assert!(matches!(error, RestoreError::Invalid { .. }), "{}", error);
                prop_assert_eq!(board.save(), old);
                prop_assert_eq!(board.told(), []);
            }
        }
        device.lock().unwrap().post_restore();
        board.each(|device| device.start());
        after.iter().for_each(|event| drop(board.apply(event)));
    }

    /// Bytes that end early are a state without its last fields, or none.
    #[test]
    fn a_truncated_state_is_taken_as_what_is_left_or_not_at_all(
        before in events(), device in 0..DEVICES, end in any::<prop::sample::Index>(),
    ) {
        let board = Board::after(&before, &clock());
        board.stop();
        let old = board.save();
        let whole = &old[device];
        let bytes = &whole.value()[..end.index(whole.value().len() + 1)];
        let cut = SavedStateBlob::from_parts(whole.type_name(), bytes);
        let restored = board.devices[device].lock().unwrap().restore_blob(cut.clone());
        match restored {
            // Fields that are missing are zero: the decoded state is the one that the device has now.
            Ok(()) => prop_assert_eq!(decoded(&board.save()[device]), decoded(&cut)),
            Err(_) => prop_assert_eq!(board.save(), old),
        }
    }
}

/// A blob's state, in words.
fn decoded(blob: &SavedStateBlob) -> String {
    guest_saved_state::saved_state_roots().describe(blob.type_name(), blob.value()).expect("it decodes")
}

/// Mostly values of eight bits.
fn small() -> impl Strategy<Value = u32> {
    prop_oneof![20 => 0u32..0x100, 1 => any::<u32>()]
}

/// States whose fields are each often what the device can have.
fn any_state() -> impl Strategy<Value = (usize, SavedStateBlob)> {
    let masked =
        |mask: u64| prop_oneof![200 => any::<u64>().prop_map(move |bits| bits & mask), 1 => any::<u64>()];
    let count = prop_oneof![10 => Just(usize::from(PIN_COUNT)), 1 => 0usize..100];
    let entries = count.prop_flat_map(move |count| vec(masked(0xff00_0000_0001_afff), count));
    let ioapic = (small(), 0u32..0x11, entries, any::<u32>(), any::<u64>());
    let ioapic = ioapic.prop_map(|(select, id, entries, asserted, asserted_high)| {
        (IOAPIC, SavedStateBlob::new(&IoApicState { select, id: id << 24, entries, asserted, asserted_high }))
    });
    let sources = prop_oneof![8 => select(vec![1u32, 2, 4, 6]), 1 => small()];
    let status = prop_oneof![8 => select(vec![0x60u32, 0x61]), 1 => small()];
    let modem = prop_oneof![8 => Just(0xb0), 1 => small()];
    let registers = (any::<u16>(), 0u32..0x11, sources, small(), status, small(), modem, small());
    let fifo =
        prop_oneof![8 => vec(any::<u8>(), 0..=64), 4 => Just(Vec::new()), 1 => vec(any::<u8>(), 60..70)];
    let serial = (registers, fifo, vec(any::<u8>(), 0..200));
    let serial = serial.prop_map(|(registers, receive_fifo, queued_input)| {
        let (divisor, interrupt_enable, interrupt_identification, line_control, ..) = registers;
        let (.., line_status, modem_control, modem_status, scratch) = registers;
        (
            SERIAL,
            SavedStateBlob::new(&SerialPortState {
                divisor: divisor.into(),
                interrupt_enable,
                interrupt_identification,
                line_control,
                line_status,
                modem_control,
                modem_status,
                scratch,
                receive_fifo,
                queued_input,
            }),
        )
    });
    let size = prop_oneof![8 => Just(128usize), 1 => 0usize..200];
    let time = || prop_oneof![8 => 0..=253_402_300_799i64, 1 => any::<i64>()];
    let read_only = prop_oneof![8 => Just([0, 0]), 1 => any::<[u8; 2]>()];
    let rtc = (0u32..0x88, size.prop_flat_map(|size| vec(any::<u8>(), size)), read_only, time(), time());
    let rtc = rtc.prop_map(|(index, mut ram, read_only, offset, acknowledged_seconds)| {
        ram.iter_mut().skip(12).zip(read_only).for_each(|(byte, value)| *byte = value);
        (RTC, SavedStateBlob::new(&RtcState { index, ram, offset_seconds: -offset, acknowledged_seconds }))
    });
    let i8042 = small().prop_map(|port_b| (KEYBOARD, SavedStateBlob::new(&I8042State { port_b })));
    let generic_event = prop_oneof![4 => 0u32..4, 1 => small()];
    let generic_event =
        generic_event.prop_map(|pending| (EVENTS, SavedStateBlob::new(&GenericEventState { pending })));
    prop_oneof![ioapic, serial, rtc, i8042, generic_event]
}

/// A change that makes a state invalid, and what is said of it.
type Case<'a, T> = (fn(&mut T), &'a str);

/// A device's state with one field changed is refused, and that alone.
fn refused<T: SavedStateRoot + Clone>(device: usize, cases: &[Case<T>]) {
    let mut board = Board::new(&clock());
    assert_eq!(board.input.push(b"input"), Some(5));
    board.stop();
    let before = board.save();
    let good: T = before[device].parse().unwrap();
    for (change, field_and_value) in cases {
        let mut state = good.clone();
        change(&mut state);
        let error =
            board.devices[device].lock().unwrap().restore_blob(SavedStateBlob::new(&state)).unwrap_err();
        assert_eq!(error.to_string(), format!("{field_and_value}, which is not valid"));
        assert!(matches!(error, RestoreError::Invalid { .. }), "{error:?}");
        assert_eq!((board.save(), board.told()), (before.clone(), Vec::new()), "{field_and_value}");
    }
}

#[test]
fn what_no_ioapic_has_is_refused() {
    refused::<IoApicState>(
        IOAPIC,
        &[
            (|state| state.select = 0x100, "select is 0x100"),
            (|state| state.id = 1 << 28, "id is 0x10000000"),
            (|state| state.id = 1, "id is 0x1"),
            (|state| state.entries.truncate(95), "entries is 95 entries long"),
            (|state| state.entries.push(1 << 16), "entries is 97 entries long"),
            (|state| state.entries[23] |= 1 << 17, "entries[23] is 0x30000"),
            (|state| state.entries[0] |= 1 << 12, "entries[0] is 0x11000"),
            // Remote IRR at an edge-triggered pin, and at one that is by its delivery mode (NMI).
            (|state| state.entries[1] = 0x4030, "entries[1] is 0x4030"),
            (|state| state.entries[1] = 0xc430, "entries[1] is 0xc430"),
        ],
    );
}

#[test]
fn what_no_serial_port_has_is_refused() {
    refused::<SerialPortState>(
        SERIAL,
        &[
            (|state| state.divisor = 1 << 16, "divisor is 0x10000"),
            (|state| state.interrupt_enable = 0x10, "interrupt_enable is 0x10"),
            (|state| state.interrupt_identification = 0, "interrupt_identification is 0x0"),
            (|state| state.interrupt_identification = 3, "interrupt_identification is 0x3"),
            (|state| state.interrupt_identification = 8, "interrupt_identification is 0x8"),
            (|state| state.interrupt_identification = 0xc1, "interrupt_identification is 0xc1"),
            (
                |state| {
                    (state.line_status, state.interrupt_identification) = (0x60, 4);
                    state.receive_fifo.clear();
                },
                "interrupt_identification is 0x4",
            ),
            (|state| state.line_control = 0x100, "line_control is 0x100"),
            (|state| state.line_status = 0, "line_status is 0x0"),
            (|state| state.line_status = 0x60, "line_status is 0x60"),
            (|state| state.receive_fifo.clear(), "line_status is 0x61"),
            (|state| state.modem_control = 0x100, "modem_control is 0x100"),
            (|state| state.modem_status = 0xb1, "modem_status is 0xb1"),
            (|state| state.scratch = u32::MAX, "scratch is 0xffffffff"),
            (|state| state.receive_fifo = vec![0; 65], "receive_fifo is 65 bytes long"),
            (|state| state.queued_input = vec![0; 65_596], "queued_input is 65596 bytes long"),
        ],
    );
}

#[test]
fn what_no_clock_has_is_refused() {
    refused::<RtcState>(
        RTC,
        &[
            (|state| state.index = 0x80, "index is 0x80"),
            (|state| state.ram.truncate(127), "ram is 127 bytes long"),
            (|state| state.ram.push(0), "ram is 129 bytes long"),
            (|state| state.ram[12] = 0x10, "ram[12] is 0x10"),
            (|state| state.ram[13] = 0x80, "ram[13] is 0x80"),
            (|state| state.offset_seconds = 253_402_300_800, "offset_seconds is 253402300800"),
            (|state| state.offset_seconds = i64::MIN, "offset_seconds is -9223372036854775808"),
            (|state| state.acknowledged_seconds = -1, "acknowledged_seconds is -1"),
            (|state| state.acknowledged_seconds = i64::MAX, "acknowledged_seconds is 9223372036854775807"),
        ],
    );
}

#[test]
fn what_no_keyboard_controller_has_is_refused() {
    refused::<I8042State>(
        KEYBOARD,
        &[(|state| state.port_b = 0x20, "port_b is 0x20"), (|state| state.port_b = 0x100, "port_b is 0x100")],
    );
}

#[test]
fn events_that_do_not_exist_are_refused() {
    refused::<GenericEventState>(
        EVENTS,
        &[(|state| state.pending = 4, "pending is 0x4"), (|state| state.pending = 0x100, "pending is 0x100")],
    );
}

#[test]
fn devices_without_state_say_so() {
    let board = Board::new(&clock());
    for device in [ACPI_POWER, PVPANIC, DEBUG_EXIT] {
        assert_eq!(board.save()[device], SavedStateBlob::new(&NoSavedState {}));
    }
}

#[test]
fn another_devices_state_is_refused() {
    let board = Board::new(&clock());
    let states = board.save();
    for (at, device) in board.devices.iter().enumerate() {
        let others = |state: &SavedStateBlob| state.type_name() != states[at].type_name();
        for (other, state) in states.iter().enumerate().filter(|(_, state)| others(state)) {
            let error = device.lock().unwrap().restore_blob(state.clone()).unwrap_err();
            assert!(matches!(error, RestoreError::WrongType { .. }), "{at} takes {other}: {error}");
        }
    }
    assert_eq!(board.save(), states);
}

/// Hosts count different times away; the guest's clock is as far ahead of each.
#[test]
fn a_restored_clock_shows_the_hosts_time_as_the_guest_has_moved_it() {
    let (here, there) = (clock(), Hand::default());
    there.set(1_709_251_198 + 1_000_000, 0);
    let write = |offset, value| Event::Write { device: RTC, offset, data: vec![value] };
    // The year 2024 becomes 2025; its 29th of February does not, so begin a day later.
    here.set(1_709_251_200, 0);
    let saved = Board::after(&[write(0, 9), write(1, 0x25)], &here);
    let mut restored = Board::new(&there);
    saved.stop();
    restored.restore(&saved.save());
    let mut read = |register| {
        restored.apply(&write(0, register));
        restored.apply(&Event::Read { device: RTC, offset: 1, width: 1 }).read[0]
    };
    // The host shows 2024-03-12T13:46:38Z; the guest is 365 days ahead.
    assert_eq!([9, 8, 7, 4, 2, 0].map(&mut read), [0x25, 0x03, 0x12, 0x13, 0x46, 0x38]);
}
