//! The board's small devices as Linux finds them, with its own drivers: the ACPI power button behind the Generic Event Device, pvpanic;
//! and the bytes of the VM generation ID in its memory.

use super::{BOOTED, LIMIT, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest};

/// Inserts modules of the guest's initramfs with all that they need.
fn insert(guest: &LabGuest<'_>, modules: &str) -> anyhow::Result<()> {
    let insert = format!(
        "cd /modules; for m in $(cat {modules}); do n=${{m##*/}}; [ -d /sys/module/${{n%.ko}} ] || insmod $m || echo FAILED; done"
    );
    let said = guest.ask(&insert, LIMIT)?;
    ensure!(said.is_empty(), "{said}");
    Ok(())
}

/// Starts a guestd in the lab and a guest of it. The socket's path is the first of what comes back.
fn boot<'l>(lab: &'l Lab, name: &str) -> anyhow::Result<(String, LabGuest<'l>)> {
    let base = format!("/tmp/guestd-{name}");
    let log = serve(lab, &base)?;
    let socket = format!("{base}.sock");
    let guest = LabGuest::start(lab, name, "panic=-1", &format!("--memory 256M --socket {socket}"))?;
    guest.saw(BOOTED, 1, LIMIT).with_context(|| log)?;
    Ok((socket, guest))
}

/// What a guest does when its button is pressed, and when it listens to it.
const LISTEN: &str = "mkdir -p /etc/acpi/PWRF; printf '#!/bin/sh\\npoweroff -f\\n' >/etc/acpi/PWRF/00000080; \
                      chmod +x /etc/acpi/PWRF/00000080; acpid -f -l /tmp/acpid.log -p /tmp/acpid.pid & \
                      until ls -l /proc/$!/fd | grep -q /dev/input/event; do sleep 0.1; done";

pub fn linux_shuts_down_by_its_power_button(lab: &Lab) -> anyhow::Result<()> {
    let (socket, guest) = boot(lab, "button")?;
    assert_has_its_generation_id(&guest, &socket)?;
    insert(&guest, "button evdev")?;
    let found = guest.ask("grep -h . /sys/bus/acpi/devices/*/hid; grep ACPI: /proc/interrupts", LIMIT)?;
    for words in ["ACPI0013", "PNP0C0C", "QEMU0001", "VMGENCTR", "9-edge      ACPI:Ged"] {
        ensure!(found.contains(words), "no {words} in\n{found}");
    }
    guest.ask(LISTEN, LIMIT)?;
    let complaints =
        guest.ask("dmesg | grep -E 'ACPI (BIOS )?(Error|Warning)|Firmware Bug|nobody cared'", LIMIT)?;
    ensure!(complaints.is_empty(), "{complaints}");
    let stopped = guest
        .here(&format!("guestctl stop button --graceful --timeout 150s --socket {socket} 2>&1; echo $?"))?;
    ensure!(stopped == "button has ended: clean: the guest powered itself off\n0\n", "{stopped}");
    let end = guest.end(LIMIT)?;
    ensure!(end.status == 0, "{end:?}");
    Ok(())
}

/// The bytes in the guest's memory are those that its operator is shown.
fn assert_has_its_generation_id(guest: &LabGuest<'_>, socket: &str) -> anyhow::Result<()> {
    let words = guest.ask("devmem 0xfe000 64; devmem 0xfe008 64", LIMIT)?;
    let read: Option<String> = words.lines().map(|word| bytes_of(word.strip_prefix("0x")?)).collect();
    let shown =
        guest.here(&format!("guestctl inspect button units/generation-id/unit/id --socket {socket} 2>&1"))?;
    ensure!(read.as_deref() == Some(shown.trim()) && shown.trim().len() == 32, "{words:?} is not {shown:?}");
    Ok(())
}

/// A number of 64 bits as its bytes lie in memory, in hexadecimal.
fn bytes_of(word: &str) -> Option<String> {
    let word = u64::from_str_radix(word, 16).ok()?;
    Some(format!("{:016x}", word.swap_bytes()))
}

pub fn a_linux_that_does_not_listen_is_forced(lab: &Lab) -> anyhow::Result<()> {
    let (socket, guest) = boot(lab, "deaf")?;
    let stopped =
        guest.here(&format!("guestctl stop deaf --graceful --timeout 2s --socket {socket} 2>&1; echo $?"))?;
    ensure!(stopped == "deaf has not ended within 2s: stopped by force\n0\n", "{stopped}");
    let end = guest.end(LIMIT)?;
    ensure!(end.status == 1 && end.err.contains("controllerForcedHalt"), "{end:?}");
    Ok(())
}

pub fn a_panic_of_linux_is_told(lab: &Lab) -> anyhow::Result<()> {
    let guest = LabGuest::start(lab, "pvpanic", "panic=-1 reboot=a", "--memory 256M --on-reset stop --json")?;
    guest.saw(BOOTED, 1, LIMIT)?;
    insert(&guest, "pvpanic_mmio")?;
    guest.send("echo c >/proc/sysrq-trigger")?;
    let end = guest.end(LIMIT)?;
    let report: serde_json::Value = serde_json::from_str(&end.err).with_context(|| end.err.clone())?;
    ensure!(
        report["outcome"] == "clean" && report["panic"] == "panicked" && report["panics"] == 1,
        "{report}"
    );
    ensure!(end.status == 1, "{end:?}");
    Ok(())
}
