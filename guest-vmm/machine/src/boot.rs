//! What a machine boots, kept for as long as it may be reset.

use crate::acpi::{self, AcpiError, DeviceNode};
use crate::loader::{self, BootSource, LoadError, LoadedGuest};
use crate::memory::GuestMemory;
use crate::reset_vector;
use std::fs::File;
use vm_memory::GuestMemoryError;

/// The files and the command line of a guest.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel. It must not change for as long as the machine lives: a reset reads it again.
    pub kernel: File,
    /// The initial RAM disk; the same holds.
    pub initrd: Option<File>,
    /// The command line, without a NUL.
    pub cmdline: String,
}

/// Why a guest cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The ACPI tables cannot be written.
    #[error("the ACPI tables cannot be written")]
    Acpi(#[from] AcpiError),
    /// There is no memory at [`crate::layout::RESET_VECTOR`].
    #[error("the reset vector cannot be written")]
    ResetVector(#[source] GuestMemoryError),
    /// The kernel, the initrd or the command line cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Everything that is written into memory before VP 0 starts.
pub(crate) struct BootImage {
    pub files: BootFiles,
    pub vps: u32,
    pub devices: Vec<DeviceNode>,
}

impl BootImage {
    /// Loads the guest into memory that is all zero. Blocks for as long as the files take to be read.
    pub fn load(&self, memory: &GuestMemory) -> Result<LoadedGuest, BootError> {
        let rsdp = acpi::write_tables(memory.view(), self.vps, &self.devices)?;
        reset_vector::write(memory.view()).map_err(BootError::ResetVector)?;
        let BootFiles { kernel, initrd, cmdline } = &self.files;
        let source = BootSource { kernel, initrd: initrd.as_ref(), cmdline };
        Ok(loader::load(memory, &source, rsdp)?)
    }
}
