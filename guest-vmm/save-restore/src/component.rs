//! What components implement.

use crate::{RestoreError, SaveError, SavedStateBlob, SavedStateRoot};
use std::borrow::Cow;

/// A component whose state can be saved into, and restored from, a message type of its own.
pub trait SaveRestore {
    /// The message; [`NoSavedState`](crate::NoSavedState) for a component without state.
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

/// A component that needs more than its state to be restored: `P`, which only the restoring side has (guest memory, a
/// reopened file, the interrupt lines of a new board).
///
/// What is in `P` is no part of the format. It may be borrowed:
///
/// ```
/// use save_restore::{ProtobufSaveRestoreWith, RestoreError, SaveError, SaveRestoreWith, saved_state_root};
///
/// #[derive(Clone, PartialEq, prost::Message)]
/// struct DiskState {
///     #[prost(uint64, tag = "1")]
///     position: u64,
/// }
///
/// saved_state_root!(DiskState, package = "example");
///
/// struct Disk { position: u64 }
///
/// impl SaveRestoreWith<&std::fs::File> for Disk {
///     type SavedState = DiskState;
///
///     fn save(&mut self) -> Result<DiskState, SaveError> {
///         Ok(DiskState { position: self.position })
///     }
///
///     fn restore_with(&mut self, state: DiskState, image: &std::fs::File) -> Result<(), RestoreError> {
///         let size = image.metadata().map_err(RestoreError::other)?.len();
///         if state.position > size {
///             return Err(RestoreError::invalid("position", state.position));
///         }
///         self.position = state.position;
///         Ok(())
///     }
/// }
///
/// let blob = Disk { position: 512 }.save_blob()?;
/// let empty = std::fs::File::open("/dev/null")?;
/// let error = Disk { position: 0 }.restore_blob_with(blob, &empty).unwrap_err();
/// assert_eq!(error.to_string(), "position is 512, which is not valid");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait SaveRestoreWith<P> {
    /// The message.
    type SavedState: SavedStateRoot;

    /// As [`SaveRestore::save`].
    fn save(&mut self) -> Result<Self::SavedState, SaveError>;

    /// As [`SaveRestore::restore`], with what else it takes.
    fn restore_with(&mut self, state: Self::SavedState, parameters: P) -> Result<(), RestoreError>;
}

/// [`SaveRestoreWith`] with the message type erased; object safe, and implemented for every `SaveRestoreWith`.
pub trait ProtobufSaveRestoreWith<P> {
    /// As [`ProtobufSaveRestore::save_blob`].
    fn save_blob(&mut self) -> Result<SavedStateBlob, SaveError>;

    /// As [`ProtobufSaveRestore::restore_blob`]. `parameters` are dropped unused if the blob is refused.
    fn restore_blob_with(&mut self, blob: SavedStateBlob, parameters: P) -> Result<(), RestoreError>;
}

impl<P, T: SaveRestoreWith<P> + ?Sized> ProtobufSaveRestoreWith<P> for T {
    fn save_blob(&mut self) -> Result<SavedStateBlob, SaveError> {
        Ok(SavedStateBlob::new(&self.save()?))
    }

    fn restore_blob_with(&mut self, blob: SavedStateBlob, parameters: P) -> Result<(), RestoreError> {
        self.restore_with(blob.parse()?, parameters)
    }
}

/// Stands in for a component that can be neither saved nor restored: refuses both, always, and says why.
///
/// It implements [`ProtobufSaveRestore`] alone: there is no message that it could be saved into, and a blob of whatever type
/// is refused for the same reason.
///
/// ```
/// use save_restore::{ProtobufSaveRestore, SavedStateNotSupported};
///
/// let mut passthrough = SavedStateNotSupported::new("the device belongs to the host");
/// let error = passthrough.save_blob().unwrap_err();
/// assert_eq!(error.to_string(), "saving is not supported: the device belongs to the host");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedStateNotSupported {
    reason: Cow<'static, str>,
}

impl SavedStateNotSupported {
    /// Refuses for this reason, in words for the user.
    pub fn new(reason: impl Into<Cow<'static, str>>) -> Self {
        Self { reason: reason.into() }
    }
}

impl ProtobufSaveRestore for SavedStateNotSupported {
    fn save_blob(&mut self) -> Result<SavedStateBlob, SaveError> {
        Err(SaveError::not_supported(self.reason.as_ref()))
    }

    fn restore_blob(&mut self, _: SavedStateBlob) -> Result<(), RestoreError> {
        Err(RestoreError::not_supported(self.reason.as_ref()))
    }
}
