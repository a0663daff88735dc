//! Snapshots' files that were written by the releases of each format: whatever has changed since, guests go on from them.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use guest_client::snapshot_file::{FORMAT, SnapshotFile};
use guest_client::{Lifecycle, Snapshot};
use guest_schema::{FileSource, GuestConfig, MemoryConfig};
use guest_tests::stage::{Player, Running, Stage, Story};

use super::snapshots::writes_to_memory;

/// Memory that the script does not use.
const PLACE: u64 = 0x18_0000;
const MEMORY_BYTES: u64 = 2 << 20;

fn folder() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/snapshots"))
}

async fn cue(running: &Running, words: &str) -> Story {
    running.input.write(b"!").await?;
    Ok(running.console.saw(words).await?)
}

async fn save(player: &Player, path: &Path, base: Option<&Path>) -> Story {
    let snapshot: Snapshot = player.lifecycle.control().snapshot().await?;
    let base = base.map(|base| anyhow::Ok(SnapshotFile::open(File::open(base)?)?)).transpose()?;
    snapshot.save(path, base, |_, _| ControlFlow::Continue(())).await?;
    Ok(())
}

/// Writes the files of the format of now.
async fn write(stage: &Stage, folder: &Path) -> Story {
    std::fs::create_dir(folder)?;
    let player = stage.launch("fixture").await?;
    let memory = MemoryConfig::of_bytes(MEMORY_BYTES);
    let running =
        player.play_config(&GuestConfig { memory, ..player.config_of(&writes_to_memory(PLACE))? }).await?;
    let whole = folder.join("whole.snapshot");
    save(&player, &whole, None).await?;
    cue(&running, "original TOLD").await?;
    save(&player, &folder.join("layer.snapshot"), Some(&whole)).await
}

fn file(lifecycle: &Lifecycle, path: &Path) -> anyhow::Result<FileSource> {
    let opened = File::open(path).with_context(|| format!("{} is not there", path.display()))?;
    Ok(lifecycle.file(opened))
}

async fn go_on(stage: &Stage, file_of: &Path, base: Option<&Path>, told: &[&str]) -> Story {
    let player = stage.launch("fixture").await?;
    let base = base.map(|base| file(&player.lifecycle, base)).transpose()?;
    let config = GuestConfig::restored(file(&player.lifecycle, file_of)?, base);
    let running = player.run_config(&config).await?;
    for words in told {
        cue(&running, &format!("{words} TOLD")).await?;
    }
    running.input.write(b"!").await?;
    Ok(running.run.await?)
}

pub async fn files_of_every_format_go_on(stage: Stage) -> Story {
    let now = folder().join(format!("format-{FORMAT}"));
    if std::env::var_os("GUESTD_REGENERATE").is_some() && !now.exists() {
        write(&stage, &now).await?;
    }
    ensure!(now.exists(), "there is no {}: see the README beside it", now.display());
    for entry in std::fs::read_dir(folder())? {
        let folder = entry?.path();
        if !folder.is_dir() {
            continue;
        }
        let (whole, layer) = (folder.join("whole.snapshot"), folder.join("layer.snapshot"));
        let story = async {
            go_on(&stage, &whole, None, &["original", "overdone"]).await?;
            go_on(&stage, &layer, Some(&whole), &["overdone"]).await
        };
        story.await.with_context(|| format!("{}", folder.display()))?;
    }
    Ok(())
}
