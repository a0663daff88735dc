//! The primitives under the signalling: a set's locks, the mailboxes, a phase's bookkeeping.
//!
//! They are the standard library's, but for the unit tests, where they are `loom`'s: a test of this crate's inside is a
//! model, and is run once for every order in which its threads can meet. Reference counts stay the standard library's.

#[cfg(test)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(test))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};
