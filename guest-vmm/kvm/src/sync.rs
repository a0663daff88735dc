//! The primitives under the kicking of a VP.
//!
//! They are the standard library's, but for the unit tests, where they are `loom`'s: `kick/model.rs` is run once for every
//! order in which its threads can meet. Reference counts stay the standard library's.

#[cfg(test)]
pub(crate) use loom::{
    sync::{Mutex, MutexGuard, atomic},
    thread,
};
#[cfg(not(test))]
pub(crate) use std::{
    sync::{Mutex, MutexGuard, atomic},
    thread,
};
