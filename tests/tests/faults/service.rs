//! The service's own start and end.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::ensure;
use guest_client::GuestExit;
use guest_schema::Outcome;
use guest_tests::process::{Process, Stdin};
use guest_tests::requirements::trial;
use guest_tests::service::{PATIENCE, Service, program};
use guest_tests::stage::{Act, Channel, Kind, Player, Stage, Story, expect, play, refused, says};
use guest_tests::{census, wait};
use libtest_mimic::Trial;
use rustix::process::Signal;
use tempfile::TempDir;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("sigterm_stops_all_leased_guests", &[], || play(a_signal_stops_all_guests(Signal::TERM))),
        trial("sigint_stops_all_leased_guests", &[], || play(a_signal_stops_all_guests(Signal::INT))),
        trial("a_vmm_that_never_answers_is_killed_at_the_end", &[], || {
            play(a_deaf_vmm_is_killed_at_the_end())
        }),
        trial("a_unit_that_hangs_does_not_hold_up_the_end", &[], || {
            play(a_hanging_unit_does_not_hold_up_the_end())
        }),
        trial("nothing_is_launched_while_the_service_ends", &[], || play(nothing_is_launched_at_the_end())),
        trial("a_second_service_is_refused", &[], a_second_service_is_refused),
        trial("a_stale_socket_is_replaced", &[], || play(a_stale_socket_is_replaced())),
        trial("the_socket_is_for_its_user_alone", &[], the_socket_is_for_its_user_alone),
        trial("wrong_usage_is_told", &[], wrong_usage_is_told),
        trial("a_wrong_config_is_named", &[], a_wrong_config_is_named),
        trial("a_missing_vmm_is_told", &[], a_missing_vmm_is_told),
        trial("a_vmm_that_is_no_program_fails_the_launch", &[], || play(a_vmm_that_is_no_program())),
        trial("a_vmm_that_ends_at_once_is_a_crash", &[], || play(a_vmm_that_ends_at_once())),
        trial("logs_carry_the_guests_id", &[], || play(logs_carry_the_guests_id())),
        trial("a_vmm_by_hand_says_what_it_is", &[], a_vmm_by_hand_says_what_it_is),
    ]
}

/// Two guests that run on a stage, and one without a guest, with their processes.
async fn company(stage: &Stage) -> anyhow::Result<(Vec<Player>, Vec<u32>)> {
    let mut players = Vec::new();
    let mut pids = Vec::new();
    for id in ["one", "two", "empty"] {
        let player = stage.launch(id).await?;
        if id != "empty" {
            player.play(Act::Spin).await?;
        }
        pids.push(player.pid().await?);
        players.push(player);
    }
    Ok((players, pids))
}

async fn a_signal_stops_all_guests(signal: Signal) -> Story {
    for channel in [Channel::Direct, Channel::Proxied] {
        let stage = Stage::set(Kind::Scripted, channel, "")?;
        let (_players, pids) = company(&stage).await?;
        stage.service.process().signal(signal);
        ended_well(&stage.service, &pids)?;
    }
    Ok(())
}

/// The service has ended with status 0, and nothing of it or its guests is left.
fn ended_well(service: &Service, pids: &[u32]) -> Story {
    let status = service.process().wait(PATIENCE)?;
    expect("status", status.code(), Some(0))?;
    expect("the socket is there", service.socket().exists(), false)?;
    // Whoever was reaped by the service is gone for good: no waiting is needed.
    let left: Vec<&u32> = pids.iter().filter(|pid| census::runs(**pid)).collect();
    ensure!(left.is_empty(), "{left:?} still run");
    no_panic(service)
}

fn no_panic(service: &Service) -> Story {
    ensure!(!service.log().contains("panicked"), "{}", service.log());
    Ok(())
}

async fn a_hanging_unit_does_not_hold_up_the_end() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, ",hold-unit=stop")?;
    let (_players, pids) = company(&stage).await?;
    stage.service.process().signal(Signal::TERM);
    ended_well(&stage.service, &pids)
}

async fn a_deaf_vmm_is_killed_at_the_end() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let (_players, pids) = company(&stage).await?;
    signal(pids[0], Signal::STOP)?;
    stage.service.process().signal(Signal::TERM);
    ended_well(&stage.service, &pids)?;
    says(&stage.service.log(), "did not stop in time: killed")
}

fn signal(pid: u32, signal: Signal) -> Story {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("no process is 0");
    Ok(rustix::process::kill_process(pid, signal)?)
}

async fn nothing_is_launched_at_the_end() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let (players, pids) = company(&stage).await?;
    // One that does not answer keeps the service ending for a while.
    signal(pids[0], Signal::STOP)?;
    stage.service.process().signal(Signal::TERM);
    stage.service.process().logged("stopping all guests", PATIENCE)?;
    let late = players[0].host.launch("late")?;
    let answer = refused(late.id.await);
    if let Ok((_, detail)) = &answer {
        says(detail, "ending")?;
    }
    ended_well(&stage.service, &pids)?;
    ensure!(answer.is_ok(), "the late launch: {answer:?}");
    Ok(())
}

/// A guestd with these arguments, to its end.
fn guestd(arguments: &[&str], environment: &[(&str, &Path)]) -> anyhow::Result<(ExitStatus, String)> {
    guestd_at(&program("guestd")?, arguments, environment)
}

fn guestd_at(
    program: &Path,
    arguments: &[&str],
    environment: &[(&str, &Path)],
) -> anyhow::Result<(ExitStatus, String)> {
    let mut command = Command::new(program);
    command.args(arguments).envs(environment.iter().copied()).env_remove("GUESTD_SOCKET");
    let process = Process::spawn(command, Stdin::Empty)?;
    let status = process.wait(PATIENCE)?;
    let said = process.stderr().to_end(PATIENCE)?;
    Ok((status, String::from_utf8_lossy(&said).into_owned()))
}

fn path(path: &Path) -> &str {
    path.to_str().expect("test folders have plain names")
}

fn a_second_service_is_refused() -> Story {
    let service = Service::start("scripted", &[])?;
    let socket = service.socket();
    let (status, said) = guestd(&["--socket", path(&socket)], &[])?;
    expect("status", status.code(), Some(1))?;
    says(&said, "another guestd listens there")?;
    says(&said, path(&socket))?;
    // The first one has not noticed.
    play(async {
        service.connect().await?.info().await?;
        Ok(())
    })
}

async fn a_stale_socket_is_replaced() -> Story {
    let first = Service::start("scripted", &[])?;
    first.process().kill();
    first.process().wait(PATIENCE)?;
    expect("the socket is left behind", first.socket().exists(), true)?;
    let mut command = Command::new(program("guestd")?);
    command.arg("--socket").arg(first.socket()).args(["--hypervisor", "scripted", "--warm", "0"]);
    let second = Process::spawn(command, Stdin::Empty)?;
    second.logged("listening", PATIENCE)?;
    let info = first.connect().await?.info().await?;
    expect("hypervisor", &info.hypervisor[..], "scripted")
}

fn the_socket_is_for_its_user_alone() -> Story {
    let service = Service::start("scripted", &[])?;
    let mode = std::fs::metadata(service.socket())?.permissions().mode();
    expect("mode", mode & 0o777, 0o600)
}

fn wrong_usage_is_told() -> Story {
    for (arguments, words) in [
        (&["--socket", "/nowhere/x", "--speed", "7"][..], "--speed"),
        (&[], "--socket"),
        (&["--socket"], "--socket"),
        (&["--socket", "/nowhere/x", "more"], "more"),
    ] {
        let (status, said) = guestd(arguments, &[])?;
        expect(&format!("status of {arguments:?}"), status.code(), Some(2))?;
        says(&said, words)?;
    }
    for (arguments, words) in [
        (&["--socket", "/nowhere/x"][..], "/nowhere/x"),
        (&["--socket", "/nowhere/x", "--log", "=,="], "--log =,="),
        (&["--socket", "/nowhere/x", "--hypervisor", "xen"], "\"xen\""),
        (&["--socket", "/nowhere/x", "--warm", "65"], "warm = \"65\": at most 64"),
    ] {
        let (status, said) = guestd(arguments, &[])?;
        expect(&format!("status of {arguments:?}"), status.code(), Some(1))?;
        says(&said, words)?;
    }
    Ok(())
}

fn a_wrong_config_is_named() -> Story {
    let folder = TempDir::new()?;
    let (socket, file) = (folder.path().join("socket"), folder.path().join("guestd.toml"));
    let start = || guestd(&["--socket", path(&socket), "--config", path(&file)], &[]);
    let refuses = |contents: &str, words: &str| -> Story {
        std::fs::write(&file, contents)?;
        let (status, said) = start()?;
        expect(&format!("status with {contents:?}"), status.code(), Some(1))?;
        says(&said, path(&file))?;
        says(&said, words)
    };
    let (status, said) = start()?;
    expect("status without the file", status.code(), Some(1))?;
    says(&said, path(&file))?;
    says(&said, "No such file")?;
    refuses("max-guest = 3", "max-guest")?;
    refuses("max-guests = \"many\"", "max-guests")?;
    refuses("max-guests = -1", "max-guests")?;
    refuses("warm = -1", "warm")?;
    refuses("warm = 65", "warm = \"65\"")?;
    refuses("vmm = [", "line 1")?;
    refuses("hypervisor = \"xen\"", "\"xen\"")?;
    refuses("vmm-log = \"=,=\"", "vmm-log")?;
    refuses("vmm = \"/nowhere/guest-vmm\"", "/nowhere/guest-vmm")
}

/// A copy of guestd with nothing beside it.
fn lonely_guestd(folder: &Path) -> anyhow::Result<PathBuf> {
    let lonely = folder.join("guestd");
    std::fs::copy(program("guestd")?, &lonely)?;
    Ok(lonely)
}

fn a_missing_vmm_is_told() -> Story {
    let folder = TempDir::new()?;
    let socket = folder.path().join("socket");
    let lonely = lonely_guestd(folder.path())?;
    let (status, said) = guestd_at(&lonely, &["--socket", path(&socket)], &[("PATH", folder.path())])?;
    expect("status", status.code(), Some(1))?;
    says(&said, "no guest-vmm beside")?;
    says(&said, path(folder.path()))?;
    says(&said, "--vmm")?;
    let (status, said) = guestd(&["--socket", path(&socket), "--vmm", "/nowhere/guest-vmm"], &[])?;
    expect("status", status.code(), Some(1))?;
    says(&said, "vmm = \"/nowhere/guest-vmm\": no such executable file")?;
    expect("the socket is there", socket.exists(), false)
}

/// A file in place of guest-vmm.
fn instead_of_vmm(contents: &str, mode: u32) -> anyhow::Result<(TempDir, String)> {
    let folder = TempDir::new()?;
    let file = folder.path().join("guest-vmm");
    std::fs::write(&file, contents)?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode))?;
    let name = path(&file).to_owned();
    Ok((folder, name))
}

async fn a_vmm_that_is_no_program() -> Story {
    let (_folder, file) = instead_of_vmm("neither script nor program", 0o755)?;
    let service = Service::start("scripted", &["--vmm", &file])?;
    let host = service.connect().await?;
    let (code, detail) = refused(host.launch_proxied("").id.await)?;
    expect("code", code, guest_schema::GuestError::FailedServiceConnect)?;
    says(&detail, &file)?;
    expect("guests", host.list().await?.len(), 0)
}

async fn a_vmm_that_ends_at_once() -> Story {
    let (_folder, file) = instead_of_vmm("#!/bin/sh\necho these were its last words >&2\nexit 7\n", 0o755)?;
    let service = Service::start("scripted", &["--vmm", &file])?;
    for _ in 0..3 {
        let launched = service.connect().await?.launch_proxied("");
        let exit = launched.exit.terminated().await?;
        expect("outcome", exit.outcome, Outcome::Crashed)?;
        says(&exit.detail, "status 7")?;
        says(&exit.log, "these were its last words")?;
    }
    let host = service.connect().await?;
    let empty = || async { host.list().await.is_ok_and(|guests| guests.is_empty()) };
    Ok(wait::until_async("the service to forget its guests", PATIENCE, empty).await?)
}

async fn logs_carry_the_guests_id() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    for id in ["first", "second"] {
        let player = stage.launch(id).await?;
        let running = player.play(Act::Crash).await?;
        player.cue(&running, Act::Crash).await?;
        expect("run fails", running.run.await.is_err(), true)?;
        let exit: GuestExit = player.exit.clone();
        drop(player);
        exit.terminated().await?;
        stage.service.process().logged(&format!("the VMM has ended guest=\"{id}\""), PATIENCE)?;
    }
    let log = stage.service.log();
    let theirs: Vec<&str> = log.lines().filter(|line| line.contains("guest_vmm")).collect();
    for id in ["first", "second"] {
        let own = theirs.iter().filter(|line| line.contains(&format!("guest=\"{id}\""))).count();
        ensure!(own >= 3, "{own} lines of {id} in {log}");
    }
    let nobodys: Vec<&&str> = theirs.iter().filter(|line| !line.contains("guest=\"")).collect();
    ensure!(nobodys.is_empty(), "{nobodys:?}");
    ensure!(theirs.iter().any(|line| line.contains("ERROR") && line.contains("the guest crashed")), "{log}");
    Ok(())
}

fn a_vmm_by_hand_says_what_it_is() -> Story {
    for stdin in [Stdin::Empty, Stdin::Piped] {
        let process = Process::spawn(Command::new(program("guest-vmm")?), stdin)?;
        expect("status", process.wait(PATIENCE)?.code(), Some(1))?;
        let said = String::from_utf8_lossy(&process.stderr().to_end(PATIENCE)?).into_owned();
        says(&said, "launched by guestd")?;
    }
    Ok(())
}
