//! A whole machine: the built-in guest, which waits for input in HLT, with VPs that it has not started.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use kvm::KvmHypervisor;
use machine::{BootFiles, Halt, Machine, MachineConfig};
use tokio::sync::mpsc;

use super::no_halts;
use crate::stage::sealed_file;

const MEMORY_BYTES: u64 = 64 << 20;

/// A machine that is paused.
pub(super) struct WholeGuest {
    pub(super) machine: Machine,
    halts: mpsc::UnboundedReceiver<Halt>,
}

impl WholeGuest {
    /// Boots the guest until it waits for input.
    pub(super) async fn boot(hypervisor: &KvmHypervisor, vps: u32) -> anyhow::Result<Self> {
        let kernel = sealed_file(builtin_guest::IMAGE)?;
        let boot = BootFiles { kernel, initrd: None, cmdline: String::new() };
        let config = MachineConfig::new(vps, MEMORY_BYTES, boot);
        let (wrote, mut written) = mpsc::unbounded_channel();
        let output = Arc::new(move |bytes: &[u8]| {
            // Only the first is waited for.
            let _ = wrote.send(bytes.len());
        });
        let (halt, halts) = mpsc::unbounded_channel();
        let machine = Machine::build(hypervisor.clone(), config, output, halt, || false).await?;
        machine.start().await?;
        written.recv().await.context("the guest wrote nothing")?;
        super::at_rest()?;
        machine.pause().await?;
        Ok(Self { machine, halts })
    }

    /// Fails if a VP has halted by itself.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        no_halts(&mut self.halts)
    }

    /// Takes the machine down.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        self.check()?;
        self.machine.stop().await.map_err(|error| anyhow!(error))?;
        self.machine.destroy().await;
        Ok(())
    }
}
