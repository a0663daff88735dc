//! What the board's small devices tell a guest, and tell of it: the power button, panics, the debug-exit port.

use std::process::{Command, Output};
use std::time::Instant;

use guest_client::{EventKind, PanicReport, Rendering};
use guest_schema::{GuestConfig, GuestError, OnReset, Outcome, Panic};
use guest_tests::service::program;
use guest_tests::stage::{Act, DEBUG_EXIT, Kind, Player, Running, Stage, Story, expect, refusal, says};
use processor::scripted::Script;

use super::operator::events;

const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
const EVENTS: u16 = 0x604;
const PVPANIC: u16 = 0x505;
const KEYBOARD_COMMAND: u16 = 0x64;
/// Port 0x80 shows nothing: it takes the cue.
const NOWHERE: u16 = 0x80;

/// A guest that says READY, and then does this.
fn script(does: impl FnOnce(&mut Script)) -> Vec<u8> {
    let mut script = Script::new();
    script.out(SERIAL, b"READY\n");
    does(&mut script);
    script.spin();
    script.to_elf()
}

/// Shuts down once its power button is pressed.
fn listens() -> Vec<u8> {
    script(|script| {
        script.poll(EVENTS, 1).out(SLEEP_CONTROL, &[0x34]);
    })
}

async fn play(player: &Player, script: &[u8]) -> anyhow::Result<Running> {
    player.play_config(&player.config_of(script)?).await
}

/// Lets a script go on that waits for input.
async fn cue(running: &Running) -> Story {
    Ok(running.input.write(b"!").await?)
}

async fn presses(running: &Running) -> anyhow::Result<String> {
    let observer = running.guest.observer();
    let path = "units/generic-events/unit/raised/power_button";
    Ok(observer.inspect(path, 0, Rendering::Text).await?)
}

/// How a guest ended, and the panics that its subscribers heard of.
async fn panics(running: Running) -> anyhow::Result<(guest_schema::Exit, Vec<PanicReport>)> {
    let heard = events(&running.guest.observer(), 0).await?;
    let reports = heard.iter().filter_map(|event| match &event.kind {
        EventKind::Panic(report) => Some(*report),
        _ => None,
    });
    Ok((running.guest.terminated().await?, reports.collect()))
}

pub async fn a_guest_shuts_down_by_its_power_button(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    player.lifecycle.create(&player.config_of(&listens())?).await?;
    let early = player.lifecycle.control().power_button().await;
    expect("before it runs", refusal(early)?, GuestError::NotRunning)?;
    let running = play(&player, &listens()).await?;
    let control = player.lifecycle.control();
    expect("presses", presses(&running).await?, "0\n".to_owned())?;
    control.power_button().await?;
    running.run.await?;
    expect("outcome", running.guest.terminated().await?.outcome, Outcome::Clean)?;
    let heard = events(&running.guest.observer(), 0).await?;
    let pressed = heard.iter().filter(|event| event.kind == EventKind::PowerButton).count();
    expect("events", pressed, 1)?;
    expect("after its end", refusal(control.power_button().await)?, GuestError::NotRunning)
}

pub async fn a_paused_guest_hears_of_its_power_button_when_it_goes_on(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = play(&player, &listens()).await?;
    let control = player.lifecycle.control();
    control.pause().await?;
    control.power_button().await?;
    control.resume().await?;
    Ok(running.run.await?)
}

pub async fn a_guest_that_ignores_its_power_button_runs_on(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    player.lifecycle.control().power_button().await?;
    player.lifecycle.control().power_button().await?;
    expect("presses", presses(&running).await?, "2\n".to_owned())?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

/// Runs `guestctl` against the stage's service.
async fn guestctl(stage: &Stage, arguments: &[&str]) -> anyhow::Result<(i32, String)> {
    let mut command = Command::new(program("guestctl")?);
    command.arg("--socket").arg(stage.service.socket()).args(arguments);
    let Output { status, stdout, stderr } = tokio::task::spawn_blocking(move || command.output()).await??;
    let said = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Ok((status.code().unwrap_or(-1), said))
}

pub async fn guestctl_stops_a_guest_gracefully(stage: Stage) -> Story {
    let player = stage.launch("listens").await?;
    let running = play(&player, &listens()).await?;
    let (status, said) = guestctl(&stage, &["stop", "listens", "--graceful"]).await?;
    expect(&said, status, 0)?;
    says(&said, "listens has ended: clean: the guest powered itself off")?;
    Ok(running.run.await?)
}

pub async fn guestctl_forces_a_guest_that_ignores_its_power_button(stage: Stage) -> Story {
    let player = stage.launch("deaf").await?;
    let running = player.play(Act::Spin).await?;
    let (status, said) = guestctl(&stage, &["stop", "deaf", "--graceful", "--timeout", "300ms"]).await?;
    expect(&said, status, 0)?;
    says(&said, "deaf has not ended within 300ms: stopped by force")?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("outcome", running.guest.terminated().await?.outcome, Outcome::Forced)
}

pub async fn a_panic_is_an_event_and_in_the_exit(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let panicking = script(|script| {
        script
            .out(PVPANIC, &[1])
            .out(SERIAL, b"dead\n")
            .serial_input(SERIAL, NOWHERE)
            .out(SLEEP_CONTROL, &[0x34]);
    });
    let running = play(&player, &panicking).await?;
    running.console.saw("dead").await?;
    let observer = running.guest.observer();
    expect(
        "shown",
        observer.inspect("units/pvpanic/unit/panicked", 0, Rendering::Text).await?,
        "1\n".to_owned(),
    )?;
    cue(&running).await?;
    let (exit, reports) = panics(running).await?;
    expect("reports", reports, vec![PanicReport { panic: Panic::Panicked, count: 1 }])?;
    expect("exit", (exit.outcome, exit.panic, exit.panics), (Outcome::Clean, Some(Panic::Panicked), 1))
}

/// Panics, and resets itself when it is told to.
fn panics_and_resets() -> Vec<u8> {
    script(|script| {
        script.serial_input(SERIAL, NOWHERE).out(PVPANIC, &[2]).out(KEYBOARD_COMMAND, &[0xfe]);
    })
}

pub async fn a_panic_that_ends_in_a_reset_is_in_the_exit_if_the_reset_ends_the_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let config = GuestConfig { on_reset: OnReset::Stop, ..player.config_of(&panics_and_resets())? };
    let running = player.play_config(&config).await?;
    cue(&running).await?;
    let (exit, reports) = panics(running).await?;
    expect("reports", reports, vec![PanicReport { panic: Panic::CrashLoaded, count: 1 }])?;
    expect("exit", (exit.outcome, exit.panic, exit.panics), (Outcome::Clean, Some(Panic::CrashLoaded), 1))?;
    let told = player.exit.terminated().await?;
    expect("the service's", told, exit)
}

pub async fn a_panic_before_a_reset_is_counted_and_not_the_end(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = play(&player, &panics_and_resets()).await?;
    for lives in 2..4 {
        cue(&running).await?;
        running.console.saw_times("READY", lives).await?;
    }
    player.lifecycle.stop().await?;
    let (exit, reports) = panics(running).await?;
    let each = PanicReport { panic: Panic::CrashLoaded, count: 1 };
    expect("reports", reports, vec![each, each])?;
    expect("exit", (exit.outcome, exit.panic, exit.panics), (Outcome::Forced, None, 2))
}

pub async fn a_guest_that_panics_all_the_time_is_told_of_now_and_then(stage: Stage) -> Story {
    const REPORTS: u32 = 20_000;
    let player = stage.launch("").await?;
    let raging = script(|script| {
        script.counter(REPORTS.into());
        let again = script.here();
        script.out(PVPANIC, &[1]).repeat(again).out(SLEEP_CONTROL, &[0x34]);
    });
    let begun = Instant::now();
    let running = play(&player, &raging).await?;
    let (exit, reports) = panics(running).await?;
    expect("all are counted", exit.panics, REPORTS)?;
    expect("and told", reports.iter().map(|report| report.count).sum(), REPORTS)?;
    // One at once, one a second, one at the end.
    let most = begun.elapsed().as_secs() + 2;
    expect(&format!("{reports:?}"), reports.len() as u64 <= most, true)
}

pub async fn a_test_guest_ends_itself_with_a_value(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let config = GuestConfig { debug_exit: true, ..player.config(Act::DebugExit)? };
    let running = player.play_config(&config).await?;
    player.cue(&running, Act::DebugExit).await?;
    running.run.await?;
    let exit = running.guest.terminated().await?;
    expect("exit", (exit.outcome, exit.debug_exit), (Outcome::Clean, Some(DEBUG_EXIT)))?;
    expect("the service's", player.exit.terminated().await?, exit)
}

pub async fn a_guest_has_no_debug_exit_port_unless_asked_for(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::DebugExit).await?;
    player.cue(&running, Act::DebugExit).await?;
    if stage.kind == Kind::BuiltIn {
        running.console.saw("no debug-exit port").await?;
    }
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("exit", running.guest.terminated().await?.debug_exit, None)
}
