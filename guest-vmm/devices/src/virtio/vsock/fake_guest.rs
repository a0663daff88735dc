//! A guest's side of the socket device: packets by hand, over the [fake driver](crate::virtio::fake_driver).

use super::packet::{GUEST_CID, HEADER_BYTES, HOST_CID, Header, Op, PortPair, TYPE_STREAM};
use super::{Vsock, VsockHost, VsockLimits};
use crate::virtio::fake_driver::{Buffer, FakeDriver, Used};

/// The queue of packets to the guest.
pub const RX: usize = 0;
/// The queue of packets from the guest.
pub const TX: usize = 1;
/// The queue of events.
pub const EVENT: usize = 2;

/// How long a buffer for packets is: as Linux has them.
pub const RX_BYTES: u32 = 4096;

/// A guest's driver, and the host's end of its device. It blocks as the driver does.
pub struct FakeGuest {
    /// The driver.
    pub driver: FakeDriver,
    /// The host's end.
    pub host: VsockHost,
}

/// A packet of the guest's without data, of which it says that the guest has room for 1 MiB and has taken nothing.
pub fn packet(pair: PortPair, op: Op) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: pair.guest,
        dst_port: pair.host,
        len: 0,
        socket_type: TYPE_STREAM,
        op: op as u16,
        flags: 0,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
    }
}

impl FakeGuest {
    /// A guest whose driver is ready, with so many buffers for packets.
    pub fn ready(buffers: usize) -> Self {
        let (spec, host) = Vsock::spec("vsock", VsockLimits::default());
        let mut guest = Self { driver: FakeDriver::ready(spec, u64::MAX), host };
        guest.provide(buffers);
        guest
    }

    /// Gives the device buffers for packets.
    pub fn provide(&mut self, count: usize) {
        for _ in 0..count {
            self.driver.send(RX, &[Buffer::In(RX_BYTES)]);
        }
    }

    /// Sends a packet and waits until the device has taken it.
    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        let len = u32::try_from(payload.len()).expect("a packet");
        let bytes = Header { len, ..*header }.to_bytes();
        match payload {
            [] => self.driver.request(TX, &[Buffer::Out(&bytes)]),
            payload => self.driver.request(TX, &[Buffer::Out(&bytes), Buffer::Out(payload)]),
        };
    }

    /// The next packet of the device's; waits for it. Its buffer is the device's again.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.wait_used(RX);
        self.packet_of(&used)
    }

    /// The next packet of the device's, if there is one now.
    pub fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.driver.poll(RX)?;
        Some(self.packet_of(&used))
    }

    fn packet_of(&mut self, used: &Used) -> (Header, Vec<u8>) {
        let reply = self.driver.take(used);
        self.provide(1);
        let (header, payload) = reply.data.split_first_chunk::<HEADER_BYTES>().expect("room for a header");
        let header = Header::from_bytes(header);
        let count = header.len as usize;
        assert_eq!(reply.written as usize, HEADER_BYTES + count, "all of the packet was written");
        (header, payload[..count].to_vec())
    }

    /// The next packet, which is for this.
    pub fn receive_op(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, payload) = self.receive();
        assert_eq!(Op::from_number(header.op), Some(op), "{header:?}");
        (header, payload)
    }
}
