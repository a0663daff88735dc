//! What serves a console's queues: for each a loop of its own, all in one task.

use super::control::Message;
use super::port::Port;
use super::shared::Shared;
use super::{FEATURE_MULTIPORT, QUEUES_PER_PORT};
use crate::virtio::{Buffers, Chain, DeviceFault, QueueFault, QueueWorker, Session, Stop, VirtQueue};
use futures::FutureExt;
use futures::future::{LocalBoxFuture, try_join_all};
use std::io::{Read, Write};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// How many bytes of output are taken at once: a guest's longest buffer holds up others no longer than these.
const PIECE_BYTES: usize = 16 << 10;

/// Moves a console's bytes and messages.
#[derive(Debug)]
pub struct ConsoleWorker {
    shared: Arc<Shared>,
}

impl ConsoleWorker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

/// What a queue is for (VIRTIO 1.3, 5.3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    ControlReceive,
    ControlTransmit,
}

impl Role {
    /// Port 0 comes first, then the control messages, then the other ports.
    fn of(queue: usize) -> Self {
        let port = (queue / QUEUES_PER_PORT).saturating_sub(1);
        match queue {
            0 => Self::Receive(0),
            1 => Self::Transmit(0),
            2 => Self::ControlReceive,
            3 => Self::ControlTransmit,
            queue if queue % QUEUES_PER_PORT == 0 => Self::Receive(port),
            _ => Self::Transmit(port),
        }
    }

    /// Whether the device cannot do without it. A driver may leave out further ports.
    fn is_needed(self) -> bool {
        matches!(self, Self::Receive(0) | Self::Transmit(0) | Self::ControlReceive | Self::ControlTransmit)
    }
}

impl QueueWorker for ConsoleWorker {
    async fn run(&mut self, session: &mut Session) -> Result<(), DeviceFault> {
        let multiport = session.has(FEATURE_MULTIPORT);
        let Session { queues, stop, memory, .. } = session;
        let shared = &*self.shared;
        let mut loops: Vec<LocalBoxFuture<'_, Result<(), DeviceFault>>> = Vec::new();
        let served = if multiport { queues.len() } else { QUEUES_PER_PORT };
        for (index, queue) in queues.iter_mut().enumerate().take(served) {
            let role = Role::of(index);
            let Some(queue) = queue else {
                if role.is_needed() {
                    return Err(QueueFault::NotReady(index).into());
                }
                continue;
            };
            let line = Line { queue, memory, stop: stop.clone() };
            loops.push(match role {
                Role::Receive(port) => line.receive(&shared.ports()[port], multiport).boxed_local(),
                Role::Transmit(port) => line.transmit(&shared.ports()[port]).boxed_local(),
                Role::ControlReceive => line.tell(shared).boxed_local(),
                Role::ControlTransmit => line.listen(shared).boxed_local(),
            });
        }
        try_join_all(loops).await.map(drop)
    }

    fn reset(&mut self) {}
}

/// A queue that is served until the worker is to stop.
struct Line<'a> {
    queue: &'a mut VirtQueue,
    memory: &'a GuestMemoryMmap,
    stop: Stop,
}

impl Line<'_> {
    /// Delivers a port's input.
    async fn receive(mut self, port: &Port, opens: bool) -> Result<(), DeviceFault> {
        while self.until(port.deliverable(opens)).await {
            let Some(chain) = self.next().await? else { break };
            // The guest may have closed the port before it has given a buffer.
            if !port.is_deliverable(opens) {
                self.queue.put_back(chain);
                continue;
            }
            let written = port.deliver(&chain.writable, self.memory)?;
            self.give_back(chain, written)?;
        }
        Ok(())
    }

    /// Takes a port's output.
    async fn transmit(mut self, port: &Port) -> Result<(), DeviceFault> {
        while let Some(chain) = self.next().await? {
            take_output(&chain.readable, self.memory, port).await?;
            self.give_back(chain, 0)?;
        }
        Ok(())
    }

    /// Tells the driver what it is to be told.
    async fn tell(mut self, shared: &Shared) -> Result<(), DeviceFault> {
        while self.until(shared.noticed()).await {
            let Some(chain) = self.next().await? else { break };
            let Some((port, notice)) = shared.first_notice() else {
                self.queue.put_back(chain);
                continue;
            };
            let message = shared.take_notice(port, notice);
            let written = write_message(&message, &chain.writable, self.memory)?;
            self.give_back(chain, written)?;
        }
        Ok(())
    }

    /// Hears what the driver tells.
    async fn listen(mut self, shared: &Shared) -> Result<(), DeviceFault> {
        while let Some(chain) = self.next().await? {
            shared.hear(Message::read(&chain.readable, self.memory)?);
            self.give_back(chain, 0)?;
        }
        Ok(())
    }

    /// Waits for something; whether it came before the worker was to stop.
    async fn until(&mut self, something: impl Future<Output = ()>) -> bool {
        tokio::select! {
            biased;
            () = self.stop.requested() => false,
            () = something => true,
        }
    }

    /// The next chain; `None` once the worker is to stop.
    async fn next(&mut self) -> Result<Option<Chain>, DeviceFault> {
        tokio::select! {
            biased;
            () = self.stop.requested() => Ok(None),
            chain = self.queue.next() => Ok(Some(chain?)),
        }
    }

    fn give_back(&mut self, chain: Chain, written: u32) -> Result<(), DeviceFault> {
        Ok(self.queue.answer(chain, written)?)
    }
}

/// Takes all of a buffer, piece by piece.
async fn take_output(buffers: &Buffers, memory: &GuestMemoryMmap, port: &Port) -> Result<(), DeviceFault> {
    let mut reader = buffers.reader(memory)?;
    let longest = usize::try_from(reader.remaining()).map_or(PIECE_BYTES, |bytes| bytes.min(PIECE_BYTES));
    let mut piece = vec![0; longest];
    loop {
        let count = reader.read(&mut piece).map_err(DeviceFault::Host)?;
        if count == 0 {
            return Ok(());
        }
        port.send(&piece[..count]);
        if reader.remaining() > 0 {
            tokio::task::yield_now().await;
        }
    }
}

fn write_message(message: &[u8], buffers: &Buffers, memory: &GuestMemoryMmap) -> Result<u32, DeviceFault> {
    let mut writer = buffers.writer(memory)?;
    let (room, length) = (writer.remaining(), message.len());
    writer.write_all(message).map_err(|_| {
        DeviceFault::Driver(format!(
            "a buffer of {room} bytes is too short for a control message of {length}"
        ))
    })?;
    Ok(writer.written())
}

#[cfg(test)]
mod tests {
    use super::Role;

    #[test]
    fn queues_have_the_roles_of_the_specification() {
        let roles = [0, 1, 2, 3, 4, 5, 6, 7, 32, 33].map(Role::of);
        let expected = [
            Role::Receive(0),
            Role::Transmit(0),
            Role::ControlReceive,
            Role::ControlTransmit,
            Role::Receive(1),
            Role::Transmit(1),
            Role::Receive(2),
            Role::Transmit(2),
            Role::Receive(15),
            Role::Transmit(15),
        ];
        assert_eq!(roles, expected);
    }
}
