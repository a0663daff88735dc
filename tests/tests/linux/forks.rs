//! Linux through a chain of snapshots, and at work in many guests at once.

use super::snapshot::{fork, here, lag};
use super::vsock::{connect, serve_in_guest};
use super::{BOOTED, LIMIT, MIB, assert_is_clean, assert_is_in_order, does, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest, LabProcess, Toolset};
use guest_tests::requirements::scaled;
use std::collections::BTreeSet;

/// How many snapshots there are in a chain, at the least 3.
const CHAIN: u32 = 50;
/// How many guests work at once.
const WORKERS: usize = 5;

/// One guest goes on through a chain of snapshots, each of the one before, which then ends. What each has written is there at the end,
/// in memory and on a disk with a clean file system.
pub fn linux_goes_on_through_a_chain_of_snapshots(lab: &Lab) -> anyhow::Result<()> {
    let service = "--socket /tmp/chain-service.sock";
    let log = serve(lab, "/tmp/chain-service")?;
    lab.make_disk("link-0.img", 8 * MIB)?;
    let arguments = format!("{service} --memory 256M --catch-up-time --disk path=/tmp/link-0.img");
    let first = LabGuest::start_with(&[Toolset::Block], lab, "link-0", "panic=-1", &arguments)
        .with_context(|| log)?;
    first.saw(BOOTED, 1, LIMIT)?;
    does(&first, "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")?;
    let links = scaled(CHAIN).max(3);
    let mut youngest = first;
    for link in 1..=links {
        let parent = format!("link-{}", link - 1);
        let next = fork(lab, service, &parent, &format!("link-{link}"))?;
        // Its parent ends with its client.
        youngest = next;
        here(lab, &format!("rm /tmp/{parent}.img"))?;
        does(&youngest, &format!("echo {link} | tee -a /tmp/links >>/mnt/links; sync"))?;
    }
    does(
        &youngest,
        &format!(
            "echo 3 >/proc/sys/vm/drop_caches; seq {links} | cmp - /mnt/links && cmp /tmp/links /mnt/links"
        ),
    )?;
    assert_is_in_order(&youngest, 1, 256 * MIB)?;
    does(&youngest, "umount /mnt")?;
    assert_is_clean(&power_off(&youngest)?, 0)?;
    here(lab, &format!("e2fsck -fn /tmp/link-{links}.img")).map(drop)
}

/// What a guest answers to commands that are sent to its shell at port 2000.
fn work(guest: &LabProcess<'_>, commands: &str) -> anyhow::Result<Vec<String>> {
    let answer = guest.here(&connect(2000, &format!("cat <<'WORK'\n{commands}\nWORK\n"), "cat"))?;
    let (ok, answers) = answer.split_once('\n').with_context(|| format!("no answer: {answer:?}"))?;
    ensure!(ok.starts_with("OK "), "{answer:?}");
    Ok(answers.lines().map(str::to_owned).collect())
}

/// A booted Linux is forked five times. Each is given work of its own over vsock and does it; each has the right time, and random bytes
/// that nobody else has. (This kernel is built without a driver for the generation ID: they differ by the interrupts of each.)
pub fn five_forks_of_linux_work_for_themselves(lab: &Lab) -> anyhow::Result<()> {
    let service = "--socket /tmp/works-service.sock";
    let log = serve(lab, "/tmp/works-service")?;
    let arguments = format!("{service} --memory 256M --catch-up-time --vsock path=vsock.sock");
    let parent =
        LabGuest::start_with(&[Toolset::Vsock], lab, "works", "panic=-1", &arguments).with_context(|| log)?;
    parent.saw(BOOTED, 1, LIMIT)?;
    serve_in_guest(&parent, 2000, "EXEC:sh")?;
    let mut workers = Vec::new();
    for number in 1..=WORKERS {
        let fork = format!("guestctl fork works {service} --name worker-{number} --vsock path=vsock.sock");
        let worker = lab.spawn(&format!("worker-{number}"), &format!("exec {fork}"))?;
        // One after the other: the lab has one processor.
        worker.until("grep -q worker out", "fork", LIMIT)?;
        workers.push(worker);
    }
    let mut random = BTreeSet::new();
    for (number, worker) in (1..).zip(&workers) {
        let before = here(lab, "date +%s")?;
        let commands =
            format!("echo $(({number} * {number}))\ndate +%s\nhead -c 16 /dev/urandom | sha256sum");
        let answers = work(worker, &commands)?;
        let [square, time, bytes] = &answers[..] else { anyhow::bail!("{answers:?}") };
        ensure!(*square == (number * number).to_string(), "{answers:?}");
        let late = lag(before.trim(), time)?;
        ensure!((-10..=2).contains(&late), "worker {number} is {late} seconds behind");
        ensure!(random.insert(bytes.clone()), "another has these random bytes, too");
    }
    for worker in &workers {
        worker.here(&connect(2000, "echo poweroff -f", "cat"))?;
        let end = worker.end(LIMIT)?;
        ensure!(end.status == 0, "{end:?}");
    }
    ensure!(work(&parent, "echo parent")? == ["parent"], "the parent does no work");
    assert_is_in_order(&parent, 1, 256 * MIB)?;
    assert_is_clean(&power_off(&parent)?, 1)
}
