//! The header before each frame (VIRTIO 1.3, 5.1.6, `struct virtio_net_hdr`), and what a driver may put there.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// How many bytes it has: with the number of buffers, as it always has in VIRTIO 1.
pub(super) const HEADER_BYTES: usize = 12;

/// The shortest frame: an Ethernet header (IEEE 802.3).
pub(super) const MIN_FRAME: usize = 14;

/// What a frame has beyond its IP packet at most: the Ethernet header with a VLAN tag (IEEE 802.1Q).
pub(super) const LINK_BYTES: usize = 18;

/// The longest frame: an IP packet of full length.
pub(super) const MAX_FRAME: usize = 65_535 + LINK_BYTES;

/// Where in the header its number of buffers is.
const NUM_BUFFERS: usize = 10;

/// A header's bytes, little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header(pub [u8; HEADER_BYTES]);

impl Header {
    /// The header of a frame to the driver that takes so many of its buffers. What the driver has not asked for is not in it.
    pub(super) fn for_driver(mut self, features: u64, buffers: u16) -> [u8; HEADER_BYTES] {
        if !accepted(features, VIRTIO_NET_F_GUEST_CSUM) {
            self = Self::default();
        }
        self.0[NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
        self.0
    }

    fn word(&self, at: usize) -> usize {
        u16::from_le_bytes([self.0[at], self.0[at + 1]]).into()
    }

    /// Whether the frame is longer than those on the wire, and yet to be segmented.
    pub(super) fn is_segmented(&self) -> bool {
        u32::from(self.0[1]) != VIRTIO_NET_HDR_GSO_NONE
    }

    fn needs_checksum(&self) -> bool {
        u32::from(self.0[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
    }

    /// Whether a driver that has accepted `features` may send a frame of `frame` bytes with it (5.1.6.2.1).
    pub(super) fn is_valid(&self, features: u64, frame: usize) -> bool {
        let checksum = !self.needs_checksum()
            || accepted(features, VIRTIO_NET_F_CSUM) && self.word(6) + self.word(8) + 2 <= frame;
        let [_, gso, ..] = self.0.map(u32::from);
        let segmented = match gso & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => gso == VIRTIO_NET_HDR_GSO_NONE,
            VIRTIO_NET_HDR_GSO_TCPV4 => self.may_be_segmented(features, VIRTIO_NET_F_HOST_TSO4, frame),
            VIRTIO_NET_HDR_GSO_TCPV6 => self.may_be_segmented(features, VIRTIO_NET_F_HOST_TSO6, frame),
            _ => false,
        };
        let ecn = gso & VIRTIO_NET_HDR_GSO_ECN == 0 || accepted(features, VIRTIO_NET_F_HOST_ECN);
        (MIN_FRAME..=MAX_FRAME).contains(&frame) && checksum && segmented && ecn
    }

    /// What is segmented needs checksums (5.1.6.2.1), a segment's size, and no more headers than there are bytes.
    fn may_be_segmented(&self, features: u64, feature: u32, frame: usize) -> bool {
        let (headers, segment) = (self.word(2), self.word(4));
        accepted(features, feature) && self.needs_checksum() && segment > 0 && headers <= frame
    }
}

/// Whether a feature is among those that were accepted.
pub(super) fn accepted(features: u64, feature: u32) -> bool {
    features >> feature & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: u64 = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_HOST_ECN;

    /// TCP over IPv4 in segments of 1448 bytes.
    const TSO4: Header = Header([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);

    fn with(at: usize, value: u8) -> Header {
        let mut header = TSO4;
        header.0[at] = value;
        header
    }

    #[test]
    fn what_was_accepted_may_be_used() {
        assert!(Header::default().is_valid(0, 60));
        assert!(TSO4.is_valid(ALL, 64_000));
        assert!(with(1, 0x81).is_valid(ALL, 64_000), "with ECN");
        assert!(with(1, 4).is_valid(ALL, 64_000), "IPv6");
        for feature in [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4] {
            assert!(!TSO4.is_valid(ALL & !(1 << feature), 64_000), "without {feature}");
        }
        assert!(!with(1, 4).is_valid(ALL & !(1 << VIRTIO_NET_F_HOST_TSO6), 64_000));
        assert!(!with(1, 0x81).is_valid(ALL & !(1 << VIRTIO_NET_F_HOST_ECN), 64_000));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (at, value, why) in [
            (1, 3, "UDP fragments"),
            (1, 0x80, "ECN without segments"),
            (1, 2, "no kind of segments"),
            (0, 0, "segments without checksums"),
            (7, 255, "a checksum behind the frame"),
            (9, 255, "a checksum behind the frame"),
            (3, 255, "headers behind the frame"),
        ] {
            assert!(!with(at, value).is_valid(ALL, 64_000), "{why}");
        }
        let mut no_size = TSO4;
        no_size.0[4..6].fill(0);
        assert!(!no_size.is_valid(ALL, 64_000), "segments of no bytes");
        for length in [0, MIN_FRAME - 1, MAX_FRAME + 1] {
            assert!(!Header::default().is_valid(ALL, length), "{length} bytes");
        }
    }

    #[test]
    fn a_driver_is_told_only_what_it_asked_for() {
        let checked = Header([2, 1, 3, 0, 4, 0, 5, 0, 6, 0, 9, 9]);
        assert_eq!(checked.for_driver(0, 3), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
        let told = checked.for_driver(1 << VIRTIO_NET_F_GUEST_CSUM, 0x102);
        assert_eq!(told, [2, 1, 3, 0, 4, 0, 5, 0, 6, 0, 2, 1]);
    }

    proptest! {
        /// Nothing that is let through points behind the frame.
        #[test]
        fn what_is_let_through_is_inside(bytes: [u8; 12], features: u64, frame in 0..70_000_usize) {
            let header = Header(bytes);
            if header.is_valid(features, frame) {
                prop_assert!(!header.needs_checksum() || header.word(6) + header.word(8) + 2 <= frame);
                prop_assert!(bytes[1] == 0 || header.word(2) <= frame && header.word(4) > 0);
            }
        }
    }
}
