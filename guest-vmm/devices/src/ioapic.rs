//! The I/O APIC: 96 pins, a redirection table, and messages to the local APICs (Intel 82093AA datasheet, 290566-001; the version
//! register and EOI register of version 0x20 as in Intel's later chip sets; messages as in SDM volume 3, 11.11).
//!
//! [`IoApic`] holds the registers and the lines, [`IrqLine`] is a device's end of one pin, and [`IoApicRouting`] takes the messages.
//! A delivery is immediate: the delivery status bit always reads idle.
//!
//! Limits: 8-bit destinations; polarity is stored and ignored, as a line has no voltage here; ExtINT sends nothing, as there is
//! no 8259.

use crate::device::{Stopping, stopped};
use crate::saved::{invalid, register};
use crate::{Device, IoDevice};
use guest_saved_state::devices::ioapic::IoApicState;
use inspect::{Inspect, Request};
use processor::{IOAPIC_PINS, MsiRequest, PowerRequest};
use save_restore::{RestoreError, SaveError, SaveRestore};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

/// How many pins there are.
#[expect(
    clippy::cast_possible_truncation,
    reason = "pins are numbered by bytes, which the compiler looks at below"
)]
pub const PIN_COUNT: u8 = IOAPIC_PINS as u8;
const _: () = assert!(PIN_COUNT as usize == IOAPIC_PINS);

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const REGISTER_ID: u8 = 0x00;
const REGISTER_VERSION: u8 = 0x01;
const REGISTER_ARBITRATION: u8 = 0x02;
const REGISTER_TABLE: u8 = 0x10;

/// Version 0x20 has the EOI register, which a guest needs if it tells its local APICs not to broadcast ends of interrupts.
const VERSION: u32 = 0x20;
const ID_SHIFT: u32 = 24;
const ID_MASK: u32 = 0x0f << ID_SHIFT;

/// Where the local APICs take messages.
const MESSAGE_BASE: u64 = 0xfee0_0000;
const MESSAGE_REDIRECTION_HINT: u64 = 1 << 3;
const MESSAGE_LOGICAL: u64 = 1 << 2;
const MESSAGE_ASSERT: u32 = 1 << 14;
const MESSAGE_LEVEL_TRIGGERED: u32 = 1 << 15;

const DELIVERY_FIXED: u64 = 0;
const DELIVERY_LOWEST_PRIORITY: u64 = 1;
const DELIVERY_SMI: u64 = 2;
const DELIVERY_NMI: u64 = 4;
const DELIVERY_INIT: u64 = 5;

const DELIVERY_EXT_INT: u64 = 7;

/// The vectors below are the architecture's own: a local APIC refuses them.
const FIRST_VECTOR: u8 = 16;

/// The names of 82093AA, 3.2.4.
fn delivery_mode_name(mode: u64) -> &'static str {
    match mode {
        DELIVERY_FIXED => "fixed",
        DELIVERY_LOWEST_PRIORITY => "lowest priority",
        DELIVERY_SMI => "SMI",
        DELIVERY_NMI => "NMI",
        DELIVERY_INIT => "INIT",
        DELIVERY_EXT_INT => "ExtINT",
        _ => "reserved",
    }
}

/// Where the IOAPIC's messages go. Called with the IOAPIC's lock held: must not block, and must not call back.
pub trait IoApicRouting: Send + Sync {
    /// Says what a pin sends when it is asserted from now on, or that it sends nothing.
    ///
    /// Called only when that changes, and for each pin in use once the IOAPIC was restored, so an implementation may be slow.
    fn set_irq_route(&self, pin: u8, request: Option<MsiRequest>);

    /// Delivers a pin's message. `request` is the pin's current route.
    fn assert_irq(&self, pin: u8, request: MsiRequest);
}

/// One entry of the redirection table.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Redirection(u64);

impl Redirection {
    const LOGICAL: u64 = 1 << 11;
    const DELIVERY_STATUS: u64 = 1 << 12;
    const ACTIVE_LOW: u64 = 1 << 13;
    const REMOTE_IRR: u64 = 1 << 14;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;
    const DESTINATION_SHIFT: u32 = 56;
    const READ_ONLY: u64 = Self::DELIVERY_STATUS | Self::REMOTE_IRR;
    /// Bits 17 to 55 are reserved and read as zero.
    const DEFINED: u64 = 0xff00_0000_0001_ffff;
    /// Masked, and otherwise zero.
    const RESET: Self = Self(Self::MASKED);

    fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    #[expect(clippy::cast_possible_truncation, reason = "the vector is the low byte")]
    fn vector(self) -> u8 {
        self.0 as u8
    }

    fn delivery_mode(self) -> u64 {
        (self.0 >> 8) & 0b111
    }

    fn destination(self) -> u8 {
        (self.0 >> Self::DESTINATION_SHIFT) as u8
    }

    /// Whether the pin is level-triggered. Only fixed and lowest-priority interrupts can be: the others are edges by definition.
    fn is_level(self) -> bool {
        self.has(Self::LEVEL) && self.delivery_mode() <= DELIVERY_LOWEST_PRIORITY
    }

    /// The entry after a write to one of its halves. A pin that becomes edge-triggered forgets its remote IRR: that is how
    /// guests end an interrupt on an IOAPIC without the EOI register.
    fn with_written(self, bits: u64, mask: u64) -> Self {
        let writable = mask & Self::DEFINED & !Self::READ_ONLY;
        let mut written = Self((self.0 & !writable) | (bits & writable));
        if !written.is_level() {
            written.0 &= !Self::REMOTE_IRR;
        }
        written
    }

    /// The entry, if it is one that guests can bring about: remote IRR is set at level-triggered pins alone.
    fn from_saved(bits: u64) -> Option<Self> {
        let defined = bits & !(Self::DEFINED & !Self::DELIVERY_STATUS) == 0;
        Some(Self(bits)).filter(|entry| defined && (entry.is_level() || !entry.has(Self::REMOTE_IRR)))
    }

    /// The message that the entry describes, masked or not; `None` if it describes nothing that a local APIC takes.
    fn message(self) -> Option<MsiRequest> {
        let mode = self.delivery_mode();
        let vector = match mode {
            DELIVERY_FIXED | DELIVERY_LOWEST_PRIORITY if self.vector() >= FIRST_VECTOR => self.vector(),
            // These carry no vector.
            DELIVERY_SMI | DELIVERY_NMI | DELIVERY_INIT => 0,
            _ => return None,
        };
        let mut address = MESSAGE_BASE | (u64::from(self.destination()) << 12);
        if self.has(Self::LOGICAL) {
            address |= MESSAGE_LOGICAL;
        }
        // The hint with a physical destination would need a destination that takes part in the arbitration: there is one alone.
        if mode == DELIVERY_LOWEST_PRIORITY && self.has(Self::LOGICAL) {
            address |= MESSAGE_REDIRECTION_HINT;
        }
        let mode = u32::try_from(mode).expect("three bits");
        let mut data = u32::from(vector) | (mode << 8);
        if self.is_level() {
            data |= MESSAGE_LEVEL_TRIGGERED | MESSAGE_ASSERT;
        }
        Some(MsiRequest { address, data })
    }
}

/// Shows the entry as it stands, field by field, whether or not the fields go together.
impl Inspect for Redirection {
    fn inspect(&self, request: Request<'_>) {
        let either = |bit, set: &'static str, clear: &'static str| if self.has(bit) { set } else { clear };
        request
            .respond()
            .hex("vector", self.vector())
            .field("delivery_mode", delivery_mode_name(self.delivery_mode()))
            .field("destination_mode", either(Self::LOGICAL, "logical", "physical"))
            .hex("destination", self.destination())
            .field("polarity", either(Self::ACTIVE_LOW, "active low", "active high"))
            .field("trigger", either(Self::LEVEL, "level", "edge"))
            .field("remote_irr", &self.has(Self::REMOTE_IRR))
            .field("masked", &self.has(Self::MASKED));
    }
}

/// A pin: its entry, its line, and what the routing was told last.
#[derive(Clone, Copy)]
struct Pin {
    entry: Redirection,
    asserted: bool,
    route: Option<MsiRequest>,
}

impl Pin {
    /// What the routing has to know. A masked pin sends nothing, but if its interrupt is still in service then the end of that
    /// interrupt has to be reported, which takes the route.
    fn wanted_route(&self) -> Option<MsiRequest> {
        let idle = self.entry.has(Redirection::MASKED) && !self.entry.has(Redirection::REMOTE_IRR);
        if idle { None } else { self.entry.message() }
    }
}

/// Shows the line, what the guest has made of the pin, and whether the routing has a message for it.
impl Inspect for Pin {
    fn inspect(&self, request: Request<'_>) {
        request
            .respond()
            .field("asserted", &self.asserted)
            .field("routed", &self.route.is_some())
            .hex("entry", self.entry.0)
            .field("redirection", &self.entry);
    }
}

/// The I/O APIC.
pub struct IoApic {
    select: u8,
    id: u32,
    pins: [Pin; PIN_COUNT as usize],
    routing: Box<dyn IoApicRouting>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.pins.iter().map(|pin| pin.entry.0);
        f.debug_struct("IoApic").field("id", &self.id).field("entries", &entries.collect::<Vec<_>>()).finish()
    }
}

impl IoApic {
    /// How many bytes of guest physical address space the registers take.
    pub const WINDOW_BYTES: u64 = 0x1000;

    /// An IOAPIC with all pins masked and no route set.
    pub fn new(routing: Box<dyn IoApicRouting>) -> Self {
        let pin = Pin { entry: Redirection::RESET, asserted: false, route: None };
        Self { select: 0, id: 0, pins: [pin; PIN_COUNT as usize], routing }
    }

    /// A local APIC has ended the level-triggered interrupt with this vector. A line that is still asserted interrupts again.
    ///
    /// Vectors that no pin has in service are ignored.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for number in 0..PIN_COUNT {
            let entry = &mut self.pins[usize::from(number)].entry;
            if entry.vector() == vector && entry.has(Redirection::REMOTE_IRR) {
                entry.0 &= !Redirection::REMOTE_IRR;
                self.entry_changed(number);
            }
        }
    }

    /// Sets the level of a pin's line. A level-triggered pin interrupts while it is asserted, an edge-triggered one when it
    /// becomes so; an edge at a masked pin is lost (82093AA, 3.2.4). Pins from [`PIN_COUNT`] on do not exist and are ignored.
    fn set_level(&mut self, number: u8, asserted: bool) {
        let Some(pin) = self.pins.get_mut(usize::from(number)) else { return };
        let rises = asserted && !pin.asserted;
        pin.asserted = asserted;
        let edge = rises && !pin.entry.is_level() && !pin.entry.has(Redirection::MASKED);
        if edge {
            self.send(number);
        } else {
            self.service_level(number);
        }
    }

    /// Sends a level-triggered pin's message if it is due: asserted, not masked, not in service yet.
    fn service_level(&mut self, number: u8) {
        let pin = &mut self.pins[usize::from(number)];
        let blocked = pin.entry.has(Redirection::MASKED | Redirection::REMOTE_IRR);
        if pin.asserted && pin.entry.is_level() && !blocked && pin.entry.message().is_some() {
            pin.entry.0 |= Redirection::REMOTE_IRR;
            self.send(number);
        }
    }

    fn send(&self, number: u8) {
        if let Some(request) = self.pins[usize::from(number)].route {
            self.routing.assert_irq(number, request);
        }
    }

    /// Tells the routing what a changed entry means, then sends what has become due.
    fn entry_changed(&mut self, number: u8) {
        self.update_route(number);
        self.service_level(number);
    }

    fn update_route(&mut self, number: u8) {
        let pin = &mut self.pins[usize::from(number)];
        let wanted = pin.wanted_route();
        if pin.route != wanted {
            pin.route = wanted;
            self.routing.set_irq_route(number, wanted);
        }
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            REGISTER_ID | REGISTER_ARBITRATION => self.id,
            REGISTER_VERSION => VERSION | (u32::from(PIN_COUNT - 1) << 16),
            register => match table_position(register) {
                #[expect(clippy::cast_possible_truncation, reason = "one half of the entry")]
                Some((pin, shift)) => (self.pins[usize::from(pin)].entry.0 >> shift) as u32,
                None => u32::MAX,
            },
        }
    }

    fn write_selected(&mut self, value: u32) {
        if self.select == REGISTER_ID {
            self.id = value & ID_MASK;
        } else if let Some((number, shift)) = table_position(self.select) {
            let pin = &mut self.pins[usize::from(number)];
            pin.entry = pin.entry.with_written(u64::from(value) << shift, u64::from(u32::MAX) << shift);
            self.entry_changed(number);
        }
    }
}

/// How many lines are in [`IoApicState::asserted`]; the others are in [`IoApicState::asserted_high`].
const LOW_PINS: u8 = 32;

/// The lines are part of the state: a device that keeps one asserted does not assert it again when it is restored.
impl SaveRestore for IoApic {
    type SavedState = IoApicState;

    fn save(&mut self) -> Result<IoApicState, SaveError> {
        // What the routing was told follows from the entries.
        let Self { select, id, pins, routing: _ } = self;
        let lines = (0..).zip(&*pins).map(|(number, pin)| u128::from(pin.asserted) << number).sum::<u128>();
        Ok(IoApicState {
            select: (*select).into(),
            id: *id,
            entries: pins.iter().map(|pin| pin.entry.0).collect(),
            asserted: u32::try_from(lines & u128::from(u32::MAX)).expect("masked"),
            asserted_high: u64::try_from(lines >> LOW_PINS).expect("96 lines"),
        })
    }

    fn restore(&mut self, state: IoApicState) -> Result<(), RestoreError> {
        let IoApicState { select, id, entries, asserted, asserted_high } = state;
        let select = register("select", select, u8::MAX.into())?;
        let id = register("id", id, ID_MASK)?;
        let lines = u128::from(asserted) | u128::from(asserted_high) << LOW_PINS;
        if entries.len() != usize::from(PIN_COUNT) {
            return Err(RestoreError::invalid("entries", format_args!("{} entries long", entries.len())));
        }
        let entries = entries.into_iter().enumerate().map(|(number, bits)| {
            Redirection::from_saved(bits).ok_or_else(|| invalid(&format!("entries[{number}]"), bits))
        });
        let entries = entries.collect::<Result<Vec<_>, _>>()?;
        (self.select, self.id) = (select, id);
        for ((number, pin), entry) in (0..).zip(&mut self.pins).zip(entries) {
            (pin.entry, pin.asserted) = (entry, lines & (1 << number) != 0);
        }
        Ok(())
    }
}

impl Device for IoApic {
    fn start(&mut self) {}

    fn stop(&mut self) -> Stopping {
        stopped()
    }

    /// Tells the routing of every pin in use, as the partition that it stands for was restored too, or is a new one; then sends
    /// what is due.
    fn post_restore(&mut self) {
        for number in 0..PIN_COUNT {
            let pin = &mut self.pins[usize::from(number)];
            let (told, wanted) = (pin.route, pin.wanted_route());
            pin.route = wanted;
            if told.or(wanted).is_some() {
                self.routing.set_irq_route(number, wanted);
            }
        }
        (0..PIN_COUNT).for_each(|number| self.service_level(number));
    }
}

/// Shows the registers, and each pin below `pins`.
impl Inspect for IoApic {
    fn inspect(&self, request: Request<'_>) {
        request.respond().field("pin_count", &PIN_COUNT).hex("version", VERSION).sensitive(|response| {
            response
                .field_with("id", || self.id >> ID_SHIFT)
                .hex("selected_register", self.select)
                .field("pins", &self.pins[..]);
        });
    }
}

/// The pin whose entry a register belongs to, and the bit at which the register's half of it begins.
fn table_position(register: u8) -> Option<(u8, u32)> {
    let index = register.checked_sub(REGISTER_TABLE)?;
    (index / 2 < PIN_COUNT).then_some((index / 2, u32::from(index % 2) * 32))
}

impl IoDevice for IoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let value = match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.read_selected(),
            _ => return,
        };
        // The registers are 32 bits wide; the datasheet allows no other access. A wider one reads all ones above them.
        let bytes = value.to_le_bytes();
        let length = data.len().min(bytes.len());
        data[..length].copy_from_slice(&bytes[..length]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<PowerRequest> {
        match (offset, data) {
            (SELECT, [select, ..]) => self.select = *select,
            (EOI, [vector, ..]) => self.end_of_interrupt(*vector),
            // A narrower write would leave half of a table entry undefined.
            (WINDOW, &[a, b, c, d, ..]) => self.write_selected(u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
        ControlFlow::Continue(())
    }

    /// The lines keep their levels: they belong to the devices that drive them.
    fn reset(&mut self) {
        self.select = 0;
        self.id = 0;
        for number in 0..PIN_COUNT {
            self.pins[usize::from(number)].entry = Redirection::RESET;
            self.update_route(number);
        }
    }
}

/// A device's end of one of the IOAPIC's pins.
#[derive(Debug, Clone)]
pub struct IrqLine {
    ioapic: Arc<Mutex<IoApic>>,
    pin: u8,
}

impl IrqLine {
    /// The line into a pin, not asserted. `None` if there is no such pin.
    pub fn new(ioapic: Arc<Mutex<IoApic>>, pin: u8) -> Option<Self> {
        (pin < PIN_COUNT).then_some(Self { ioapic, pin })
    }

    /// Asserts or deasserts the line. Locks the IOAPIC.
    pub fn set_level(&self, asserted: bool) {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner).set_level(self.pin, asserted);
    }

    /// Asserts and deasserts the line: an edge. Locks the IOAPIC.
    pub fn pulse(&self) {
        let mut ioapic = self.ioapic.lock().unwrap_or_else(PoisonError::into_inner);
        ioapic.set_level(self.pin, true);
        ioapic.set_level(self.pin, false);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::inspected::{inspected, observed};
    use inspect::Node;

    /// What the routing was told.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Told {
        Route(u8, Option<MsiRequest>),
        Assert(u8, MsiRequest),
    }

    #[derive(Clone, Default)]
    pub(crate) struct Recorder(Arc<Mutex<Vec<Told>>>);

    impl Recorder {
        pub(crate) fn take(&self) -> Vec<Told> {
            std::mem::take(&mut self.0.lock().unwrap())
        }

        pub(crate) fn asserted(&self) -> Vec<u8> {
            let pin = |told| match told {
                Told::Assert(pin, _) => Some(pin),
                Told::Route(..) => None,
            };
            self.take().into_iter().filter_map(pin).collect()
        }
    }

    impl IoApicRouting for Recorder {
        fn set_irq_route(&self, pin: u8, request: Option<MsiRequest>) {
            self.0.lock().unwrap().push(Told::Route(pin, request));
        }

        fn assert_irq(&self, pin: u8, request: MsiRequest) {
            self.0.lock().unwrap().push(Told::Assert(pin, request));
        }
    }

    pub(crate) fn ioapic() -> (Arc<Mutex<IoApic>>, Recorder) {
        let recorder = Recorder::default();
        (Arc::new(Mutex::new(IoApic::new(Box::new(recorder.clone())))), recorder)
    }

    /// Reads and writes registers as a guest's driver does.
    pub(crate) struct Driver(pub(crate) Arc<Mutex<IoApic>>);

    impl Driver {
        pub(crate) fn read(&self, register: u8) -> u32 {
            let mut ioapic = self.0.lock().unwrap();
            let _ = ioapic.write(SELECT, &u32::from(register).to_le_bytes());
            let mut data = [0; 4];
            ioapic.read(WINDOW, &mut data);
            u32::from_le_bytes(data)
        }

        pub(crate) fn write(&self, register: u8, value: u32) {
            let mut ioapic = self.0.lock().unwrap();
            let _ = ioapic.write(SELECT, &u32::from(register).to_le_bytes());
            let _ = ioapic.write(WINDOW, &value.to_le_bytes());
        }

        /// The high half first, as Linux does, so that the entry is whole once it is unmasked.
        pub(crate) fn set_entry(&self, pin: u8, entry: u64) {
            self.write(REGISTER_TABLE + 2 * pin + 1, (entry >> 32) as u32);
            self.write(REGISTER_TABLE + 2 * pin, (entry & 0xffff_ffff) as u32);
        }

        fn entry(&self, pin: u8) -> u64 {
            let low = u64::from(self.read(REGISTER_TABLE + 2 * pin));
            low | u64::from(self.read(REGISTER_TABLE + 2 * pin + 1)) << 32
        }

        fn eoi_register(&self, vector: u8) {
            let _ = self.0.lock().unwrap().write(EOI, &u32::from(vector).to_le_bytes());
        }
    }

    const LEVEL: u64 = Redirection::LEVEL;
    const MASKED: u64 = Redirection::MASKED;

    #[test]
    fn identifies_itself() {
        let (ioapic, _) = ioapic();
        let driver = Driver(ioapic);
        assert_eq!(driver.read(REGISTER_VERSION), 0x005f_0020);
        driver.write(REGISTER_ID, 0xffff_ffff);
        assert_eq!(driver.read(REGISTER_ID), 0x0f00_0000);
        assert_eq!(driver.read(REGISTER_ARBITRATION), 0x0f00_0000);
        driver.write(REGISTER_VERSION, 0);
        assert_eq!(driver.read(REGISTER_VERSION), 0x005f_0020);
        assert_eq!(driver.read(0x0f), u32::MAX, "no such register");
        assert_eq!(driver.read(0xd0), u32::MAX, "one past the table");
    }

    #[test]
    fn an_entry_keeps_what_is_writable() {
        let (ioapic, recorder) = ioapic();
        let driver = Driver(ioapic);
        assert_eq!(driver.entry(23), MASKED);
        driver.set_entry(23, u64::MAX);
        assert_eq!(driver.entry(23), 0xff00_0000_0001_afff);
        assert_eq!(recorder.take(), [], "a masked pin has no route");
    }

    #[test]
    fn an_edge_is_sent_once() {
        let (ioapic, recorder) = ioapic();
        let (driver, line) = (Driver(ioapic.clone()), IrqLine::new(ioapic, 4).unwrap());
        driver.set_entry(4, 0x0300_0000_0000_0034);
        let request = MsiRequest { address: 0xfee0_3000, data: 0x34 };
        line.pulse();
        assert_eq!(recorder.take(), [Told::Route(4, Some(request)), Told::Assert(4, request)]);
        line.set_level(true);
        line.set_level(true);
        assert_eq!(recorder.asserted(), [4]);
    }

    #[test]
    fn an_edge_at_a_masked_pin_is_lost() {
        let (ioapic, recorder) = ioapic();
        let (driver, line) = (Driver(ioapic.clone()), IrqLine::new(ioapic, 4).unwrap());
        driver.set_entry(4, MASKED | 0x34);
        line.set_level(true);
        driver.set_entry(4, 0x34);
        assert_eq!(recorder.asserted(), [0; 0]);
    }

    #[test]
    fn a_level_is_sent_again_until_it_falls() {
        let (ioapic, recorder) = ioapic();
        let (driver, line) = (Driver(ioapic.clone()), IrqLine::new(ioapic.clone(), 10).unwrap());
        driver.set_entry(10, LEVEL | 0x51);
        line.set_level(true);
        line.set_level(true);
        assert_eq!(recorder.asserted(), [10]);
        assert_eq!(driver.entry(10) & Redirection::REMOTE_IRR, Redirection::REMOTE_IRR);
        ioapic.lock().unwrap().end_of_interrupt(0x50);
        assert_eq!(recorder.asserted(), [0; 0], "another vector's end");
        ioapic.lock().unwrap().end_of_interrupt(0x51);
        assert_eq!(recorder.asserted(), [10]);
        line.set_level(false);
        driver.eoi_register(0x51);
        assert_eq!(recorder.asserted(), [0; 0]);
        assert_eq!(driver.entry(10) & Redirection::REMOTE_IRR, 0);
    }

    #[test]
    fn a_level_at_a_masked_pin_waits() {
        let (ioapic, recorder) = ioapic();
        let (driver, line) = (Driver(ioapic.clone()), IrqLine::new(ioapic, 10).unwrap());
        driver.set_entry(10, MASKED | LEVEL | 0x51);
        line.set_level(true);
        assert_eq!(recorder.asserted(), [0; 0]);
        driver.set_entry(10, LEVEL | 0x51);
        assert_eq!(recorder.asserted(), [10]);
    }

    #[test]
    fn a_pin_masked_in_service_keeps_its_route_until_the_end() {
        let (ioapic, recorder) = ioapic();
        let (driver, line) = (Driver(ioapic.clone()), IrqLine::new(ioapic.clone(), 10).unwrap());
        driver.set_entry(10, LEVEL | 0x51);
        line.set_level(true);
        recorder.take();
        driver.set_entry(10, MASKED | LEVEL | 0x51);
        assert_eq!(recorder.take(), []);
        ioapic.lock().unwrap().end_of_interrupt(0x51);
        assert_eq!(recorder.take(), [Told::Route(10, None)]);
    }

    #[test]
    fn switching_to_edge_ends_an_interrupt() {
        let (ioapic, recorder) = ioapic();
        let (driver, line) = (Driver(ioapic.clone()), IrqLine::new(ioapic, 10).unwrap());
        driver.set_entry(10, LEVEL | 0x51);
        line.set_level(true);
        recorder.take();
        driver.set_entry(10, MASKED | 0x51);
        driver.set_entry(10, LEVEL | 0x51);
        assert_eq!(recorder.asserted(), [10]);
    }

    #[test]
    fn messages_follow_the_entry() {
        let message = |entry| Redirection(entry).message().map(|m| (m.address, m.data));
        assert_eq!(message(0xff00_0000_0000_0030), Some((0xfeef_f000, 0x30)));
        assert_eq!(message(LEVEL | 0x30), Some((0xfee0_0000, 0xc030)));
        assert_eq!(message(0x0100_0000_0000_0930), Some((0xfee0_100c, 0x130)), "lowest priority, logical");
        assert_eq!(message(0x0100_0000_0000_0130), Some((0xfee0_1000, 0x130)), "lowest priority, physical");
        assert_eq!(message(LEVEL | 0x430), Some((0xfee0_0000, 0x400)), "an NMI has no vector and is an edge");
        assert_eq!(message(0x0f), None, "a vector of the architecture's");
        for mode in [3, 6, 7] {
            assert_eq!(message(mode << 8 | 0x30), None, "delivery mode {mode}");
        }
    }

    #[test]
    fn reset_masks_all_and_drops_the_routes() {
        let (ioapic, recorder) = ioapic();
        let driver = Driver(ioapic.clone());
        driver.set_entry(4, 0x34);
        recorder.take();
        IoDevice::reset(&mut *ioapic.lock().unwrap());
        assert_eq!(recorder.take(), [Told::Route(4, None)]);
        assert_eq!(driver.entry(4), MASKED);
    }

    /// The partition beside a restored IOAPIC may know no route, whatever this one was told before.
    #[test]
    fn after_a_restore_the_routes_are_told_again() {
        let (ioapic, recorder) = ioapic();
        let driver = Driver(ioapic.clone());
        driver.set_entry(4, 0x34);
        let state = ioapic.lock().unwrap().save().unwrap();
        driver.set_entry(5, 0x35);
        recorder.take();
        ioapic.lock().unwrap().restore(state).unwrap();
        assert_eq!(recorder.take(), []);
        ioapic.lock().unwrap().post_restore();
        let request = MsiRequest { address: 0xfee0_0000, data: 0x34 };
        assert_eq!(recorder.take(), [Told::Route(4, Some(request)), Told::Route(5, None)]);
    }

    /// No guest leaves a level like that, but where it came from it would have interrupted.
    #[test]
    fn a_level_that_is_due_after_a_restore_is_sent_once_there_is_a_route() {
        let (ioapic, recorder) = ioapic();
        let mut state = ioapic.lock().unwrap().save().unwrap();
        (state.asserted, state.entries[10]) = (1 << 10, LEVEL | 0x51);
        ioapic.lock().unwrap().restore(state).unwrap();
        ioapic.lock().unwrap().post_restore();
        let request = MsiRequest { address: 0xfee0_0000, data: 0xc051 };
        assert_eq!(recorder.take(), [Told::Route(10, Some(request)), Told::Assert(10, request)]);
        assert_eq!(Driver(ioapic).entry(10) & Redirection::REMOTE_IRR, Redirection::REMOTE_IRR);
    }

    #[test]
    fn it_shows_each_pin() {
        let (ioapic, _) = ioapic();
        let (driver, line) = (Driver(ioapic.clone()), IrqLine::new(ioapic.clone(), 10).unwrap());
        driver.write(REGISTER_ID, 0x0300_0000);
        driver.set_entry(10, 0x0700_0000_0000_2951 | LEVEL);
        line.set_level(true);
        let mut ioapic = ioapic.lock().unwrap();
        let pin = "asserted: true\nrouted: true\nentry: 0x70000000000e951\nredirection:\n  vector: 0x51\n  \
                   delivery_mode: lowest priority\n  destination_mode: logical\n  destination: 0x7\n  \
                   polarity: active low\n  trigger: level\n  remote_irr: true\n  masked: false\n";
        assert_eq!(inspected(&mut *ioapic, "pins/10").to_string(), pin);
        let untouched = inspected(&mut *ioapic, "pins/1").to_string();
        for line in
            ["asserted: false", "routed: false", "entry: 0x10000", "  masked: true", "  trigger: edge"]
        {
            assert!(untouched.lines().any(|found| found == line), "{line} is not in {untouched}");
        }
        let Some(Node::Children(pins)) = inspected(&mut *ioapic, "").child("pins").cloned() else {
            panic!("no pins");
        };
        assert_eq!(pins.len(), usize::from(PIN_COUNT));
        assert_eq!(inspected(&mut *ioapic, "pins/96"), Node::NotFound);
        assert_eq!(inspected(&mut *ioapic, "id").to_string(), "3\n");
        assert_eq!(inspected(&mut *ioapic, "selected_register").to_string(), "0x24\n");
    }

    #[test]
    fn looking_at_it_sends_nothing_and_selects_nothing() {
        let (ioapic, recorder) = ioapic();
        let driver = Driver(ioapic.clone());
        driver.set_entry(4, 0x34);
        recorder.take();
        let before = format!("{:?}", ioapic.lock().unwrap());
        inspected(&mut *ioapic.lock().unwrap(), "");
        assert_eq!((recorder.take(), format!("{:?}", ioapic.lock().unwrap())), (vec![], before));
        let mut selected = [0; 4];
        ioapic.lock().unwrap().read(SELECT, &mut selected);
        assert_eq!(selected, [REGISTER_TABLE + 8, 0, 0, 0]);
        let plain = observed(&mut *ioapic.lock().unwrap());
        assert_eq!(plain.to_string(), "pin_count: 96\nversion: 0x20\n");
    }

    #[test]
    fn there_are_24_pins() {
        let (ioapic, _) = ioapic();
        assert!(IrqLine::new(ioapic.clone(), 23).is_some());
        assert!(IrqLine::new(ioapic, 96).is_none());
    }
}
