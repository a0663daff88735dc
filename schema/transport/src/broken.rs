//! Capabilities that stand for a failure, so that calls pipelined on them fail with the true reason.

use capnp::capability::FromClientHook;
use guest_schema::{Failure, GuestError};

/// Opens the text of an exception that carries a [`Failure`]: each hop puts words of its own in front.
const MARK: &str = "guestd/";

/// A capability every call on which fails with this failure.
pub fn broken<C: FromClientHook>(failure: &Failure) -> C {
    let text = format!("{MARK}{}: {}", failure.code, failure.detail);
    C::new(capnp_rpc::new_broken_cap(capnp::Error::failed(text)).hook)
}

/// The failure that an exception carries, if it comes from a capability made by [`broken`].
pub fn failure_of(error: &capnp::Error) -> Option<Failure> {
    let (_, text) = error.extra.split_once(MARK)?;
    let (name, detail) = text.split_once(": ")?;
    let code = GuestError::ALL.iter().copied().find(|code| code.name() == name)?;
    Some(Failure::new(code, detail))
}
