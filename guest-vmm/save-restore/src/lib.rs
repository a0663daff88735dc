//! Saved state: protobuf messages of their own types in an opaque blob that carries its type name.
//!
//! A component's saved state is a message type apart from its runtime type, so that the runtime may change while the
//! format stays. [`SaveRestore`] is what a component implements; [`ProtobufSaveRestore`] is the same with the type
//! erased into a [`SavedStateBlob`], which is what travels and is stored. The package name is part of the format: a blob
//! is restored only into the type whose full name it carries.
//!
//! ```
//! use save_restore::{ProtobufSaveRestore, RestoreError, SaveError, SaveRestore};
//!
//! #[derive(Clone, PartialEq, prost::Message)]
//! struct CounterState {
//!     #[prost(uint32, tag = "1")]
//!     count: u32,
//! }
//!
//! impl prost::Name for CounterState {
//!     const NAME: &'static str = "CounterState";
//!     const PACKAGE: &'static str = "example";
//! }
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
mod error;

pub use blob::SavedStateBlob;
pub use error::{RestoreError, SaveError};

/// A message that can be the whole saved state of a component: a protobuf message with a full name.
///
/// Every type with [`prost::Message`] and [`prost::Name`] is one; code generated from `.proto` files has both.
pub trait SavedStateRoot: prost::Message + prost::Name + Default {}

impl<T: prost::Message + prost::Name + Default> SavedStateRoot for T {}

/// A component whose state can be saved into, and restored from, a message type of its own.
pub trait SaveRestore {
    /// The message; [`NoSavedState`] for a component without state.
    type SavedState: SavedStateRoot;

    /// The state at this moment. Called only while the component is stopped; leaves it as it was.
    fn save(&mut self) -> Result<Self::SavedState, SaveError>;

    /// Replaces the state. Called only while the component is stopped. After an error the component's state is
    /// unspecified, and it is not started again before a reset or another restore.
    fn restore(&mut self, state: Self::SavedState) -> Result<(), RestoreError>;
}

/// [`SaveRestore`] with the message type erased; object safe, and implemented for every `SaveRestore`.
pub trait ProtobufSaveRestore {
    /// The state at this moment, with the name of its type.
    fn save_blob(&mut self) -> Result<SavedStateBlob, SaveError>;

    /// Replaces the state; refuses a blob of another type, or one that does not decode.
    fn restore_blob(&mut self, blob: SavedStateBlob) -> Result<(), RestoreError>;
}

impl<T: SaveRestore + ?Sized> ProtobufSaveRestore for T {
    fn save_blob(&mut self) -> Result<SavedStateBlob, SaveError> {
        Ok(SavedStateBlob::new(&self.save()?))
    }

    fn restore_blob(&mut self, blob: SavedStateBlob) -> Result<(), RestoreError> {
        self.restore(blob.parse()?)
    }
}

/// The saved state of a component that has none.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct NoSavedState {}

impl prost::Name for NoSavedState {
    const NAME: &'static str = "NoSavedState";
    const PACKAGE: &'static str = "save_restore";
}
