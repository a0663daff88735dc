//! The block device with Linux's driver.

use super::{BOOTED, LIMIT, MIB, assert_is_clean, does, power_off};
use anyhow::ensure;
use guest_tests::lab::{Lab, LabGuest, Toolset};

fn boot<'lab>(lab: &'lab Lab, name: &str, disks: &str) -> anyhow::Result<LabGuest<'lab>> {
    let arguments = format!("--memory 512M {disks}");
    let guest = LabGuest::start_with(&[Toolset::Block], lab, name, "panic=-1", &arguments)?;
    guest.saw(BOOTED, 1, LIMIT)?;
    Ok(guest)
}

/// Four jobs write at once, read back what they have written, and compare.
fn fio(kind: &str, size: &str) -> String {
    format!(
        "fio --name={kind} --directory=/mnt --rw={kind} --bs=4k --size={size} --numjobs=4 --ioengine=psync --direct=1 \
         --verify=crc32c --do_verify=1 --verify_fatal=1 --group_reporting --minimal >/tmp/fio && rm /mnt/{kind}.*"
    )
}

/// A file system is made, filled and checked; what was flushed is there after the VMM was killed; a disk that is only read, and one
/// that the host cuts off, give errors and nothing worse.
pub fn linux_keeps_files_on_a_disk(lab: &Lab) -> anyhow::Result<()> {
    let (image, other) = (lab.make_disk("disk.img", 64 * MIB)?, lab.make_disk("other.img", MIB)?);
    let guest = boot(lab, "disk", &format!("--disk path={image},id=lab-disk"))?;
    let shown = guest.ask("cat /sys/block/vda/serial; echo; cat /sys/block/vda/size", LIMIT)?;
    ensure!(shown == "lab-disk\n131072\n", "{shown:?}");
    does(&guest, "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 -o discard /dev/vda /mnt")?;
    does(&guest, &fio("randwrite", "2M"))?;
    does(&guest, &fio("write", "2M"))?;
    let sum = does(
        &guest,
        "dd if=/dev/urandom of=/mnt/kept bs=64k count=16 conv=fsync 2>/dev/null; sha256sum /mnt/kept",
    )?;
    guest.kill_vmm(LIMIT)?;
    guest.end(LIMIT)?;

    let guest = boot(lab, "disk-again", &format!("--disk path={image} --disk path={other},readonly=on"))?;
    // 1: the journal was played back.
    let checked = guest.ask("e2fsck -p /dev/vda >/dev/null; echo $?", LIMIT)?;
    ensure!(["0\n", "1\n"].contains(&&checked[..]), "e2fsck: {checked:?}");
    does(&guest, "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")?;
    ensure!(does(&guest, "sha256sum /mnt/kept")? == sum, "what was flushed is not there");
    does(&guest, "umount /mnt && e2fsck -fn /dev/vda >/dev/null")?;
    does(
        &guest,
        "[ $(cat /sys/block/vdb/ro) = 1 ] && ! dd if=/dev/zero of=/dev/vdb bs=4k count=1 && cat /dev/vdb >/dev/null",
    )?;
    // The image goes away below the guest.
    guest.here(&format!("truncate -s {MIB} {image}"))?;
    does(
        &guest,
        "! dd if=/dev/vda of=/dev/null bs=4k skip=8192 count=1 iflag=direct && dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct",
    )?;
    assert_is_clean(&power_off(&guest)?, 1)
}

/// The client keeps the disk's data, on a channel over which no descriptors go: its block service does all that an image does.
pub fn linux_keeps_files_with_its_client(lab: &Lab) -> anyhow::Result<()> {
    let image = lab.make_disk("served.img", 64 * MIB)?;
    let guest = boot(lab, "served", &format!("--proxied --disk path={image},id=served"))?;
    does(&guest, "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 -o discard /dev/vda /mnt")?;
    does(&guest, &fio("randwrite", "256k"))?;
    does(&guest, &fio("write", "256k"))?;
    let sum = does(
        &guest,
        "dd if=/dev/urandom of=/mnt/kept bs=1M count=2 conv=fsync 2>/dev/null; sha256sum /mnt/kept",
    )?;
    does(&guest, "echo 3 >/proc/sys/vm/drop_caches")?;
    ensure!(does(&guest, "sha256sum /mnt/kept")? == sum, "what was read is not what was written");
    does(&guest, "umount /mnt")?;
    assert_is_clean(&power_off(&guest)?, 1)?;
    let checked = lab.run(&format!("e2fsck -fn {image}"), LIMIT)?;
    ensure!(checked.status == 0, "e2fsck: {}", checked.output);
    Ok(())
}

/// What was flushed into a qcow2 image is there after the VMM was killed. Then two disks share that image: one is only read, the
/// other one is written, as is one on a raw image, and neither image changes.
pub fn linux_keeps_files_in_a_qcow2_image(lab: &Lab) -> anyhow::Result<()> {
    let (image, raw) = (lab.make_qcow2("disk.qcow2", 64 * MIB)?, lab.make_disk("volatile.img", 8 * MIB)?);
    let guest = boot(lab, "qcow2", &format!("--disk path={image},format=qcow2"))?;
    ensure!(guest.ask("cat /sys/block/vda/size", LIMIT)? == "131072\n", "the size is the disk's own");
    does(&guest, "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 -o discard /dev/vda /mnt")?;
    does(&guest, &fio("randwrite", "2M"))?;
    does(&guest, "dd if=/dev/urandom of=/mnt/kept bs=64k count=16 2>/dev/null")?;
    // Flushes all there is.
    does(&guest, "mount -o remount,ro /mnt")?;
    let sum = does(&guest, "sha256sum /mnt/kept")?;
    guest.kill_vmm(LIMIT)?;
    guest.end(LIMIT)?;

    let hash = format!("sha256sum {image} {raw}");
    let before = lab.run(&hash, LIMIT)?;
    let disks = format!(
        "--disk path={image},format=qcow2,readonly=on --disk path={image},format=qcow2,volatile=on \
         --disk path={raw},volatile=on"
    );
    let guest = boot(lab, "qcow2-again", &disks)?;
    let modes = guest.ask("cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdc/ro", LIMIT)?;
    ensure!(modes == "1\n0\n0\n", "{modes:?}");
    does(
        &guest,
        "mkdir -p /mnt /volatile && mount -t ext4 -o ro /dev/vda /mnt && e2fsck -fn /dev/vda >/dev/null",
    )?;
    ensure!(does(&guest, "sha256sum /mnt/kept")? == sum, "what was flushed is not there");
    does(&guest, "! dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync")?;
    does(
        &guest,
        "mount -t ext4 /dev/vdb /volatile && cp /volatile/kept /volatile/copy && rm /volatile/kept",
    )?;
    does(&guest, "umount /volatile && e2fsck -fn /dev/vdb >/dev/null && mount -t ext4 /dev/vdb /volatile")?;
    does(&guest, "cmp /volatile/copy /mnt/kept && [ ! -e /volatile/kept ]")?;
    does(
        &guest,
        "dd if=/mnt/kept of=/dev/vdc bs=64k oflag=direct && dd if=/dev/vdc bs=64k count=16 iflag=direct | cmp - /mnt/kept",
    )?;
    assert_is_clean(&power_off(&guest)?, 1)?;
    ensure!(lab.run(&hash, LIMIT)? == before, "an image has changed");
    Ok(())
}
