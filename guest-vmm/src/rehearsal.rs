//! A guest that nobody sees, run before the first that somebody waits for.
//!
//! The first guest of a process pays for what later ones find there: pages of the VMM's code and heap that were never touched cost a
//! fault each, some dozens between create and the guest's first byte. A VMM that waits for a launch has the time to pay ahead.
//!
//! The messages by which a guest is asked for are not rehearsed: the heap that they take is touched here.

use devices::ByteSink;
use kvm::KvmHypervisor;
use machine::{BootFiles, Machine, MachineConfig, MachineError, PreparedMachine};
use rustix::fs::{MemfdFlags, memfd_create};
use state_unit::StateTransitionError;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// The guest's memory, in bytes: more than it needs, and nothing that it does not touch.
const MEMORY: u64 = 8 << 20;

/// What a launch takes of the heap besides what a rehearsal does, in bytes. Less than what the allocator gives back at once.
const HEAP: usize = 64 << 10;

/// How long it may take to say something. It does so in its first instructions.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there was no rehearsal, or only part of one. No guest needs it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RehearsalError {
    #[error("the guest has no file")]
    File(#[from] io::Error),
    #[error("the guest cannot be made")]
    Machine(#[from] MachineError),
    #[error("the guest cannot be started")]
    Start(#[from] StateTransitionError),
    #[error("the guest said nothing within {PATIENCE:?}")]
    Silent,
}

/// Boots the built-in guest, waits until it has said something, and takes it down.
pub(crate) async fn rehearse(kvm: KvmHypervisor) -> Result<(), RehearsalError> {
    let mut kernel = File::from(memfd_create("rehearsal", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
    kernel.write_all(builtin_guest::IMAGE)?;
    let boot = BootFiles { kernel, initrd: None, cmdline: String::new() };
    let config = MachineConfig::new(1, MEMORY, boot);
    let prepared = PreparedMachine::new(kvm, config.shape.clone()).await?;
    let (said, mut says) = mpsc::unbounded_channel();
    let output: Arc<dyn ByteSink> = Arc::new(move |_: &[u8]| {
        // Whoever waits may have given up.
        let _ = said.send(());
    });
    let (halts, _halted) = mpsc::unbounded_channel();
    let machine = Machine::build_on(prepared, config, output, halts).await?;
    let result = perform(&machine, &mut says).await;
    machine.destroy().await;
    std::hint::black_box(vec![1u8; HEAP]);
    result
}

async fn perform(machine: &Machine, says: &mut mpsc::UnboundedReceiver<()>) -> Result<(), RehearsalError> {
    machine.start().await?;
    let said = tokio::time::timeout(PATIENCE, says.recv()).await;
    machine.stop().await?;
    said.ok().flatten().ok_or(RehearsalError::Silent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_rehearsal_leaves_nothing_open() {
        let kvm = KvmHypervisor::open().unwrap_or_else(|error| panic!("no KVM: {error}"));
        rehearse(kvm.clone()).await.unwrap();
        let machines = || {
            let files = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            let targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
            let names = targets.map(|target| target.display().to_string());
            names.filter(|name| name.contains("kvm-v") || name.contains("rehearsal")).count()
        };
        assert_eq!(machines(), 0);
    }
}
