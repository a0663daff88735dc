//! Errors as the protocol carries them, and how a guest ended.

use crate::common_capnp::{failure, guest_error as code, result};
use crate::guest_capnp::exit;
use crate::state::Panic;
use std::fmt;

macro_rules! guest_errors {
    ($($variant:ident = $constant:ident, $name:literal;)*) => {
        /// The protocol's error codes: 1 to 15 are fuchsia.virtualization's, by number.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[expect(missing_docs, reason = "common.capnp documents them")]
        pub enum GuestError { $($variant,)* }

        impl GuestError {
            /// Every code, in ascending order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The number on the wire.
            pub const fn code(self) -> u16 {
                match self { $(Self::$variant => code::$constant,)* }
            }

            /// The name in the schema.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

guest_errors! {
    InternalError = INTERNAL_ERROR, "internalError";
    DeviceNotPresent = DEVICE_NOT_PRESENT, "deviceNotPresent";
    BadConfig = BAD_CONFIG, "badConfig";
    GuestInitializationFailure = GUEST_INITIALIZATION_FAILURE, "guestInitializationFailure";
    DeviceInitializationFailure = DEVICE_INITIALIZATION_FAILURE, "deviceInitializationFailure";
    DeviceStartFailure = DEVICE_START_FAILURE, "deviceStartFailure";
    DeviceMemoryOverlap = DEVICE_MEMORY_OVERLAP, "deviceMemoryOverlap";
    FailedServiceConnect = FAILED_SERVICE_CONNECT, "failedServiceConnect";
    DuplicatePublicServices = DUPLICATE_PUBLIC_SERVICES, "duplicatePublicServices";
    KernelLoadFailure = KERNEL_LOAD_FAILURE, "kernelLoadFailure";
    VcpuStartFailure = VCPU_START_FAILURE, "vcpuStartFailure";
    VcpuRuntimeFailure = VCPU_RUNTIME_FAILURE, "vcpuRuntimeFailure";
    NotCreated = NOT_CREATED, "notCreated";
    AlreadyRunning = ALREADY_RUNNING, "alreadyRunning";
    ControllerForcedHalt = CONTROLLER_FORCED_HALT, "controllerForcedHalt";
    SnapshotNotSupported = SNAPSHOT_NOT_SUPPORTED, "snapshotNotSupported";
    SnapshotIncompatible = SNAPSHOT_INCOMPATIBLE, "snapshotIncompatible";
    SnapshotCorrupt = SNAPSHOT_CORRUPT, "snapshotCorrupt";
    TransitionTimedOut = TRANSITION_TIMED_OUT, "transitionTimedOut";
    Faulted = FAULTED, "faulted";
    NotRunning = NOT_RUNNING, "notRunning";
    NotSupported = NOT_SUPPORTED, "notSupported";
    LimitExceeded = LIMIT_EXCEEDED, "limitExceeded";
}

impl GuestError {
    /// The error with this number. A number that this version does not know is an `InternalError` of a newer peer.
    pub fn from_code(code: u16) -> Self {
        Self::ALL.iter().copied().find(|error| error.code() == code).unwrap_or(Self::InternalError)
    }
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An expected refusal: data in the results of a call, never an exception.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What kind of failure.
    pub code: GuestError,
    /// Which field, file, device or unit, with the value.
    pub detail: String,
    /// The state units concerned.
    pub units: Vec<String>,
    /// What led to it.
    pub cause: Option<Box<Failure>>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.detail)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

/// How deep a chain of causes is read from the wire.
const MAX_CAUSES: usize = 8;

impl Failure {
    /// A failure without units or cause.
    pub fn new(code: GuestError, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), units: Vec::new(), cause: None }
    }

    /// The same failure with what led to it.
    #[must_use]
    pub fn caused_by(mut self, cause: Failure) -> Self {
        self.cause = Some(Box::new(cause));
        self
    }

    /// The same failure with the state units concerned.
    #[must_use]
    pub fn of_units(mut self, units: Vec<String>) -> Self {
        self.units = units;
        self
    }

    /// The failure and its causes in one line.
    pub fn chain(&self) -> String {
        chain(self)
    }

    /// Writes it into a message.
    pub fn write(&self, mut builder: failure::Builder<'_>) {
        builder.set_code(self.code.code());
        builder.set_detail(&self.detail[..]);
        let mut units = builder.reborrow().init_units(u32::try_from(self.units.len()).unwrap_or(u32::MAX));
        for (index, unit) in (0u32..).zip(&self.units) {
            units.set(index, &unit[..]);
        }
        if let Some(cause) = &self.cause {
            cause.write(builder.init_cause());
        }
    }

    /// Reads it from a message. Text that is not UTF-8 is read with replacement characters.
    pub fn read(reader: failure::Reader<'_>) -> capnp::Result<Self> {
        Self::read_to_depth(reader, MAX_CAUSES)
    }

    fn read_to_depth(reader: failure::Reader<'_>, depth: usize) -> capnp::Result<Self> {
        let cause = if depth > 0 && reader.has_cause() {
            Some(Box::new(Self::read_to_depth(reader.get_cause()?, depth - 1)?))
        } else {
            None
        };
        let units = reader.get_units()?.iter().map(|unit| unit.map(lossy)).collect::<Result<_, _>>()?;
        Ok(Self {
            code: GuestError::from_code(reader.get_code()),
            detail: lossy(reader.get_detail()?),
            units,
            cause,
        })
    }

    /// Writes the answer of a method that returns no data.
    pub fn write_result(answer: &Result<(), Failure>, mut builder: result::Builder<'_>) {
        match answer {
            Ok(()) => builder.set_ok(()),
            Err(failure) => failure.write(builder.init_error()),
        }
    }

    /// Reads the answer of a method that returns no data.
    pub fn read_result(reader: result::Reader<'_>) -> capnp::Result<Result<(), Failure>> {
        Ok(match reader.which()? {
            result::Ok(()) => Ok(()),
            result::Error(failure) => Err(Self::read(failure?)?),
        })
    }
}

/// An error and everything behind it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// Text from the wire; what is not UTF-8 becomes replacement characters.
pub(crate) fn lossy(text: capnp::text::Reader<'_>) -> String {
    String::from_utf8_lossy(text.as_bytes()).into_owned()
}

/// In which of three ways a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest ended itself.
    Clean,
    /// It was stopped, or its lease ended.
    Forced,
    /// A VP, a unit or the VMM's process failed.
    Crashed,
}

impl Outcome {
    /// The name in the schema.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Forced => "forced",
            Self::Crashed => "crashed",
        }
    }
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// In which of three ways.
    pub outcome: Outcome,
    /// The error, unless the end was clean.
    pub code: Option<GuestError>,
    /// What is known beyond the code.
    pub detail: String,
    /// After a crash of the VMM's process: the end of its log, at most 4 KiB.
    pub log: String,
    /// What the guest has reported of its kernel since it was started or last reset, the latest.
    pub panic: Option<Panic>,
    /// How many panics it has reported in all.
    pub panics: u32,
    /// What it has written to its debug-exit port, if that ended it.
    pub debug_exit: Option<u32>,
}

impl Exit {
    /// The guest ended itself.
    pub fn clean(detail: impl Into<String>) -> Self {
        Self::of(Outcome::Clean, None, detail.into())
    }

    /// The guest ended itself with a write to its debug-exit port.
    pub fn debug(value: u32) -> Self {
        let detail = format!("the guest wrote {value:#x} to its debug-exit port");
        Self { debug_exit: Some(value), ..Self::clean(detail) }
    }

    /// Somebody ended the guest.
    pub fn forced(detail: impl Into<String>) -> Self {
        Self::of(Outcome::Forced, Some(GuestError::ControllerForcedHalt), detail.into())
    }

    /// Something failed.
    pub fn crashed(failure: &Failure) -> Self {
        Self::of(Outcome::Crashed, Some(failure.code), failure.detail.clone())
    }

    fn of(outcome: Outcome, code: Option<GuestError>, detail: String) -> Self {
        Self { outcome, code, detail, log: String::new(), panic: None, panics: 0, debug_exit: None }
    }

    /// The failure, unless the end was clean.
    pub fn failure(&self) -> Option<Failure> {
        self.code.map(|code| Failure::new(code, self.detail.clone()))
    }

    /// Writes it into a message.
    pub fn write(&self, mut builder: exit::Builder<'_>) {
        builder.set_outcome(match self.outcome {
            Outcome::Clean => exit::Outcome::Clean,
            Outcome::Forced => exit::Outcome::Forced,
            Outcome::Crashed => exit::Outcome::Crashed,
        });
        builder.set_code(self.code.map_or(0, GuestError::code));
        builder.set_detail(&self.detail[..]);
        builder.set_log(&self.log[..]);
        builder.set_panic(Panic::to_wire(self.panic));
        builder.set_panics(self.panics);
        if let Some(value) = self.debug_exit {
            builder.get_debug_exit().set_value(value);
        }
    }

    /// Reads it from a message.
    pub fn read(reader: exit::Reader<'_>) -> capnp::Result<Self> {
        let outcome = match reader.get_outcome()? {
            exit::Outcome::Clean => Outcome::Clean,
            exit::Outcome::Forced => Outcome::Forced,
            exit::Outcome::Crashed => Outcome::Crashed,
        };
        let code = (reader.get_code() != 0).then(|| GuestError::from_code(reader.get_code()));
        let debug_exit = match reader.get_debug_exit().which()? {
            exit::debug_exit::None(()) => None,
            exit::debug_exit::Value(value) => Some(value),
        };
        Ok(Self {
            outcome,
            code,
            detail: lossy(reader.get_detail()?),
            log: lossy(reader.get_log()?),
            panic: Panic::from_wire(reader.get_panic()?),
            panics: reader.get_panics(),
            debug_exit,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_fuchsias_by_number() {
        let numbers: Vec<u16> = GuestError::ALL.iter().map(|error| error.code()).collect();
        let expected: Vec<u16> = (1..=15).chain(64..=71).collect();
        assert_eq!(numbers, expected);
        assert_eq!(GuestError::from_code(3), GuestError::BadConfig);
        assert_eq!(GuestError::from_code(999), GuestError::InternalError);
    }

    #[test]
    fn a_failure_survives_the_wire() {
        let failure = Failure::new(GuestError::DeviceStartFailure, "serial: no such line")
            .of_units(vec!["serial".into(), "vps".into()])
            .caused_by(Failure::new(GuestError::InternalError, "the line is gone"));
        let mut message = capnp::message::Builder::new_default();
        failure.write(message.init_root());
        let read = Failure::read(message.get_root_as_reader().expect("a failure")).expect("readable");
        assert_eq!(read, failure);
        assert_eq!(read.chain(), "deviceStartFailure: serial: no such line: internalError: the line is gone");
    }

    #[test]
    fn an_exit_survives_the_wire() {
        let forced = Exit { log: "last words".into(), ..Exit::forced("stopped") };
        let panicked = Exit { panic: Some(Panic::CrashLoaded), panics: 7, ..Exit::clean("reset") };
        for exit in [forced, panicked, Exit::debug(0), Exit::debug(u32::MAX)] {
            let mut message = capnp::message::Builder::new_default();
            exit.write(message.init_root());
            assert_eq!(Exit::read(message.get_root_as_reader().expect("an exit")).expect("readable"), exit);
        }
    }
}
