//! The lab itself: that it boots, has `/dev/kvm`, and reports faithfully what commands do in it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use guest_tests::census;
use guest_tests::lab::{Lab, LabError, LabOutput, SharedLab};
use guest_tests::process::{Process, Stdin};
use guest_tests::requirements::{self, Requirement, trial};
use guest_tests::wait;
use libtest_mimic::Trial;

const LIMIT: Duration = Duration::from_secs(60);
const LAB: &[Requirement] = &[Requirement::Lab];
static SHARED: SharedLab = SharedLab::new();

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
        trial("the_emulator_dies_with_its_parent", LAB, the_emulator_dies_with_its_parent),
        trial("a_lab_that_is_lost_says_so", LAB, a_lab_that_is_lost_says_so),
    ];
    requirements::run(trials, || SHARED.close())
}

/// A test on the lab that all of them share.
fn test(name: &str, body: fn(&Lab) -> Result<(), LabError>) -> Trial {
    trial(name, LAB, move || {
        let lab = SHARED.get(|| vec![guest_lab()])?;
        Ok(body(&lab)?)
    })
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
    let lab = Lab::boot(&[])?;
    for command in ["poweroff -f; sleep 1000", "true"] {
        match lab.run(command, LIMIT) {
            Err(LabError::Lost { command: named, .. }) => assert_eq!(named, command),
            other => panic!("it must be lost: {other:?}"),
        }
    }
    Ok(())
}
