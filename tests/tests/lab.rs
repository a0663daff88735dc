//! The lab itself: that it boots, has `/dev/kvm`, and reports faithfully what commands do in it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use guest_tests::census;
use guest_tests::lab::{
    self, DebianKernel, Lab, LabError, LabGuest, LabOutput, LabPool, LabProcessEnd, TapQueues, Toolset,
};
use guest_tests::process::{Process, Stdin};
use guest_tests::requirements::{self, Requirement, trial};
use guest_tests::wait;
use libtest_mimic::Trial;

const LIMIT: Duration = Duration::from_secs(60);
/// For what a guest does, which takes ten times as long.
const GUEST_LIMIT: Duration = Duration::from_secs(200);
const LAB: &[Requirement] = &[Requirement::Lab];
static LABS: LabPool = LabPool::new();

fn main() -> ExitCode {
    let trials = vec![
        test("kvm_is_there", kvm_is_there),
        test("status_and_output_are_exact", status_and_output_are_exact),
        test("a_failing_command_has_its_status", a_failing_command_has_its_status),
        test("a_long_output_is_whole", a_long_output_is_whole),
        test("a_command_of_many_lines_runs", a_command_of_many_lines_runs),
        test("a_late_command_is_killed_and_the_lab_goes_on", a_late_command_is_killed_and_the_lab_goes_on),
        test("what_runs_in_the_background_goes_on", what_runs_in_the_background_goes_on),
        test("threads_share_the_lab", threads_share_the_lab),
        test("the_root_can_be_pivoted", the_root_can_be_pivoted),
        test("a_guest_is_at_hand", a_guest_is_at_hand),
        test("binaries_run_with_their_libraries", binaries_run_with_their_libraries),
        story("what_is_spawned_is_heard_and_killed", what_is_spawned_is_heard_and_killed),
        story("tools_run_on_the_host", tools_run_on_the_host),
        story("a_guest_has_its_tools_and_drivers", a_guest_has_its_tools_and_drivers),
        story("a_disk_is_sparse", a_disk_is_sparse),
        story("a_tap_is_its_users", a_tap_is_its_users),
        story("passt_answers", passt_answers),
        story("a_guests_vmm_is_killed", a_guests_vmm_is_killed),
        trial("a_guest_loads_the_drivers_of_its_devices", LAB, a_guest_loads_the_drivers_of_its_devices),
        trial("the_emulator_dies_with_its_parent", LAB, the_emulator_dies_with_its_parent),
        trial("a_lab_that_is_lost_says_so", LAB, a_lab_that_is_lost_says_so),
    ];
    requirements::run(trials, || LABS.close())
}

/// A test on one of the labs that all of them share.
fn test(name: &str, body: fn(&Lab) -> Result<(), LabError>) -> Trial {
    trial(name, LAB, move || LABS.lend(DebianKernel::Cloud, binaries, |lab| Ok(body(lab)?)))
}

/// As [`test()`], with guests and other company.
fn story(name: &'static str, body: fn(&Lab) -> anyhow::Result<()>) -> Trial {
    trial(name, LAB, move || LABS.attempt(name, DebianKernel::Cloud, binaries, body))
}

fn binaries() -> Vec<PathBuf> {
    let mut binaries = lab::project_binaries();
    binaries.push(guest_lab());
    binaries
}

/// A program of this workspace that is linked dynamically.
fn guest_lab() -> PathBuf {
    env!("CARGO_BIN_EXE_guest-lab").into()
}

fn output(lab: &Lab, command: &str) -> Result<String, LabError> {
    let done = lab.run(command, LIMIT)?;
    assert_eq!(done.status, 0, "{command}: {}", done.output);
    Ok(done.output)
}

fn kvm_is_there(lab: &Lab) -> Result<(), LabError> {
    output(lab, "test -c /dev/kvm && test -w /dev/kvm")?;
    // One line for each processor, and there is one.
    assert_eq!(output(lab, "grep -cw svm /proc/cpuinfo")?, "1\n");
    Ok(())
}

fn status_and_output_are_exact(lab: &Lab) -> Result<(), LabError> {
    let exact = "printf 'a\\r\\nb\\n\\n  \\tü' ; printf 'no newline' >&2";
    assert_eq!(
        lab.run(exact, LIMIT)?,
        LabOutput { status: 0, output: "a\r\nb\n\n  \tüno newline".to_owned() }
    );
    assert_eq!(lab.run("true", LIMIT)?, LabOutput { status: 0, output: String::new() });
    Ok(())
}

fn a_failing_command_has_its_status(lab: &Lab) -> Result<(), LabError> {
    assert_eq!(
        lab.run("echo why >&2; exit 42", LIMIT)?,
        LabOutput { status: 42, output: "why\n".to_owned() }
    );
    assert_eq!(lab.run("kill -TERM $$", LIMIT)?.status, 128 + 15);
    assert_eq!(lab.run("no-such-program", LIMIT)?.status, 127);
    Ok(())
}

fn a_long_output_is_whole(lab: &Lab) -> Result<(), LabError> {
    let lines = output(lab, "seq 1 50000")?;
    let expected: String = (1..=50_000).map(|number| format!("{number}\n")).collect();
    assert!(lines == expected, "{} bytes came of {}", lines.len(), expected.len());
    Ok(())
}

fn a_command_of_many_lines_runs(lab: &Lab) -> Result<(), LabError> {
    let echoes: String = (0..2000).map(|number| format!("echo {number}\n")).collect();
    let expected: String = (0..2000).map(|number| format!("{number}\n")).collect();
    assert_eq!(output(lab, &echoes)?, expected);
    let too_long = lab.run(&"x".repeat(100_000), LIMIT).expect_err("the line takes 32 KiB");
    assert!(matches!(too_long, LabError::TooLong { length: 100_000, .. }), "{too_long}");
    Ok(())
}

fn a_late_command_is_killed_and_the_lab_goes_on(lab: &Lab) -> Result<(), LabError> {
    output(lab, "echo seen on the console >/dev/console")?;
    let start = Instant::now();
    let late = lab.run("echo before; sleep 997 & sleep 998", Duration::from_millis(500));
    assert!(start.elapsed() >= Duration::from_millis(500));
    let Err(LabError::Late { output: written, console, .. }) = late else {
        panic!("it must be late: {late:?}");
    };
    assert_eq!(written, "before\n");
    assert!(console.contains("seen on the console"), "{console}");
    assert_eq!(lab.run("ps | grep '[s]leep 99[78]'", LIMIT)?, LabOutput { status: 1, output: String::new() });
    Ok(())
}

fn what_runs_in_the_background_goes_on(lab: &Lab) -> Result<(), LabError> {
    output(lab, "(until [ -e /tmp/go ]; do sleep 0.1; done; echo done >/tmp/gone) &")?;
    output(lab, "test ! -e /tmp/gone; touch /tmp/go")?;
    output(lab, "until [ -e /tmp/gone ]; do sleep 0.1; done")?;
    Ok(())
}

fn threads_share_the_lab(lab: &Lab) -> Result<(), LabError> {
    std::thread::scope(|scope| {
        let runs: Vec<_> =
            (0..4).map(|number| scope.spawn(move || output(lab, &format!("echo {number}")))).collect();
        for (number, run) in runs.into_iter().enumerate() {
            assert_eq!(run.join().expect("no panic")?, format!("{number}\n"));
        }
        Ok(())
    })
}

fn the_root_can_be_pivoted(lab: &Lab) -> Result<(), LabError> {
    let pivot = "mkdir -p /tmp/root && mount -t tmpfs tmpfs /tmp/root && mkdir /tmp/root/old && cd /tmp/root && \
                 pivot_root . old && test -d /old/lab";
    output(lab, &format!("unshare -m sh -c '{pivot}'"))?;
    Ok(())
}

fn a_guest_is_at_hand(lab: &Lab) -> Result<(), LabError> {
    // The boot protocol's magic at 0x202 (Linux Documentation/arch/x86/boot.rst).
    assert_eq!(output(lab, "dd if=/guest/kernel bs=1 skip=514 count=4 2>/dev/null")?, "HdrS");
    let listing = output(lab, "cpio -t </guest/initramfs 2>/dev/null")?;
    for file in ["init", "bin/busybox", "bin/sh", "modules/virtio_mmio.ko", "modules/virtio_net"] {
        assert!(listing.lines().any(|line| line == file), "{file} is not in\n{listing}");
    }
    Ok(())
}

fn binaries_run_with_their_libraries(lab: &Lab) -> Result<(), LabError> {
    let version = output(lab, "guest-lab --version")?;
    assert_eq!(version, format!("guest-lab {}\n", env!("CARGO_PKG_VERSION")));
    Ok(())
}

fn the_emulator_dies_with_its_parent() -> anyhow::Result<()> {
    let mut command = std::process::Command::new(guest_lab());
    command.args(["run", "--", "sleep 1000"]);
    let parent = Process::spawn(command, Stdin::Empty)?;
    let qemu = wait::found("the emulator", LIMIT, || emulator_of(parent.pid()))?;
    parent.kill();
    wait::until("the emulator's end", LIMIT, || !census::runs(qemu))?;
    Ok(())
}

fn emulator_of(parent: u32) -> anyhow::Result<u32> {
    let children = census::children(parent)?;
    // Not one that is only asked for its version.
    let boots = |line: Vec<String>| line.iter().any(|argument| argument == "-initrd");
    let emulator = |&child: &u32| census::command_line(child).is_ok_and(boots);
    children.into_iter().find(emulator).context("no child boots a lab")
}

fn a_lab_that_is_lost_says_so() -> anyhow::Result<()> {
    let lab = Lab::boot(DebianKernel::Cloud, &[])?;
    for command in ["poweroff -f; sleep 1000", "true"] {
        match lab.run(command, LIMIT) {
            Err(LabError::Lost { command: named, .. }) => assert_eq!(named, command),
            other => panic!("it must be lost: {other:?}"),
        }
    }
    Ok(())
}

fn what_is_spawned_is_heard_and_killed(lab: &Lab) -> anyhow::Result<()> {
    let cat = lab.spawn("cat", "exec cat")?;
    cat.send("it's \"$HOME\"")?;
    ensure!(cat.saw("$HOME", 1, LIMIT)? == "it's \"$HOME\"\n");
    let taken = lab.spawn("cat", "true").expect_err("the name is in use");
    ensure!(matches!(taken, LabError::Status { status: 1, .. }), "{taken}");
    cat.here("kill $(cat pid)")?;
    let end = cat.end(LIMIT)?;
    ensure!(end.status == 128 + 15 && end.out == "it's \"$HOME\"\n", "{end:?}");
    let exits = lab.spawn("exits", "echo why >&2; exit 3")?.end(LIMIT)?;
    ensure!(exits == LabProcessEnd { status: 3, err: "why\n".to_owned(), out: String::new() }, "{exits:?}");

    let sleepers = lab.spawn("sleepers", "sleep 995 & sleep 996; true")?;
    sleepers.until("ps | grep -q '[s]leep 996'", "sleep", LIMIT)?;
    let never = sleepers.saw("a word", 1, Duration::ZERO).expect_err("it says nothing");
    ensure!(never.to_string().contains("(sleepers goes on)"), "{never}");
    sleepers.kill()?;
    ensure!(sleepers.end(LIMIT)?.status == 128 + 9);
    ensure!(lab.run("ps | grep '[s]leep 99[56]'", LIMIT)?.status == 1, "what it started goes on");
    Ok(())
}

/// What each tool is asked in order to see that it runs with all its libraries, and a part of its answer.
const ANSWERS: [(&str, &str); 6] = [
    ("fio --version", "fio-"),
    ("mkfs.ext4 -V", "mke2fs "),
    ("e2fsck -V", "e2fsck "),
    ("iperf3 --version", "iperf "),
    ("ethtool --version", "ethtool version"),
    ("socat -V", "WITH_VSOCK 1"),
];

/// A file that fio writes and reads back, with an engine that it has of a library.
const VERIFIED: &str = "fio --name=verified --filename=/tmp/fio --size=256k --bs=4k --rw=randwrite --verify=crc32c \
                   --ioengine=libaio --output-format=terse; echo status $?; rm /tmp/fio";

fn tools_run_on_the_host(lab: &Lab) -> anyhow::Result<()> {
    let host = [("/bin/ip -V", "iproute2"), ("passt --version", "passt ")];
    for (command, part) in ANSWERS.into_iter().chain(host) {
        let answer = output(lab, &format!("{command} 2>&1"))?;
        ensure!(answer.contains(part), "{command}: {answer}");
    }
    let verified = output(lab, VERIFIED)?;
    ensure!(verified.contains("status 0"), "{verified}");
    let unknown = lab.run("guest-initramfs block blokc", LIMIT)?;
    ensure!(unknown.status == 1 && unknown.output.contains("no toolset blokc"), "{unknown:?}");
    Ok(())
}

fn a_guest_has_its_tools_and_drivers(lab: &Lab) -> anyhow::Result<()> {
    let guest = LabGuest::start_with(&Toolset::ALL, lab, "tools", "panic=-1", "--memory 512M")?;
    guest.saw("GUEST-UP", 1, GUEST_LIMIT)?;
    let commands = ANSWERS.map(|(command, _)| format!("{command} 2>&1; "));
    let answers = guest.ask(&format!("{}{VERIFIED}; ping -c 1 127.0.0.1", commands.concat()), GUEST_LIMIT)?;
    let parts = ANSWERS.map(|(_, part)| part);
    for part in parts.iter().chain(&["status 0", " 0% packet loss"]) {
        ensure!(answers.contains(part), "{part:?} is not in:\n{answers}");
    }
    assert_drivers_load(&guest)
}

fn assert_drivers_load(guest: &LabGuest<'_>) -> anyhow::Result<()> {
    let load = "for list in $(ls -d /modules/* | grep -v .ko$); do while read -r module; do name=${module##*/}; \
                [ -d /sys/module/${name%.ko} ] || insmod $module || echo $module FAILS; done <$list; done";
    let loaded =
        guest.ask(&format!("{load}; ls /sys/bus/virtio/drivers; cat /proc/filesystems"), GUEST_LIMIT)?;
    ensure!(!loaded.contains("FAILS"), "{loaded}");
    let drivers = ["blk", "net", "console", "rng", "balloon", "mem"].map(|name| format!("virtio_{name}"));
    for driver in drivers.iter().map(String::as_str).chain(["vmw_vsock_virtio_transport", "\text4"]) {
        ensure!(loaded.contains(driver), "{driver} is not among:\n{loaded}");
    }
    Ok(())
}

/// On QEMU's devices at virtio-mmio, which ACPI announces (LNRO0005); without the lab, and so in little time.
fn a_guest_loads_the_drivers_of_its_devices() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (initramfs, disk) = (folder.path().join("initramfs"), folder.path().join("disk"));
    std::fs::write(&initramfs, lab::guest_initramfs()?)?;
    std::fs::File::create(&disk)?.set_len(1 << 20)?;
    let mut qemu = std::process::Command::new("qemu-system-x86_64");
    qemu.args("-machine microvm,acpi=on -accel tcg -cpu EPYC -m 256 -nographic -no-reboot".split(' '));
    qemu.arg("-kernel").arg(Lab::prepare()?.image()).arg("-initrd").arg(initramfs);
    let look = "ls -d /sys/bus/virtio/drivers/*/virtio[0-9]*; head -c 4 /dev/vda | hexdump -C; poweroff -f";
    // Told the frequency, it does not measure it against timers, which a software CPU may be too slow for: the boot hangs then.
    qemu.arg("-append")
        .arg(format!("console=ttyS0 quiet panic=-1 tsc_early_khz=1000000 GUEST_RUN=\"{look}\""));
    qemu.arg("-drive").arg(format!("if=none,id=disk,format=raw,file={}", disk.display()));
    for device in ["blk-device,drive=disk", "net-device", "serial-device", "rng-device", "balloon-device"] {
        qemu.arg("-device").arg(format!("virtio-{device}"));
    }
    let qemu = Process::spawn(qemu, Stdin::Empty)?;
    let status = qemu.wait(LIMIT)?;
    let console = String::from_utf8_lossy(&qemu.stdout().to_end(LIMIT)?).into_owned();
    ensure!(status.success(), "{status}: {}", qemu.last_words());
    for driver in ["blk", "net", "console", "rng", "balloon"] {
        ensure!(console.contains(&format!("/virtio_{driver}/virtio")), "no {driver}:\n{console}");
    }
    ensure!(console.contains("00000000  00 00 00 00"), "{console}");
    Ok(())
}

fn a_disk_is_sparse(lab: &Lab) -> anyhow::Result<()> {
    let disk = lab.make_disk("disk", 5 << 30)?;
    let sizes = output(
        lab,
        &format!("stat -c '%s %b' {disk}; mkfs.ext4 -q -O ^has_journal {disk} && e2fsck -fn {disk} >&2"),
    )?;
    ensure!(sizes.starts_with("5368709120 0\n"), "{sizes}");
    let taken = lab.make_disk("disk", 1).expect_err("there is such a file");
    ensure!(matches!(taken, LabError::Status { .. }), "{taken}");
    output(lab, &format!("rm {disk}"))?;
    Ok(())
}

fn a_tap_is_its_users(lab: &Lab) -> anyhow::Result<()> {
    lab.make_tap("tap-one", TapQueues::One, "nobody", "198.51.100.1/24")?;
    lab.make_tap("tap-many", TapQueues::Many, "nobody", "203.0.113.1/24")?;
    let taps = output(
        lab,
        "/bin/ip tuntap; /bin/ip -brief address show dev tap-one; cat /sys/class/net/tap-one/flags",
    )?;
    ensure!(taps.contains("tap-one: tap persist user 65534"), "{taps}");
    ensure!(taps.contains("tap-many: tap multi_queue persist user 65534"), "{taps}");
    ensure!(taps.contains("198.51.100.1/24") && taps.contains("0x1003"), "{taps}");
    let refused = lab.make_tap("tap-one", TapQueues::One, "nobody", "198.51.100.1/24");
    ensure!(matches!(refused, Err(LabError::Status { .. })), "{refused:?}");
    Ok(())
}

fn passt_answers(lab: &Lab) -> anyhow::Result<()> {
    let passt = lab.start_passt("passt", "")?;
    let guest = lab.spawn("client", &format!("exec socat - UNIX-CONNECT:{}/socket", passt.folder()))?;
    // A frame of 42 bytes: who has 192.0.2.1, tell 192.0.2.2 at 02:00:00:00:00:01 (RFC 826).
    let length = r"\x00\x00\x00\x2a";
    let ethernet = r"\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x08\x06";
    let sender = r"\x02\x00\x00\x00\x00\x01\xc0\x00\x02\x02";
    let target = r"\x00\x00\x00\x00\x00\x00\xc0\x00\x02\x01";
    guest
        .here(&format!(r"printf '{length}{ethernet}\x00\x01\x08\x00\x06\x04\x00\x01{sender}{target}' >in"))?;
    guest.until("[ $(wc -c <out) -ge 46 ]", "answer of passt", LIMIT)?;
    let answer = guest.here("dd if=out bs=1 skip=24 count=2 2>/dev/null | xxd -p")?;
    ensure!(answer == "0002\n", "operation {answer}");
    Ok(())
}

/// Neither the first nor the last one that there is.
fn a_guests_vmm_is_killed(lab: &Lab) -> anyhow::Result<()> {
    let start = |name| LabGuest::start(lab, name, "panic=-1", "--memory 256M");
    let (before, guest, after) = (start("before")?, start("killed")?, start("after")?);
    after.until("[ $(pidof guest-vmm | wc -w) -ge 3 ]", "three of guest-vmm", GUEST_LIMIT)?;
    guest.kill_vmm(GUEST_LIMIT)?;
    let end = guest.end(GUEST_LIMIT)?;
    ensure!(end.status != 0 && end.status < 128, "{end:?}");
    for other in [before, after] {
        let ended = other.here("[ -e status ] && echo ended; cat err")?;
        ensure!(!ended.contains("ended"), "another one has ended: {ended}");
    }
    Ok(())
}
