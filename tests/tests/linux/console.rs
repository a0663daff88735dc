//! The console and a further port with Linux's driver. What is asked and answered goes through them.

use super::{BOOTED, LIMIT, assert_is_clean, assert_takes_long_input, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest};

const UP: &str = "PORT-UP";

/// A shell of the guest's on the console, which has a size that follows. Quotes and dollars are the lab's shell's.
pub fn a_shell_on_hvc0_knows_its_size(lab: &Lab) -> anyhow::Result<()> {
    let base = "/tmp/guestd-console";
    let log = serve(lab, base)?;
    let shell = format!(
        "GUEST_RUN=\\\"until [ -c /dev/hvc0 ]; do sleep 0.1; done; exec </dev/hvc0 >/dev/hvc0 2>&1; stty -echo; \
         echo {UP}; sh /dev/hvc0\\\""
    );
    let arguments = format!("--memory 256M --console --attach console --socket {base}.sock");
    let guest = LabGuest::start(lab, "hvc", &format!("panic=-1 {shell}"), &arguments).with_context(|| log)?;
    guest.saw(UP, 1, LIMIT)?;
    ensure!(!guest.here("cat out")?.contains(BOOTED), "the serial line is somewhere else");
    for (columns, rows) in [(132, 43), (80, 25)] {
        resize(&guest, "hvc", base, columns, rows)?;
    }
    assert_takes_long_input(&guest)?;
    assert_is_clean(&power_off(&guest)?, 0)
}

/// Has the terminal another size, and waits until the guest knows it.
fn resize(guest: &LabGuest<'_>, name: &str, base: &str, columns: u16, rows: u16) -> anyhow::Result<()> {
    let set = format!(
        "guestctl --socket {base}.sock update {name} units/console/unit/device/size {columns}x{rows}"
    );
    ensure!(guest.here(&set)?.trim() == format!("{columns}x{rows}"), "the size was not taken");
    // The driver takes its time to look. Of no size stty makes an error.
    let look = format!(
        "until [ \"$(stty size </dev/hvc0 2>/dev/null)\" = '{rows} {columns}' ]; do sleep 0.1; done; echo seen"
    );
    ensure!(guest.ask(&look, LIMIT)?.trim() == "seen");
    Ok(())
}

/// A shell of the guest's that reads and writes a port, found by its name. Meanwhile the terminal, whose driver is told of its size
/// in another way where there are further ports, is resized, and a program on it is told by a signal.
pub fn a_named_port_carries_bytes_both_ways(lab: &Lab) -> anyhow::Result<()> {
    let base = "/tmp/guestd-agent";
    let log = serve(lab, base)?;
    let find = "until grep -qsx agent /sys/class/virtio-ports/*/name; do sleep 0.1; done; \
                name=\\$(grep -lx agent /sys/class/virtio-ports/*/name); port=\\${name%/name}; port=/dev/\\${port##*/}";
    let shell = format!("GUEST_RUN=\\\"{find}; exec <>\\$port >&0 2>&0; echo {UP} \\$port; exec sh\\\"");
    let arguments =
        format!("--memory 256M --console ports=log+agent --attach port=agent --socket {base}.sock");
    let guest =
        LabGuest::start(lab, "agent", &format!("panic=-1 {shell}"), &arguments).with_context(|| log)?;
    let out = guest.saw(UP, 1, LIMIT)?;
    ensure!(out.contains(&format!("{UP} /dev/vport0p2")), "the second of the further ports: {out}");
    let names = guest.ask("cat /sys/class/virtio-ports/*/name", LIMIT)?;
    ensure!(names.contains("log\nagent\n"), "the ports are {names:?}");
    let program = "trap 'echo told >>/tmp/told' WINCH; touch /tmp/told; while :; do sleep 0.1; done";
    guest.ask(
        &format!("echo \"{program}\" >/tmp/program; (setsid -c sh /tmp/program <>/dev/hvc0 >&0 2>&0 &)"),
        LIMIT,
    )?;
    guest.ask("until [ -e /tmp/told ]; do sleep 0.1; done", LIMIT)?;
    for (times, (columns, rows)) in (1..).zip([(132, 43), (80, 25)]) {
        resize(&guest, "agent", base, columns, rows)?;
        let look = format!("until [ $(grep -c told /tmp/told) = {times} ]; do sleep 0.1; done; echo told");
        ensure!(guest.ask(&look, LIMIT)?.trim() == "told");
    }
    // Fewer than are kept of a port's output, should its reader be slow.
    let answer = guest.ask("head -c 40000 /dev/zero | tr '\\0' x; echo", LIMIT)?;
    ensure!(answer.trim_end() == "x".repeat(40_000), "{} other bytes came", answer.len());
    assert_is_clean(&power_off(&guest)?, 0)
}
