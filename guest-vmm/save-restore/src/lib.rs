//! Saved state: protobuf messages of their own types in an opaque blob that carries its type name.
//!
//! A component's saved state is a message type apart from its runtime type, so that the runtime may change while the
//! format stays. [`SaveRestore`] is what a component implements; [`ProtobufSaveRestore`] is the same with the type
//! erased into a [`SavedStateBlob`], which is what travels and is stored. [`SaveRestoreWith`] is for components that are
//! restored with more than their state. The package name is part of the format: a blob is restored only into the type
//! whose full name it carries.
//!
//! The messages of this crate are also in `save_restore.proto`, in the schema of saved state, where a test compares the two.
//!
//! ```
//! use save_restore::{ProtobufSaveRestore, RestoreError, SaveError, SaveRestore, saved_state_root};
//!
//! #[derive(Clone, PartialEq, prost::Message)]
//! struct CounterState {
//!     #[prost(uint32, tag = "1")]
//!     count: u32,
//! }
//!
//! saved_state_root!(CounterState, package = "example");
//!
//! struct Counter { count: u8 }
//!
//! impl SaveRestore for Counter {
//!     type SavedState = CounterState;
//!
//!     fn save(&mut self) -> Result<CounterState, SaveError> {
//!         let Self { count } = self;
//!         Ok(CounterState { count: (*count).into() })
//!     }
//!
//!     fn restore(&mut self, state: CounterState) -> Result<(), RestoreError> {
//!         let CounterState { count } = state;
//!         self.count = count.try_into().map_err(|_| RestoreError::invalid("count", count))?;
//!         Ok(())
//!     }
//! }
//!
//! let blob = Counter { count: 7 }.save_blob()?;
//! assert_eq!(blob.type_name(), "example.CounterState");
//! let mut copy = Counter { count: 0 };
//! copy.restore_blob(blob)?;
//! assert_eq!(copy.count, 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod blob;
mod component;
mod error;
mod root;

pub use blob::SavedStateBlob;
pub use component::{
    ProtobufSaveRestore, ProtobufSaveRestoreWith, SaveRestore, SaveRestoreWith, SavedStateNotSupported,
};
pub use error::{RestoreError, SaveError};
pub use root::{NoSavedState, SavedStateRoot};
