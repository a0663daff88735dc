//! One Cap'n Proto connection over a Unix stream socket: descriptors travel with it, and its peer is bounded.
//!
//! [`Connection`] joins an RPC system, the [`Descriptors`] that travel beside its messages, and the [`Limits`] of its peer. It
//! lives on one thread, in a tokio `LocalSet`, as one task: a panic in a method ends that connection and nothing else.

mod broken;
mod connection;
mod descriptors;
mod limits;
mod meter;

pub use broken::{broken, failure_of};
pub use connection::{Connection, ConnectionError, printable};
pub use descriptors::{DescriptorError, Descriptors, MAX_WAITING};
pub use limits::{Limit, Limits};
