//! The calls of a guest's life one by one, on a VMM that is there already, and the memory that the VMM takes meanwhile.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use guest_client::{Host, Lifecycle};

use super::figure::{Definition, Samples};
use super::{Group, Rounds, config, first_byte, floor, launched, output};

const CREATE: &str = "create";
const RUN: &str = "run";
const STOP: &str = "stop";
const VMM: &str = "memory-vmm";
const ALL: &str = "memory-all";

pub(super) static GROUP: Group = Group {
    figures: &[
        Definition::time(CREATE, "create call → answer", Some(floor::IN_PROCESS)),
        Definition::time(RUN, "run call → first byte", Some(floor::IN_PROCESS)),
        Definition::time(STOP, "stop call → answer", Some(floor::CLOSE)),
        Definition::memory(VMM, "Pss of guest-vmm once its guest runs, without the guest's memory"),
        Definition::memory(ALL, "the same with it"),
    ],
    open: |setting| async { Ok(Box::new(Lives(setting.host.clone())) as Box<dyn Rounds>) }.boxed_local(),
};

struct Lives(Host);

impl Lives {
    async fn measure(&self, samples: &mut Samples) -> anyhow::Result<()> {
        let lifecycle = launched(&self.0).await?;
        let config = config(&lifecycle)?;
        let begin = Instant::now();
        lifecycle.create(&config).await?;
        samples.time(CREATE, begin.elapsed());
        self.run_and_stop(&lifecycle, samples).await
    }

    async fn run_and_stop(&self, lifecycle: &Lifecycle, samples: &mut Samples) -> anyhow::Result<()> {
        let (output, mut bytes) = output();
        lifecycle.bind().serial(output).opened().await?;
        let begin = Instant::now();
        let run = lifecycle.run();
        first_byte(&mut bytes).await?;
        samples.time(RUN, begin.elapsed());
        let memory = Pss::of(self.youngest().await?)?;
        samples.add(VMM, memory.total_kib - memory.guest_kib);
        samples.add(ALL, memory.total_kib);
        let begin = Instant::now();
        lifecycle.stop().await?;
        samples.time(STOP, begin.elapsed());
        // The guest was stopped by force, which is what run answers.
        let _ = run.await;
        Ok(())
    }

    /// The process of the guest that runs; the others of this benchmark have none.
    async fn youngest(&self) -> anyhow::Result<u32> {
        let guests = self.0.list().await?;
        let running = guests.iter().find(|guest| guest.phase == guest_client::Phase::Running);
        Ok(running.context("no guest runs")?.pid)
    }
}

impl Rounds for Lives {
    fn round<'a>(&'a mut self, samples: &'a mut Samples) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        self.measure(samples).boxed_local()
    }
}

/// A process's share of the memory that it has mapped, in KiB.
pub(super) struct Pss {
    pub total_kib: f64,
    /// What of it is the guest's.
    guest_kib: f64,
}

impl Pss {
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/smaps"));
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let (mut total_kib, mut guest_kib, mut is_guest) = (0.0, 0.0, false);
        for line in text.lines() {
            match line.strip_prefix("Pss:") {
                Some(value) => {
                    let kib: f64 = value.trim().trim_end_matches(" kB").parse()?;
                    total_kib += kib;
                    guest_kib += if is_guest { kib } else { 0.0 };
                }
                None if is_mapping(line) => is_guest = line.contains("/memfd:guest-memory"),
                None => {}
            }
        }
        Ok(Self { total_kib, guest_kib })
    }
}

/// Whether a line of smaps begins a mapping, with its addresses.
fn is_mapping(line: &str) -> bool {
    line.split_once('-').is_some_and(|(start, _)| u64::from_str_radix(start, 16).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_takes_memory_and_has_no_guest() {
        let pss = Pss::of(std::process::id()).unwrap();
        assert!(pss.total_kib > 100.0, "{}", pss.total_kib);
        assert!(pss.guest_kib.abs() < f64::EPSILON);
        assert!(is_mapping(
            "7f0e4c000000-7f0e54000000 rw-s 00000000 00:01 1030 /memfd:guest-memory (deleted)"
        ));
        assert!(!is_mapping("Pss_Anon:              60 kB"));
    }
}
