//! Devices, driven by a fake driver over real memory, each beside the bare operation of the host that it stands for.
//!
//! Parts: `block` disks, beside bare io_uring on the same file with the same pattern; `net` and `vsock` networks and sockets, beside
//! Unix socket pairs.
//!
//! In every round each figure follows its floor. A round is played once before the first and not counted.
//!
//! Limits: no hypervisor: a doorbell is an eventfd that a thread writes, and an interrupt wakes that thread; no figure fails the run.

mod bare;
mod block;
mod net;
mod vsock;

use std::path::Path;

use super::figure::{Definition, Row, Samples};

/// All figures there are.
pub fn definitions() -> Vec<Definition> {
    [block::definitions(), net::definitions(), vsock::definitions()].concat()
}

/// Measures all figures, with files in this folder.
///
/// # Errors
/// When the host has no io_uring, or no room for the files.
pub fn measure(folder: &Path, rounds: u32) -> anyhow::Result<Vec<Row>> {
    let mut disks = block::Disks::prepare(folder)?;
    let mut round = |samples: &mut Samples| {
        disks.round(samples)?;
        net::round(samples)?;
        vsock::round(samples)
    };
    round(&mut Samples::default())?;
    let mut samples = Samples::default();
    for _ in 0..rounds {
        round(&mut samples)?;
    }
    Ok(samples.rows(&definitions()))
}
