//! Configs and kernels that cannot be: each is refused with the right code, in words that name the field and its value, and the next
//! create works.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use guest_schema::config_capnp::{KernelType, OnReset, guest_config};
use guest_schema::guest_capnp::guest_lifecycle::create_params;
use guest_schema::{CpuidMask, Failure, FileSource, GuestConfig, GuestError, MemoryConfig, VpAffinity};
use guest_tests::bare::Bare;
use guest_tests::requirements::trial;
use guest_tests::stage::{
    Act, Channel, Kind, Player, Stage, Story, expect, play, refused, says, sealed_file,
};
use guest_tests::{census, wait};
use libtest_mimic::Trial;

/// Where the headers of a script's ELF file lie, and in them what is changed (ELF-64 object file format).
const SEGMENT: usize = 64;
const NOTE: usize = 120;
const PHYSICAL: usize = 24;
const FILE_BYTES: usize = 32;
const MEMORY_BYTES: usize = 40;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("configs::kernels::direct", &[], || play(kernels_that_cannot_be(Channel::Direct))),
        trial("configs::kernels::proxied", &[], || play(kernels_that_cannot_be(Channel::Proxied))),
        trial("configs::limits::direct", &[], || play(limits_are_kept(Channel::Direct))),
        trial("configs::limits::proxied", &[], || play(limits_are_kept(Channel::Proxied))),
        trial("configs::initrds", &[], || play(initrds_that_do_not_fit())),
        trial("configs::descriptors_that_are_no_files", &[], || play(descriptors_that_are_no_files())),
        trial("configs::a_descriptor_is_good_once", &[], || play(a_descriptor_is_good_once())),
        trial("configs::what_is_not_supported_is_listed", &[], || play(what_is_not_supported_is_listed())),
        trial("configs::values_of_a_later_schema", &[], || play(values_of_a_later_schema())),
        trial("configs::text_that_is_none", &[], || play(text_that_is_none())),
    ]
}

/// A config with this kernel, for which no other descriptor is on its way.
fn of_kernel(kernel: Option<FileSource>) -> GuestConfig {
    GuestConfig::new(kernel, 16 << 20)
}

fn on_cpus(lists: &[&[u32]]) -> VpAffinity {
    VpAffinity::Each(lists.iter().map(|cpus| cpus.iter().copied().collect()).collect())
}

/// A refused create leaves nothing behind: no file stays open, and the next create works.
async fn refuses(player: &Player, config: &GuestConfig, code: GuestError, words: &[&str]) -> Story {
    let (found, detail) = refused(player.lifecycle.create(config).await)?;
    expect(&detail, found, code)?;
    for words in words {
        says(&detail, words)?;
    }
    expect("run", refused(player.lifecycle.run().await)?.0, GuestError::NotCreated)?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    Ok(player.lifecycle.stop().await?)
}

/// Plays on a stage and looks afterwards that the VMM is the same and holds what it held.
async fn unharmed(channel: Channel, story: impl AsyncFnOnce(&Player) -> Story) -> Story {
    let stage = Stage::set(Kind::Scripted, channel, "")?;
    let player = stage.launch("").await?;
    let pid = player.pid().await?;
    player.lifecycle.create(&player.config(Act::Spin)?).await?;
    player.lifecycle.stop().await?;
    let files = census::open_files(pid)?;
    story(&player).await?;
    expect("the VMM's process", player.pid().await?, pid)?;
    let closed = || async { census::open_files(pid).is_ok_and(|now| now <= files) };
    wait::until_async("all files to be closed", guest_tests::service::PATIENCE, closed).await?;
    anyhow::ensure!(!stage.service.log().contains("panicked"), "{}", stage.service.log());
    Ok(())
}

/// A script's ELF file with some of its numbers changed.
fn changed(changes: &[(usize, u64)]) -> Vec<u8> {
    let mut image = Kind::Scripted.image(Act::Spin);
    for (place, value) in changes {
        image[*place..*place + 8].copy_from_slice(&value.to_le_bytes());
    }
    image
}

/// The note turned into another segment of 4 KiB, at this address.
fn two_segments(address: u64) -> Vec<u8> {
    let mut image = changed(&[(NOTE + PHYSICAL, address), (NOTE + MEMORY_BYTES, 4096)]);
    image[NOTE..NOTE + 4].copy_from_slice(&1u32.to_le_bytes());
    image
}

async fn kernels_that_cannot_be(channel: Channel) -> Story {
    let image = Kind::Scripted.image(Act::Spin);
    let with = |place: usize, byte: u8| {
        let mut image = image.clone();
        image[place] = byte;
        image
    };
    let kernels: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "the file is empty"),
        (b"x".to_vec(), "it begins with [78]"),
        (b"#!/bin/sh\nexit 0\n".to_vec(), "neither an ELF file nor a bzImage"),
        (vec![0; 1 << 20], "it begins with [00, 00"),
        (image[..20].to_vec(), "truncated: the ELF header ends at byte 64"),
        (image[..100].to_vec(), "truncated: the program header table ends at byte 176"),
        (image[..image.len() - 1].to_vec(), "truncated: a segment ends at byte"),
        (with(4, 1), "EI_CLASS is 0x1"),
        (with(5, 2), "EI_DATA is 0x2"),
        (with(16, 1), "e_type is 0x1"),
        (with(18, 3), "e_machine is 0x3"),
        (with(56, 0), "e_phnum is 0x0"),
        (with(57, 0xff), "e_phnum is 0xff02"),
        (changed(&[(32, u64::MAX)]), "truncated: the program header table"),
        (changed(&[(SEGMENT + MEMORY_BYTES, 1 << 40)]), "kernel segment 0 needs 0x100000..0x10000100000"),
        (changed(&[(SEGMENT + MEMORY_BYTES, u64::MAX)]), "p_memsz is 0xffffffffffffffff"),
        (changed(&[(SEGMENT + FILE_BYTES, u64::MAX)]), "p_filesz is 0xffffffffffffffff"),
        (changed(&[(SEGMENT + PHYSICAL, 1 << 40)]), "entry 0x100000 is in no loaded segment"),
        (changed(&[(NOTE + FILE_BYTES, u64::MAX)]), "p_filesz is 0xffffffffffffffff"),
        (two_segments(0x10_0000), "kernel segment 1 needs 0x100000..0x101000, but 0x100000..0x1000"),
        (two_segments(0xa_0000), "kernel segment 1 needs 0xa0000..0xa1000, usable memory is"),
        (two_segments(1 << 24), "kernel segment 1 needs 0x1000000..0x1001000, usable memory is"),
        (two_segments(u64::MAX - 4095), "p_memsz"),
    ];
    unharmed(channel, async |player| {
        for (kernel, words) in &kernels {
            let config = player.config_of(kernel)?;
            refuses(player, &config, GuestError::KernelLoadFailure, &["kernel", words]).await?;
        }
        Ok(())
    })
    .await
}

async fn limits_are_kept(channel: Channel) -> Story {
    unharmed(channel, async |player| {
        let good = || player.config(Act::Spin);
        let memory = |bytes| MemoryConfig::of_bytes(bytes);
        for (config, words) in [
            (GuestConfig { cpus: 0, ..good()? }, "cpus: 0 is not from 1 to"),
            (GuestConfig { cpus: 255, ..good()? }, "cpus: 255 is not from 1 to"),
            (GuestConfig { cpus: u32::MAX, ..good()? }, "cpus: 4294967295 is not from 1 to"),
            (
                GuestConfig { affinity: VpAffinity::All([0, u32::MAX].into()), ..good()? },
                "affinity.all: host CPU 4294967295 is none of those that the VMM may use, 0",
            ),
            (
                GuestConfig { cpus: 2, affinity: on_cpus(&[&[], &[4096]]), ..good()? },
                "affinity.each[1]: host CPU 4096 is none of those that the VMM may use, 0",
            ),
            (
                GuestConfig { affinity: on_cpus(&[&[], &[]]), ..good()? },
                "affinity.each: 2 lists are more than the 1 VPs",
            ),
            (
                GuestConfig { cpuid_mask: vec![CpuidMask::default(); 5000], ..good()? },
                "cpuidMask: 5000 entries are more than 1024",
            ),
            (GuestConfig { memory: memory(0), ..good()? }, "memory.bytes: 0 is below"),
            (GuestConfig { memory: memory((1 << 20) - 1), ..good()? }, "memory.bytes: 1048575 is below"),
            (
                GuestConfig { memory: memory(1 << 50), ..good()? },
                "memory.bytes: 1125899906842624 is more than",
            ),
            (
                GuestConfig { memory: memory(u64::MAX), ..good()? },
                "memory.bytes: 18446744073709551615 is more",
            ),
            (
                GuestConfig { cmdline: "x".repeat(65_536), ..good()? },
                "source.boot.cmdline: 65536 bytes are more",
            ),
            (GuestConfig { cmdline: "x".repeat(1 << 20), ..good()? }, "source.boot.cmdline: 1048576 bytes"),
            (
                GuestConfig { cmdline: "a\0b".into(), ..good()? },
                "source.boot.cmdline: there is a NUL at byte 1",
            ),
            (of_kernel(None), "source.boot.kernel: none was given"),
        ] {
            refuses(player, &config, GuestError::BadConfig, &[words]).await?;
        }
        Ok(())
    })
    .await
}

async fn initrds_that_do_not_fit() -> Story {
    unharmed(Channel::Direct, async |player| {
        let with = |initrd: File| -> anyhow::Result<GuestConfig> {
            let ramdisk = Some(player.lifecycle.file(initrd));
            Ok(GuestConfig { ramdisk, ..player.config(Act::Spin)? })
        };
        let sized = |bytes: u64| -> anyhow::Result<File> {
            let file = tempfile::tempfile()?;
            file.set_len(bytes)?;
            Ok(file)
        };
        let code = GuestError::KernelLoadFailure;
        let field = "source.boot.ramdisk: 1099511627776 bytes do not fit into";
        refuses(player, &with(sized(1 << 40)?)?, code, &[field]).await?;
        let beside = "initrd: 16711680 bytes do not fit below";
        refuses(player, &with(sized((16 << 20) - (64 << 10))?)?, code, &[beside]).await?;
        refuses(player, &with(sized(0)?)?, code, &["initrd: the file is empty"]).await
    })
    .await
}

async fn descriptors_that_are_no_files() -> Story {
    unharmed(Channel::Direct, async |player| {
        let (socket, _other) = UnixStream::pair()?;
        let (pipe, _writer) = std::io::pipe()?;
        let kinds: Vec<(OwnedFd, &str)> = vec![
            (pipe.into(), "Fifo"),
            (socket.into(), "Socket"),
            (File::open("/")?.into(), "Directory"),
            (File::open("/dev/zero")?.into(), "CharacterDevice"),
        ];
        for (descriptor, kind) in kinds {
            let kernel = Some(player.lifecycle.file(descriptor));
            let config = of_kernel(kernel);
            let words = ["source.boot.kernel: descriptor", "is no regular file", kind];
            refuses(player, &config, GuestError::BadConfig, &words).await?;
        }
        let write_only = tempfile::NamedTempFile::new()?;
        let write_only = File::options().write(true).open(write_only.path())?;
        write_only.set_len(4096)?;
        let kernel = Some(player.lifecycle.file(write_only));
        let config = of_kernel(kernel);
        refuses(
            player,
            &config,
            GuestError::KernelLoadFailure,
            &["source.boot.kernel", "Bad file descriptor"],
        )
        .await
    })
    .await
}

async fn a_descriptor_is_good_once() -> Story {
    unharmed(Channel::Direct, async |player| {
        let config = player.config(Act::Spin)?;
        player.lifecycle.create(&config).await?;
        player.lifecycle.stop().await?;
        let words = ["source.boot.kernel", "was used before"];
        refuses(player, &config, GuestError::BadConfig, &words).await?;
        let kernel = Some(FileSource::Descriptor(u64::MAX));
        let config = of_kernel(kernel);
        refuses(player, &config, GuestError::BadConfig, &[&u64::MAX.to_string()]).await
    })
    .await?;
    // A descriptor means nothing where none can come.
    unharmed(Channel::Proxied, async |player| {
        let kernel = Some(FileSource::Descriptor(0));
        let config = of_kernel(kernel);
        refuses(player, &config, GuestError::BadConfig, &["source.boot.kernel: descriptor 0"]).await
    })
    .await
}

/// Creates a guest of a bare request; the number is that of a kernel's descriptor.
async fn create_with(
    fill: impl FnOnce(create_params::Builder<'_>, u64) -> capnp::Result<()>,
) -> anyhow::Result<Result<(), Failure>> {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let host = Bare::connect(&stage.service.socket())?;
    let lease = host.launch("").await?;
    let kernel = lease.descriptors.push(sealed_file(&Kind::Scripted.image(Act::Spin))?.into());
    let mut request = lease.client.create_request();
    fill(request.get(), kernel)?;
    let answer = request.send().promise.await?;
    Ok(Failure::read_result(answer.get()?.get_result()?)?)
}

fn plain(mut config: guest_config::Builder<'_>, kernel: u64) {
    config.reborrow().init_memory().set_bytes(16 << 20);
    config.get_source().init_boot().init_kernel().set_descriptor(kernel);
}

/// Creates a guest with a plain config and what is filled in besides.
async fn create_bare(fill: impl FnOnce(guest_config::Builder<'_>)) -> anyhow::Result<Result<(), Failure>> {
    let filled = |params: create_params::Builder<'_>, kernel| {
        let mut config = params.init_config();
        plain(config.reborrow(), kernel);
        fill(config);
        Ok(())
    };
    create_with(filled).await
}

/// The words of a refusal as badConfig.
fn bad_config(answer: Result<(), Failure>) -> anyhow::Result<String> {
    let Err(failure) = answer else { anyhow::bail!("the config was taken") };
    expect(&failure.detail, failure.code, GuestError::BadConfig)?;
    Ok(failure.detail)
}

async fn what_is_not_supported_is_listed() -> Story {
    create_bare(|_| {}).await??;
    let detail = bad_config(create_bare(everything).await?)?;
    for field in [
        "source.boot.kernelType: zircon is not supported",
        "block[0].format.file: none was given",
        "net[0].backend.vhostUser: descriptor 1 was not handed over this channel",
        "consoleConfig.ports[1]: \"a/b\" has other characters",
        "vsock.listeners[0].acceptor: none was given",
        "units[0].unit: none was given",
        "gpu: not supported",
        "sound: not supported",
        "wayland: not supported",
        "magma: not supported",
    ] {
        says(&detail, field)?;
    }
    let devices = bad_config(create_bare(bad_devices).await?)?;
    for fault in [
        "net[0].mac: 3 bytes are not the 6 of an address",
        "net[0].backend.tap: descriptor 77 was not handed over this channel",
        "net[1].mac: 01:00:00:00:00:00 is no unicast address",
        "net[1].mtu: 67 is below the least of 68",
        "net[1].backend.stream: descriptor 0 was not handed over this channel",
    ] {
        says(&devices, fault)?;
    }
    let snapshot = create_bare(|config| {
        config.get_source().set_snapshot(capnp_rpc::new_client(NoSnapshot));
    });
    says(&bad_config(snapshot.await?)?, "source.snapshot: not supported")
}

fn bad_devices(config: guest_config::Builder<'_>) {
    let mut net = config.init_net(2);
    let mut first = net.reborrow().get(0);
    first.set_mac(&[2, 0, 0]);
    first.init_backend().set_tap(77);
    let mut second = net.get(1);
    second.set_mac(&[1, 0, 0, 0, 0, 0]);
    second.set_mtu(67);
    // The kernel's, which is taken.
    second.init_backend().set_stream(0);
}

struct NoSnapshot;

impl guest_schema::snapshot_capnp::snapshot::Server for NoSnapshot {}

fn everything(mut config: guest_config::Builder<'_>) {
    if let Ok(guest_config::source::Boot(Ok(mut boot))) = config.reborrow().get_source().which() {
        boot.set_kernel_type(KernelType::Zircon);
    }
    config.reborrow().init_block(1).get(0).set_id("disk");
    config.reborrow().init_net(1).get(0).init_backend().set_vhost_user(1);
    config.reborrow().init_vsock().init_listeners(1);
    config.reborrow().init_mem().set_block_bytes(1 << 21);
    config.reborrow().init_units(1).get(0).set_id("unit");
    config.set_console(true);
    let mut ports = config.reborrow().init_console_config().init_ports(2);
    ports.set(0, "a");
    ports.set(1, "a/b");
    config.set_balloon(true);
    config.set_gpu(true);
    config.set_sound(true);
    config.set_wayland(true);
    config.set_magma(true);
}

/// Enumerants that this version does not know.
async fn values_of_a_later_schema() -> Story {
    let later = create_with(|mut params, kernel| {
        let bytes = later_config(kernel);
        let message = capnp::serialize::read_message_from_flat_slice(&mut &bytes[..], Default::default())?;
        params.set_config(message.get_root()?)
    });
    says(&bad_config(later.await?)?, "onReset: unknown value 65535")
}

/// A config with 65535 in onReset, which no builder of this version writes: where it lies shows in what changes with it.
fn later_config(kernel: u64) -> Vec<u8> {
    let with = |on_reset| {
        let mut message = capnp::message::Builder::new_default();
        let mut config: guest_config::Builder<'_> = message.init_root();
        plain(config.reborrow(), kernel);
        config.set_on_reset(on_reset);
        capnp::serialize::write_message_to_words(&message)
    };
    let (restart, mut stop) = (with(OnReset::Restart), with(OnReset::Stop));
    let place = restart.iter().zip(&stop).position(|(one, other)| one != other).expect("onReset is written");
    stop[place..place + 2].fill(0xff);
    stop
}

async fn text_that_is_none() -> Story {
    let mut bytes = b"quiet \xff\xfe".to_vec();
    let not_utf8 = create_bare(|config| {
        if let Ok(guest_config::source::Boot(Ok(mut boot))) = config.get_source().which() {
            boot.set_cmdline(capnp::text::Reader(&bytes));
        }
    });
    says(&bad_config(not_utf8.await?)?, "source.boot.cmdline: \"quiet ")?;
    bytes.clear();
    let additions = create_bare(|config| {
        if let Ok(guest_config::source::Boot(Ok(boot))) = config.get_source().which() {
            let mut additions = boot.init_cmdline_add(1000);
            for index in 0..1000 {
                additions.set(index, &"y".repeat(100)[..]);
            }
        }
    });
    says(&bad_config(additions.await?)?, "source.boot.cmdline: 100999 bytes are more than 65535")
}
