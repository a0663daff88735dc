//! What can go wrong with a VP, and the names of calls that fail.

use processor::PartitionError;
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
    /// A model-specific register could not be given a value that it has had before.
    #[error("MSR {index:#x} does not take its value {value:#x} back")]
    Msr {
        /// Its number.
        index: u32,
        /// The value.
        value: u64,
    },
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
