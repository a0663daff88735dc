//! The command snapshot save.

use super::{Save, bar, open};
use crate::ending::{Outcome, Trouble};
use crate::out::Out;
use crate::signals::Signals;
use guest_client::snapshot_file::WriteError;
use guest_client::{Host, SaveError, SavedSnapshot, Snapshot, SnapshotInfo};
use guest_schema::chain;
use indicatif::{BinaryBytes, ProgressBar};
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long there is nothing to say after a progress was told.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes a snapshot of a guest and writes its file.
pub async fn save(host: &Host, options: &Save, out: &Out) -> Outcome {
    let mut signals = Signals::watch()?;
    let base = options.against.as_deref().map(open).transpose()?;
    let (id, snapshot, info) = tokio::select! {
        taken = take(host, &options.id) => taken?,
        signal = signals.next() => return Err(Trouble::Interrupted(signal)),
    };
    let path = place(&options.path, &id);
    if options.json {
        out.write(&line(&taken(&id, &info)))?;
    }
    let ended = Arc::new(AtomicBool::new(false));
    let mut progress = Progress::new(options.json, out)?;
    let (bar, end) = (progress.bar.clone(), ended.clone());
    let saving = snapshot.save(&path, base, move |done, of| {
        progress.tell(done, of);
        if end.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let saved = until_signals(saving, &ended, &mut signals).await;
    bar.finish_and_clear();
    let saved = saved?.map_err(|error| match error {
        SaveError::Client(error) => error.into(),
        error => Trouble::Failed(format!("{}: {}", path.display(), chain(&error))),
    })?;
    let told = if options.json {
        line(&done(&id, &path, &saved))
    } else {
        sentence(&id, &path, &saved).into_bytes()
    };
    out.write(&told)
}

/// Until it is saved, or until a signal has ended that; the second one does not wait.
async fn until_signals(
    saving: impl Future<Output = Result<SavedSnapshot, SaveError>>,
    ended: &AtomicBool,
    signals: &mut Signals,
) -> Outcome<Result<SavedSnapshot, SaveError>> {
    let mut saving = std::pin::pin!(saving);
    let signal = tokio::select! {
        saved = &mut saving => return Ok(saved),
        signal = signals.next() => signal,
    };
    ended.store(true, Ordering::Relaxed);
    tokio::select! {
        saved = saving => match saved {
            Err(SaveError::Write(WriteError::Ended)) => Err(Trouble::Interrupted(signal)),
            saved => Ok(saved),
        },
        signal = signals.next() => Err(Trouble::Interrupted(signal)),
    }
}

async fn take(host: &Host, id: &str) -> Outcome<(String, Snapshot, SnapshotInfo)> {
    let found = host.find(id).await?;
    let snapshot = found.control.snapshot().await?;
    let info = snapshot.info().await?;
    Ok((found.id, snapshot, info))
}

/// The file that is meant.
fn place(path: &Path, id: &str) -> PathBuf {
    if path.is_dir() { path.join(format!("{id}.snapshot")) } else { path.to_owned() }
}

/// Who tells how far it is.
struct Progress {
    bar: ProgressBar,
    /// Where lines for programs go.
    lines: Option<File>,
    told: Option<Instant>,
}

impl Progress {
    fn new(json: bool, out: &Out) -> Outcome<Self> {
        let (bar, lines) = if json { (ProgressBar::hidden(), Some(out.another()?)) } else { (bar(), None) };
        Ok(Self { bar, lines, told: None })
    }

    fn tell(&mut self, done: u64, of: u64) {
        if self.told.is_some_and(|told| told.elapsed() < PAUSE) {
            return;
        }
        self.told = Some(Instant::now());
        self.bar.set_length(of);
        self.bar.set_position(done);
        if let Some(lines) = &mut self.lines {
            // Whether anybody reads this is known when it is saved.
            let _ = lines.write_all(&line(&json!({ "event": "progress", "bytes": done, "of": of })));
        }
    }
}

fn line(event: &serde_json::Value) -> Vec<u8> {
    format!("{event}\n").into_bytes()
}

fn taken(id: &str, info: &SnapshotInfo) -> serde_json::Value {
    let SnapshotInfo { memory_bytes, memory, copied_bytes, taken_at_us, .. } = *info;
    json!({
        "event": "taken", "id": id, "taken_at_us": taken_at_us, "memory_bytes": memory_bytes, "memory": memory.name(),
        "copied_bytes": copied_bytes,
    })
}

fn done(id: &str, path: &Path, saved: &SavedSnapshot) -> serde_json::Value {
    let SavedSnapshot { bytes, memory, .. } = saved;
    json!({
        "event": "saved", "id": id, "path": path.to_string_lossy(), "bytes": bytes, "data_bytes": memory.data_bytes,
        "memory_checksum": memory.checksum.to_string(),
    })
}

fn sentence(id: &str, path: &Path, saved: &SavedSnapshot) -> String {
    let (data, of) = (BinaryBytes(saved.memory.data_bytes), BinaryBytes(saved.info.memory_bytes));
    format!("{id} is in {}, with {data} of its {of} of memory\n", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_folder_the_file_has_the_guests_id() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(place(folder.path(), "web"), folder.path().join("web.snapshot"));
        assert_eq!(place(Path::new("monday"), "web"), Path::new("monday"));
    }
}
