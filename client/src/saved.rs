//! Snapshots on disk: what the service keeps, written to a file.

use crate::{ClientError, Snapshot};
use guest_schema::SnapshotInfo;
use guest_snapshot_file::{
    MemoryMade, SavedFile, SnapshotEncoder, SnapshotFile, SnapshotSource, WriteError, is_snapshot_file,
};
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A snapshot that was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedSnapshot {
    /// What it has.
    pub info: SnapshotInfo,
    /// How long its file is, holes included.
    pub bytes: u64,
    /// The memory in the file, or a layer's pages.
    pub memory: MemoryMade,
}

/// Why a snapshot was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The service did not hand it over.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What is there under this name is not to be overwritten.
    #[error("it is there already, and no snapshot's file")]
    NotASnapshot,
    /// The layer would take the place of its own base.
    #[error("it is the base itself: a layer is of no use without its base")]
    IsBase,
    /// The file could not be made, or not be put in its place.
    #[error("it cannot be written")]
    File(#[source] io::Error),
    /// The file could not be made of what there is.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl Snapshot {
    /// Writes its file: all of it or, with a base, a layer alone, which is of use with that file only. It is there under its name only
    /// once it is whole and on disk; until then, and after a crash at any moment, what was there before is. Pages of zeros are holes.
    ///
    /// `progress` is told, on another thread, how many bytes of about how many are done, holes included, and may end it. Dropping the
    /// future ends nothing.
    ///
    /// # Errors
    /// [`SaveError`]; then there is no new file. As [`Self::files`] besides.
    pub async fn save(
        &self,
        path: impl Into<PathBuf>,
        base: Option<SnapshotFile>,
        progress: impl FnMut(u64, u64) -> ControlFlow<()> + Send + 'static,
    ) -> Result<SavedSnapshot, SaveError> {
        let (source, path) = (self.files().await?, path.into());
        let saving = move || save(&source, &path, base.as_ref(), progress);
        let saved = tokio::task::spawn_blocking(saving).await;
        saved.unwrap_or_else(|error| {
            Err(ClientError::Local { what: "cannot save a snapshot", reason: error.to_string() }.into())
        })
    }
}

fn save(
    source: &SnapshotSource,
    path: &Path,
    base: Option<&SnapshotFile>,
    progress: impl FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<SavedSnapshot, SaveError> {
    check_place(path, base)?;
    let mut encoder = match base {
        Some(base) => SnapshotEncoder::layer(source, base)?,
        None => SnapshotEncoder::whole(source)?,
    };
    let saved = SavedFile::create(path).map_err(SaveError::File)?;
    saved.write(&mut encoder, progress)?;
    saved.commit().map_err(SaveError::File)?;
    let memory = encoder.memory().expect("it was written");
    Ok(SavedSnapshot { info: source.info.clone(), bytes: encoder.at(), memory })
}

/// Whether what is there, if anything, may go.
fn check_place(path: &Path, base: Option<&SnapshotFile>) -> Result<(), SaveError> {
    let there = match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        there => there.map_err(SaveError::File)?,
    };
    let file = |file: &File| file.metadata().map(|file| (file.dev(), file.ino()));
    let base = base.map(|base| file(base.file())).transpose().map_err(SaveError::File)?;
    if base == Some((there.dev(), there.ino())) {
        return Err(SaveError::IsBase);
    }
    let is_snapshot = there.is_file()
        && File::open(path).and_then(|file| is_snapshot_file(&file)).map_err(SaveError::File)?;
    if is_snapshot { Ok(()) } else { Err(SaveError::NotASnapshot) }
}
