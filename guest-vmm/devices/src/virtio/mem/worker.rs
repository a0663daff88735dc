//! What answers a memory device's requests (VIRTIO 1.3, 5.15.6).

use super::{Shared, State};
use crate::virtio::{Buffers, Chain, DeviceFault, GuestRam, QueueWorker, Session};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const REQUEST_PLUG: u16 = 0;
const REQUEST_UNPLUG: u16 = 1;
const REQUEST_UNPLUG_ALL: u16 = 2;
const REQUEST_STATE: u16 = 3;

/// A response's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Response {
    Ack = 0,
    Nack = 1,
    Error = 3,
}

const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// Plugs and unplugs blocks.
#[derive(Debug)]
pub struct MemWorker {
    shared: Arc<Shared>,
}

/// What the driver asks for.
struct MemRequest {
    kind: u16,
    address: u64,
    blocks: u16,
}

impl MemRequest {
    /// struct virtio_mem_req: type, padding to 8 bytes, address, number of blocks, padding to 24 bytes.
    fn read(buffers: &Buffers, memory: &GuestMemoryMmap) -> Result<Self, DeviceFault> {
        let mut reader = buffers.reader(memory)?;
        let short =
            || DeviceFault::Driver(format!("a request of {} bytes is shorter than 24", buffers.bytes()));
        let mut word = || reader.read_obj::<[u8; 8]>().map(u64::from_le_bytes).ok_or_else(short);
        let (kind, address, blocks) = (word()?, word()?, word()?);
        let low = |word: u64| u16::try_from(word & 0xffff).expect("masked");
        Ok(Self { kind: low(kind), address, blocks: low(blocks) })
    }
}

impl MemWorker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn answer(
        &self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
        ram: &dyn GuestRam,
    ) -> Result<u32, DeviceFault> {
        let request = MemRequest::read(&chain.readable, memory)?;
        let (response, state) = self.carry_out(&request, ram).map_err(DeviceFault::Host)?;
        let mut writer = chain.writable.writer(memory)?;
        // struct virtio_mem_resp: type, padding to 8 bytes, state.
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&(response as u16).to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        let short =
            || DeviceFault::Driver(format!("{} bytes are no room for a response", chain.writable.bytes()));
        writer.write_obj(bytes).ok_or_else(short)?;
        Ok(writer.written())
    }

    fn carry_out(&self, request: &MemRequest, ram: &dyn GuestRam) -> io::Result<(Response, u16)> {
        let mut state = self.shared.state();
        let blocks = self.shared.geometry.blocks_at(request.address, request.blocks);
        let response = match (request.kind, blocks) {
            (REQUEST_UNPLUG_ALL, _) => {
                let all = 0..self.shared.geometry.blocks();
                self.unplug(&mut state, all, ram)?
            }
            (REQUEST_PLUG, Some(blocks)) => self.plug(&mut state, blocks),
            (REQUEST_UNPLUG, Some(blocks)) if state.blocks.plugged_of(blocks.clone()) == blocks.len() => {
                self.unplug(&mut state, blocks, ram)?
            }
            (REQUEST_STATE, Some(blocks)) => return Ok((Response::Ack, plugged_state(&state, blocks))),
            _ => Response::Error,
        };
        Ok((response, 0))
    }

    /// No more than the host wants, and nothing twice.
    fn plug(&self, state: &mut State, blocks: Range<usize>) -> Response {
        if state.blocks.plugged_of(blocks.clone()) > 0 {
            return Response::Error;
        }
        let more = blocks.len() as u64 * self.shared.geometry.block_bytes;
        if self.shared.plugged_bytes(state) + more > state.requested_bytes {
            return Response::Nack;
        }
        state.blocks.set(blocks, true);
        Response::Ack
    }

    fn unplug(&self, state: &mut State, blocks: Range<usize>, ram: &dyn GuestRam) -> io::Result<Response> {
        let addresses = self.shared.geometry.addresses(&blocks);
        ram.discard(GuestAddress(addresses.start), addresses.end - addresses.start)?;
        state.blocks.set(blocks, false);
        Ok(Response::Ack)
    }
}

fn plugged_state(state: &State, blocks: Range<usize>) -> u16 {
    match state.blocks.plugged_of(blocks.clone()) {
        0 => STATE_UNPLUGGED,
        plugged if plugged == blocks.len() => STATE_PLUGGED,
        _ => STATE_MIXED,
    }
}

impl QueueWorker for MemWorker {
    async fn run(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        let Session { queues, stop, memory, ram, .. } = session;
        let [queue] = Session::queues(queues, [0])?;
        loop {
            let chain = tokio::select! {
                biased;
                () = stop.requested() => return Ok(()),
                chain = queue.next() => chain?,
            };
            let written = self.answer(&chain, memory, &**ram)?;
            queue.answer(chain, written)?;
        }
    }

    fn reset(&mut self) {}
}
