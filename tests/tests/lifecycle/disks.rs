//! Disks of guests that a client creates: whose image may be whose, what is no image, and what a script reads that drives one.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use devices::virtio::block::ImageFile;
use guest_client::{EventKind, Observer, image_service};
use guest_schema::{
    BlockConfig, BlockMode, DeviceError, DevicesConfig, DiskSource, GuestConfig, GuestError, ImageFormat,
    Outcome,
};
use guest_tests::driver::{Buffer, ScriptedDriver};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Player, Stage, Story, expect, refused, says};
use guest_tests::wait;
use processor::scripted::Script;
use tokio::sync::mpsc;

use super::endless_config;

const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
const SECTOR: u32 = 512;

/// A file of so many bytes, without a name.
fn image(bytes: u64) -> anyhow::Result<File> {
    let file = tempfile::tempfile()?;
    file.set_len(bytes)?;
    Ok(file)
}

/// As another program opens it, for locks are an opening's.
fn again(file: &File) -> std::io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(OpenOptions::new().read(true).write(true).open(path)?.into())
}

fn is_free(file: &File) -> std::io::Result<bool> {
    Ok(ImageFile::lock(again(file)?, true).is_ok())
}

fn with_disks(config: GuestConfig, block: Vec<BlockConfig>) -> GuestConfig {
    GuestConfig { devices: DevicesConfig { block, ..DevicesConfig::default() }, ..config }
}

/// A guest of the stage with a disk on this image.
fn config(player: &Player, file: &File, mode: BlockMode) -> anyhow::Result<GuestConfig> {
    let disk = BlockConfig::raw(player.lifecycle.file(again(file)?), mode);
    Ok(with_disks(player.config(Act::Spin)?, vec![disk]))
}

async fn is_refused(player: &Player, config: &GuestConfig, problems: &[&str]) -> Story {
    let (code, detail) = refused(player.lifecycle.create(config).await)?;
    expect("create", code, GuestError::BadConfig)?;
    problems.iter().try_for_each(|problem| says(&detail, problem))
}

pub async fn an_image_has_one_writer_or_any_number_of_readers(stage: Stage) -> Story {
    let file = image(4096)?;
    let (one, other) = (stage.launch("").await?, stage.launch("").await?);
    let create = |player: &Player, mode| anyhow::Ok(player.lifecycle.create(&config(player, &file, mode)?));
    create(&one, BlockMode::ReadWrite)?.await?;
    for (mode, problem) in [
        (
            BlockMode::ReadWrite,
            "block[0].format.file: it is in use: another process or guest holds a lock on it",
        ),
        (
            BlockMode::ReadOnly,
            "block[0].format.file: it is in use: another process or guest holds it for writing",
        ),
        (BlockMode::VolatileWrite, "another process or guest holds it for writing"),
    ] {
        is_refused(&other, &config(&other, &file, mode)?, &[problem]).await?;
    }
    one.lifecycle.stop().await?;
    expect("free when the stop has answered", is_free(&file)?, true)?;
    create(&other, BlockMode::ReadOnly)?.await?;
    create(&one, BlockMode::VolatileWrite)?.await?;
    let writer = stage.launch("").await?;
    is_refused(&writer, &config(&writer, &file, BlockMode::ReadWrite)?, &["holds a lock on it"]).await?;
    // The end of a lease and of a process are the end of its locks, too.
    drop(one.lifecycle);
    drop(other.lifecycle);
    let free = || async { is_free(&file).unwrap_or(false) };
    wait::until_async("the image to be free", PATIENCE, free).await?;
    Ok(create(&writer, BlockMode::ReadWrite)?.await?)
}

pub async fn what_is_no_image_is_named_by_its_field(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let disk = |file: File, format| {
        let source = DiskSource::Image(format, Some(player.lifecycle.file(file)));
        BlockConfig::new(source, BlockMode::ReadWrite)
    };
    let disks = vec![
        disk(image(100)?, ImageFormat::Raw),
        disk(image(4096)?, ImageFormat::Qcow2),
        disk(image(4096)?, ImageFormat::Raw),
        disk(File::open("/dev/null")?, ImageFormat::Raw),
    ];
    let problems = [
        "block[0].format.file: its 100 bytes are less than a sector of 512",
        "block[1].format.qcow2: it is no qcow2 image that can be used: its first bytes are not those of one",
        "block[3].format.file: it is neither a regular file nor a block device but CharacterDevice",
    ];
    is_refused(&player, &with_disks(player.config(Act::Spin)?, disks), &problems).await?;
    let good = vec![disk(image(4096)?, ImageFormat::Raw)];
    Ok(player.lifecycle.create(&with_disks(player.config(Act::Spin)?, good)).await?)
}

pub async fn an_image_does_not_go_over_a_proxied_channel(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let config = config(&player, &image(4096)?, BlockMode::ReadOnly)?;
    let problem =
        "block[0].format.file: a disk's image has to be a descriptor, which a proxied channel does not pass";
    is_refused(&player, &config, &[problem]).await
}

/// The create waits for a kernel when it is given up, with its disks open.
pub async fn a_create_that_is_given_up_lets_go_of_its_disks(stage: Stage) -> Story {
    let file = image(4096)?;
    let player = stage.launch("").await?;
    let endless = || {
        let disk = BlockConfig::raw(player.lifecycle.file(again(&file)?), BlockMode::ReadWrite);
        anyhow::Ok(with_disks(endless_config(), vec![disk]))
    };
    let held = || async { !is_free(&file).unwrap_or(true) };
    let created = player.lifecycle.create(&endless()?);
    wait::until_async("the create to open the disk", PATIENCE, held).await?;
    player.lifecycle.stop().await?;
    expect("free when the stop has answered", is_free(&file)?, true)?;
    expect("create", refused(created.await)?.0, GuestError::ControllerForcedHalt)?;

    let _created = player.lifecycle.create(&endless()?);
    wait::until_async("the create to open the disk again", PATIENCE, held).await?;
    drop(player.lifecycle);
    let free = || async { is_free(&file).unwrap_or(false) };
    Ok(wait::until_async("the image to be free", PATIENCE, free).await?)
}

/// A guest that reads its disk's first sector on each cue, and tells how the sector begins and the request's status.
fn reads(times: usize) -> Vec<u8> {
    let mut script = Script::new();
    let mut driver = ScriptedDriver::set_up(&mut script, 1);
    script.out(SERIAL, b"READY\n");
    for _ in 0..times {
        script.serial_input(SERIAL, 0x80);
        // VIRTIO_BLK_T_IN at sector 0 (5.2.6).
        let request = [Buffer::Out(&[0; 16]), Buffer::In(SECTOR), Buffer::In(1)];
        let places = driver.send(&mut script, 0, &request);
        script.hlt().read_quad(places[1], SERIAL).read_long(places[2], SERIAL).out(SERIAL, b"TOLD\n");
    }
    script.serial_input(SERIAL, 0x80).out(SLEEP_CONTROL, &[0x34]).spin();
    script.to_elf()
}

/// The next failure of a device that its subscribers hear of.
async fn next_error(observer: &Observer) -> anyhow::Result<DeviceError> {
    let (sender, mut arriving) = mpsc::channel(1);
    let _subscription = observer.subscribe(0, sender).await?;
    let told = async {
        while let Some(event) = arriving.recv().await {
            if let EventKind::DeviceError(error) = event.kind {
                return Ok(error);
            }
        }
        Err(anyhow::anyhow!("the guest ended without a failure of a device"))
    };
    tokio::time::timeout(PATIENCE, told).await?
}

pub async fn a_disk_that_the_host_fails_is_an_event(stage: Stage) -> Story {
    let (file, player) = (image(SECTOR.into())?, stage.launch("").await?);
    let source = player.lifecycle.image(again(&file)?, ImageFormat::Raw, BlockMode::ReadWrite)?;
    fails_and_goes_on(&file, source, &player).await
}

pub async fn a_disk_that_its_client_fails_is_an_event(stage: Stage) -> Story {
    let file = image(SECTOR.into())?;
    let source = DiskSource::Service(Some(image_service(again(&file)?, true)?));
    fails_and_goes_on(&file, source, &stage.launch("").await?).await
}

/// The file is cut off below the guest, which gets an I/O error, and goes on.
async fn fails_and_goes_on(file: &File, source: DiskSource, player: &Player) -> Story {
    file.write_all_at(b"a sector", 0)?;
    let disk = BlockConfig::new(source, BlockMode::ReadWrite);
    let running = player.play_config(&with_disks(player.config_of(&reads(3))?, vec![disk])).await?;
    running.input.write(b"!").await?;
    running.console.saw("a sector\0\0\0\0TOLD").await?;
    file.set_len(0)?;
    running.input.write(b"!").await?;
    running.console.saw("\u{1}\0\0\0TOLD").await?;
    let error = next_error(&running.guest.observer()).await?;
    expect("device and operation", (&error.device[..], &error.operation[..]), ("block0", "read"))?;
    expect("what the host says", error.detail.is_empty(), false)?;
    file.set_len(SECTOR.into())?;
    file.write_all_at(b"is again", 0)?;
    running.input.write(b"!").await?;
    running.console.saw("is again\0\0\0\0TOLD").await?;
    running.input.write(b"!").await?;
    running.run.await?;
    expect("outcome", running.guest.terminated().await?.outcome, Outcome::Clean)?;
    // A service hears that nobody has it only after that.
    let free = || async { is_free(file).unwrap_or(false) };
    Ok(wait::until_async("the image to be free", PATIENCE, free).await?)
}
