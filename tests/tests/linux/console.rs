//! The console and a further port with Linux's driver. What is asked and answered goes through them.

use super::{BOOTED, LIMIT, assert_is_clean, assert_takes_long_input, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest};

const UP: &str = "PORT-UP";

/// A shell of the guest's on the console, whose size follows and of which programs are told, beside a further port that is open.
/// Quotes and dollars are the lab's shell's.
pub fn a_shell_on_hvc0_knows_its_size(lab: &Lab) -> anyhow::Result<()> {
    let base = "/tmp/guestd-console";
    let log = serve(lab, base)?;
    let shell = format!(
        "GUEST_RUN=\\\"until [ -c /dev/hvc0 ]; do sleep 0.1; done; exec </dev/hvc0 >/dev/hvc0 2>&1; stty -echo; \
         echo {UP}; setsid -c sh /dev/hvc0\\\""
    );
    let arguments = format!("--memory 256M --console ports=log --attach console --socket {base}.sock");
    let guest = LabGuest::start(lab, "hvc", &format!("panic=-1 {shell}"), &arguments).with_context(|| log)?;
    guest.saw(UP, 1, LIMIT)?;
    ensure!(!guest.here("cat out")?.contains(BOOTED), "the serial line is somewhere else");
    let ask = |question: &str| guest.ask(question, LIMIT);
    let opened = ask("trap 'told=$((told + 1))' WINCH; exec 9<>/dev/vport0p1 && echo one >&9; echo $?")?;
    ensure!(opened.trim() == "0", "the further port: {opened:?}");
    for (times, (columns, rows)) in (1..).zip([(132, 43), (80, 25)]) {
        let set = format!(
            "guestctl --socket {base}.sock update hvc units/console/unit/device/size {columns}x{rows}"
        );
        ensure!(guest.here(&set)?.trim() == format!("{columns}x{rows}"), "the size was not taken");
        // The driver takes its time to look, and a shell to hear of a signal.
        let look = format!(
            "until [ \"$(stty size </dev/hvc0)\" = '{rows} {columns}' ] && [ \"$told\" = {times} ]; do sleep 0.1; done; echo seen"
        );
        ensure!(ask(&look)?.trim() == "seen");
    }
    let written = ask("echo two >&9; echo $?")?;
    ensure!(written.trim() == "0", "the further port after that: {written:?}");
    let port = guest.here(&format!("guestctl --socket {base}.sock inspect hvc units/console/unit/device"))?;
    ensure!(port.contains("log"), "{port}");
    assert_takes_long_input(&guest)?;
    assert_is_clean(&power_off(&guest)?, 0)
}

/// A shell of the guest's that reads and writes a port, found by its name.
pub fn a_named_port_carries_bytes_both_ways(lab: &Lab) -> anyhow::Result<()> {
    let find = "until grep -qsx agent /sys/class/virtio-ports/*/name; do sleep 0.1; done; \
                name=\\$(grep -lx agent /sys/class/virtio-ports/*/name); port=\\${name%/name}; port=/dev/\\${port##*/}";
    let shell = format!("GUEST_RUN=\\\"{find}; exec <>\\$port >&0 2>&0; echo {UP} \\$port; exec sh\\\"");
    let arguments = "--memory 256M --console ports=log+agent --attach port=agent";
    let guest = LabGuest::start(lab, "agent", &format!("panic=-1 {shell}"), arguments)?;
    let out = guest.saw(UP, 1, LIMIT)?;
    ensure!(out.contains(&format!("{UP} /dev/vport0p2")), "the second of the further ports: {out}");
    let names = guest.ask("cat /sys/class/virtio-ports/*/name", LIMIT)?;
    ensure!(names.contains("log\nagent\n"), "the ports are {names:?}");
    // Fewer than are kept of a port's output, should its reader be slow.
    let answer = guest.ask("head -c 40000 /dev/zero | tr '\\0' x; echo", LIMIT)?;
    ensure!(answer.trim_end() == "x".repeat(40_000), "{} other bytes came", answer.len());
    assert_is_clean(&power_off(&guest)?, 0)
}
