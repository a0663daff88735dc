//! What a network device's registers show (5.1.4).

use super::shared::{DriverSetup, MacAddress, ReceiveMode, Shared};
use super::worker::NetWorker;
use crate::saved::invalid;
use crate::virtio::{DeviceType, VirtioDevice, read_config};
use guest_saved_state::devices::net::NetState;
use inspect::{InspectMut, Request};
use save_restore::{RestoreError, SaveError};
use std::sync::Arc;
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

/// How many descriptors each queue has at most. Buffers for a frame of full length are a quarter of one.
const QUEUE_SIZE: u16 = 256;

/// How many the control queue has.
const CONTROL_SIZE: u16 = 64;

/// What a network device's registers show.
#[derive(Debug)]
pub struct NetDevice {
    pub(super) features: u64,
    /// What of the transport's features the back end cannot do.
    pub(super) lacks: u64,
    /// Another process serves the queues.
    pub(super) is_served_elsewhere: bool,
    /// How many queue pairs there are.
    pub(super) pairs: u16,
    pub(super) mtu: Option<u16>,
    pub(super) mac: MacAddress,
    pub(super) shared: Arc<Shared>,
}

impl NetDevice {
    /// `struct virtio_net_config`: the address, the status, the number of queue pairs, the MTU.
    fn config(&self) -> [u8; 12] {
        let up = if self.shared.link.is_up() { VIRTIO_NET_S_LINK_UP } else { 0 };
        let announce = if self.shared.announcement.is_shown() { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let status = u16::try_from(up | announce).expect("two bits");
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.shared.setup().mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }
}

impl VirtioDevice for NetDevice {
    type Worker = NetWorker;
    type SavedState = NetState;

    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn lacks(&self) -> u64 {
        self.lacks
    }

    fn shares_memory(&self) -> bool {
        self.is_served_elsewhere
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(self.pairs)];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    /// There is nothing that a driver of VIRTIO 1 writes: its address goes by the control queue.
    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn reset(&mut self) {
        *self.shared.setup() = DriverSetup::new(self.mac);
    }

    fn save(&mut self, _: &mut NetWorker) -> Result<NetState, SaveError> {
        let DriverSetup { mac, pairs, receive_mode } = *self.shared.setup();
        let ReceiveMode { promiscuous, all_multicast } = receive_mode;
        Ok(NetState { mac: mac.to_vec(), queue_pairs: pairs.into(), promiscuous, all_multicast })
    }

    fn restore(&mut self, _: &mut NetWorker, state: NetState) -> Result<(), RestoreError> {
        let NetState { mac, queue_pairs, promiscuous, all_multicast } = state;
        let unicast = |mac: &MacAddress| mac[0] & 1 == 0;
        let mac = mac.as_slice().try_into().ok().filter(unicast);
        let mac = mac.ok_or_else(|| RestoreError::invalid("mac", "not a unicast address of 6 bytes"))?;
        let pairs = u16::try_from(queue_pairs).ok().filter(|pairs| (1..=self.pairs).contains(pairs));
        let pairs = pairs.ok_or_else(|| invalid("queue_pairs", queue_pairs))?;
        let receive_mode = ReceiveMode { promiscuous, all_multicast };
        *self.shared.setup() = DriverSetup { mac, pairs, receive_mode };
        self.shared.announcement.set_due();
        Ok(())
    }
}

/// Shows the link, which can be switched off and on at `link`, the rates, which can be written, and what has gone through it.
impl InspectMut for NetDevice {
    fn inspect_mut(&mut self, request: Request<'_>) {
        let Shared { link, rates, received, transmitted, .. } = &*self.shared;
        let mut response = request.respond();
        response
            .writable(
                "link",
                || link.is_enabled(),
                |enabled| {
                    link.set_enabled(enabled);
                    Ok::<_, std::convert::Infallible>(enabled)
                },
            )
            .field_with("backend", || link.gone().map_or("there".into(), |reason| format!("gone: {reason}")))
            .field("mtu", &self.mtu)
            .field("queue_pairs", &self.pairs)
            .field("limits", rates)
            .field("received", received)
            .field("transmitted", transmitted);
        let setup = *self.shared.setup();
        response.sensitive(|response| {
            response
                .field_with("mac", || address(&setup.mac))
                .field("used_queue_pairs", &setup.pairs)
                .field("promiscuous", &setup.receive_mode.promiscuous)
                .field("all_multicast", &setup.receive_mode.all_multicast);
        });
    }
}

/// An address as people write it.
fn address(mac: &MacAddress) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
