//! Why there is no KVM, and what to do about it.

use processor::PartitionError;
use std::arch::x86_64::{__cpuid, __get_cpuid_max};
use std::io;
use std::path::Path;

/// The error for a device that could not be opened.
pub(crate) fn cannot_open(path: &Path, error: &io::Error) -> PartitionError {
    let path = path.display();
    let text = match error.raw_os_error() {
        Some(libc::ENOENT) => format!("{path} does not exist: {}", what_to_do(virtualisation())),
        Some(libc::ENODEV | libc::ENXIO) => {
            format!("{path} has no driver behind it: {}", what_to_do(virtualisation()))
        }
        Some(libc::EACCES | libc::EPERM) => format!(
            "{path} may not be opened by this user ({error}): add the user to the group that owns it, \
             which is kvm as a rule, and log in again"
        ),
        _ => format!("{path} cannot be opened: {error}"),
    };
    PartitionError::Unavailable(text)
}

/// What the CPU offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Virtualisation {
    Intel,
    Amd,
    None,
}

fn virtualisation() -> Virtualisation {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let extended = 0x8000_0001;
    if __cpuid(1).ecx & VMX != 0 {
        Virtualisation::Intel
    } else if __get_cpuid_max(0x8000_0000).0 >= extended && __cpuid(extended).ecx & SVM != 0 {
        Virtualisation::Amd
    } else {
        Virtualisation::None
    }
}

fn what_to_do(virtualisation: Virtualisation) -> &'static str {
    match virtualisation {
        Virtualisation::Intel => "the CPU has VT-x, so load the module with `modprobe kvm_intel`",
        Virtualisation::Amd => "the CPU has SVM, so load the module with `modprobe kvm_amd`",
        Virtualisation::None => {
            "the CPU shows neither VT-x nor SVM, so enable virtualisation in the firmware or, if this machine is virtual \
             itself, nested virtualisation on its host"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(errno: i32) -> String {
        cannot_open(Path::new("/dev/kvm"), &io::Error::from_raw_os_error(errno)).to_string()
    }

    #[test]
    fn each_reason_has_its_remedy() {
        assert!(text(libc::ENOENT).starts_with("/dev/kvm does not exist: the CPU "));
        assert!(text(libc::ENODEV).starts_with("/dev/kvm has no driver behind it: the CPU "));
        let denied = text(libc::EACCES);
        assert!(denied.contains("Permission denied") && denied.contains("kvm as a rule"), "{denied}");
        assert!(text(libc::EMFILE).contains("Too many open files"));
        assert!(what_to_do(Virtualisation::Intel).contains("kvm_intel"));
        assert!(what_to_do(Virtualisation::Amd).contains("kvm_amd"));
        assert!(what_to_do(Virtualisation::None).contains("nested"));
    }
}
