//! The socket device (VIRTIO 1.3, 5.10): streams between the guest, whose address is 3, and the host, whose address is 2.
//!
//! - `packet` is what goes through the queues, `connection` one connection, `ports` the host's ports, and `engine` all of it together:
//!   packets in, packets out, without queues, threads or a clock
//! - [`VsockHost`] is the host's side: it listens and connects, from any thread. Its streams take bytes from the connections' own buffers
//!   and put them there, so that a slow reader on either end holds up the other end of its own connection, and nobody else
//! - [`Vsock`] and its worker move packets between the engine and the queues; connections take turns
//!
//! A connection ends cleanly when both directions were ended and one end has confirmed it by a reset. Any other end is unclean: both
//! ends learn of it, and its ports rest for ten seconds.
//!
//! Limits: streams only, no SEQPACKET; no other address than the host's. A restored device has no connections.

mod connection;
mod device;
mod engine;
mod host;
mod packet;
mod ports;

#[cfg(any(test, feature = "fake-driver"))]
pub mod fake_guest;
#[cfg(test)]
mod tests;

pub use connection::End;
pub use device::{Vsock, VsockWorker};
pub use engine::{ANSWER, MAX_PAYLOAD, VsockCounters, VsockLimits};
pub use host::{VsockHost, VsockListener, VsockPending, VsockReader, VsockRequest, VsockStream, VsockWriter};
pub use packet::{GUEST_CID, HEADER_BYTES, HOST_CID, Header, Op, PortPair};
pub use ports::{EPHEMERAL, MAX_LISTENERS, PortError, QUARANTINE};
