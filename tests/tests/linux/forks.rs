//! Linux under load, through a chain of snapshots, and at work in many guests at once.

use super::snapshot::{here, lag};
use super::vsock::{connect, serve as serve_vsock, serve_in_guest};
use super::{BOOTED, LIMIT, MIB, assert_is_clean, assert_is_in_order, does, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest, LabProcess, TapQueues, Toolset};
use guest_tests::requirements::scaled;
use std::collections::BTreeSet;

/// How many snapshots there are in a chain, at the least 3. Scaled twice: each takes as long as a boot.
const CHAIN: u32 = 50;
/// How many guests work at once.
const WORKERS: usize = 5;

/// The addresses of the host and the guest on the network of the parent, then of the fork.
const PARENTS: [&str; 2] = ["198.18.1.1", "198.18.1.2"];
const FORKS: [&str; 2] = ["198.18.2.1", "198.18.2.2"];
const PREFIX: &str = "/24";

/// What a guest does again and again until there is a file /tmp/stop: writes to its disk and reads back, sends to the host, and has
/// the host compute. Each counts its rounds in a file of its name.
fn load(host: &str) -> [(&'static str, String); 3] {
    let fio = "fio --name=load --directory=/mnt --rw=randwrite --bs=4k --size=256k --ioengine=psync --direct=1 --verify=crc32c \
               --do_verify=1 --verify_fatal=1 --minimal";
    let vsock =
        "[ \"$(socat -t 100 - VSOCK-CONNECT:2:1000,retry=9 </tmp/random)\" = \"$(sha256sum </tmp/random)\" ]";
    [
        ("fio", fio.to_owned()),
        ("iperf", format!("iperf3 --client {host} -n 64K")),
        ("vsock", vsock.to_owned()),
    ]
}

fn begin_load(guest: &LabGuest<'_>, host: &str) -> anyhow::Result<()> {
    does(guest, "head -c 16384 /dev/urandom >/tmp/random")?;
    for (name, command) in load(host) {
        let round = format!("{command} >/tmp/out-{name} 2>&1 || {{ touch /tmp/bad-{name}; break; }}");
        let rounds = format!(
            "while [ ! -e /tmp/stop ]; do {round}; echo >>/tmp/{name}; sleep 1; done; touch /tmp/end-{name}"
        );
        // With an input of its own: the guest's shell reads the terminal.
        does(guest, &format!("{{ {rounds}; }} </dev/null >/dev/null 2>&1 &"))?;
    }
    one_more_round(guest)
}

/// Waits until each kind of load has made one more round since, and none has failed.
fn one_more_round(guest: &LabGuest<'_>) -> anyhow::Result<()> {
    for name in ["fio", "iperf", "vsock"] {
        let count = format!("$(cat /tmp/{name} 2>/dev/null | wc -l)");
        let wait = format!(
            "n={count}; until [ {count} -gt $n ] || [ -e /tmp/bad-{name} ]; do sleep 0.2; done; [ ! -e /tmp/bad-{name} ]"
        );
        does(guest, &wait).with_context(|| format!("{name} does not go on"))?;
    }
    Ok(())
}

/// A fork of this guest with these grants, of which one is a copy of its disk: it is paused meanwhile, so that both are of the same
/// moment.
fn fork<'lab>(
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

/// A guest with two VPs whose disk, network and sockets are all in use is forked twice: once while it runs, then paused, so that its
/// disk can be copied. Its load goes on as if nothing had been. The fork verifies what it was writing on a disk of its own, has its own
/// network, sockets and random bytes, and a clean file system. Neither sees what the other writes, in memory or on its disk.
pub fn linux_is_forked_under_load(lab: &Lab) -> anyhow::Result<()> {
    let service = "--socket /tmp/busy-service.sock";
    let log = serve(lab, "/tmp/busy-service")?;
    lab.make_disk("busy.img", 24 * MIB)?;
    lab.make_disk("empty.img", 24 * MIB)?;
    for (tap, [host, _]) in [("tap-busy", PARENTS), ("tap-spare", FORKS)] {
        lab.make_tap(tap, TapQueues::One, "root", &format!("{host}{PREFIX}"))?;
    }
    let arguments = format!(
        "{service} --cpus 2 --memory 384M --catch-up-time --rng --disk path=/tmp/busy.img --net tap=tap-busy --vsock path=vsock.sock"
    );
    let tools = [Toolset::Block, Toolset::Net, Toolset::Vsock];
    let busy = LabGuest::start_with(&tools, lab, "busy", "panic=-1", &arguments).with_context(|| log)?;
    busy.saw(BOOTED, 1, LIMIT)?;
    does(&busy, "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")?;
    does(&busy, &format!("ip address add {}{PREFIX} dev eth0 && ip link set eth0 up", PARENTS[1]))?;
    let _sums = serve_vsock(lab, &busy, 1000, "EXEC:sha256sum")?;
    let _iperf = lab.spawn("busy-iperf", "exec iperf3 --server")?;
    begin_load(&busy, PARENTS[0])?;

    // A snapshot of a running guest. Its fork has a disk of zeros, and is not to live.
    let lost = format!(
        "guestctl fork busy {service} --name lost --disk path=/tmp/empty.img,volatile=on --net tap=tap-spare"
    );
    let lost = lab.spawn("lost", &format!("exec {lost}"))?;
    lost.until("grep -q lost-1 out", "fork of a guest that runs", LIMIT)?;
    lost.kill()?;
    one_more_round(&busy)?;
    lost.until(&format!("! guestctl {service} ps | grep -q lost-1"), "end of that fork", LIMIT)?;

    let grants = "--disk path=/tmp/spare.img,volatile=on --net tap=tap-spare --vsock path=vsock.sock";
    let spare = fork(lab, service, "busy", "spare", grants)?;
    one_more_round(&busy)?;
    does(
        &busy,
        "touch /tmp/stop; until [ -e /tmp/end-fio -a -e /tmp/end-iperf -a -e /tmp/end-vsock ]; do sleep 0.2; done",
    )?;
    does(&busy, "! ls /tmp/bad-*")?;
    does(&busy, "echo busy | tee /tmp/own >/mnt/own; sync")?;

    // What it was writing when it was forked is there. Its connections are not.
    does(&spare, "touch /tmp/stop; until [ -e /tmp/end-fio ]; do sleep 0.2; done; [ ! -e /tmp/bad-fio ]")?;
    does(
        &spare,
        &format!("ip address add {}{PREFIX} dev eth0 && ping -q -c 3 -W 20 {}", FORKS[1], FORKS[0]),
    )?;
    let _sums = serve_vsock(lab, &spare, 1000, "EXEC:sha256sum")?;
    let [_, _, (_, vsock)] = load(FORKS[0]);
    does(&spare, &vsock)?;
    does(&spare, "[ ! -e /tmp/own ] && [ ! -e /mnt/own ] && echo spare | tee /tmp/own >/mnt/own; sync")?;
    for (guest, name, boots) in [(busy, "busy", 1), (spare, "spare", 0)] {
        does(&guest, &format!("[ $(cat /tmp/own) = {name} ] && [ $(cat /mnt/own) = {name} ]"))?;
        does(&guest, "head -c 64 /dev/hwrng | sha256sum")?;
        does(&guest, "killall iperf3; umount /mnt && e2fsck -fn /dev/vda")?;
        assert_is_in_order(&guest, 2, 384 * MIB)?;
        assert_is_clean(&power_off(&guest)?, boots)?;
    }
    here(lab, "e2fsck -fn /tmp/busy.img").map(drop)
}

/// One guest goes on through a chain of snapshots, each of the one before, which then ends. What each has written is there at the end,
/// in memory and on a disk with a clean file system.
pub fn linux_goes_on_through_a_chain_of_snapshots(lab: &Lab) -> anyhow::Result<()> {
    let service = "--socket /tmp/chain-service.sock";
    let log = serve(lab, "/tmp/chain-service")?;
    lab.make_disk("link-0.img", 8 * MIB)?;
    let arguments = format!("{service} --cpus 2 --memory 256M --catch-up-time --disk path=/tmp/link-0.img");
    let first = LabGuest::start_with(&[Toolset::Block], lab, "link-0", "panic=-1", &arguments)
        .with_context(|| log)?;
    first.saw(BOOTED, 1, LIMIT)?;
    does(&first, "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")?;
    let links = scaled(scaled(CHAIN)).max(3);
    let mut youngest = first;
    for link in 1..=links {
        let parent = format!("link-{}", link - 1);
        // It goes on nowhere else: its disk is copied while it is paused, and it ends with its client.
        here(
            lab,
            &format!("guestctl {service} pause {parent} && cp /tmp/{parent}.img /tmp/link-{link}.img"),
        )?;
        let grants = format!("{service} {parent} --disk path=/tmp/link-{link}.img");
        let next = LabGuest::fork(lab, &format!("link-{link}"), &grants)?;
        let did = does(&next, &format!("echo {link} | tee -a /tmp/links >>/mnt/links; sync"));
        did.with_context(|| format!("link {link}"))?;
        youngest = next;
        here(lab, &format!("rm /tmp/{parent}.img"))?;
    }
    does(
        &youngest,
        &format!(
            "echo 3 >/proc/sys/vm/drop_caches; seq {links} | cmp - /mnt/links && cmp /tmp/links /mnt/links"
        ),
    )?;
    assert_is_in_order(&youngest, 2, 256 * MIB)?;
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
/// that nobody else has.
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
