//! The capabilities that a guest VMM serves. They hold no VM state: each call is one message to the driver, or looks at a guest.

mod balloon;
mod control;
mod debugger;
mod guest;
mod lifecycle;
mod mem;
mod observer;
mod streams;
mod vmm;

pub(crate) use lifecycle::Lifecycle;
pub(crate) use vmm::VmmChannel;
