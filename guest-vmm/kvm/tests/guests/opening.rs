//! Opening the device.

use kvm::KvmHypervisor;
use processor::{Hypervisor, PartitionError};
use std::path::Path;

fn refusal(path: &str) -> String {
    match KvmHypervisor::open_at(Path::new(path)) {
        Err(PartitionError::Unavailable(text)) => text,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("{path} was taken for KVM"),
    }
}

#[test]
fn what_is_not_kvm_is_refused_with_the_reason() {
    assert!(refusal("/dev/no-such-kvm").starts_with("/dev/no-such-kvm does not exist: the CPU "));
    assert!(refusal("/dev/null").ends_with("it is not KVM"));
    assert!(refusal("/dev").contains("directory"));
}

#[test]
fn a_descriptor_from_elsewhere_does() {
    let device = std::fs::File::options().read(true).write(true).open("/dev/kvm").expect("no KVM");
    let hypervisor = KvmHypervisor::from_device(device.into()).unwrap();
    assert!(hypervisor.max_vps().unwrap() >= 1);
}
