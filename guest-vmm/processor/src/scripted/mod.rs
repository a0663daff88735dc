//! A hypervisor that needs none: its VPs interpret scripts in guest memory.
//!
//! It serves tests of everything above the processor seam. A [`Script`] is a guest: it is assembled with a builder, lies in
//! guest memory like any other guest's code (as an ELF file with a PVH entry, if a boot loader is to load it), and drives
//! ports, memory-mapped registers, interrupts and other VPs. Options break it on purpose: [`ScriptedOptions`].
//!
//! Parts: `instruction` the encoding, `script` the builder, `partition` what VPs and interrupt sources share, `vp` the
//! interpreter.
//!
//! Limits: there is no address translation, and segments and control registers are only kept; interrupts end a `hlt` and are
//! lost on no handler. Registers that scripts use: RIP, RAX (what was read last), RCX (the counter), RDX (the vector of the
//! interrupt that ended the last `hlt`).

mod elf;
mod instruction;
mod partition;
mod script;
mod vp;

pub use script::{Label, SCRIPT_BASE, Script};
pub use vp::{ScriptedError, ScriptedProcessor, ScriptedState};

use crate::{BindProcessor, Hypervisor, NewPartition, PartitionConfig, PartitionError, VpIndex};
use partition::ScriptedPartition;
use std::sync::Arc;

/// What a scripted hypervisor is to fail at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScriptedOptions {
    /// This VP cannot be bound.
    pub fail_bind: Option<VpIndex>,
    /// The general registers of this VP cannot be set, so that nothing can start it.
    pub fail_set_registers: Option<VpIndex>,
    /// This VP's thread panics at the VP's first instruction.
    pub panic_at_first_instruction: Option<VpIndex>,
}

/// The most VPs of a scripted partition: as many as have a local APIC ID of eight bits that is not the broadcast.
const MAX_VPS: u32 = 254;

/// The hypervisor.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScriptedHypervisor {
    /// What it fails at.
    pub options: ScriptedOptions,
}

impl Hypervisor for ScriptedHypervisor {
    type Binder = ScriptedBinder;

    fn max_vps(&self) -> Result<u32, PartitionError> {
        Ok(MAX_VPS)
    }

    fn build(&self, config: &PartitionConfig) -> Result<NewPartition<ScriptedBinder>, PartitionError> {
        let wanted = config.vp_count;
        if wanted > MAX_VPS {
            return Err(PartitionError::TooManyVps { wanted, limit: MAX_VPS });
        }
        let partition = Arc::new(ScriptedPartition::new(config));
        let binder =
            |n| ScriptedBinder { vp: VpIndex(n), partition: partition.clone(), options: self.options };
        Ok(NewPartition { processors: (0..wanted).map(binder).collect(), partition })
    }
}

/// Binds a scripted VP.
pub struct ScriptedBinder {
    vp: VpIndex,
    partition: Arc<ScriptedPartition>,
    options: ScriptedOptions,
}

impl BindProcessor for ScriptedBinder {
    type Processor = ScriptedProcessor;

    fn bind(self) -> Result<ScriptedProcessor, PartitionError> {
        let Self { vp, partition, options } = self;
        if options.fail_bind == Some(vp) {
            let source = std::io::Error::other(format!("the options say that VP {vp} cannot be bound"));
            return Err(PartitionError::Call { call: "binding a scripted VP", source });
        }
        Ok(ScriptedProcessor::new(vp, partition, options))
    }
}
