//! The device's two halves: its configuration, and what moves packets between the queues and the engine.

use super::engine::{MAX_PAYLOAD, VsockLimits};
use super::host::{Shared, VsockHost};
use super::packet::{GUEST_CID, HEADER_BYTES, Header};
use crate::virtio::{
    DeviceFault, DeviceType, Interrupt, QueueWorker, Session, VirtQueue, VirtioDevice, VirtioSpec,
    read_config,
};
use guest_saved_state::devices::vsock::VsockState;
use inspect::{Inspect, Request};
use save_restore::{RestoreError, SaveError};
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;
use vm_memory::GuestMemoryMmap;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

const QUEUE_SIZE: u16 = 256;
const EVENT_QUEUE_SIZE: u16 = 16;

/// VIRTIO_VSOCK_F_STREAM.
const F_STREAM: u64 = 1 << 0;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, little endian.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// How many packets go one way before the other way has its turn, and then other devices.
const BATCH: usize = 64;

/// A header and something behind it.
const LEAST_BUFFER: u64 = HEADER_BYTES as u64 + 1;

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    shared: Arc<Shared>,
}

/// What serves its queues.
#[derive(Debug)]
pub struct VsockWorker {
    shared: Arc<Shared>,
    /// The driver has to hear that it has lost all connections.
    owes_event: bool,
    /// The payload of the packet that is being taken.
    payload: Vec<u8>,
}

impl Vsock {
    /// A socket device as a unit of this name, and the host's end of it.
    pub fn spec(name: impl Into<String>, limits: VsockLimits) -> (VirtioSpec, VsockHost) {
        let host = VsockHost::new(limits);
        let shared = host.0.clone();
        let worker = VsockWorker { shared: shared.clone(), owes_event: false, payload: Vec::new() };
        let spec = VirtioSpec::new(name, Self { shared }, worker, Arc::new(Interrupt::default()));
        (spec, host)
    }
}

impl VirtioDevice for Vsock {
    type Worker = VsockWorker;
    type SavedState = VsockState;

    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn reset(&mut self) {}

    fn save(&mut self, _: &mut VsockWorker) -> Result<VsockState, SaveError> {
        Ok(VsockState { guest_cid: GUEST_CID })
    }

    /// The other ends of the connections were not saved, so all are reset, and the driver is told so.
    fn restore(&mut self, worker: &mut VsockWorker, state: VsockState) -> Result<(), RestoreError> {
        let VsockState { guest_cid } = state;
        if guest_cid != GUEST_CID {
            return Err(RestoreError::invalid("guest_cid", guest_cid));
        }
        self.shared.engine().reset_guest();
        worker.owes_event = true;
        Ok(())
    }
}

/// Shows the listeners, the connections, and what has passed through.
impl Inspect for Vsock {
    fn inspect(&self, request: Request<'_>) {
        let engine = self.shared.engine();
        let counters = engine.counters();
        let mut response = request.respond();
        response
            .field("guest_cid", &GUEST_CID)
            .field("from_guest_bytes", &counters.from_guest_bytes)
            .field("to_guest_bytes", &counters.to_guest_bytes)
            .field("malformed_packets", &counters.malformed_packets)
            .field("resets", &counters.resets)
            .field("quarantined_pairs", &(engine.quarantined() as u64))
            .field("connection_count", &(engine.connections().count() as u64));
        response.child("listeners", |request| {
            let mut response = request.respond();
            for (port, waiting) in engine.listening() {
                let name = port.map_or("unclaimed".to_owned(), |port| port.to_string());
                response.child(&name, |request| {
                    request.respond().field("waiting_requests", &(waiting as u64));
                });
            }
        });
        response.sensitive(|response| {
            response.child("connections", |request| {
                let mut response = request.respond();
                for (pair, connection) in engine.connections() {
                    let name = format!("guest-{}-host-{}", pair.guest, pair.host);
                    response.field(&name, connection);
                }
            });
        });
    }
}

/// The host is told that the guest is gone.
impl Drop for VsockWorker {
    fn drop(&mut self) {
        self.shared.engine().shut_down();
    }
}

impl QueueWorker for VsockWorker {
    async fn run(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        let Session { queues, stop, memory, .. } = session;
        let [rx, tx, event] = Session::queues(queues, [RX, TX, EVENT])?;
        self.shared.engine().restart_deadlines(Instant::now());
        loop {
            let taken = self.take_packets(tx, memory)?;
            let sent = self.send_packets(rx, memory)?;
            self.tell_event(event, memory)?;
            if stop.is_requested() {
                return Ok(());
            }
            if taken + sent > 0 {
                tokio::task::yield_now().await;
                continue;
            }
            let (can_send, can_receive, deadline) = self.waits_for();
            let overdue = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.requested() => return Ok(()),
                rung = tx.rung(), if can_receive => rung?,
                rung = rx.rung(), if can_send => rung?,
                rung = event.rung(), if self.owes_event => rung?,
                () = self.shared.bell.notified() => {}
                () = overdue => self.shared.engine().expire(Instant::now()),
            }
        }
    }

    /// The driver begins with no connections.
    fn reset(&mut self) {
        self.owes_event = false;
        self.shared.engine().reset_guest();
    }
}

impl VsockWorker {
    /// What there is to wait for: room for packets, packets, time.
    fn waits_for(&self) -> (bool, bool, Option<Instant>) {
        let engine = self.shared.engine();
        (engine.can_send(), engine.can_receive(), engine.deadline())
    }

    /// Takes packets of the guest's, as long as they can be answered; how many.
    fn take_packets(&mut self, tx: &mut VirtQueue, memory: &GuestMemoryMmap) -> Result<usize, DeviceFault> {
        let mut count = 0;
        while count < BATCH && self.shared.engine().can_receive() {
            let Some(chain) = tx.try_next()? else { break };
            let mut reader = chain.readable.reader(memory)?;
            let mut header = [0; HEADER_BYTES];
            if reader.read_exact(&mut header).is_ok() {
                let header = Header::from_bytes(&header);
                // More is not looked at: no connection has room for it.
                let length = reader.remaining().min(header.len.into()).min(MAX_TAKEN);
                self.payload.resize(usize::try_from(length).expect("bounded"), 0);
                reader.read_exact(&mut self.payload).map_err(DeviceFault::Host)?;
                self.shared.engine().receive(&header, &self.payload, Instant::now());
            } else {
                self.shared.engine().receive_garbage();
            }
            tx.complete(chain, 0)?;
            count += 1;
        }
        if count > 0 {
            tx.signal()?;
        }
        Ok(count)
    }

    /// Sends packets, as long as the guest has room for them; how many.
    fn send_packets(&mut self, rx: &mut VirtQueue, memory: &GuestMemoryMmap) -> Result<usize, DeviceFault> {
        let mut count = 0;
        while count < BATCH && self.shared.engine().can_send() {
            let Some(chain) = rx.try_next()? else { break };
            let room = chain.writable.bytes();
            if room < LEAST_BUFFER {
                let problem = format!("a buffer for packets has {room} bytes, fewer than {LEAST_BUFFER}");
                return Err(DeviceFault::Driver(problem));
            }
            let mut writer = chain.writable.writer(memory)?;
            let room = usize::try_from(room).map_or(MAX_PAYLOAD, |room| room - HEADER_BYTES);
            let sent = self.shared.engine().send(room, Instant::now(), |header, (front, back)| {
                writer.write_all(&header.to_bytes())?;
                writer.write_all(front)?;
                writer.write_all(back)
            });
            let Some(sent) = sent else {
                rx.put_back(chain);
                break;
            };
            sent.map_err(DeviceFault::Host)?;
            let written = writer.written();
            rx.complete(chain, written)?;
            count += 1;
        }
        if count > 0 {
            rx.signal()?;
        }
        Ok(count)
    }

    /// Tells the driver that it has lost its connections, once it has a buffer for that.
    fn tell_event(&mut self, event: &mut VirtQueue, memory: &GuestMemoryMmap) -> Result<(), DeviceFault> {
        if !self.owes_event {
            return Ok(());
        }
        let Some(chain) = event.try_next()? else { return Ok(()) };
        let mut writer = chain.writable.writer(memory)?;
        if writer.remaining() < TRANSPORT_RESET.len() as u64 {
            let problem = format!("a buffer for events has {} bytes, fewer than 4", writer.remaining());
            return Err(DeviceFault::Driver(problem));
        }
        writer.write_all(&TRANSPORT_RESET).map_err(DeviceFault::Host)?;
        let written = writer.written();
        event.answer(chain, written)?;
        self.owes_event = false;
        Ok(())
    }
}

/// The most bytes that are taken out of one packet: one more than the widest window has room for.
const MAX_TAKEN: u64 = (256 << 10) + 1;
