//! The command dump: a guest's registers and memory as an ELF core file.

use crate::ending::{Outcome, Trouble};
use crate::options::Dump;
use crate::signals::Signals;
use guest_client::{Control, DumpError, Host, Phase};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use tempfile::NamedTempFile;

const STYLE: &str = "{bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}";

/// Dumps a guest. It is held for that time if it runs, and goes on afterwards, whatever becomes of the dump.
pub async fn dump(host: &Host, options: &Dump) -> Outcome {
    let mut signals = Signals::watch()?;
    let control = host.find(&options.id).await?.control;
    let phase = control.observer().state().await?.phase;
    let hold = !options.live && phase == Phase::Running;
    if hold {
        control.pause().await?;
    }
    let dumped = tokio::select! {
        dumped = write(&control, &options.file) => dumped,
        signal = signals.next() => Err(Trouble::Interrupted(signal)),
    };
    if hold {
        control.resume().await?;
    }
    dumped
}

/// The file is there under its name only once it is whole.
async fn write(control: &Control, path: &Path) -> Outcome {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |error| Trouble::Failed(format!("{}: {error}", path.display()));
    let file = NamedTempFile::new_in(folder).map_err(failed)?;
    let core = control.dump().await?;
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(STYLE).expect("a valid template"));
    let progress = |done, bytes| {
        bar.set_length(bytes);
        bar.set_position(done);
    };
    let saved = core.save(file.as_file(), progress).await;
    bar.finish_and_clear();
    saved.map_err(|error| match error {
        DumpError::Read(error) => error.into(),
        DumpError::Write(error) => failed(error),
        short @ DumpError::Short { .. } => Trouble::Failed(short.to_string()),
    })?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}
