//! The virtio console, as a script that touches its registers has it.

use guest_client::{ByteStream, Callback};
use guest_schema::{ConsoleConfig, DevicesConfig, GuestConfig, GuestError};
use guest_tests::console::Console;
use guest_tests::stage::{Player, Running, Stage, Story, expect, refusal};
use machine::layout::DEVICE_WINDOWS;
use processor::scripted::Script;

const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
/// Where the configuration of the one device begins (VIRTIO 1.3, 4.2.2): the size, the number of ports, and where a character is
/// written without a queue (5.3.4).
const CONFIG: u64 = DEVICE_WINDOWS.start + 0x100;
const EMERG_WRITE: u64 = CONFIG + 8;

/// What a console's queue holds.
const QUEUE: usize = 64 << 10;

/// A guest that greets on its console, on its cue tells the console's configuration by its serial port, and on the next one ends.
fn script() -> Vec<u8> {
    let mut script = Script::new();
    for character in b"hvc" {
        script.write(EMERG_WRITE, &u32::from(*character).to_le_bytes());
    }
    script.out(SERIAL, b"READY\n").serial_input(SERIAL, 0x80);
    script.read_quad(CONFIG, SERIAL).out(SERIAL, b"TOLD").serial_input(SERIAL, 0x80);
    script.out(SLEEP_CONTROL, &[0x34]).spin();
    script.to_elf()
}

async fn play(player: &Player, ports: &[&str]) -> anyhow::Result<Running> {
    let console = ConsoleConfig { ports: ports.iter().map(|name| (*name).to_owned()).collect() };
    let devices = DevicesConfig { console: Some(console), ..DevicesConfig::default() };
    player.play_config(&GuestConfig { devices, ..player.config_of(&script())? }).await
}

pub async fn a_console_is_read_and_resized(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = play(&player, &["agent", "log"]).await?;
    let (terminal, agent) = (Console::default(), Console::default());
    let input = running.guest.console(terminal.writer());
    let _agent = running.guest.console_port("agent", agent.writer());
    terminal.saw("hvc").await?;
    running.guest.resize_console(0x4241, 0x4443).await?;
    running.input.write(b"!").await?;
    running.console.saw("ABCD\u{3}\0\0\0TOLD").await?;
    let refused = running.guest.console_port("spy", Callback::new(|_: &[u8], _| ())).opened().await;
    expect("a port that there is not", refusal(refused)?, GuestError::DeviceNotPresent)?;
    running.input.write(b"!").await?;
    running.run.await?;
    expect("all that the terminal wrote", terminal.whole().await?, "hvc".to_owned())?;
    expect("all that the port wrote", agent.whole().await?, String::new())?;
    let late = Console::default();
    let _late = running.guest.console(late.writer());
    expect("a reader after the end", late.whole().await?, "hvc".to_owned())?;
    let resized = running.guest.resize_console(80, 25).await;
    expect("a size after the end", refusal(resized)?, GuestError::NotRunning)?;
    let (written, ended) = (input.write(b"late").await, input.end().await);
    expect("input after the end fails", written.is_err() || ended.is_err(), true)
}

/// No driver takes the input, so the queue is full before long: other input goes on, and the sender hears of the end.
pub async fn a_consoles_sender_waits_for_room(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = play(&player, &["agent"]).await?;
    let fits = running.guest.console_input();
    fits.write(&vec![b'x'; QUEUE]).await?;
    fits.end().await?;
    let full: ByteStream = running.guest.console_input();
    full.write(b"more").await?;
    let waiting = full.end();
    let agent = running.guest.console_port_input("agent");
    agent.write(b"of another port").await?;
    agent.end().await?;
    player.lifecycle.stop().await?;
    expect("the one that waited", waiting.await.is_err(), true)?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

pub async fn a_console_without_a_config_of_its_own_has_no_ports(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = play(&player, &[]).await?;
    running.input.write(b"!").await?;
    running.console.saw("\0\0\0\0\u{1}\0\0\0TOLD").await?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}
