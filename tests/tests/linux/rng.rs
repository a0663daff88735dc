//! The entropy device with Linux's driver.

use super::{BOOTED, LIMIT, MIB, assert_is_clean, assert_is_in_order, power_off};
use anyhow::ensure;
use guest_tests::lab::{Lab, LabGuest};

/// Much more than one request's worth.
const BYTES: u32 = 64 << 10;

pub fn linux_gets_random_bytes(lab: &Lab) -> anyhow::Result<()> {
    let guest = LabGuest::start(lab, "rng", "panic=-1", "--memory 256M --rng")?;
    guest.saw(BOOTED, 1, LIMIT)?;
    let current = guest.ask("cat /sys/class/misc/hw_random/rng_current", LIMIT)?;
    ensure!(current.starts_with("virtio_rng"), "Linux's source of entropy is {current:?}");
    let sum = || {
        guest.ask(
            &format!("head -c {BYTES} /dev/hwrng | tee /tmp/random | sha256sum; wc -c </tmp/random"),
            LIMIT,
        )
    };
    let (one, other) = (sum()?, sum()?);
    ensure!(one != other, "twice the same bytes: {one:?}");
    for answer in [&one, &other] {
        ensure!(answer.trim_end().ends_with(&BYTES.to_string()), "not {BYTES} bytes: {answer:?}");
    }
    assert_is_in_order(&guest, 1, 256 * MIB)?;
    assert_is_clean(&power_off(&guest)?, 1)
}
