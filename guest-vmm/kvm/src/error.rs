//! What can go wrong with a VP, and the names of calls that fail.

use processor::{NotSupported, PartitionError, StateAccessError, VpStateKind};
use std::fmt::Write;
use std::io;

/// What can go wrong when a VP's state is read or written.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// An ioctl failed.
    #[error("{call} failed")]
    Call {
        /// Its name.
        call: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The host reports a state of the VP that no x86 processor has.
    #[error("KVM reports the multiprocessing state {0}, which no x86 VP has")]
    MpState(u32),
    /// A model-specific register is to be set that this host's VPs do not have.
    #[error("this host has no MSR {index:#x}, whose value was {value:#x}")]
    NoMsr {
        /// Its number.
        index: u32,
        /// The value that it had.
        value: u64,
    },
    /// CPUID is to tell of features that this host's VPs do not have.
    #[error("this host has no CPUID {function:#x}{} {register} bits {bits:#x}, which its guest was told of", .index.map(|index| format!(".{index:#x}")).unwrap_or_default())]
    NoFeature {
        /// The leaf.
        function: u32,
        /// The subleaf, of a leaf that has any.
        index: Option<u32>,
        /// The register of the answer.
        register: &'static str,
        /// What is lacking.
        bits: u32,
    },
    /// The time-stamp counter cannot count as often as it did.
    #[error("the TSC counted at {wanted} kHz, and this host's counts at {host} kHz and cannot be scaled")]
    TscFrequency {
        /// In kHz.
        wanted: u32,
        /// In kHz.
        host: u32,
    },
    /// Several states were to be set or read.
    #[error(transparent)]
    States(#[from] Box<StateAccessError<VpStateKind>>),
    /// KVM has no such thing.
    #[error(transparent)]
    NotSupported(#[from] NotSupported),
    /// A model-specific register could not be given a value that it has had before.
    #[error("MSR {index:#x} does not take its value {value:#x} back")]
    Msr {
        /// Its number.
        index: u32,
        /// The value.
        value: u64,
    },
}

impl KvmError {
    /// Its text with those of its causes.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(text, ": {error}").expect("a string takes everything");
            cause = error.source();
        }
        text
    }
}

impl From<StateAccessError<VpStateKind>> for KvmError {
    fn from(error: StateAccessError<VpStateKind>) -> Self {
        Self::States(Box::new(error))
    }
}

/// The result of an ioctl on a VP, with the ioctl's name.
pub(crate) trait Named<T> {
    /// For the state of a VP.
    fn named(self, call: &'static str) -> Result<T, KvmError>;

    /// For a partition.
    fn for_partition(self, call: &'static str) -> Result<T, PartitionError>;
}

impl<T> Named<T> for Result<T, kvm_ioctls::Error> {
    fn named(self, call: &'static str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError::Call { call, source: io_error(error) })
    }

    fn for_partition(self, call: &'static str) -> Result<T, PartitionError> {
        self.map_err(|error| PartitionError::Call { call, source: io_error(error) })
    }
}

/// The same error in the standard library's type.
pub(crate) fn io_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl From<KvmError> for PartitionError {
    fn from(error: KvmError) -> Self {
        match error {
            KvmError::Call { call, source } => Self::Call { call, source },
            other => Self::Call { call: "preparing a VP", source: io::Error::other(other) },
        }
    }
}
