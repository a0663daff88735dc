//! The memory device with Linux's driver: blocks come and go while the guest runs.

use super::{BOOTED, LIMIT, assert_is_clean, power_off, serve};
use anyhow::Context;
use guest_tests::lab::{Lab, LabGuest};

const MIB: u64 = 1 << 20;
/// What is plugged, in the end: two of Linux's own blocks.
const PLUGGED: u64 = 256 * MIB;
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
    let fill = format!("head -c {FILL_MIB}m /dev/zero >/tmp/fill && wc -c </tmp/fill; rm /tmp/fill");
    let filled = guest.ask(&fill, LIMIT)?;
    anyhow::ensure!(
        filled.trim() == (FILL_MIB * MIB).to_string(),
        "the guest uses what is plugged: {filled:?}"
    );
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
