//! Linux that goes on from snapshots.

use super::{BOOTED, LIMIT, MIB, assert_is_clean, assert_is_in_order, does, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest, Toolset};

/// Reads all of a file again and again.
const LOAD: &str = "(while :; do sha256sum /mnt/kept; done >/dev/null 2>&1) & echo $! >/tmp/load";
/// Ends that. What it has begun ends by itself.
const UNLOAD: &str = "kill $(cat /tmp/load); while pidof sha256sum; do sleep 0.1; done";

/// Counts in a file, whose every number is on the disk before the next.
const WRITE_LOAD: &str = "(n=0; while :; do n=$((n+1)); echo $n >/mnt/next; mv /mnt/next /mnt/step; sync; done) >/dev/null 2>&1 & echo $! >/tmp/load; until [ -s /mnt/step ]; do sleep 0.1; done";

pub(super) fn here(lab: &Lab, command: &str) -> anyhow::Result<String> {
    let done = lab.run(command, LIMIT)?;
    ensure!(done.status == 0, "{command}: {}", done.output);
    Ok(done.output)
}

/// A fork of this guest, which is paused meanwhile, so that the copy of its disk is of the same moment.
pub(super) fn fork<'lab>(
    lab: &'lab Lab,
    service: &str,
    of: &str,
    name: &str,
) -> anyhow::Result<LabGuest<'lab>> {
    fork_granted(lab, service, of, name, &format!("--disk path=/tmp/{name}.img"))
}

/// The same with these grants, of which one is the copy of its disk.
pub(super) fn fork_granted<'lab>(
    lab: &'lab Lab,
    service: &str,
    of: &str,
    name: &str,
    grants: &str,
) -> anyhow::Result<LabGuest<'lab>> {
    here(lab, &format!("guestctl {service} pause {of} && cp /tmp/{of}.img /tmp/{name}.img"))?;
    let fork = LabGuest::fork(lab, name, &format!("{service} {of} {grants}"))?;
    let up = fork.until(&format!("guestctl {service} ps | grep -q '^{name} .*running'"), "fork", LIMIT);
    up.with_context(|| here(lab, "cat /tmp/*.log").unwrap_or_default())?;
    here(lab, &format!("guestctl {service} resume {of}"))?;
    Ok(fork)
}

/// How far a guest's time is behind the host's, in seconds.
pub(super) fn lag(host: &str, guest: &str) -> anyhow::Result<i64> {
    let seconds = |text: &str| text.trim().parse::<i64>().with_context(|| format!("{text:?} is no time"));
    Ok(seconds(host)? - seconds(guest)?)
}

/// A guest with two VPs under load is forked, its fork once more. Each goes on with what it was doing, writes to a disk and to memory
/// that are its own, has the right time, and ends by itself with a clean file system.
pub fn linux_is_forked_and_its_fork_again(lab: &Lab) -> anyhow::Result<()> {
    let service = "--socket /tmp/forks.sock";
    let log = serve(lab, "/tmp/forks")?;
    lab.make_disk("adam.img", 32 * MIB)?;
    let arguments =
        format!("{service} --cpus 2 --memory 256M --catch-up-time --rng --disk path=/tmp/adam.img,id=root");
    let adam =
        LabGuest::start_with(&[Toolset::Block], lab, "adam", "panic=-1", &arguments).with_context(|| log)?;
    adam.saw(BOOTED, 1, LIMIT)?;
    does(
        &adam,
        "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && cp /bin/fio /mnt/kept",
    )?;
    let sum = does(&adam, "sha256sum /mnt/kept")?;
    does(&adam, LOAD)?;
    let seth = fork(lab, service, "adam", "seth")?;
    does(&adam, UNLOAD)?;
    does(&seth, "echo seth | tee /tmp/own >/mnt/own; sync")?;
    let enosh = fork(lab, service, "seth", "enosh")?;
    does(&seth, UNLOAD)?;
    does(&enosh, "[ $(cat /tmp/own) = seth ] && echo enosh | tee /tmp/own >/mnt/own; sync")?;
    does(&enosh, UNLOAD)?;
    does(&adam, "[ ! -e /tmp/own ] && echo adam | tee /tmp/own >/mnt/own; sync")?;
    for (guest, name, boots) in [(seth, "seth", 0), (adam, "adam", 1), (enosh, "enosh", 0)] {
        does(&guest, &format!("[ $(cat /tmp/own) = {name} ] && [ $(cat /mnt/own) = {name} ]"))?;
        assert_is_in_order(&guest, 2, 256 * MIB)?;
        does(&guest, "head -c 64 /dev/hwrng | sha256sum")?;
        let time = guest.ask("date +%s", LIMIT)?;
        let lag = lag(&here(lab, "date +%s")?, &time)?;
        ensure!((-2..=10).contains(&lag), "{name} is {lag} seconds behind");
        does(&guest, "echo 3 >/proc/sys/vm/drop_caches")?;
        ensure!(does(&guest, "sha256sum /mnt/kept")? == sum, "{name} has another file");
        does(&guest, "umount /mnt")?;
        assert_is_clean(&power_off(&guest)?, boots)?;
        here(lab, &format!("e2fsck -fn /tmp/{name}.img"))?;
    }
    Ok(())
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
