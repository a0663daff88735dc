//! The words for a VP that cannot go on.

use crate::exit::{Emulation, Exit, name};
use kvm_bindings::*;
use std::fmt::Write;

/// What a reader of the registers has to know where a triple fault resets the VP.
pub(crate) const AFTER_INIT: &str =
    "after a triple fault on AMD the registers follow INIT and are no longer the guest's";

/// The reason of a fault, by the exit that made it one.
pub(crate) fn reason(exit: Exit) -> String {
    match exit {
        Exit::Shutdown => "triple fault (KVM_EXIT_SHUTDOWN)".to_owned(),
        Exit::FailEntry { reason, cpu } => format!(
            "the processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY): hardware reason {reason:#x} on CPU {cpu}"
        ),
        Exit::InternalError { suberror, emulation } => internal_error(suberror, emulation),
        Exit::SystemEvent { kind } => format!("system event {} (KVM_EXIT_SYSTEM_EVENT)", system_event(kind)),
        Exit::Debug { dr6 } => {
            format!("an exit for a debugger, of which there is none (KVM_EXIT_DEBUG): DR6 {dr6:#x}")
        }
        Exit::Other { reason } => match name(reason) {
            Some(name) => format!("an exit that nothing handles: {name}"),
            None => format!("an exit that nothing handles and KVM has had no name for: {reason}"),
        },
        handled => format!("an exit that should have been handled: {handled:?}"),
    }
}

fn internal_error(suberror: u32, emulation: Option<Emulation>) -> String {
    let name = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "EMULATION",
        KVM_INTERNAL_ERROR_SIMUL_EX => "SIMUL_EX",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "DELIVERY_EV",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "UNEXPECTED_EXIT_REASON",
        _ => "of no known name",
    };
    let mut text = format!("KVM cannot go on (KVM_EXIT_INTERNAL_ERROR): suberror {suberror}, {name}");
    if let Some(Emulation { len, bytes }) = emulation {
        text.push_str(", at the instruction bytes");
        for byte in bytes.iter().take(len.into()) {
            write!(text, " {byte:02x}").expect("a string takes everything");
        }
    }
    text
}

fn system_event(kind: u32) -> String {
    match kind {
        KVM_SYSTEM_EVENT_CRASH => "crash".to_owned(),
        KVM_SYSTEM_EVENT_WAKEUP => "wake-up".to_owned(),
        KVM_SYSTEM_EVENT_SUSPEND => "suspend".to_owned(),
        KVM_SYSTEM_EVENT_SEV_TERM => "SEV termination".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_name_their_exits() {
        assert_eq!(reason(Exit::Shutdown), "triple fault (KVM_EXIT_SHUTDOWN)");
        let mut bytes = [0; 15];
        bytes[..2].copy_from_slice(&[0xcc, 0x90]);
        let emulation = Some(Emulation { len: 2, bytes });
        let text = "KVM cannot go on (KVM_EXIT_INTERNAL_ERROR): suberror 1, EMULATION, at the instruction bytes cc 90";
        assert_eq!(reason(Exit::InternalError { suberror: 1, emulation }), text);
        let none = reason(Exit::InternalError { suberror: 99, emulation: None });
        assert_eq!(none, "KVM cannot go on (KVM_EXIT_INTERNAL_ERROR): suberror 99, of no known name");
        let hypercall = reason(Exit::Other { reason: KVM_EXIT_HYPERCALL });
        assert_eq!(hypercall, "an exit that nothing handles: KVM_EXIT_HYPERCALL");
        assert!(reason(Exit::Debug { dr6: 0xffff_4ff0 }).ends_with("(KVM_EXIT_DEBUG): DR6 0xffff4ff0"));
        assert!(reason(Exit::Other { reason: 4711 }).ends_with(": 4711"));
        assert!(reason(Exit::FailEntry { reason: 0x8000_0021, cpu: 1 }).contains("0x80000021 on CPU 1"));
        assert!(reason(Exit::SystemEvent { kind: KVM_SYSTEM_EVENT_CRASH }).contains("crash"));
    }
}
