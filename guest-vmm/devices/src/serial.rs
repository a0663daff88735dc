//! The serial port: a 16550A (National Semiconductor PC16550D datasheet) over `vm-superio`'s model of one.
//!
//! What the guest sends goes to a [`ByteSink`] at once. What the host sends goes through [`SerialInput`] into a queue of
//! [`INPUT_CAPACITY`] bytes, from which the port refills its receive FIFO as the guest empties it; beyond the queue, the sender
//! waits for room. So no byte is lost, which is also why the guest's command to clear the receive FIFO clears nothing.
//!
//! `vm-superio` forgets that received data is pending once the guest has read the interrupt identification register or one byte.
//! A driver that leaves bytes in the FIFO (Linux reads 256 at a time) would wait for ever, so that register is corrected here.
//!
//! What is saved: the registers, the FIFO, and the queue. The queue is the host's, but its sender was told that the bytes were
//! taken: a guest that goes on elsewhere has to find them, once and in order. What the guest has sent left with the access, and
//! whatever the host keeps of it is no part of the port. A restore replaces the queue of the port with the one that was saved, and
//! interrupts nobody: the edges for what is pending were sent before, and are in the state of whoever got them.
//!
//! Limits: no modem, no line errors, no speed; writes take no time.

use crate::device::{Stopping, stopped};
use crate::saved::{invalid, register};
use crate::{ByteRegisters, ByteSink, Device, IrqLine};
use guest_saved_state::devices::serial::SerialPortState;
use inspect::{Inspect, Request};
use processor::PowerRequest;
use save_restore::{RestoreError, SaveError, SaveRestore};
use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

/// How many bytes of input can be queued.
pub const INPUT_CAPACITY: usize = 64 * 1024;

const FIFO_BYTES: usize = 64;

const INTERRUPT_ENABLE: u8 = 1;
const INTERRUPT_IDENTIFICATION: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const REGISTERS: u8 = 8;

const IER_RECEIVED: u8 = 1 << 0;
const IER_DEFINED: u8 = 0x0f;
const IIR_SOURCE: u8 = 0x0f;
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_FIFO_ENABLED: u8 = 0xc0;
const LCR_DIVISOR_LATCH: u8 = 1 << 7;
const LSR_DATA_READY: u8 = 1 << 0;
/// The transmitter is always done: its holding register and its shift register are empty.
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;
/// CTS, DSR and DCD: a terminal that listens.
const MSR_CONNECTED: u8 = 0xb0;
const MCR_LOOPBACK: u8 = 1 << 4;

/// The output as `vm-superio` wants it.
#[derive(Clone)]
struct Sink(Arc<dyn ByteSink>);

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt as `vm-superio` wants it: an edge, as on the ISA bus.
#[derive(Clone)]
struct Edge {
    line: IrqLine,
    /// Whether edges reach the line. They do, but while a state is put back whose edges were sent before.
    connected: Cell<bool>,
}

impl Edge {
    fn new(line: IrqLine) -> Self {
        Self { line, connected: Cell::new(true) }
    }
}

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if self.connected.get() {
            self.line.pulse();
        }
        Ok(())
    }
}

type Uart = Serial<Edge, NoEvents, Sink>;

/// A serial port. Built stopped: until [`Device::start`], input stays in the queue and raises no interrupt.
pub struct SerialPort {
    uart: Uart,
    queue: VecDeque<u8>,
    running: bool,
    /// Who waits for room in the queue.
    waiting: Vec<Waker>,
    interrupt: Edge,
    output: Sink,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("SerialPort");
        shown.field("queued", &self.queue.len()).field("uart", &self.uart.state()).finish_non_exhaustive()
    }
}

impl SerialPort {
    /// How many ports the window takes.
    pub const PORTS: u16 = REGISTERS as u16;

    /// A port whose interrupt is an edge on the given line.
    pub fn new(interrupt: IrqLine, output: Arc<dyn ByteSink>) -> Self {
        let (interrupt, output) = (Edge::new(interrupt), Sink(output));
        Self {
            uart: Serial::new(interrupt.clone(), output.clone()),
            queue: VecDeque::new(),
            running: false,
            waiting: Vec::new(),
            interrupt,
            output,
        }
    }

    fn push(&mut self, bytes: &[u8]) -> usize {
        // A reset may have put a FIFO's bytes back into a full queue.
        let accepted = bytes.len().min(INPUT_CAPACITY.saturating_sub(self.queue.len()));
        self.queue.extend(&bytes[..accepted]);
        self.refill();
        accepted
    }

    /// Moves input from the queue into the FIFO once the FIFO is empty: a whole FIFO at a time makes one interrupt of 64 bytes,
    /// and wakes a sender for no less.
    fn refill(&mut self) {
        let ready = self.running && self.received() == 0 && !self.has(MODEM_CONTROL, MCR_LOOPBACK);
        if !ready || self.queue.is_empty() {
            return;
        }
        let mut chunk = [0; FIFO_BYTES];
        let length = FIFO_BYTES.min(self.queue.len());
        for (byte, queued) in chunk.iter_mut().zip(self.queue.drain(..length)) {
            *byte = queued;
        }
        let taken = self.uart.enqueue_raw_bytes(&chunk[..length]);
        debug_assert!(matches!(taken, Ok(taken) if taken == length), "an empty FIFO takes {length} bytes");
        self.wake_senders();
    }

    /// Lets those who wait for room look again.
    fn wake_senders(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }

    /// How many bytes the FIFO holds for the guest.
    fn received(&self) -> usize {
        FIFO_BYTES - self.uart.fifo_capacity()
    }

    /// Whether a register without side effects has a bit set.
    fn has(&mut self, register: u8, bit: u8) -> bool {
        self.uart.read(register) & bit != 0
    }

    /// The interrupt identification register with received data reported for as long as there is some (PC16550D, table IV).
    fn read_identification(&mut self) -> u8 {
        let value = self.uart.read(INTERRUPT_IDENTIFICATION);
        let (line_control, enabled) = (self.uart.read(LINE_CONTROL), self.uart.read(INTERRUPT_ENABLE));
        if !self.reports_received(line_control, enabled) {
            return value;
        }
        if value & IIR_TRANSMITTER_EMPTY != 0 {
            // Two sources were pending and the read has forgotten both. Only the reported one may be: raise the other again.
            self.write_uart(INTERRUPT_ENABLE, enabled);
        }
        (value & !IIR_SOURCE) | IIR_RECEIVED
    }

    /// Whether received data is the source that the interrupt identification register has to name.
    fn reports_received(&self, line_control: u8, interrupt_enable: u8) -> bool {
        // With the divisor latch open the enable register cannot be reached; nobody handles interrupts then.
        let reachable = line_control & LCR_DIVISOR_LATCH == 0;
        reachable && self.received() != 0 && interrupt_enable & IER_RECEIVED != 0
    }

    /// The registers, from the model's copy of its state: reading them as the guest does would clear some.
    fn inspect_registers(&self, request: Request<'_>) {
        let state = self.uart.state();
        let divisor = u16::from_le_bytes([state.baud_divisor_low, state.baud_divisor_high]);
        let mut identification = state.interrupt_identification | IIR_FIFO_ENABLED;
        if self.reports_received(state.line_control, state.interrupt_enable) {
            identification = (identification & !IIR_SOURCE) | IIR_RECEIVED;
        }
        request
            .respond()
            .hex("ier", state.interrupt_enable)
            .hex("iir", identification)
            .hex("lcr", state.line_control)
            .hex("mcr", state.modem_control)
            .hex("lsr", state.line_status)
            .hex("msr", state.modem_status)
            .hex("scr", state.scratch)
            .hex("divisor", divisor);
    }

    fn write_uart(&mut self, register: u8, value: u8) {
        // Neither the interrupt nor the output can fail; loopback into a full FIFO drops the byte, as an overrun does.
        let written = self.uart.write(register, value);
        debug_assert!(written.is_ok(), "neither the interrupt nor the output fails");
    }

    fn poll_room(&mut self, context: &Context<'_>) -> Poll<()> {
        if self.queue.len() < INPUT_CAPACITY {
            return Poll::Ready(());
        }
        if !self.waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            self.waiting.push(context.waker().clone());
        }
        Poll::Pending
    }
}

impl Device for SerialPort {
    /// Lets input through to the guest, which may raise the interrupt.
    fn start(&mut self) {
        self.running = true;
        self.refill();
    }

    /// Holds input back.
    fn stop(&mut self) -> Stopping {
        self.running = false;
        stopped()
    }

    fn post_restore(&mut self) {}
}

impl SaveRestore for SerialPort {
    type SavedState = SerialPortState;

    fn save(&mut self) -> Result<SerialPortState, SaveError> {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.uart.state();
        Ok(SerialPortState {
            divisor: u16::from_le_bytes([baud_divisor_low, baud_divisor_high]).into(),
            interrupt_enable: interrupt_enable.into(),
            interrupt_identification: interrupt_identification.into(),
            line_control: line_control.into(),
            line_status: line_status.into(),
            modem_control: modem_control.into(),
            modem_status: modem_status.into(),
            scratch: scratch.into(),
            receive_fifo: in_buffer,
            queued_input: self.queue.iter().copied().collect(),
        })
    }

    /// Whoever waits for room looks again: the restored queue may have some.
    fn restore(&mut self, state: SerialPortState) -> Result<(), RestoreError> {
        let (state, queue) = from_saved(state)?;
        let silent = Edge { connected: Cell::new(false), ..self.interrupt.clone() };
        let uart = Serial::from_state(&state, silent, NoEvents, self.output.clone());
        // The model refuses a FIFO that is too long and nothing else, and that is refused above.
        let uart = uart.map_err(|error| RestoreError::other(error.to_string()))?;
        uart.interrupt_evt().connected.set(true);
        (self.uart, self.queue) = (uart, queue.into());
        self.wake_senders();
        Ok(())
    }
}

/// The model's registers and the queue, each field as the port can have it.
fn from_saved(state: SerialPortState) -> Result<(SerialState, Vec<u8>), RestoreError> {
    let SerialPortState {
        divisor,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        receive_fifo,
        queued_input,
    } = state;
    let [baud_divisor_low, baud_divisor_high] =
        register::<u16>("divisor", divisor, u16::MAX.into())?.to_le_bytes();
    let byte = |field, value| register::<u8>(field, value, u8::MAX.into());
    at_most("receive_fifo", &receive_fifo, FIFO_BYTES)?;
    // A reset puts the FIFO's bytes back into the queue, full or not.
    at_most("queued_input", &queued_input, INPUT_CAPACITY + FIFO_BYTES - receive_fifo.len())?;
    let received = !receive_fifo.is_empty();
    let data_ready = if received { LSR_DATA_READY } else { 0 };
    let registers = SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable: register("interrupt_enable", interrupt_enable, IER_DEFINED.into())?,
        interrupt_identification: pending_sources(interrupt_identification, received)?,
        line_control: byte("line_control", line_control)?,
        line_status: exactly("line_status", line_status, LSR_TRANSMITTER_EMPTY | data_ready)?,
        modem_control: byte("modem_control", modem_control)?,
        modem_status: exactly("modem_status", modem_status, MSR_CONNECTED)?,
        scratch: byte("scratch", scratch)?,
        in_buffer: receive_fifo,
    };
    Ok((registers, queued_input))
}

/// What the model has still to report: nothing, or sources, of which received data takes some that was received.
fn pending_sources(value: u32, received: bool) -> Result<u8, RestoreError> {
    const FIELD: &str = "interrupt_identification";
    let sources = register::<u8>(FIELD, value, IIR_SOURCE.into())?;
    match sources {
        IIR_NONE | IIR_TRANSMITTER_EMPTY => Ok(sources),
        _ if received && sources & !IIR_TRANSMITTER_EMPTY == IIR_RECEIVED => Ok(sources),
        _ => Err(invalid(FIELD, sources)),
    }
}

fn exactly(field: &str, value: u32, only: u8) -> Result<u8, RestoreError> {
    if value == u32::from(only) { Ok(only) } else { Err(invalid(field, value)) }
}

fn at_most(field: &str, bytes: &[u8], limit: usize) -> Result<(), RestoreError> {
    if bytes.len() <= limit {
        return Ok(());
    }
    Err(RestoreError::invalid(field, format_args!("{} bytes long", bytes.len())))
}

impl ByteRegisters for SerialPort {
    fn read_byte(&mut self, offset: u64) -> u8 {
        let value = match u8::try_from(offset) {
            Ok(INTERRUPT_IDENTIFICATION) => self.read_identification(),
            Ok(register) if register < REGISTERS => self.uart.read(register),
            _ => return 0xff,
        };
        self.refill();
        value
    }

    fn write_byte(&mut self, offset: u64, value: u8) -> ControlFlow<PowerRequest> {
        if let Ok(register) = u8::try_from(offset) {
            self.write_uart(register, value);
            // Leaving loopback reconnects the input.
            self.refill();
        }
        ControlFlow::Continue(())
    }

    /// What the guest has not read stays queued, in order: it belongs to the host.
    fn reset(&mut self) {
        let SerialState { in_buffer, modem_control, .. } = self.uart.state();
        self.uart = Serial::new(self.interrupt.clone(), self.output.clone());
        // Bytes that the guest has looped back to itself die with it.
        if modem_control & MCR_LOOPBACK == 0 {
            in_buffer.into_iter().rev().for_each(|byte| self.queue.push_front(byte));
        }
        self.refill();
    }
}

/// Shows how much input waits where and, as the guest's own, the registers as it would read them next; `msr` as it is out of
/// loopback.
impl Inspect for SerialPort {
    fn inspect(&self, request: Request<'_>) {
        request
            .respond()
            .field("running", &self.running)
            .field_with("queued_bytes", || self.queue.len())
            .field("queue_capacity", &INPUT_CAPACITY)
            .field_with("fifo_bytes", || self.received())
            .field_with("waiting_senders", || self.waiting.len())
            .sensitive(|response| {
                response.child("registers", |request| self.inspect_registers(request));
            });
    }
}

/// The host's end of a serial port's input. Does not keep the port.
#[derive(Debug, Clone)]
pub struct SerialInput(Weak<Mutex<SerialPort>>);

impl SerialInput {
    /// The input of a port. Any number of them may exist; their bytes are not interleaved within one push.
    pub fn new(port: &Arc<Mutex<SerialPort>>) -> Self {
        Self(Arc::downgrade(port))
    }

    /// Queues bytes for the guest and says how many there was room for: a prefix. Does not wait. `None` once the port is gone.
    pub fn push(&self, bytes: &[u8]) -> Option<usize> {
        let port = self.0.upgrade()?;
        Some(locked(&port).push(bytes))
    }

    /// Resolves once there is room in the queue, or the port is gone.
    pub async fn room(&self) {
        poll_fn(|context| match self.0.upgrade() {
            Some(port) => locked(&port).poll_room(context),
            None => Poll::Ready(()),
        })
        .await;
    }
}

fn locked(port: &Mutex<SerialPort>) -> MutexGuard<'_, SerialPort> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whoever waits for room learns that there is no port.
impl Drop for SerialPort {
    fn drop(&mut self) {
        self.wake_senders();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IoDevice;
    use crate::inspected::{hex, inspected, observed};
    use crate::ioapic::tests::{Driver, Recorder, ioapic};
    use futures::FutureExt;
    use futures::task::{ArcWake, noop_waker, waker};
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const RECEIVE: u64 = 0;
    const TRANSMIT: u64 = 0;
    const LINE_STATUS: u64 = 5;

    struct Board {
        port: Arc<Mutex<SerialPort>>,
        input: SerialInput,
        interrupts: Recorder,
        output: Arc<Mutex<Vec<u8>>>,
    }

    impl Board {
        fn new() -> Self {
            let (ioapic, interrupts) = ioapic();
            Driver(ioapic.clone()).set_entry(4, 0x34);
            let output = Arc::new(Mutex::new(Vec::new()));
            let sink = output.clone();
            let sink = Arc::new(move |bytes: &[u8]| sink.lock().unwrap().extend_from_slice(bytes));
            let port = Arc::new(Mutex::new(SerialPort::new(IrqLine::new(ioapic, 4).unwrap(), sink)));
            port.lock().unwrap().start();
            interrupts.take();
            Self { input: SerialInput::new(&port), port, interrupts, output }
        }

        fn push(&self, bytes: &[u8]) -> usize {
            self.input.push(bytes).expect("the port is there")
        }

        fn read(&self, register: u64) -> u8 {
            let mut data = [0];
            self.port.lock().unwrap().read(register, &mut data);
            data[0]
        }

        fn write(&self, register: u64, value: u8) {
            assert!(self.port.lock().unwrap().write(register, &[value]).is_continue());
        }

        fn read_ready(&self, most: usize) -> Vec<u8> {
            let ready = || self.read(LINE_STATUS) & LSR_DATA_READY != 0;
            (0..most).map_while(|_| ready().then(|| self.read(RECEIVE))).collect()
        }

        fn source(&self) -> u8 {
            self.read(2) & IIR_SOURCE
        }
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..=250).cycle().take(count).collect()
    }

    #[test]
    fn output_arrives_in_order() {
        let board = Board::new();
        for byte in *b"READY\n" {
            board.write(TRANSMIT, byte);
        }
        assert_eq!(*board.output.lock().unwrap(), b"READY\n");
    }

    #[test]
    fn a_wide_write_reaches_neighbouring_registers() {
        let board = Board::new();
        assert!(board.port.lock().unwrap().write(6, &[0, 0x5a]).is_continue());
        assert_eq!(board.read(7), 0x5a, "the scratch register");
    }

    #[test]
    fn a_full_queue_takes_no_more_and_a_polling_guest_reads_all() {
        let board = Board::new();
        let sent = bytes(INPUT_CAPACITY + FIFO_BYTES + 1);
        assert_eq!(board.push(&sent[..INPUT_CAPACITY]), INPUT_CAPACITY);
        // The first 64 bytes have gone on into the FIFO.
        assert_eq!(board.push(&sent[INPUT_CAPACITY..]), FIFO_BYTES);
        assert_eq!(board.push(&sent), 0);
        assert_eq!(board.read_ready(usize::MAX), &sent[..INPUT_CAPACITY + FIFO_BYTES]);
    }

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl ArcWake for Count {
        fn wake_by_ref(arc: &Arc<Self>) {
            arc.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_sender_learns_of_room_once_a_fifo_has_been_read() {
        let board = Board::new();
        while board.push(&bytes(4096)) > 0 {}
        let count = Arc::new(Count::default());
        let (waker, mut room) = (waker(count.clone()), Box::pin(board.input.room()));
        for _ in 0..2 {
            assert!(room.poll_unpin(&mut Context::from_waker(&waker)).is_pending());
        }
        board.read_ready(FIFO_BYTES - 1);
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        board.read_ready(1);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(room.poll_unpin(&mut Context::from_waker(&waker)).is_ready());
        assert_eq!(board.push(&bytes(4096)), FIFO_BYTES);
    }

    #[test]
    fn a_sender_learns_of_the_room_that_a_restore_makes() {
        let board = Board::new();
        drop(board.port.lock().unwrap().stop());
        let empty = board.port.lock().unwrap().save().unwrap();
        while board.push(&bytes(4096)) > 0 {}
        let count = Arc::new(Count::default());
        let (waker, mut room) = (waker(count.clone()), Box::pin(board.input.room()));
        assert!(room.poll_unpin(&mut Context::from_waker(&waker)).is_pending());
        board.port.lock().unwrap().restore(empty).unwrap();
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(room.poll_unpin(&mut Context::from_waker(&waker)).is_ready());
    }

    #[test]
    fn a_restore_sends_no_edge_again_and_later_ones_as_ever() {
        let board = Board::new();
        board.write(1, IER_RECEIVED | 0x02);
        board.push(b"x");
        drop(board.port.lock().unwrap().stop());
        let state = board.port.lock().unwrap().save().unwrap();
        assert_eq!(state.interrupt_identification, u32::from(IIR_RECEIVED | IIR_TRANSMITTER_EMPTY));
        let other = Board::new();
        drop(other.port.lock().unwrap().stop());
        other.port.lock().unwrap().restore(state).unwrap();
        other.port.lock().unwrap().start();
        assert_eq!(other.interrupts.asserted(), [0; 0]);
        assert_eq!(other.source(), IIR_RECEIVED);
        assert_eq!(other.read_ready(2), b"x");
        other.interrupts.take();
        other.push(b"y");
        assert_eq!(other.interrupts.asserted(), [4]);
    }

    /// A port that was reset, stopped, when its queue and its FIFO were full; and what was sent.
    fn full_and_reset() -> (Board, Vec<u8>) {
        let board = Board::new();
        let sent = bytes(INPUT_CAPACITY + FIFO_BYTES);
        let accepted = board.push(&sent[..INPUT_CAPACITY]);
        assert_eq!(accepted + board.push(&sent[accepted..]), sent.len());
        drop(board.port.lock().unwrap().stop());
        IoDevice::reset(&mut *board.port.lock().unwrap());
        (board, sent)
    }

    /// A reset may leave a FIFO's bytes in a full queue.
    #[test]
    fn the_longest_queue_is_restored() {
        let (board, sent) = full_and_reset();
        let state = board.port.lock().unwrap().save().unwrap();
        assert_eq!(state.queued_input, sent);
        let other = Board::new();
        drop(other.port.lock().unwrap().stop());
        other.port.lock().unwrap().restore(state).unwrap();
        other.port.lock().unwrap().start();
        assert_eq!(other.read_ready(usize::MAX), sent);
    }

    #[test]
    fn room_is_there_from_the_beginning() {
        let board = Board::new();
        let waker = noop_waker();
        assert!(Box::pin(board.input.room()).poll_unpin(&mut Context::from_waker(&waker)).is_ready());
    }

    #[test]
    fn received_data_interrupts_when_enabled() {
        let board = Board::new();
        board.push(b"x");
        assert_eq!(board.interrupts.asserted(), [0; 0]);
        assert_eq!(board.source(), IIR_NONE);
        board.write(1, IER_RECEIVED);
        assert_eq!(board.interrupts.asserted(), [4], "enabling finds the data that is there");
        assert_eq!(board.source(), IIR_RECEIVED);
        assert_eq!(board.read_ready(2), b"x");
        assert_eq!(board.source(), IIR_NONE);
    }

    #[test]
    fn data_left_in_the_fifo_stays_reported() {
        let board = Board::new();
        board.write(1, IER_RECEIVED);
        board.push(&bytes(10));
        assert_eq!(board.source(), IIR_RECEIVED);
        board.read_ready(3);
        assert_eq!(board.source(), IIR_RECEIVED);
        assert_eq!(board.source(), IIR_RECEIVED, "reading the register does not acknowledge data");
        board.read_ready(7);
        assert_eq!(board.source(), IIR_NONE);
    }

    #[test]
    fn the_transmitter_is_reported_after_the_receiver() {
        let board = Board::new();
        board.write(1, IER_RECEIVED | 0x02);
        board.push(b"x");
        board.write(TRANSMIT, b'y');
        assert_eq!(board.source(), IIR_RECEIVED, "the higher priority");
        board.read_ready(1);
        assert_eq!(board.source(), IIR_TRANSMITTER_EMPTY);
        assert_eq!(board.source(), IIR_NONE);
    }

    /// Linux's handler: it reads at most 256 bytes for one look at the identification register, and returns when that says that
    /// nothing is pending.
    #[test]
    fn an_interrupt_driven_guest_reads_all() {
        let board = Board::new();
        board.write(1, IER_RECEIVED);
        let sent = bytes(10_000);
        let (mut queued, mut got) = (0, Vec::new());
        while got.len() < sent.len() {
            let end = sent.len().min(queued + 777);
            queued += board.push(&sent[queued..end]);
            assert!(!board.interrupts.asserted().is_empty(), "an interrupt for more input");
            while board.source() == IIR_RECEIVED {
                got.extend(board.read_ready(256));
            }
            board.interrupts.take();
        }
        assert_eq!(got, sent);
    }

    /// The registers by the names of the datasheet, without the divisor latch.
    const SHOWN: [(&str, u64); 7] =
        [("ier", 1), ("iir", 2), ("lcr", 3), ("mcr", 4), ("lsr", 5), ("msr", 6), ("scr", 7)];

    #[test]
    fn it_shows_its_registers_and_what_is_queued() {
        let board = Board::new();
        board.write(3, LCR_DIVISOR_LATCH);
        board.write(0, 0x0c);
        board.write(1, 0x01);
        board.write(3, 0x03);
        board.write(1, IER_RECEIVED);
        board.write(7, 0x5a);
        board.push(&bytes(FIFO_BYTES + 9));
        let shown = inspected(&mut *board.port.lock().unwrap(), "").to_string();
        let lines =
            ["running: true", "queued_bytes: 9", "fifo_bytes: 64", "  ier: 0x1", "  iir: 0xc4", "  lcr: 0x3"];
        for line in lines.into_iter().chain(["  scr: 0x5a", "  divisor: 0x10c", "  lsr: 0x61"]) {
            assert!(shown.lines().any(|found| found == line), "{line} is not in {shown}");
        }
        let plain = observed(&mut *board.port.lock().unwrap()).to_string();
        assert!(plain.contains("queued_bytes: 9") && !plain.contains("registers"), "{plain}");
    }

    #[test]
    fn a_stopped_port_holds_input_back() {
        let board = Board::new();
        board.write(1, IER_RECEIVED);
        drop(board.port.lock().unwrap().stop());
        assert_eq!(board.push(b"later"), 5);
        assert_eq!(board.interrupts.asserted(), [0; 0]);
        board.port.lock().unwrap().start();
        assert_eq!(board.interrupts.asserted(), [4]);
        assert_eq!(board.read_ready(9), b"later");
    }

    #[test]
    fn loopback_keeps_input_out() {
        let board = Board::new();
        board.write(4, MCR_LOOPBACK);
        board.push(b"host");
        board.write(TRANSMIT, b'g');
        assert_eq!(board.read_ready(9), b"g");
        board.write(4, 0);
        assert_eq!(board.read_ready(9), b"host");
        assert_eq!(*board.output.lock().unwrap(), b"");
    }

    #[test]
    fn a_reset_keeps_the_input_in_order() {
        let board = Board::new();
        let sent = bytes(200);
        board.write(1, IER_RECEIVED);
        board.push(&sent);
        let mut got = board.read_ready(10);
        IoDevice::reset(&mut *board.port.lock().unwrap());
        assert_eq!(board.read(1), 0, "no interrupt is enabled");
        got.extend(board.read_ready(usize::MAX));
        assert_eq!(got, sent);
    }

    #[test]
    fn a_reset_with_a_full_queue_loses_nothing() {
        let (board, sent) = full_and_reset();
        assert_eq!(board.push(b"no room"), 0);
        board.port.lock().unwrap().start();
        assert_eq!(board.read_ready(usize::MAX), sent);
    }

    proptest! {
        /// What is shown is what the guest reads next, and looking twice changes neither.
        #[test]
        fn registers_are_shown_as_they_are_read_next(
            writes in prop::collection::vec((0u64..8, any::<u8>()), 0..30),
            input in 0usize..100,
        ) {
            let board = Board::new();
            board.push(&bytes(input));
            for (register, value) in writes {
                // The divisor latch hides a register, loopback another; the others are for the guest to set.
                let kept = match register { 3 => value & !LCR_DIVISOR_LATCH, 4 => value & !MCR_LOOPBACK, _ => value };
                board.write(register, kept);
            }
            for (name, register) in SHOWN {
                let path = format!("registers/{name}");
                let shown = [0, 1].map(|_| inspected(&mut *board.port.lock().unwrap(), &path));
                let read = board.read(register);
                prop_assert_eq!(&shown, &[hex(read), hex(read)], "{}", name);
            }
        }

        /// Whatever a guest does besides reading, each byte comes out once and in order.
        #[test]
        fn input_survives_a_guest_that_pokes_around(
            pokes in prop::collection::vec((1u64..8, any::<u8>(), 0usize..100), 1..50),
        ) {
            let board = Board::new();
            let sent = bytes(3000);
            let mut got = Vec::new();
            board.push(&sent);
            for (register, value, reads) in pokes {
                // Bit 7 of the line control register swaps registers, bit 4 of the modem control register loops back.
                let value = if register == 3 { value & 0x7f } else { value };
                board.write(register, if register == 4 { value & !MCR_LOOPBACK } else { value });
                board.read(register);
                got.extend(board.read_ready(reads));
            }
            got.extend(board.read_ready(usize::MAX));
            prop_assert_eq!(got, sent);
        }
    }
}
