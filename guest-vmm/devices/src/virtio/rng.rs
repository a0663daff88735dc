//! The entropy device (VIRTIO 1.3, 5.4): random bytes of the host's.

use super::{
    Buffers, DeviceFault, DeviceType, Interrupt, QueueWorker, Session, VirtioDevice, VirtioSpec, read_config,
};
use inspect::{Inspect, Request};
use rustix::rand::{GetRandomFlags, getrandom};
use save_restore::{NoSavedState, RestoreError, SaveError};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::GuestMemoryMmap;

const QUEUE_SIZE: u16 = 256;

/// The most bytes that one request gets; Linux asks for 64 at a time. A driver asks again for what is missing.
const REQUEST_BYTES: usize = 4096;

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    given: Arc<AtomicU64>,
}

/// What answers its requests.
#[derive(Debug)]
pub struct RngWorker {
    given: Arc<AtomicU64>,
}

impl Rng {
    /// An entropy device as a unit of this name.
    pub fn spec(name: impl Into<String>) -> VirtioSpec {
        let given = Arc::new(AtomicU64::new(0));
        let worker = RngWorker { given: given.clone() };
        VirtioSpec::new(name, Self { given }, worker, Arc::new(Interrupt::default()))
    }
}

impl VirtioDevice for Rng {
    type Worker = RngWorker;
    type SavedState = NoSavedState;

    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&[], offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn reset(&mut self) {}

    fn save(&mut self, _: &mut RngWorker) -> Result<NoSavedState, SaveError> {
        Ok(NoSavedState {})
    }

    fn restore(&mut self, _: &mut RngWorker, _: NoSavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Shows how many bytes it has given.
impl Inspect for Rng {
    fn inspect(&self, request: Request<'_>) {
        request.respond().field_with("given_bytes", || self.given.load(Ordering::Relaxed));
    }
}

impl QueueWorker for RngWorker {
    async fn run(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        let Session { queues, stop, memory, .. } = session;
        let [queue] = Session::queues(queues, [0])?;
        loop {
            tokio::select! {
                biased;
                () = stop.requested() => return Ok(()),
                chain = queue.next() => {
                    let chain = chain?;
                    let written = self.fill(&chain.writable, memory)?;
                    queue.answer(chain, written)?;
                }
            }
        }
    }

    fn reset(&mut self) {}
}

impl RngWorker {
    /// Fills a request's buffers, the first of them if there are many.
    fn fill(&self, buffers: &Buffers, memory: &GuestMemoryMmap) -> Result<u32, DeviceFault> {
        let mut writer = buffers.writer(memory)?;
        let mut bytes = [0; REQUEST_BYTES];
        let wanted =
            usize::try_from(writer.remaining()).map_or(REQUEST_BYTES, |room| room.min(REQUEST_BYTES));
        if wanted == 0 {
            return Err(DeviceFault::Driver("a request for entropy has no writable buffer".into()));
        }
        let random = &mut bytes[..wanted];
        fill_random(random).map_err(DeviceFault::Host)?;
        writer.write_all(random).map_err(DeviceFault::Host)?;
        self.given.fetch_add(wanted as u64, Ordering::Relaxed);
        Ok(writer.written())
    }
}

fn fill_random(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = getrandom(&mut *bytes, GetRandomFlags::empty())?;
        bytes = &mut bytes[count..];
    }
    Ok(())
}
