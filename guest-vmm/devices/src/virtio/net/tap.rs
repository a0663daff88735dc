//! TAP devices (tuntap, Documentation/networking/tuntap.rst): frames with a header, one per system call.
//!
//! The descriptor comes attached to its device (TUNSETIFF with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR), one per queue. A queue that the
//! driver does not use is detached, so that the host's kernel steers no frames there.

// UNSAFETY: what a TAP device can do is asked and set with ioctls.
#![expect(unsafe_code, reason = "ioctls of a TAP device")]

use super::header::{HEADER_BYTES, Header, MAX_FRAME, MIN_FRAME, accepted};
use super::port::{
    Descriptor, Direct, Frame, Incoming, Outgoing, Port, PortError, Sent, blocked, push_body, uninterrupted,
};
use super::vectored::{Pieces, failed_with};
use rustix::io::Errno;
use std::ffi::{c_int, c_uint, c_ulong};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};
use vm_memory::VolatileSlice;

/// What a TAP device can do for a driver.
pub(super) const TAP_FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// Why a descriptor is no back end.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is no TAP device, or not attached to one.
    #[error("the descriptor is not attached to a TAP device")]
    NotTap(#[source] io::Error),
    /// It is a TUN device, whose packets have no Ethernet header.
    #[error("{0} is a TUN device, not a TAP device")]
    Tun(String),
    /// It was attached without IFF_VNET_HDR, or without IFF_NO_PI.
    #[error("{0} was not attached with IFF_VNET_HDR and IFF_NO_PI")]
    Framing(String),
    /// The host refuses something that every TAP device can do.
    #[error("the host does not set {what} of {name}")]
    Host {
        /// The device.
        name: String,
        /// What was to be set.
        what: &'static str,
        /// Why it was not.
        source: io::Error,
    },
}

/// One queue of a TAP device.
#[derive(Debug)]
pub struct Tap {
    descriptor: Descriptor,
    /// Whether the host's kernel segments frames and fills in checksums for it.
    offloads: bool,
    /// Whether the device has several queues.
    multi_queue: bool,
}

impl Tap {
    /// Takes a descriptor that is attached to a TAP device, and sets its framing.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn new(descriptor: OwnedFd) -> Result<Self, TapError> {
        let (name, flags) = attachment(&descriptor).map_err(TapError::NotTap)?;
        if flags & libc::IFF_TAP == 0 {
            return Err(TapError::Tun(name));
        }
        if flags & libc::IFF_VNET_HDR == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(TapError::Framing(name));
        }
        let host = |what| {
            let name = name.clone();
            move |source| TapError::Host { name, what, source }
        };
        set_header_size(&descriptor).map_err(host("the size of headers"))?;
        set_offloads(&descriptor, 0).map_err(host("the offloads"))?;
        let everything = offloads(TAP_FEATURES);
        let offloads = set_offloads(&descriptor, everything).is_ok();
        set_offloads(&descriptor, 0).map_err(host("the offloads"))?;
        let multi_queue = flags & libc::IFF_MULTI_QUEUE != 0;
        let descriptor = Descriptor::new(descriptor).map_err(host("non-blocking"))?;
        Ok(Self { descriptor, offloads, multi_queue })
    }

    /// One end of a socket that keeps messages apart, in place of a TAP device: each message is a header and a frame.
    ///
    /// # Errors
    /// If it cannot be made non-blocking.
    #[cfg(any(test, feature = "fake-driver"))]
    pub fn of_socket(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { descriptor: Descriptor::new(socket)?, offloads: true, multi_queue: false })
    }

    /// The features that it can serve.
    pub(super) fn features(&self) -> u64 {
        if self.offloads { TAP_FEATURES } else { 0 }
    }

    pub(super) fn into_port(self) -> Port {
        Port {
            descriptor: self.descriptor,
            incoming: Incoming::Tap(TapIncoming::default()),
            outgoing: Outgoing::Tap(TapOutgoing { multi_queue: self.multi_queue, attached: true }),
        }
    }
}

/// Frames from a TAP device.
#[derive(Debug)]
pub(super) struct TapIncoming {
    /// Room for a frame with its header, and a byte more.
    buffer: Vec<u8>,
    /// How much of it a frame takes that is there.
    length: usize,
}

impl Default for TapIncoming {
    fn default() -> Self {
        Self { buffer: vec![0; HEADER_BYTES + MAX_FRAME + 1], length: 0 }
    }
}

impl TapIncoming {
    /// Reads a frame into `pieces`. One that is longer than they are is lost.
    pub(super) fn read_into(
        &mut self,
        descriptor: BorrowedFd<'_>,
        pieces: &[VolatileSlice<'_>],
    ) -> Result<Direct, PortError> {
        let (mut header, mut excess) = ([0; HEADER_BYTES], [0]);
        let mut all = Pieces::with_capacity(pieces.len() + 2);
        all.push_own(&mut header);
        push_body(&mut all, pieces);
        let room = all.bytes();
        // The rest of a frame without room is lost without a word: a byte more tells.
        all.push_own(&mut excess);
        let read = received(uninterrupted(|| all.read(descriptor)))?;
        if read > room {
            Err(PortError::Frame)
        } else {
            Ok(Direct { header: Header(header), bytes: read - HEADER_BYTES })
        }
    }

    /// Reads a frame into memory of its own, unless one is there already.
    pub(super) fn stage(&mut self, descriptor: BorrowedFd<'_>) -> Result<(), PortError> {
        if self.length > 0 {
            return Ok(());
        }
        let read = uninterrupted(|| Ok(rustix::io::read(descriptor, &mut self.buffer[..])?));
        let read = received(read)?;
        if read == self.buffer.len() {
            return Err(PortError::Frame);
        }
        self.length = read;
        Ok(())
    }

    pub(super) fn frame(&self) -> Option<(Header, &[u8])> {
        let (header, frame) = self.buffer.get(..self.length)?.split_first_chunk()?;
        Some((Header(*header), frame))
    }

    pub(super) fn consume(&mut self) {
        self.length = 0;
    }
}

/// How many bytes came, which are a header and a frame.
fn received(outcome: io::Result<usize>) -> Result<usize, PortError> {
    match outcome {
        Ok(0) => Err(PortError::Gone("it was closed".into())),
        Ok(read) if read < HEADER_BYTES + MIN_FRAME => Err(PortError::Frame),
        Ok(read) => Ok(read),
        Err(error) => Err(blocked(&error).unwrap_or_else(|| PortError::Gone(error.to_string()))),
    }
}

/// Frames to a TAP device.
#[derive(Debug)]
pub(super) struct TapOutgoing {
    multi_queue: bool,
    attached: bool,
}

impl TapOutgoing {
    pub(super) fn send(&mut self, descriptor: BorrowedFd<'_>, frames: &[Option<Frame<'_>>]) -> Sent {
        let mut sent = Sent { count: 0, dropped: 0, stopped: None };
        for frame in frames {
            match frame.as_ref().map_or(Ok(()), |frame| send_one(descriptor, frame)) {
                Ok(()) => {}
                Err(PortError::Frame) => sent.dropped += 1,
                Err(error) => {
                    sent.stopped = Some(error);
                    break;
                }
            }
            sent.count += 1;
        }
        sent
    }

    /// Attaches the queue to its device, or detaches it.
    pub(super) fn attach(&mut self, descriptor: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
        if self.multi_queue && self.attached != attached {
            set_attached(descriptor, attached)?;
            self.attached = attached;
        }
        Ok(())
    }
}

fn send_one(descriptor: BorrowedFd<'_>, frame: &Frame<'_>) -> Result<(), PortError> {
    let mut header = frame.header.0;
    let mut pieces = Pieces::with_capacity(frame.body.len() + 1);
    pieces.push_own(&mut header);
    push_body(&mut pieces, &frame.body);
    match uninterrupted(|| pieces.write(descriptor)) {
        Ok(_) => Ok(()),
        Err(error) => Err(blocked(&error).unwrap_or_else(|| {
            let gone = [Errno::BADFD, Errno::PIPE, Errno::CONNRESET, Errno::NOTCONN];
            // Others are of the frame, or of an interface that is down: as on a wire, the frame is lost.
            if failed_with(&error, &gone) { PortError::Gone(error.to_string()) } else { PortError::Frame }
        })),
    }
}

/// Sets what the device may hand to a driver that has accepted these features. A socket in its place has nothing to set.
pub(super) fn set_features(descriptor: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    match set_offloads(&descriptor, offloads(features)) {
        Err(error) if failed_with(&error, &[Errno::NOTTY]) => Ok(()),
        outcome => outcome,
    }
}

/// A driver's features as TUNSETOFFLOAD has them. Nothing goes without checksums.
fn offloads(features: u64) -> c_uint {
    let bits = [
        (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    ];
    let chosen = bits.iter().filter(|(feature, _)| accepted(features, *feature));
    let chosen = chosen.fold(0, |all, (_, bit)| all | bit);
    let segments = chosen & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6);
    match chosen & libc::TUN_F_CSUM {
        0 => 0,
        _ if segments == 0 => libc::TUN_F_CSUM,
        _ => chosen,
    }
}

/// The device's name and flags.
fn attachment(descriptor: &OwnedFd) -> io::Result<(String, c_int)> {
    // SAFETY: a structure of integers and a pointer, for which zero is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // SAFETY: TUNGETIFF fills the structure; other kinds of descriptors refuse the number.
    check(unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    let name: Vec<u8> = name.map(|byte| byte.to_ne_bytes()[0]).collect();
    // SAFETY: TUNGETIFF has filled in this one of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((String::from_utf8_lossy(&name).into_owned(), c_int::from(flags) & 0xffff))
}

fn set_header_size(descriptor: &OwnedFd) -> io::Result<()> {
    let bytes = c_int::try_from(HEADER_BYTES).expect("small");
    // SAFETY: TUNSETVNETHDRSZ reads the integer.
    check(unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) })
}

fn set_offloads(descriptor: &impl AsRawFd, offloads: c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number, and no address.
    check(unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(offloads)) })
}

fn set_attached(descriptor: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    // SAFETY: a structure of integers and a pointer, for which zero is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flag.try_into().expect("16 bits");
    // SAFETY: TUNSETQUEUE reads the structure.
    check(unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_need_checksums() {
        assert_eq!(offloads(TAP_FEATURES), 15);
        assert_eq!(offloads(TAP_FEATURES & !(1 << VIRTIO_NET_F_GUEST_CSUM)), 0);
        let ecn_alone = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN;
        assert_eq!(offloads(ecn_alone), libc::TUN_F_CSUM);
    }

    #[test]
    fn other_descriptors_are_refused() {
        let null = std::fs::File::open("/dev/null").unwrap().into();
        assert!(matches!(Tap::new(null), Err(TapError::NotTap(_))));
    }
}
