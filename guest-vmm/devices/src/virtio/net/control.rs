//! The control queue (5.1.6.5): what the driver asks of the device beside its frames.

use super::header::accepted;
use super::shared::{DriverSetup, Shared};
use crate::virtio::{BufferReader, Chain, DeviceFault, VirtQueue};
use std::io::{self, Read};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};
use vm_memory::GuestMemoryMmap;

/// The device's control queue while it is served.
pub(super) struct Control<'a> {
    pub queue: &'a mut VirtQueue,
    pub memory: &'a GuestMemoryMmap,
    pub features: u64,
    /// How many queue pairs are ready, from the first on.
    pub pairs: u16,
    pub shared: &'a Shared,
}

impl Control<'_> {
    /// Answers commands until one changes the number of queue pairs. May be cancelled at any time.
    pub(super) async fn run(mut self) -> Result<(), DeviceFault> {
        let before = self.shared.setup().pairs;
        while self.shared.setup().pairs == before {
            let chain = self.queue.next().await?;
            self.answer(chain)?;
        }
        Ok(())
    }

    fn answer(&mut self, chain: Chain) -> Result<(), DeviceFault> {
        let mut command = chain.readable.reader(self.memory)?;
        let outcome = if self.obey(&mut command).is_some() { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        let mut answer = chain.writable.writer(self.memory)?;
        let outcome = outcome.to_le_bytes()[0];
        if answer.write_obj(outcome).is_none() {
            return Err(DeviceFault::Driver("a control command has no room for its answer".into()));
        }
        Ok(self.queue.answer(chain, 1)?)
    }

    /// Does what a command says, or nothing and `None`.
    fn obey(&self, command: &mut BufferReader<'_>) -> Option<()> {
        let [class, number] = command.read_obj::<[u8; 2]>()?.map(u32::from);
        let mut setup = self.shared.setup();
        match class {
            VIRTIO_NET_CTRL_RX if self.has(VIRTIO_NET_F_CTRL_RX) => receive_mode(&mut setup, number, command),
            VIRTIO_NET_CTRL_MAC if number == VIRTIO_NET_CTRL_MAC_TABLE_SET => {
                // Unicast, then multicast addresses. What is filtered by them is the guest's business.
                self.has(VIRTIO_NET_F_CTRL_RX).then_some(())?;
                (0..2).try_for_each(|_| skip_addresses(command))
            }
            VIRTIO_NET_CTRL_MAC if number == VIRTIO_NET_CTRL_MAC_ADDR_SET => {
                self.has(VIRTIO_NET_F_CTRL_MAC_ADDR).then_some(())?;
                let mac: [u8; 6] = command.read_obj()?;
                (mac[0] & 1 == 0).then(|| setup.mac = mac)
            }
            VIRTIO_NET_CTRL_ANNOUNCE if number == VIRTIO_NET_CTRL_ANNOUNCE_ACK => {
                self.has(VIRTIO_NET_F_GUEST_ANNOUNCE).then(|| self.shared.announcement.acknowledge())
            }
            VIRTIO_NET_CTRL_MQ if number == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => {
                self.has(VIRTIO_NET_F_MQ).then_some(())?;
                let pairs = u16::from_le_bytes(command.read_obj()?);
                (1..=self.pairs).contains(&pairs).then(|| setup.pairs = pairs)
            }
            _ => None,
        }
    }

    fn has(&self, feature: u32) -> bool {
        accepted(self.features, feature)
    }
}

/// Passes over a table of hardware addresses, which has to be there.
fn skip_addresses(command: &mut BufferReader<'_>) -> Option<()> {
    let count = u32::from_le_bytes(command.read_obj()?);
    let bytes = u64::from(count) * 6;
    (command.remaining() >= bytes).then_some(())?;
    io::copy(&mut command.take(bytes), &mut io::sink()).ok().map(drop)
}

fn receive_mode(setup: &mut DriverSetup, number: u32, command: &mut BufferReader<'_>) -> Option<()> {
    let [on] = command.read_obj::<[u8; 1]>()?;
    match number {
        VIRTIO_NET_CTRL_RX_PROMISC => setup.receive_mode.promiscuous = on != 0,
        VIRTIO_NET_CTRL_RX_ALLMULTI => setup.receive_mode.all_multicast = on != 0,
        _ => return None,
    }
    Some(())
}
