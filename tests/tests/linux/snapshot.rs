//! Linux that goes on from a snapshot's file, and files for which the disk has no room.

use super::{BOOTED, LIMIT, MIB, assert_is_clean, does, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest, LabProcess, Toolset};

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

/// What the built-in guest keeps, and says.
const KEPT: &str = "kept from the beginning";
const SAVE_SMALL: &str = "guestctl snapshot save full /tmp/small --socket /tmp/full.sock 2>&1";

/// What there is on the small disk: names, and KiB in use.
fn on_disk(lab: &Lab) -> anyhow::Result<String> {
    here(lab, "ls -A /tmp/small; df -k /tmp/small | awk 'END { print $3 }'")
}

/// Saves the guest to the small disk, which fails for want of room; the guest then answers.
fn is_not_saved(lab: &Lab, guest: &LabProcess<'_>, times: usize) -> anyhow::Result<()> {
    let done = lab.run(SAVE_SMALL, LIMIT)?;
    ensure!(done.status == 1, "{done:?}");
    for words in ["/tmp/small/full.snapshot: ", "it cannot be written: No space left on device"] {
        ensure!(done.output.contains(words), "no {words:?} in {:?}", done.output);
    }
    guest.send("keep")?;
    guest.saw(KEPT, times, LIMIT)?;
    Ok(())
}

/// The disk is full at once, in the middle, with the last pages, or has no room for one more file: then nothing is on it. Where there was
/// a file before, it stays as it was. Once there is room, the guest is saved there.
pub fn a_full_disk_leaves_no_half_of_a_snapshot(lab: &Lab) -> anyhow::Result<()> {
    let log = serve(lab, "/tmp/full")?;
    let run = "exec guestctl run --name full --memory 128M --socket /tmp/full.sock";
    let guest = lab.spawn("full-guest", run).with_context(|| log)?;
    guest.send("keep from the beginning")?;
    guest.saw(KEPT, 1, LIMIT)?;
    here(lab, "guestctl snapshot save full /tmp --socket /tmp/full.sock && mkdir /tmp/small")?;
    let kib: u64 = here(lab, "du -k /tmp/full.snapshot | cut -f1")?.trim().parse()?;
    ensure!(kib > 64, "{kib} KiB are too few to be cut short");

    let mut answers = 1;
    let almost = format!("size={}k", kib - 8);
    for limit in ["size=4k", &format!("size={}k", kib / 2), &almost, "nr_inodes=1"] {
        here(lab, &format!("mount -t tmpfs -o {limit} small /tmp/small"))?;
        answers += 1;
        is_not_saved(lab, &guest, answers).context(limit.to_owned())?;
        let left = on_disk(lab)?;
        ensure!(left == "0\n", "{limit}: there is {left:?}");
        here(lab, "umount /tmp/small")?;
    }

    here(lab, &format!("mount -t tmpfs -o size={}k small /tmp/small && {SAVE_SMALL}", kib * 3 / 2))?;
    here(lab, "cp /tmp/small/full.snapshot /tmp/old.snapshot")?;
    let before = on_disk(lab)?;
    is_not_saved(lab, &guest, answers + 1)?;
    ensure!(on_disk(lab)? == before, "there was {before:?}");
    here(lab, "cmp /tmp/small/full.snapshot /tmp/old.snapshot")?;

    here(lab, &format!("mount -o remount,size={}k /tmp/small && {SAVE_SMALL}", kib * 3))?;
    let (same, whole) =
        ("cmp -s full.snapshot /tmp/old.snapshot", "guestctl snapshot show --verify full.snapshot");
    here(lab, &format!("cd /tmp/small && ! {same} && {whole}"))?;
    guest.send("poweroff")?;
    ensure!(guest.end(LIMIT)?.status == 0, "it does not end cleanly");
    here(lab, "umount /tmp/small").map(drop)
}
