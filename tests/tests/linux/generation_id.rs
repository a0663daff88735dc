//! The VM generation ID with Linux's own driver, which Debian's generic kernel has: a guest that goes on from a snapshot makes its random
//! numbers anew, and the one that the snapshot is of does not.

use super::snapshot::here;
use super::{BOOTED, LIMIT, MIB, assert_is_clean, assert_is_in_order, does, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest};
use std::collections::BTreeSet;

/// Is there when the driver (Linux 6.1, drivers/virt/vmgenid.c) has taken the device.
const DEVICE: &str = "/sys/bus/acpi/drivers/vmgenid/VMGENCTR:00";
/// What the kernel says each time that it reseeds (Linux 6.1, drivers/char/random.c).
const RESEEDED: &str = "random: crng reseeded due to virtual machine fork";
const MEMORY: &str = "--memory 256M";

/// A booted Linux is forked, its fork is forked, and it is saved to a file from which another goes on: each has an ID of its own, and
/// has reseeded as often as there is another guest before it. The first one goes on with what it was seeded with.
pub fn linux_reseeds_as_another_guest(lab: &Lab) -> anyhow::Result<()> {
    let service = "--socket /tmp/generations.sock";
    let log = serve(lab, "/tmp/generations")?;
    let arguments = format!("{service} {MEMORY}");
    let first = LabGuest::start(lab, "first", "panic=-1", &arguments).with_context(|| log)?;
    first.saw(BOOTED, 1, LIMIT)?;
    does(&first, &format!("ls -d {DEVICE}"))?;
    // One that was never seeded does not reseed. Reading this waits for the seed.
    does(&first, "head -c 1 /dev/random >/dev/null")?;

    let fork = LabGuest::fork(lab, "fork", &format!("{service} first"))?;
    assert_has_reseeded(&fork, 1)?;
    let second = LabGuest::fork(lab, "second", &format!("{service} fork"))?;
    here(lab, &format!("guestctl snapshot save first /tmp/first.snapshot {service}"))?;
    let saved = LabGuest::restored(lab, "saved", &format!("--snapshot /tmp/first.snapshot {service}"))?;

    let guests = [("first", first, 0), ("fork", fork, 1), ("second", second, 2), ("saved", saved, 1)];
    let mut ids = BTreeSet::new();
    for (name, guest, times) in &guests {
        assert_has_reseeded(guest, *times).with_context(|| (*name).to_owned())?;
        let id = here(lab, &format!("guestctl inspect {name} units/generation-id/unit/id {service}"))?;
        ensure!(ids.insert(id), "{name} has the ID of another");
    }
    for (name, guest, _) in guests {
        assert_is_in_order(&guest, 1, 256 * MIB)?;
        assert_is_clean(&power_off(&guest)?, usize::from(name == "first"))?;
    }
    Ok(())
}

/// Waits until the guest's kernel has said so many times that it reseeds. It has not said so more often.
fn assert_has_reseeded(guest: &LabGuest<'_>, times: usize) -> anyhow::Result<()> {
    let count = format!("dmesg | grep -c '{RESEEDED}'");
    let seen = guest.ask(&format!("until [ $({count}) -ge {times} ]; do sleep 0.2; done; {count}"), LIMIT)?;
    ensure!(seen.trim() == times.to_string(), "it has reseeded {seen:?} times instead of {times}");
    Ok(())
}
