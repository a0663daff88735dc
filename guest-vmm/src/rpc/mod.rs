//! The capabilities that a guest VMM serves. They hold no VM state: each call is one message to the driver, or looks at a guest.

mod balloon;
mod control;
mod debugger;
mod guest;
mod keeper;
mod lifecycle;
mod mem;
mod observer;
mod streams;
mod vmm;
mod vsock;

pub(crate) use lifecycle::{Lifecycle, ServiceEnds};
pub(crate) use vmm::VmmChannel;
pub(crate) use vsock::serve as serve_vsock;
