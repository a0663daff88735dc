//! Launches with ids and channels that are none, and floods of descriptors.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use anyhow::ensure;
use guest_client::ClientError;
use guest_schema::host_capnp::{guest_exit, guest_host};
use guest_schema::{Exit, Failure, GuestError, Outcome};
use guest_tests::bare::Bare;
use guest_tests::requirements::trial;
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Channel, Kind, Stage, Story, expect, play, refused, says};
use guest_tests::{census, wait};
use libtest_mimic::Trial;
use rustix::net::{AddressFamily, SocketType};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("launches::ids_that_cannot_be", &[], || play(ids_that_cannot_be())),
        trial("launches::ends_that_are_no_channel", &[], || play(ends_that_are_no_channel())),
        trial("launches::a_channel_that_nobody_holds", &[], || play(a_channel_that_nobody_holds())),
        trial("launches::more_guests_than_allowed", &[], || play(more_guests_than_allowed())),
        trial("launches::descriptors_flood_the_service", &[], || play(descriptors_flood_the_service())),
        trial("launches::descriptors_flood_a_lease", &[], || play(descriptors_flood_a_lease())),
        trial("launches::descriptors_that_nobody_takes_are_closed", &[], || {
            play(untaken_descriptors_are_closed())
        }),
        trial("launches::a_manager_is_not_there_yet", &[], || play(a_manager_is_not_there_yet())),
    ]
}

async fn ids_that_cannot_be() -> Story {
    for channel in [Channel::Direct, Channel::Proxied] {
        let stage = Stage::set(Kind::Scripted, channel, "")?;
        let _first = stage.launch("taken").await?;
        let longest = "x".repeat(64);
        let _long = stage.launch(&longest).await?;
        let too_long = "x".repeat(65);
        let endless = "x".repeat(1 << 20);
        let bad = ["a b", "a/b", "ä", "new\nline", "nul\0", "\u{202e}", &too_long, &endless];
        for id in bad {
            says(&refused_launch(&stage, id).await?, "an id is at most 64")?;
        }
        says(&refused_launch(&stage, "taken").await?, "\"taken\" is taken")?;
        let host = stage.service.connect().await?;
        expect("guests", host.list().await?.len(), 2)?;
    }
    Ok(())
}

/// What a launch was refused with: the answer's own words, which calls on the lease repeat.
async fn refused_launch(stage: &Stage, id: &str) -> anyhow::Result<String> {
    let host = stage.service.connect().await?;
    let launched = match stage.channel {
        Channel::Direct => host.launch(id)?,
        Channel::Proxied => host.launch_proxied(id),
    };
    let stopped = launched.lifecycle.stop();
    let (code, detail) = refused(launched.id.await)?;
    expect("code", code, GuestError::BadConfig)?;
    ensure!(detail.len() < 4096, "{} bytes of detail", detail.len());
    expect("code of stop", refused(stopped.await)?.0, GuestError::BadConfig)?;
    expect("code of exit", refused(launched.exit.terminated().await)?.0, GuestError::BadConfig)?;
    Ok(detail)
}

/// A launch with this number for a channel, bare.
async fn launch_on(
    host: &Bare<guest_host::Client>,
    number: u64,
) -> anyhow::Result<Result<guest_exit::Client, Failure>> {
    let mut request = host.client.launch_request();
    request.get().set_server_end(number);
    let answer = request.send().promise.await?;
    let answer = answer.get()?;
    match answer.has_error() {
        true => Ok(Err(Failure::read(answer.get_error()?)?)),
        false => Ok(Ok(answer.get_exit()?)),
    }
}

fn no_channels() -> anyhow::Result<Vec<OwnedFd>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(vec![
        File::open("/dev/null")?.into(),
        File::open("/")?.into(),
        tempfile::tempfile()?.into(),
        std::io::pipe()?.0.into(),
        UnixDatagram::unbound()?.into(),
        rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?,
        TcpStream::connect(listener.local_addr()?)?.into(),
    ])
}

async fn ends_that_are_no_channel() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let host = Bare::connect(&stage.service.socket())?;
    let refuses = async |number: u64, words: &str| -> Story {
        let Err(failure) = launch_on(&host, number).await? else {
            anyhow::bail!("a launch on descriptor {number} was not refused");
        };
        expect("code", failure.code, GuestError::BadConfig)?;
        says(&failure.detail, "serverEnd")?;
        says(&failure.detail, words)
    };
    refuses(0, "descriptor 0 was not handed over").await?;
    refuses(u64::MAX, &u64::MAX.to_string()).await?;
    for end in no_channels()? {
        refuses(host.descriptors.push(end), "not a Unix stream socket").await?;
    }
    let (_ours, theirs) = UnixStream::pair()?;
    let number = host.descriptors.push(theirs.into());
    launch_on(&host, number).await??;
    refuses(number, "was used before").await
}

/// Stream sockets whose other end is not there: those that never had one are refused, and else the VMM ends at once.
async fn a_channel_that_nobody_holds() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let host = Bare::connect(&stage.service.socket())?;
    let folder = tempfile::TempDir::new()?;
    let unconnected = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    let listening = UnixListener::bind(folder.path().join("socket"))?;
    for end in [unconnected, listening.into()] {
        let Err(failure) = launch_on(&host, host.descriptors.push(end)).await? else {
            anyhow::bail!("a socket without another end was taken");
        };
        expect("code", failure.code, GuestError::BadConfig)?;
        says(&failure.detail, "serverEnd: the socket is not connected")?;
    }
    let (_, widowed) = UnixStream::pair()?;
    let exit = launch_on(&host, host.descriptors.push(widowed.into())).await??;
    let answer = tokio::time::timeout(PATIENCE, exit.when_terminated_request().send().promise).await??;
    let exit = Exit::read(answer.get()?.get_exit()?)?;
    expect(&format!("outcome: {exit:?}"), exit.outcome, Outcome::Forced)
}

async fn more_guests_than_allowed() -> Story {
    let folder = tempfile::TempDir::new()?;
    let config = folder.path().join("guestd.toml");
    std::fs::write(&config, "max-guests = 2\nmax-connections = 3\n")?;
    let config = config.to_str().expect("a plain name");
    let service = guest_tests::service::Service::start("scripted", &["--config", config])?;
    let host = service.connect().await?;
    let mut guests = vec![host.launch_proxied(""), host.launch("")?];
    for guest in &mut guests {
        (&mut guest.id).await?;
    }
    let (code, detail) = refused(host.launch("")?.id.await)?;
    expect("code", code, GuestError::LimitExceeded)?;
    says(&detail, "2 guests")?;
    let others = [service.connect().await?, service.connect().await?];
    for other in &others {
        other.info().await?;
    }
    let fourth = service.connect().await?.info().await;
    ensure!(matches!(fourth, Err(ClientError::Lost(_))), "a fourth connection: {fourth:?}");
    drop(others);
    let again = async || match service.connect().await {
        Ok(host) => host.info().await.is_ok(),
        Err(_) => false,
    };
    wait::until_async("a place for a connection", PATIENCE, again).await?;
    drop(guests);
    let room = async || host.info().await.is_ok_and(|info| info.guests == 0);
    Ok(wait::until_async("a place for a guest", PATIENCE, room).await?)
}

async fn descriptors_flood_the_service() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let bystander = stage.service.connect().await?;
    bystander.info().await?;
    let before = census::open_files(stage.service.pid())?;
    let flooding = Bare::<guest_host::Client>::connect(&stage.service.socket())?;
    flood(&flooding)?;
    let answer = flooding.client.info_request().send().promise.await;
    ensure!(answer.is_err(), "the flood was taken");
    bystander.info().await?;
    let closed = || async { census::open_files(stage.service.pid()).is_ok_and(|now| now <= before) };
    Ok(wait::until_async("the descriptors to be closed", PATIENCE, closed).await?)
}

fn flood<C>(connection: &Bare<C>) -> Story {
    for _ in 0..600 {
        connection.descriptors.push(File::open("/dev/null")?.into());
    }
    Ok(())
}

async fn descriptors_flood_a_lease() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let other = stage.launch("other").await?;
    let running = other.play(Act::PowerOff).await?;
    let host = Bare::connect(&stage.service.socket())?;
    let flooding = host.launch("flooding").await?;
    flood(&flooding)?;
    let answer = flooding.client.stop_request().send().promise.await;
    ensure!(answer.is_err(), "the flood was taken");
    let alone = || async { other.host.list().await.is_ok_and(|guests| guests.len() == 1) };
    wait::until_async("the flooded VMM to end", PATIENCE, alone).await?;
    stage.service.process().logged("more than 512 descriptors", PATIENCE)?;
    other.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

async fn untaken_descriptors_are_closed() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let before = census::open_files(stage.service.pid())?;
    let host = Bare::<guest_host::Client>::connect(&stage.service.socket())?;
    for _ in 0..500 {
        host.descriptors.push(File::open("/dev/null")?.into());
    }
    host.client.info_request().send().promise.await?;
    let held = census::open_files(stage.service.pid())?;
    ensure!(held >= before + 500, "{held} descriptors are held, {before} were");
    drop(host);
    let closed = || async { census::open_files(stage.service.pid()).is_ok_and(|now| now <= before) };
    Ok(wait::until_async("the descriptors to be closed", PATIENCE, closed).await?)
}

async fn a_manager_is_not_there_yet() -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let host = Bare::<guest_host::Client>::connect(&stage.service.socket())?;
    crate::methods::unimplemented("manager", host.client.manager_request().send().promise).await
}
