//! Guests that try everything, on KVM, and readers that are too slow for their guest.

use std::rc::Rc;
use std::time::Duration;

use anyhow::ensure;
use guest_client::{GuestConfig, OutputClosed, SerialOutput};
use guest_schema::{GuestError, MemoryConfig, Outcome, VpState};
use guest_tests::console::{Console, ConsoleWriter};
use guest_tests::requirements::{Requirement, trial};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Channel, Kind, Player, Running, Stage, Story, expect, play, refused, says};
use guest_tests::wait;
use libtest_mimic::Trial;
use processor::scripted::Script;
use tokio::sync::Semaphore;

/// The serial port's data, the port that a script powers off by, and one where nothing is.
const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
const NOWHERE: u16 = 0x80;

const KVM: &[Requirement] = &[Requirement::Kvm];

/// How long a guest may take that does a hundred thousand things, however slow the machine.
const LONG: Duration = Duration::from_secs(300);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("guests::every_port_is_survived", KVM, || play(everything_is_survived("ports"))),
        trial("guests::every_address_is_survived", KVM, || play(everything_is_survived("mmio"))),
        trial("guests::a_breakpoint_in_ring_0", KVM, || play(a_breakpoint_in_ring_0())),
        trial("guests::a_halted_guest_can_be_stopped", KVM, || play(a_halted_guest_can_be_stopped())),
        trial("guests::four_vps_count", KVM, || play(vps_count(4))),
        trial("guests::sixty_three_vps_count", KVM, || play(vps_count(63))),
        trial("guests::a_slow_reader_loses_the_oldest::direct", &[], || play(a_slow_reader(Channel::Direct))),
        trial("guests::a_slow_reader_loses_the_oldest::proxied", &[], || {
            play(a_slow_reader(Channel::Proxied))
        }),
        trial("guests::input_that_nobody_reads", KVM, || play(input_that_nobody_reads())),
    ]
}

/// The built-in guest with so many VPs.
async fn guest(stage: &Stage, cpus: u32) -> anyhow::Result<(Player, Running)> {
    let player = stage.launch("").await?;
    let memory = MemoryConfig::of_bytes(64 << 20);
    let config = GuestConfig { cpus, memory, ..player.config(Act::PowerOff)? };
    let running = player.play_config(&config).await?;
    Ok((player, running))
}

/// Sends a command and waits for words of the answer.
async fn ask(running: &Running, command: &str, words: &str) -> Story {
    running.input.write(format!("{command}\n").as_bytes()).await?;
    saw(&running.console, words).await
}

/// Waits longer than a console does by itself.
async fn saw(console: &Console, words: &str) -> Story {
    let written = || async { if console.text().contains(words) { Ok(()) } else { Err(console.text()) } };
    Ok(wait::found_async(&format!("the guest to write {words:?}"), LONG, written).await?)
}

async fn end(player: &Player, running: Running) -> Story {
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn everything_is_survived(command: &str) -> Story {
    let stage = Stage::set(Kind::BuiltIn, Channel::Direct, "")?;
    let (player, running) = guest(&stage, 1).await?;
    ask(&running, command, &format!("{command} done")).await?;
    ask(&running, "echo still here", "still here").await?;
    ask(&running, "memory", "memory ").await?;
    ensure!(!stage.service.log().contains("panicked"), "{}", stage.service.log());
    end(&player, running).await
}

async fn a_breakpoint_in_ring_0() -> Story {
    let stage = Stage::set(Kind::BuiltIn, Channel::Direct, "")?;
    let (player, running) = guest(&stage, 1).await?;
    running.input.write(b"int3\n").await?;
    let (code, detail) = refused(running.run.await)?;
    expect(&detail, code, GuestError::VcpuRuntimeFailure)?;
    for words in ["KVM_EXIT_INTERNAL_ERROR", "at the instruction bytes cc", "VP 0", "rip=0x"] {
        says(&detail, words)?;
    }
    expect("outcome", running.guest.terminated().await?.outcome, Outcome::Crashed)?;
    let running = player.play(Act::PowerOff).await?;
    end(&player, running).await
}

async fn a_halted_guest_can_be_stopped() -> Story {
    let stage = Stage::set(Kind::BuiltIn, Channel::Direct, "")?;
    let (player, running) = guest(&stage, 4).await?;
    ask(&running, "vps", "vps 4").await?;
    ask(&running, "halt", "halting").await?;
    let observer = running.guest.observer();
    let halted = || async {
        let state = observer.state().await.map_err(|error| error.to_string())?;
        if state.vps == [VpState::Halted; 4] { Ok(()) } else { Err(format!("{:?}", state.vps)) }
    };
    wait::found_async("all VPs to halt", PATIENCE, halted).await?;
    player.lifecycle.stop().await?;
    expect("run", refused(running.run.await)?.0, GuestError::ControllerForcedHalt)
}

async fn vps_count(cpus: u32) -> Story {
    let stage = Stage::set(Kind::BuiltIn, Channel::Direct, "")?;
    let (player, running) = guest(&stage, cpus).await?;
    ask(&running, "vps", &format!("vps {cpus}\n")).await?;
    ask(&running, "count", &format!("count {}\n", (cpus - 1) * 1000)).await?;
    expect("VPs", running.guest.observer().state().await?.vps.len(), cpus as usize)?;
    end(&player, running).await
}

/// A reader that takes a write only when it is let.
struct Slow {
    console: ConsoleWriter,
    leave: Rc<Semaphore>,
}

impl SerialOutput for Slow {
    async fn write(&self, bytes: &[u8], lost: u64) -> Result<(), OutputClosed> {
        let leave = self.leave.acquire().await.map_err(|_| OutputClosed)?;
        leave.forget();
        self.console.write(bytes, lost).await
    }
}

/// More than may be on its way to a reader and kept for it: 3 MiB in lines of 64 bytes.
const LINES: u64 = 3 << 14;

/// On its cue, a guest that writes all lines, and then powers itself off when it is told to.
fn talkative() -> Vec<u8> {
    let mut script = Script::new();
    script.out(SERIAL, b"READY\n").serial_input(SERIAL, NOWHERE).counter(LINES);
    let line = script.here();
    script.out(SERIAL, format!("{:-<63}\n", "burst ").as_bytes()).repeat(line).out(SERIAL, b"burst done\n");
    script.serial_input(SERIAL, NOWHERE).out(SLEEP_CONTROL, &[0x34]).spin();
    script.to_elf()
}

async fn a_slow_reader(channel: Channel) -> Story {
    let stage = Stage::set(Kind::Scripted, channel, "")?;
    let player = stage.launch("").await?;
    let running = player.play_config(&player.config_of(&talkative())?).await?;
    let (slow, leave) = (Console::default(), Rc::new(Semaphore::new(0)));
    let _input = running.guest.serial(Slow { console: slow.writer(), leave: leave.clone() });
    // The guest and its other reader are not held up.
    running.input.write(b"!").await?;
    saw(&running.console, "burst done").await?;
    // Now it reads everything that is left for it.
    leave.add_permits(Semaphore::MAX_PERMITS >> 1);
    slow.saw("burst done").await?;
    running.input.write(b"!").await?;
    running.run.await?;
    let written = b"READY\n".len() as u64 + LINES * 64 + b"burst done\n".len() as u64;
    for console in [&running.console, &slow] {
        expect("read and lost", console.whole().await?.len() as u64 + console.lost(), written)?;
    }
    ensure!(slow.lost() > running.console.lost(), "{} bytes lost, {}", slow.lost(), running.console.lost());
    let newest = slow.text().split_off(slow.text().len() - 32_768);
    ensure!(running.console.text().ends_with(&newest), "the newest bytes are not there");
    Ok(())
}

/// A guest that does not read holds up its writer, and neither the VMM nor others.
async fn input_that_nobody_reads() -> Story {
    let stage = Stage::set(Kind::BuiltIn, Channel::Direct, "")?;
    let (player, running) = guest(&stage, 1).await?;
    ask(&running, "spin", "spinning").await?;
    let flood = vec![b'x'; 64 << 20];
    let pid = player.pid().await?;
    let before = guest_tests::census::resident_bytes(pid)?;
    let others = async {
        let other = player.lifecycle.bind().serial_input();
        other.opened().await?;
        expect("VPs", running.guest.observer().state().await?.vps.len(), 1)?;
        let grown = guest_tests::census::resident_bytes(pid)?.saturating_sub(before);
        ensure!(grown < 32 << 20, "the VMM has taken {} MiB", grown >> 20);
        Ok(player.lifecycle.stop().await?)
    };
    let (written, others) = tokio::join!(running.input.write(&flood), others);
    others?;
    ensure!(written.is_err(), "a guest that never read has taken 64 MiB");
    expect("run", refused(running.run.await)?.0, GuestError::ControllerForcedHalt)
}
