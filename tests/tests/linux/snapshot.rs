//! Linux that goes on from a snapshot's file.

use super::{BOOTED, LIMIT, MIB, assert_is_clean, does, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest, Toolset};

/// Counts in a file, whose every number is on the disk before the next.
const WRITE_LOAD: &str = "(n=0; while :; do n=$((n+1)); echo $n >/mnt/next; mv /mnt/next /mnt/step; sync; done) >/dev/null 2>&1 & echo $! >/tmp/load; until [ -s /mnt/step ]; do sleep 0.1; done";

pub(super) fn here(lab: &Lab, command: &str) -> anyhow::Result<String> {
    let done = lab.run(command, LIMIT)?;
    ensure!(done.status == 0, "{command}: {}", done.output);
    Ok(done.output)
}

/// How far a guest's time is behind the host's, in seconds.
pub(super) fn lag(host: &str, guest: &str) -> anyhow::Result<i64> {
    let seconds = |text: &str| text.trim().parse::<i64>().with_context(|| format!("{text:?} is no time"));
    Ok(seconds(host)? - seconds(guest)?)
}

/// A guest under load is saved to a file and ends. Another service's guest goes on from the file with what it was
/// doing, on the same disk, has the right time, and ends by itself with a clean file system.
pub fn linux_goes_on_from_a_file(lab: &Lab) -> anyhow::Result<()> {
    let service = "--socket /tmp/saving.sock";
    let log = serve(lab, "/tmp/saving")?;
    lab.make_disk("saved.img", 32 * MIB)?;
    let disk = "--disk path=/tmp/saved.img";
    let arguments = format!("{service} --memory 128M --catch-up-time {disk}");
    let parent = LabGuest::start_with(&[Toolset::Block], lab, "saving", "panic=-1", &arguments)
        .with_context(|| log)?;
    parent.saw(BOOTED, 1, LIMIT)?;
    does(
        &parent,
        "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && cp /bin/fio /mnt/kept",
    )?;
    let sum = does(&parent, "sha256sum /mnt/kept")?;
    does(&parent, WRITE_LOAD)?;
    let boot = does(&parent, "cat /proc/sys/kernel/random/boot_id")?;
    // It writes nothing more, so that the disk is of the same moment.
    here(
        lab,
        &format!(
            "guestctl {service} pause saving && guestctl {service} snapshot save saving /tmp/saved.snapshot"
        ),
    )?;
    here(lab, &format!("guestctl {service} stop saving"))?;
    parent.end(LIMIT)?;
    let restored = LabGuest::restored(lab, "saved", &format!("--snapshot /tmp/saved.snapshot {disk}"))?;
    does(
        &restored,
        "before=$(cat /mnt/step); until [ $(cat /mnt/step) -gt $((before + 3)) ]; do sleep 0.1; done",
    )?;
    does(&restored, "kill $(cat /tmp/load); while pidof sync; do sleep 0.1; done")?;
    ensure!(does(&restored, "cat /proc/sys/kernel/random/boot_id")? == boot, "it was booted");
    let time = restored.ask("date +%s", LIMIT)?;
    let lag = lag(&here(lab, "date +%s")?, &time)?;
    ensure!((-2..=10).contains(&lag), "it is {lag} seconds behind");
    does(&restored, "echo 3 >/proc/sys/vm/drop_caches")?;
    ensure!(does(&restored, "sha256sum /mnt/kept")? == sum, "it has another file");
    does(&restored, "umount /mnt")?;
    assert_is_clean(&power_off(&restored)?, 0)?;
    here(lab, "e2fsck -fn /tmp/saved.img")?;
    Ok(())
}
