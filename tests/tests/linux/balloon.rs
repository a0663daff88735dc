//! The memory balloon with Linux's driver: what is in it, and what is free, is the host's.

use super::{BOOTED, LIMIT, MIB, assert_is_clean, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest};

const MEMORY_MIB: u64 = 512;
const FILL_MIB: u64 = 256;
/// What Linux itself needs of its memory, far more than it was seen to.
const LINUX_MIB: u64 = 160;
const PAGES_PER_MIB: u64 = MIB / 4096;

pub fn pages_go_back_to_the_host(lab: &Lab) -> anyhow::Result<()> {
    let base = "/tmp/guestd-balloon";
    let log = serve(lab, base)?;
    let arguments = format!("--memory {MEMORY_MIB}M --balloon --socket {base}.sock");
    let guest = LabGuest::start(lab, "balloon", "panic=-1", &arguments).with_context(|| log)?;
    guest.saw(BOOTED, 1, LIMIT)?;
    let vmm = vmm(&guest, base)?;
    let fill = format!("head -c {FILL_MIB}m /dev/zero >/tmp/fill; echo filled; rm /tmp/fill");

    guest.ask(&format!("head -c {FILL_MIB}m /dev/zero >/tmp/fill; echo filled"), LIMIT)?;
    guest.until(&format!("[ {} -ge {FILL_MIB} ]", resident(vmm)), "memory that the guest uses", LIMIT)?;
    guest.send("rm /tmp/fill")?;
    let freed = format!("[ {} -lt {LINUX_MIB} ]", resident(vmm));
    guest.until(&freed, "free pages that were reported and are the host's", LIMIT)?;

    let wanted = (MEMORY_MIB - LINUX_MIB) * PAGES_PER_MIB;
    set_pages(&guest, base, wanted)?;
    let actual =
        format!("guestctl --socket {base}.sock inspect balloon units/balloon/unit/device/actual_pages");
    guest.until(&format!("[ \"$({actual})\" = {wanted} ]"), "an inflated balloon", LIMIT)?;
    guest.until(&freed, "pages in the balloon that are the host's", LIMIT)?;
    let available = guest.ask("awk '/MemAvailable/ { print int($2 / 1024) }' /proc/meminfo", LIMIT)?;
    let available: u64 = available.trim().parse().with_context(|| available)?;
    ensure!(available < LINUX_MIB, "{available} MiB are available beside the balloon");

    set_pages(&guest, base, 0)?;
    guest.until(&format!("[ \"$({actual})\" = 0 ]"), "an empty balloon", LIMIT)?;
    ensure!(guest.ask(&fill, LIMIT)?.contains("filled"), "what left the balloon is the guest's again");
    assert_is_clean(&power_off(&guest)?, 1)
}

/// The process of the guest's VMM.
fn vmm(guest: &LabGuest<'_>, base: &str) -> anyhow::Result<u64> {
    let guests = guest.here(&format!("guestctl --socket {base}.sock ps --json"))?;
    let parsed: serde_json::Value = serde_json::from_str(&guests).with_context(|| guests.clone())?;
    parsed[0]["pid"].as_u64().with_context(|| guests)
}

/// How many MiB of a guest's memory the host has allocated, as the lab's shell computes it.
fn resident(vmm: u64) -> String {
    format!("$(awk '/RssShmem/ {{ print int($2 / 1024) }}' /proc/{vmm}/status)")
}

fn set_pages(guest: &LabGuest<'_>, base: &str, pages: u64) -> anyhow::Result<()> {
    let node = "units/balloon/unit/device/requested_pages";
    guest.here(&format!("guestctl --socket {base}.sock update balloon {node} {pages}"))?;
    Ok(())
}
