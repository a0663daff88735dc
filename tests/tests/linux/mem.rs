//! The memory device with Linux's driver: blocks come and go while the guest runs.

use super::{BOOTED, LIMIT, assert_is_clean, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest};

const MIB: u64 = 1 << 20;
/// What is plugged, in the end: two of Linux's own blocks.
const PLUGGED: u64 = 256 * MIB;
const BOOTED_WITH: u64 = 256 * MIB;
/// What Linux keeps for itself, far more than it was seen to.
const LINUX: u64 = 80 * MIB;
/// More than the guest has without it.
const FILL_MIB: u64 = 300;

pub fn memory_is_plugged_and_unplugged(lab: &Lab) -> anyhow::Result<()> {
    let base = "/tmp/guestd-mem";
    let log = serve(lab, base)?;
    let arguments = format!("--memory 256M --mem region=1G,size=128M --socket {base}.sock");
    let guest = LabGuest::start(lab, "mem", "panic=-1 memhp_default_state=online_movable", &arguments)?;
    guest.saw(BOOTED, 1, LIMIT).with_context(|| log)?;
    plugged(&guest, base, 128 * MIB)?;
    request(&guest, base, PLUGGED)?;
    plugged(&guest, base, PLUGGED)?;
    let total = guest.ask("awk '/MemTotal/ { print $2 }' /proc/meminfo", LIMIT)?;
    let total: u64 = total.trim().parse().with_context(|| total)?;
    ensure!(total * 1024 > BOOTED_WITH + PLUGGED - LINUX, "Linux has {total} KiB");
    let fill = format!(
        "mkdir -p /fill && mount -t tmpfs -o size={FILL_MIB}m none /fill && head -c {FILL_MIB}m /dev/zero >/fill/all"
    );
    let filled = guest.ask(&format!("{fill} && wc -c </fill/all; umount /fill"), LIMIT)?;
    ensure!(filled.trim() == (FILL_MIB * MIB).to_string(), "the guest uses what is plugged: {filled:?}");
    request(&guest, base, 0)?;
    plugged(&guest, base, 0)?;
    assert_is_clean(&power_off(&guest)?, 1)
}

fn request(guest: &LabGuest<'_>, base: &str, bytes: u64) -> anyhow::Result<()> {
    guest.here(&format!(
        "guestctl --socket {base}.sock update mem units/mem/unit/device/requested_bytes {bytes}"
    ))?;
    Ok(())
}

/// Waits until so much is plugged, as the device and Linux say.
fn plugged(guest: &LabGuest<'_>, base: &str, bytes: u64) -> anyhow::Result<()> {
    let device = format!("guestctl --socket {base}.sock inspect mem units/mem/unit/device/plugged_bytes");
    guest.until(&format!("[ \"$({device})\" = {bytes} ]"), &format!("{bytes} bytes plugged"), LIMIT)?;
    Ok(())
}
