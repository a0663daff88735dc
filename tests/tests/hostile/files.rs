//! Files that the client serves, and that lie.

use std::cell::Cell;
use std::rc::Rc;

use guest_schema::common_capnp::file;
use guest_schema::{FileSource, GuestConfig, GuestError};
use guest_tests::requirements::trial;
use guest_tests::stage::{Act, Channel, Kind, Player, Stage, Story, expect, play, refused, says};
use guest_tests::wait;
use libtest_mimic::Trial;
use std::os::unix::fs::FileExt;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("files::lies::direct", &[], || play(lies_are_refused(Channel::Direct))),
        trial("files::lies::proxied", &[], || play(lies_are_refused(Channel::Proxied))),
        trial("files::silence_has_a_deadline", &[], || play(silence_has_a_deadline())),
        trial("files::a_stop_ends_the_wait_for_a_file", &[], || play(a_stop_ends_the_wait())),
        trial(
            "files::the_end_of_the_lease_ends_the_wait",
            &[],
            || play(the_end_of_the_lease_ends_the_wait()),
        ),
    ]
}

/// An honest file.
pub fn serve(file: &std::fs::File) -> file::Client {
    let mut contents = Vec::new();
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    contents.resize(usize::try_from(bytes).expect("a small file"), 0);
    file.read_exact_at(&mut contents, 0).expect("a file that is there");
    capnp_rpc::new_client(Served { contents, lie: Lie::None, reads: Rc::default() })
}

/// What is wrong with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    None,
    /// It has no bytes at all.
    Empty,
    /// It ends before its size.
    EndsEarly,
    /// It gives a byte at a time, though more are there.
    Dribbles,
    /// It gives more than it was asked for.
    Overflows,
    /// It has more bytes than any memory.
    Huge,
    /// It cannot tell its size.
    FailsAtSize,
    /// It cannot be read.
    FailsAtRead,
    /// It never tells its size.
    Silent,
    /// It tells its size, and nothing more.
    SilentAtRead,
}

struct Served {
    contents: Vec<u8>,
    lie: Lie,
    reads: Rc<Cell<u32>>,
}

impl file::Server for Served {
    async fn size(self: Rc<Self>, _: file::SizeParams, mut results: file::SizeResults) -> capnp::Result<()> {
        self.reads.set(self.reads.get() + 1);
        results.get().set_bytes(match self.lie {
            Lie::Silent => std::future::pending().await,
            Lie::FailsAtSize => return Err(capnp::Error::failed("the disk is on fire".into())),
            Lie::Empty => 0,
            Lie::Huge => u64::MAX,
            Lie::EndsEarly => self.contents.len() as u64 + 1,
            _ => self.contents.len() as u64,
        });
        Ok(())
    }

    async fn read(
        self: Rc<Self>,
        params: file::ReadParams,
        mut results: file::ReadResults,
    ) -> capnp::Result<()> {
        let (offset, count) = (params.get()?.get_offset(), params.get()?.get_count());
        let offset = usize::try_from(offset).expect("no more was promised").min(self.contents.len());
        let rest = &self.contents[offset..];
        let rest = &rest[..rest.len().min(usize::try_from(count).expect("a usize is wider"))];
        match self.lie {
            Lie::SilentAtRead => std::future::pending().await,
            Lie::FailsAtRead => return Err(capnp::Error::failed("the disk is on fire".into())),
            Lie::Dribbles => results.get().set_bytes(&rest[..rest.len().min(1)]),
            Lie::Overflows => results.get().set_bytes(&[rest, b"more"].concat()),
            _ => results.get().set_bytes(rest),
        }
        Ok(())
    }
}

/// A config whose kernel lies, and how often its file was asked.
fn lying(player: &Player, lie: Lie) -> anyhow::Result<(GuestConfig, Rc<Cell<u32>>)> {
    let reads = Rc::<Cell<u32>>::default();
    let contents = Kind::Scripted.image(Act::PowerOff);
    let file = Served { contents, lie, reads: reads.clone() };
    let kernel = Some(FileSource::File(capnp_rpc::new_client(file)));
    Ok((GuestConfig { kernel, ..player.config(Act::PowerOff)? }, reads))
}

async fn lies_are_refused(channel: Channel) -> Story {
    let stage = Stage::set(Kind::Scripted, channel, "")?;
    let player = stage.launch("").await?;
    for (lie, words) in [
        (Lie::Empty, "empty"),
        (Lie::EndsEarly, "bytes came at offset"),
        (Lie::Dribbles, "1 bytes came at offset 0"),
        (Lie::Overflows, "bytes came at offset 0"),
        (Lie::Huge, "18446744073709551615 bytes do not fit"),
        (Lie::FailsAtSize, "the disk is on fire"),
        (Lie::FailsAtRead, "the disk is on fire"),
    ] {
        let (config, _) = lying(&player, lie)?;
        let (code, detail) = refused(player.lifecycle.create(&config).await)?;
        expect(&format!("{lie:?}"), code, GuestError::KernelLoadFailure)?;
        says(&detail, "kernel")?;
        says(&detail, words)?;
        expect(
            &format!("run after {lie:?}"),
            refused(player.lifecycle.run().await)?.0,
            GuestError::NotCreated,
        )?;
    }
    power_off(&player, &lying(&player, Lie::None)?.0).await
}

async fn power_off(player: &Player, config: &GuestConfig) -> Story {
    let running = player.play_config(config).await?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn silence_has_a_deadline() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let player = stage.launch("").await?;
    let (config, _) = lying(&player, Lie::SilentAtRead)?;
    let (code, detail) = refused(player.lifecycle.create(&config).await)?;
    expect("create", code, GuestError::KernelLoadFailure)?;
    says(&detail, "did not answer within")?;
    power_off(&player, &player.config(Act::PowerOff)?).await
}

/// Creates a guest whose file keeps silent, and waits until the VMM waits for it.
async fn waiting(player: &Player, lie: Lie) -> anyhow::Result<guest_client::Call<()>> {
    let (config, reads) = lying(player, lie)?;
    let created = player.lifecycle.create(&config);
    let asked = || async { reads.get() > 0 };
    wait::until_async("the file to be asked", guest_tests::service::PATIENCE, asked).await?;
    Ok(created)
}

async fn a_stop_ends_the_wait() -> Story {
    for (channel, lie) in [(Channel::Direct, Lie::Silent), (Channel::Proxied, Lie::SilentAtRead)] {
        let stage = Stage::set(Kind::Scripted, channel, "")?;
        let player = stage.launch("").await?;
        let created = waiting(&player, lie).await?;
        player.lifecycle.stop().await?;
        expect("create", refused(created.await)?.0, GuestError::ControllerForcedHalt)?;
        power_off(&player, &player.config(Act::PowerOff)?).await?;
    }
    Ok(())
}

async fn the_end_of_the_lease_ends_the_wait() -> Story {
    for channel in [Channel::Direct, Channel::Proxied] {
        let stage = Stage::set(Kind::Scripted, channel, "")?;
        let player = stage.launch("").await?;
        let pid = player.pid().await?;
        let _created = waiting(&player, Lie::Silent).await?;
        drop(player);
        guest_tests::stage::gone(pid).await?;
    }
    Ok(())
}
