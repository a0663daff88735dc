//! A network device whose back end is another process (vhost-user), as a script that is its driver has it.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use devices::virtio::fake_back_end::{FakeBackEnd, OFFERED, PROTOCOL};
use guest_client::{EventKind, MacAddress, NetBackend, NetConfig, Rendering};
use guest_schema::{DevicesConfig, GuestConfig, GuestError, MemDeviceConfig};
use guest_tests::service::{PATIENCE, program};
use guest_tests::stage::{Act, Channel, Player, Stage, Story, expect, refusal, refused, says};
use guest_tests::wait;
use machine::layout::DEVICE_WINDOWS;
use processor::scripted::Script;

use super::operator::events;

const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
/// Port 0x80 shows nothing: it takes the cue.
const NOWHERE: u16 = 0x80;

/// The one device's registers (VIRTIO 1.3, 4.2.2), and where in its configuration the status of the link is (5.1.4).
const DEVICE: u64 = DEVICE_WINDOWS.start;
const DRIVER_FEATURES: u64 = DEVICE + 0x20;
const DRIVER_FEATURES_SELECT: u64 = DEVICE + 0x24;
const QUEUE_SELECT: u64 = DEVICE + 0x30;
const QUEUE_SIZE: u64 = DEVICE + 0x38;
const QUEUE_READY: u64 = DEVICE + 0x44;
const QUEUE_NOTIFY: u64 = DEVICE + 0x50;
const STATUS: u64 = DEVICE + 0x70;
const QUEUE_AREAS: [u64; 3] = [DEVICE + 0x80, DEVICE + 0x90, DEVICE + 0xa0];
const END_OF_MAC_AND_LINK: u64 = DEVICE + 0x104;

/// Where the script has its queues: descriptors, driver area, device area, and a buffer, each in a page of its own.
const RECEIVE: u64 = 0x80_0000;
const TRANSMIT: u64 = 0x81_0000;
const PAGE: u64 = 0x1000;
const BUFFER: u64 = 3 * PAGE;

/// The region for memory that is plugged later.
const REGION: u64 = 64 << 20;

const MAC: MacAddress = MacAddress([2, 0, 0, 0, b'm', b'a']);
/// A header and a frame.
const HEADER: u64 = 12;
const FRAME: &[u8; 16] = b"from me to me...";

fn set(script: &mut Script, register: u64, value: u32) {
    script.write(register, &value.to_le_bytes());
}

/// Makes a queue of one buffer ready, which is available.
fn queue(script: &mut Script, number: u32, base: u64, length: u32, flags: u16) {
    script.write(base, &(base + BUFFER).to_le_bytes());
    script.write(base + 8, &[length.to_le_bytes(), u32::from(flags).to_le_bytes()].concat());
    // No flags, one more chain, the first descriptor's.
    script.write(base + PAGE, &[0, 0, 1, 0, 0, 0, 0, 0]);
    set(script, QUEUE_SELECT, number);
    set(script, QUEUE_SIZE, 4);
    for (area, register) in (0..).zip(QUEUE_AREAS) {
        set(script, register, u32::try_from(base + area * PAGE).expect("below 4 GiB"));
        set(script, register + 4, 0);
    }
    set(script, QUEUE_READY, 1);
}

/// A guest that sends a frame, says READY, and on each of three cues tells: what it has received, how its address ends and whether the
/// link is up, and the same once more; then it ends.
fn script() -> Vec<u8> {
    let mut script = Script::new();
    let driver = &mut script;
    for (status, select, features) in [(3, 0, 0), (3, 1, 1)] {
        set(driver, STATUS, status);
        set(driver, DRIVER_FEATURES_SELECT, select);
        set(driver, DRIVER_FEATURES, features);
    }
    set(driver, STATUS, 0xb);
    let writable = 2;
    queue(driver, 0, RECEIVE, 2048, writable);
    let length = u32::try_from(HEADER).expect("small") + 16;
    driver.write(TRANSMIT + BUFFER + HEADER, FRAME);
    queue(driver, 1, TRANSMIT, length, 0);
    set(driver, STATUS, 0xf);
    set(driver, QUEUE_NOTIFY, 0);
    set(driver, QUEUE_NOTIFY, 1);
    driver.out(SERIAL, b"READY\n").serial_input(SERIAL, NOWHERE);
    driver.read_quad(RECEIVE + BUFFER + HEADER, SERIAL).read_quad(RECEIVE + BUFFER + HEADER + 8, SERIAL);
    for _ in 0..2 {
        driver.serial_input(SERIAL, NOWHERE).read_long(END_OF_MAC_AND_LINK, SERIAL).out(SERIAL, b";");
    }
    driver.serial_input(SERIAL, NOWHERE).out(SLEEP_CONTROL, &[0x34]).spin();
    script.to_elf()
}

/// A config with this back end; `None` where no descriptors go.
fn config(player: &Player, socket: UnixStream, pairs: u16) -> anyhow::Result<Option<GuestConfig>> {
    let Some(socket) = player.lifecycle.descriptor(socket) else { return Ok(None) };
    let backend = NetBackend::VhostUser { socket, queue_pairs: pairs };
    let net = vec![NetConfig { mac: Some(MAC), ..NetConfig::new(backend) }];
    let devices =
        DevicesConfig { net, mem: Some(MemDeviceConfig::of_region(REGION)), ..DevicesConfig::default() };
    Ok(Some(GuestConfig { devices, ..player.config_of(&script())? }))
}

/// Its frame goes through another process's hands, which then dies: the link is down, that is told, and the guest goes on.
pub async fn a_guest_talks_by_vhost_user(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let (back_end, socket) = FakeBackEnd::new(OFFERED, PROTOCOL);
    let Some(config) = config(&player, socket, 2)? else {
        return expect("no descriptors go through the service", stage.channel == Channel::Proxied, true);
    };
    let running = player.play_config(&config).await?;
    wait::until_async("the frame coming back", PATIENCE, async || back_end.seen().frames == 1).await?;
    expect("the back end's memory, with what may be plugged", back_end.seen().memory, (16 << 20) + REGION)?;
    player.lifecycle.control().pause().await?;
    player.lifecycle.control().resume().await?;
    running.input.write(b"!").await?;
    running.console.saw("from me to me...").await?;
    running.input.write(b"!").await?;
    running.console.saw("ma\u{1}\0;").await?;
    back_end.kill();
    let observer = running.guest.observer();
    // Which of them is seen depends on whether the VMM was writing to it at that moment.
    let lost =
        ["has closed the connection\n", "fails: vhost-user: socket is broken: Broken pipe (os error 32)\n"];
    let lost = lost.map(|how| format!("gone: the vhost-user back end {how}"));
    let look = async || {
        let node = "units/net0/unit/device/backend";
        let shown = observer.inspect(node, 0, Rendering::Text).await.map_err(|error| error.to_string())?;
        if lost.contains(&shown) { Ok(()) } else { Err(shown) }
    };
    wait::found_async("the back end's end", PATIENCE, look).await?;
    running.input.write(b"!").await?;
    running.console.saw("ma\0\0;").await?;
    running.input.write(b"!").await?;
    running.run.await?;
    let heard = events(&running.guest.observer(), 0).await?;
    let errors = heard.iter().filter_map(|event| match &event.kind {
        EventKind::DeviceError(error) => Some(format!("{} {}", error.device, error.operation)),
        _ => None,
    });
    expect("what was told", errors.collect(), vec!["net0 link".to_owned()])
}

/// Each is refused by what it is, and the next create works; one that does not answer is given up at once when the create is.
pub async fn vhost_user_back_ends_that_cannot_be_are_refused(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let (_small, socket) = FakeBackEnd::new(OFFERED, PROTOCOL);
    let Some(too_many) = config(&player, socket, 3)? else {
        return expect("no descriptors go through the service", stage.channel == Channel::Proxied, true);
    };
    let (code, detail) = refused(player.lifecycle.create(&too_many).await)?;
    expect(&detail, code, GuestError::BadConfig)?;
    says(&detail, "net[0].backend.vhostUser: the vhost-user back end has 4 queues, not 6")?;
    let (ours, silent) = UnixStream::pair()?;
    let unanswered = config(&player, ours, 1)?.expect("descriptors go here");
    let (code, detail) = refused(player.lifecycle.create(&unanswered).await)?;
    expect(&detail, code, GuestError::DeviceInitializationFailure)?;
    says(&detail, "net0: the vhost-user back end has not answered within 3s")?;
    drop(silent);
    let (ours, _silent) = UnixStream::pair()?;
    let created = player.lifecycle.create(&config(&player, ours, 1)?.expect("descriptors go here"));
    player.lifecycle.stop().await?;
    expect("a create that is cancelled", refusal(created.await)?, GuestError::ControllerForcedHalt)?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    Ok(player.lifecycle.stop().await?)
}

/// A guest that has its cues from `guestctl`'s standard input.
pub async fn guestctl_runs_a_guest_with_vhost_user(stage: Stage) -> Story {
    let folder = tempfile::tempdir()?;
    let (kernel, socket) = (folder.path().join("kernel"), folder.path().join("switch.sock"));
    std::fs::write(&kernel, script())?;
    let back_end = FakeBackEnd::listening(&socket);
    let net = format!("vhost-user={},queues=2,mac={MAC}", socket.display());
    let mut command = Command::new(program("guestctl")?);
    command.arg("--socket").arg(stage.service.socket()).args(["run", "--net", &net, "--kernel"]).arg(&kernel);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut guestctl = command.spawn()?;
    let mut input = guestctl.stdin.take().expect("it is piped");
    wait::until_async("a connection", PATIENCE, async || back_end.is_finished()).await?;
    let back_end = back_end.join().expect("it does not panic");
    wait::until_async("the frame coming back", PATIENCE, async || back_end.seen().frames == 1).await?;
    input.write_all(b"!!!!")?;
    let output = tokio::task::spawn_blocking(move || guestctl.wait_with_output()).await??;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    expect(&said, output.status.code(), Some(0))?;
    says(&said, "from me to me...ma\u{1}\0;ma\u{1}\0;")
}
