//! Unmodified Debian Linux as a guest, in the lab: its boots and its ends, its processors, memory, clock and console; and its
//! drivers with our devices, a file for each.

mod balloon;
mod block;
mod board;
mod console;
mod forks;
mod generation_id;
mod mem;
mod net;
mod rng;
mod snapshot;
mod vsock;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use guest_tests::lab::{self, DebianKernel, Lab, LabGuest, LabPool, LabProcessEnd};
use guest_tests::requirements::{self, Requirement, trial};
use guest_tests::service::program;
use libtest_mimic::Trial;

/// Ten times what the longest wait takes on two idle cores, for machines that do something else as well.
const LIMIT: Duration = Duration::from_secs(200);
const MIB: u64 = 1 << 20;
const BOOTED: &str = "GUEST-UP";
/// More than the VMM queues for a guest, on the serial line or on the console.
const LONG_INPUT: usize = 68 << 10;
/// What Linux says when something about the machine is not as it should be. Not among them: that it was not given the
/// time to run, which happens on a machine that has other work.
const COMPLAINTS: [&str; 12] = [
    "unchecked MSR",
    "timer doesn't work",
    "nobody cared",
    "No irq handler",
    "spurious",
    "interrupt lost",
    "APIC error",
    "cut here",
    "BUG:",
    "Oops",
    "[Firmware Bug]",
    "ACPI Error",
];

static LABS: LabPool = LabPool::new();

fn main() -> ExitCode {
    let trials = vec![
        test("two_vps_reboot_in_every_way", two_vps_reboot_in_every_way),
        test("input_longer_than_the_queue_is_whole", input_longer_than_the_queue_is_whole),
        test("one_vp_boots_and_powers_off", one_vp_boots_and_powers_off),
        test("a_reset_ends_a_guest_that_is_to_stop", a_reset_ends_a_guest_that_is_to_stop),
        test("a_panic_that_reboots_is_a_reset", a_panic_that_reboots_is_a_reset),
        test("a_panic_that_stays_runs_until_it_is_stopped", a_panic_that_stays_runs_until_it_is_stopped),
        test("a_pause_does_not_show_in_the_clocks", a_pause_does_not_show_in_the_clocks),
        test("a_pause_that_is_caught_up_with_shows", a_pause_that_is_caught_up_with_shows),
        test("linux_shuts_down_by_its_power_button", board::linux_shuts_down_by_its_power_button),
        test("a_linux_that_does_not_listen_is_forced", board::a_linux_that_does_not_listen_is_forced),
        test("a_panic_of_linux_is_told", board::a_panic_of_linux_is_told),
        test("linux_gets_random_bytes", rng::linux_gets_random_bytes),
        test("linux_keeps_files_on_a_disk", block::linux_keeps_files_on_a_disk),
        test("linux_keeps_files_with_its_client", block::linux_keeps_files_with_its_client),
        test("linux_keeps_files_in_a_qcow2_image", block::linux_keeps_files_in_a_qcow2_image),
        test("a_shell_on_hvc0_knows_its_size", console::a_shell_on_hvc0_knows_its_size),
        test("a_named_port_carries_bytes_both_ways", console::a_named_port_carries_bytes_both_ways),
        test("pages_go_back_to_the_host", balloon::pages_go_back_to_the_host),
        test("memory_is_plugged_and_unplugged", mem::memory_is_plugged_and_unplugged),
        test("linux_talks_over_tap_and_passt", net::linux_talks_over_tap_and_passt),
        test("linux_connects_and_is_connected_to", vsock::linux_connects_and_is_connected_to),
        test("linux_closes_in_every_order", vsock::linux_closes_in_every_order),
        test("linux_has_many_connections_at_once", vsock::linux_has_many_connections_at_once),
        test("what_linux_sends_and_gets_is_whole", vsock::what_linux_sends_and_gets_is_whole),
        test("linux_is_forked_under_load", forks::linux_is_forked_under_load),
        test("linux_goes_on_from_a_file", snapshot::linux_goes_on_from_a_file),
        test("linux_goes_on_through_a_chain_of_snapshots", forks::linux_goes_on_through_a_chain_of_snapshots),
        test("five_forks_of_linux_work_for_themselves", forks::five_forks_of_linux_work_for_themselves),
        test("a_full_disk_leaves_no_half_of_a_snapshot", snapshot::a_full_disk_leaves_no_half_of_a_snapshot),
        test_generic("linux_reseeds_as_another_guest", generation_id::linux_reseeds_as_another_guest),
    ];
    requirements::run(trials, || LABS.close())
}

fn test(name: &'static str, body: fn(&Lab) -> anyhow::Result<()>) -> Trial {
    test_with(DebianKernel::Cloud, name, body)
}

/// A test whose guests have Debian's kernel for any machine. The labs of the others are of no use to it, so it comes after them.
fn test_generic(name: &'static str, body: fn(&Lab) -> anyhow::Result<()>) -> Trial {
    test_with(DebianKernel::Generic, name, body)
}

fn test_with(guests: DebianKernel, name: &'static str, body: fn(&Lab) -> anyhow::Result<()>) -> Trial {
    trial(name, &[Requirement::Lab], move || {
        for name in lab::PROJECT_PROGRAMS {
            program(name)?;
        }
        LABS.attempt(name, guests, lab::project_binaries, body)
    })
}

fn one_vp_boots_and_powers_off(lab: &Lab) -> anyhow::Result<()> {
    let guest = LabGuest::start(lab, "one", "panic=-1", "--memory 256M --json")?;
    guest.saw(BOOTED, 1, LIMIT)?;
    assert_is_in_order(&guest, 1, 256 * MIB)?;
    assert_is_clean(&power_off(&guest)?, 1)?;
    let err = guest.here("cat err")?;
    let report: serde_json::Value = serde_json::from_str(&err).with_context(|| err.clone())?;
    ensure!(report["outcome"] == "clean" && report["id"] == "one", "{err}");
    ensure!(report["code"].is_null() && report["lost"] == 0, "{err}");
    let timings = &report["timings_us"];
    let [create, first_byte, total] =
        ["create", "first_byte", "total"].map(|name| timings[name].as_u64().unwrap_or_default());
    ensure!(create > 0 && first_byte > 0 && total > create + first_byte, "{err}");
    Ok(())
}

/// The default goes through the BIOS's entry here, since there is no EFI; `reboot=k` and `reboot=a` are the other two.
fn two_vps_reboot_in_every_way(lab: &Lab) -> anyhow::Result<()> {
    let guest = LabGuest::start(lab, "two", "panic=-1", "--cpus 2 --memory 1G --on-reset restart")?;
    for (boots, kind) in (1..).zip(["efi", "kbd", "acpi"]) {
        guest.saw(BOOTED, boots, LIMIT)?;
        assert_is_in_order(&guest, 2, 1024 * MIB)?;
        let default = guest.ask("cat /sys/kernel/reboot/type", LIMIT)?;
        ensure!(default == "efi\n", "Linux's choice without EFI is {default:?}");
        guest.send(&format!("echo {kind} >/sys/kernel/reboot/type; reboot -f"))?;
    }
    guest.saw(BOOTED, 4, LIMIT)?;
    assert_is_clean(&power_off(&guest)?, 4)
}

fn input_longer_than_the_queue_is_whole(lab: &Lab) -> anyhow::Result<()> {
    let guest = LabGuest::start(lab, "long", "panic=-1", "--memory 256M")?;
    guest.saw(BOOTED, 1, LIMIT)?;
    assert_takes_long_input(&guest)?;
    assert_is_clean(&power_off(&guest)?, 1)
}

/// The guest's shell reads more from its terminal than the VMM queues, and misses no byte.
fn assert_takes_long_input(guest: &LabGuest<'_>) -> anyhow::Result<()> {
    guest.send(&format!("stty raw; echo RA''W; head -c {LONG_INPUT} | md5sum; stty cooked; echo RE''AD"))?;
    guest.saw("RAW", 1, LIMIT)?;
    let make = format!("head -c {LONG_INPUT} /dev/urandom >random; (cat random >in) & md5sum <random");
    let sum = guest.here(&make)?;
    let out = guest.saw("READ", 1, LIMIT)?;
    ensure!(out.contains(sum.trim()), "sent {sum:?}, read:\n{out}");
    Ok(())
}

fn a_reset_ends_a_guest_that_is_to_stop(lab: &Lab) -> anyhow::Result<()> {
    let guest = LabGuest::start(lab, "stop", "panic=-1 reboot=k", "--memory 256M --on-reset stop")?;
    guest.saw(BOOTED, 1, LIMIT)?;
    guest.send("reboot -f")?;
    assert_is_clean(&guest.end(LIMIT)?, 1)
}

fn a_panic_that_reboots_is_a_reset(lab: &Lab) -> anyhow::Result<()> {
    let guest = LabGuest::start(lab, "panic", "panic=-1 reboot=a", "--memory 256M --on-reset stop")?;
    guest.saw(BOOTED, 1, LIMIT)?;
    guest.send("echo c >/proc/sysrq-trigger")?;
    let end = guest.end(LIMIT)?;
    ensure!(end.out.contains("Kernel panic - not syncing"), "{}", end.out);
    assert_is_clean(&end, 1)
}

/// Through a guestd that runs, and that shows and ends the guest.
fn a_panic_that_stays_runs_until_it_is_stopped(lab: &Lab) -> anyhow::Result<()> {
    let log = serve(lab, "/tmp/guestd")?;
    let guest = LabGuest::start(lab, "stays", "panic=0", "--memory 256M --socket /tmp/guestd.sock")
        .with_context(|| log)?;
    guest.saw(BOOTED, 1, LIMIT)?;
    guest.send("echo c >/proc/sysrq-trigger")?;
    guest.saw("end Kernel panic", 1, LIMIT)?;
    let listed = guest.here("guestctl ps --json --socket /tmp/guestd.sock")?;
    let listed: serde_json::Value = serde_json::from_str(&listed).with_context(|| listed.clone())?;
    ensure!(listed[0]["id"] == "stays" && listed[0]["phase"] == "running", "{listed}");
    let stop = "guestctl wait sta --socket /tmp/guestd.sock >waited 2>&1 & \
                guestctl stop sta --socket /tmp/guestd.sock || exit; wait $!; echo $?; cat waited";
    let waited = guest.here(stop)?;
    ensure!(waited.starts_with("1\n") && waited.contains("stopped"), "{waited}");
    let end = guest.end(LIMIT)?;
    ensure!(end.status == 1 && end.err.contains("controllerForcedHalt"), "{end:?}");
    Ok(())
}

/// Starts a guestd whose files are named `base` and an ending (the socket's is `.sock`), and returns what it has said once it is up.
fn serve(lab: &Lab, base: &str) -> anyhow::Result<String> {
    lab.run(&format!("(guestd --socket {base}.sock >{base}.log 2>&1; touch {base}.ended) &"), LIMIT)?;
    let up = format!("until [ -S {base}.sock ] || [ -e {base}.ended ]; do sleep 0.1; done; cat {base}.log");
    Ok(lab.run(&up, LIMIT)?.output)
}

fn a_pause_does_not_show_in_the_clocks(lab: &Lab) -> anyhow::Result<()> {
    let Pause { paused, around, guest } = pause(lab, "hidden", "")?;
    ensure!(around >= guest + paused, "{guest:?} of {around:?}, {paused:?} of which the guest was paused");
    Ok(())
}

fn a_pause_that_is_caught_up_with_shows(lab: &Lab) -> anyhow::Result<()> {
    let Pause { paused, around, guest } = pause(lab, "caught-up", "--catch-up-time")?;
    ensure!(guest >= paused, "{guest:?} of {around:?}, {paused:?} of which the guest was paused");
    Ok(())
}

/// How long something took, by different clocks.
struct Pause {
    /// The guest did not run, at the least: from pause's answer to resume's question.
    paused: Duration,
    /// The lab's time from before the guest's clock was read first until after it was read last.
    around: Duration,
    /// The guest's time between these two.
    guest: Duration,
}

/// The time since boot, of a Linux that has not slept.
const UPTIME: &str = "cut -d' ' -f1 /proc/uptime";
/// The clock that Linux keeps, and which ones it does not trust. The lab's processors are of a kind whose counters it does not trust
/// from the beginning, if there are several.
const CLOCK: &str =
    "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; dmesg | grep -i unstable";

/// Pauses a Linux of two VPs for longer than it takes to ask it for the time, and asks it before and after. It keeps its clock.
fn pause(lab: &Lab, name: &str, arguments: &str) -> anyhow::Result<Pause> {
    let base = format!("/tmp/guestd-{name}");
    let log = serve(lab, &base)?;
    let arguments = format!("--cpus 2 --memory 256M --socket {base}.sock {arguments}");
    let guest = LabGuest::start(lab, name, "panic=-1", &arguments).with_context(|| log)?;
    guest.saw(BOOTED, 1, LIMIT)?;
    assert_is_in_order(&guest, 2, 256 * MIB)?;
    let clock = guest.ask(CLOCK, LIMIT)?;
    let asked = uptime(&guest.here(UPTIME)?)?;
    let before = uptime(&guest.ask(UPTIME, LIMIT)?)?;
    let (control, answered) = (format!("--socket {base}.sock {name}"), uptime(&guest.here(UPTIME)?)?);
    let paused = uptime(&guest.here(&format!("guestctl pause {control} && {UPTIME}"))?)?;
    // What is to be told apart from a pause is how long asking takes.
    let long = 4 * (answered - asked) + Duration::from_secs(5);
    while uptime(&guest.here(&format!("sleep 1; {UPTIME}"))?)? < paused + long {}
    let resumed = uptime(&guest.here(&format!("{UPTIME} && guestctl resume {control}"))?)?;
    let after = uptime(&guest.ask(UPTIME, LIMIT)?)?;
    let around = uptime(&guest.here(UPTIME)?)?.saturating_sub(asked);
    assert_is_in_order(&guest, 2, 256 * MIB)?;
    let clock_after = guest.ask(CLOCK, LIMIT)?;
    ensure!(clock == clock_after, "{clock:?} before the pause, {clock_after:?} after it");
    assert_is_clean(&power_off(&guest)?, 1)?;
    Ok(Pause { paused: resumed.saturating_sub(paused), around, guest: after.saturating_sub(before) })
}

fn uptime(text: &str) -> anyhow::Result<Duration> {
    let seconds: f64 = text.trim().parse().with_context(|| format!("no time: {text:?}"))?;
    Ok(Duration::try_from_secs_f64(seconds)?)
}

/// What Linux has found of processors and memory is what it was given; it trusts its clock, and complains of nothing.
fn assert_is_in_order(guest: &LabGuest<'_>, vps: u32, memory: u64) -> anyhow::Result<()> {
    // The whole log would take longer on the serial line than the boot does.
    let complaints = COMPLAINTS.map(|complaint| format!(" -e \"{complaint}\"")).concat();
    let look = format!(
        "nproc; awk '/MemTotal/ {{ print $2 }}' /proc/meminfo; \
         cat /sys/devices/system/clocksource/clocksource0/current_clocksource; dmesg | grep -F{complaints}"
    );
    let answer = guest.ask(&look, LIMIT)?;
    let mut lines = answer.lines();
    let mut line = || lines.next().unwrap_or_default();
    let (nproc, kib, clock) = (line(), line(), line());
    ensure!(nproc == vps.to_string(), "{nproc} processors instead of {vps}");
    let total: u64 = kib.parse().with_context(|| format!("MemTotal {kib:?}"))?;
    // The kernel itself, and its list of pages.
    let kernel = 48 * MIB + memory / 64;
    ensure!((memory - kernel..memory).contains(&(total * 1024)), "{kib} KiB of {memory} bytes");
    ensure!(["kvm-clock", "tsc"].contains(&clock), "the clock is {clock}");
    let complaints = lines.collect::<Vec<_>>().join("\n");
    ensure!(complaints.is_empty(), "Linux complains:\n{complaints}");
    Ok(())
}

/// Asks for the end of a command, whose words are in the answer if it fails.
fn does(guest: &LabGuest<'_>, command: &str) -> anyhow::Result<String> {
    let answer = guest.ask(&format!("({command}) 2>&1; echo \"status $?\""), LIMIT)?;
    ensure!(answer.ends_with("status 0\n"), "{command}:\n{answer}");
    Ok(answer)
}

fn power_off(guest: &LabGuest<'_>) -> anyhow::Result<LabProcessEnd> {
    guest.send("poweroff -f")?;
    Ok(guest.end(LIMIT)?)
}

fn assert_is_clean(end: &LabProcessEnd, boots: usize) -> anyhow::Result<()> {
    ensure!(end.status == 0, "{end:?}");
    let seen = end.out.matches(BOOTED).count();
    ensure!(seen == boots, "{seen} boots instead of {boots}:\n{}", end.out);
    Ok(())
}
