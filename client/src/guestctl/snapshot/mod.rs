//! The commands about snapshots on disk: snapshot save, snapshot show.

mod report;
mod save;
mod show;

pub use save::save;
pub use show::show;

use crate::ending::{Outcome, Trouble};
use clap::{Args, Subcommand};
use guest_client::snapshot_file::SnapshotFile;
use guest_schema::chain;
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::File;
use std::path::{Path, PathBuf};

const STYLE: &str = "{bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}";

/// `guestctl snapshot`.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Write a guest as it is now to a file, from which others go on
    Save(Save),
    /// Show what is in a snapshot's file
    Show(Show),
}

const SAVE: &str = "\
The guest pauses for a moment, and runs on while the file is written. The file is there under its name only once it is whole and on \
disk; until then, and after Ctrl-C or a crash, what was there before is. Nothing but a snapshot's file is overwritten. What is zero in \
the guest's memory takes no room. The file has all of the guest, and so what it keeps secret: only its owner may read it. Disks are not \
in it.

With --against the file has only the memory that differs from that of BASE, an earlier file of the same guest (or of any with as much \
memory), which is needed whenever this one is used.

--json prints one object a line, each with an event: taken, progress (at most ten a second), saved.

Examples:
  guestctl snapshot save web web.snapshot
  guestctl snapshot save web /var/lib/guests                    (writes /var/lib/guests/web.snapshot)
  guestctl snapshot save web monday.snapshot --against sunday.snapshot";

/// `guestctl snapshot save`.
#[derive(Debug, Args)]
#[command(after_help = SAVE)]
pub struct Save {
    /// The guest's id, or a unique beginning of it
    pub id: String,
    /// The file; in a folder, ID.snapshot
    #[arg(value_name = "FILE-or-DIR")]
    pub path: PathBuf,
    /// Write only the memory that differs from that of this file
    #[arg(long, value_name = "BASE")]
    pub against: Option<PathBuf>,
    /// Print what is done as JSON
    #[arg(long)]
    pub json: bool,
}

const SHOW: &str = "\
All of the file but the memory is checked whenever it is opened; --verify reads the memory too.

Examples:
  guestctl snapshot show web.snapshot
  guestctl snapshot show web.snapshot --verify
  guestctl snapshot show web.snapshot --state rtc               (what that unit has saved)
  guestctl snapshot show web.snapshot --json | jq -r '.units[].name'";

/// `guestctl snapshot show`.
#[derive(Debug, Args)]
#[command(after_help = SHOW)]
pub struct Show {
    /// The file
    pub file: PathBuf,
    /// Check the memory as well
    #[arg(long)]
    pub verify: bool,
    /// Show what the units have saved too, or one of them
    #[arg(long, value_name = "UNIT", num_args = 0..=1, default_missing_value = "")]
    pub state: Option<String>,
    /// One JSON object instead of lines; it has the state always
    #[arg(long)]
    pub json: bool,
}

/// Opens a snapshot's file.
fn open(path: &Path) -> Outcome<SnapshotFile> {
    let failed =
        |problem: &dyn std::error::Error| Trouble::Failed(format!("{}: {}", path.display(), chain(problem)));
    let file = File::open(path).map_err(|error| failed(&error))?;
    SnapshotFile::open(file).map_err(|error| failed(&error))
}

fn bar() -> ProgressBar {
    ProgressBar::new(0).with_style(ProgressStyle::with_template(STYLE).expect("a valid template"))
}
