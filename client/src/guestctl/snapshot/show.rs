//! The command snapshot show.

use super::{Show, bar, open, report};
use crate::ending::{Outcome, Trouble};
use crate::out::Out;
use guest_client::snapshot_file::SnapshotFile;
use guest_schema::chain;

/// Prints what is in a snapshot's file, after it was checked.
pub fn show(options: &Show, out: &Out) -> Outcome {
    let file = open(&options.file)?;
    if options.verify {
        verify(&file, options)?;
    }
    let unit = options.state.as_deref().filter(|name| !name.is_empty());
    if let Some(name) = unit
        && !file.state().units.iter().any(|unit| unit.name == name)
    {
        let units: Vec<_> = file.state().units.iter().map(|unit| &unit.name[..]).collect();
        return Err(Trouble::Usage(format!("--state {name}: the snapshot has {}", units.join(", "))));
    }
    let text = if options.json {
        report::as_json(&file, options.verify)
    } else {
        report::text(&file, options.verify) + &report::states(&file, options.state.as_deref())
    };
    out.write(text.as_bytes())
}

fn verify(file: &SnapshotFile, options: &Show) -> Outcome {
    let bar = bar();
    let verified = file.verify_memory(|done, of| {
        bar.set_length(of);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    verified.map_err(|error| Trouble::Failed(format!("{}: {}", options.file.display(), chain(&error))))
}
