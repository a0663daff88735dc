//! Packets (VIRTIO 1.3, 5.10.6): their header, and the pair of ports that says which connection they belong to.

/// The host's address.
pub const HOST_CID: u64 = 2;
/// The guest's address.
pub const GUEST_CID: u64 = 3;

/// VIRTIO_VSOCK_TYPE_STREAM, the one type of socket that there is.
pub(super) const TYPE_STREAM: u16 = 1;

/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender takes no more bytes.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender sends no more bytes.
pub(super) const SHUTDOWN_SEND: u32 = 1 << 1;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// How long a header is, in bytes.
pub const HEADER_BYTES: usize = 44;

/// What a packet is for (VIRTIO_VSOCK_OP_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
#[expect(missing_docs, reason = "the specification's names")]
pub enum Op {
    Request = 1,
    Response = 2,
    Rst = 3,
    Shutdown = 4,
    Rw = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    /// By number; `None` for those that the specification does not have.
    pub fn from_number(number: u16) -> Option<Self> {
        use Op::{CreditRequest, CreditUpdate, Request, Response, Rst, Rw, Shutdown};
        let all = [Request, Response, Rst, Shutdown, Rw, CreditUpdate, CreditRequest];
        all.into_iter().find(|op| *op as u16 == number)
    }
}

/// A packet's header (`virtio_vsock_hdr`), as it was sent: any field may hold anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The sender's address.
    pub src_cid: u64,
    /// The receiver's address.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// How many bytes of payload follow.
    pub len: u32,
    /// The type of socket.
    pub socket_type: u16,
    /// What the packet is for: [`Op::from_number`].
    pub op: u16,
    /// Of a shutdown: which directions end.
    pub flags: u32,
    /// How many bytes the sender has room for in all.
    pub buf_alloc: u32,
    /// How many bytes the sender has taken out of that room so far, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// As it is in memory, little endian.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = bytes.as_mut_slice();
        let mut put = |field: &[u8]| {
            let (place, behind) = std::mem::take(&mut rest).split_at_mut(field.len());
            place.copy_from_slice(field);
            rest = behind;
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        for field in [self.src_port, self.dst_port, self.len] {
            put(&field.to_le_bytes());
        }
        put(&self.socket_type.to_le_bytes());
        put(&self.op.to_le_bytes());
        for field in [self.flags, self.buf_alloc, self.fwd_cnt] {
            put(&field.to_le_bytes());
        }
        bytes
    }

    /// The header that these bytes are.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u16_at = |at| u16::from_le_bytes(field(bytes, at));
        let u32_at = |at| u32::from_le_bytes(field(bytes, at));
        let u64_at = |at| u64::from_le_bytes(field(bytes, at));
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            socket_type: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("as many bytes as the field has")
}

/// What a connection is known by, the addresses being always the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortPair {
    /// The guest's port.
    pub guest: u32,
    /// The host's port.
    pub host: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_where_the_specification_has_its_fields() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|at| u8::try_from(at).expect("small"));
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!((header.socket_type, header.op), (0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn operations_are_known_by_number() {
        assert_eq!(Op::from_number(0), None);
        assert_eq!(Op::from_number(8), None);
        assert!((1..=7).all(|number| Op::from_number(number).is_some_and(|op| op as u16 == number)));
    }
}
