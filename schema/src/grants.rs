//! What a guest that goes on from a snapshot is granted, beside what the snapshot has.

use crate::config::{ConfigFault, GuestConfig};

impl GuestConfig {
    /// What of these grants cannot be for a guest with this config: a kernel or ramdisk, other disks and network devices than as many as
    /// the guest has, vsock listeners for a guest without that device. All of it; nothing else of the grants is looked at.
    pub fn grant_faults(&self, grants: &GuestConfig) -> Vec<ConfigFault> {
        let (own, granted) = (&self.devices, &grants.devices);
        let kernel = ("source.boot.kernel", grants.kernel.is_some());
        let ramdisk = ("source.boot.ramdisk", grants.ramdisk.is_some());
        let given = [kernel, ramdisk].into_iter().filter(|(_, is_given)| *is_given);
        let mut faults: Vec<_> = given
            .map(|(field, _)| ConfigFault::new(field, "a guest that goes on from a snapshot has its own"))
            .collect();
        faults.extend(count_fault("block", "disks", own.block.len(), granted.block.len()));
        faults.extend(count_fault("net", "network devices", own.net.len(), granted.net.len()));
        if own.vsock.is_none() && granted.vsock.is_some() {
            faults.push(ConfigFault::new("vsock", "the snapshot has no such device"));
        }
        faults
    }
}

fn count_fault(field: &str, what: &str, own: usize, granted: usize) -> Option<ConfigFault> {
    (own != granted).then(|| {
        ConfigFault::new(field, format!("the snapshot has {own} {what}, and {granted} were granted"))
    })
}
