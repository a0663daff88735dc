//! Snapshots as the service keeps them, with VMMs that hand over whatever they like.
//!
//! The service runs in this process; it launches this same program as its VMM, which then is `stand_in`.

mod stand_in;

use anyhow::{anyhow, bail, ensure};
use capnp_rpc::rpc_twoparty_capnp::Side;
use guest_schema::guest_capnp::guest_control;
use guest_schema::host_capnp::{guest_exit, guest_host};
use guest_schema::snapshot_capnp::snapshot;
use guest_schema::{Exit, Failure, GuestError, Outcome, SnapshotInfo};
use guest_service::{Service, ServiceConfig};
use guest_transport::{Connection, Descriptors, Limits};
use libtest_mimic::{Arguments, Trial};
use stand_in::Parts;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, spawn_local};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many snapshots the service of these tests keeps.
const MOST: usize = 3;
const USER: u32 = 1000;

type Story = anyhow::Result<()>;

fn main() -> ExitCode {
    // As the service starts its VMMs.
    if std::env::args().any(|argument| argument == "--hypervisor") {
        return stand_in::main();
    }
    let trials = vec![
        trial("parts_that_make_no_snapshot_are_refused_and_closed", || play(bad_parts())),
        trial(
            "a_snapshot_outlives_its_vmm_and_is_freed_with_its_last_reference",
            || play(a_snapshots_life()),
        ),
        trial("guests_are_given_all_files_of_their_snapshot", || play(files_are_given())),
        trial("a_snapshot_is_found_by_its_token_and_its_user", || play(tokens())),
        trial("more_snapshots_than_allowed", || play(more_than_allowed())),
        trial("a_capability_from_a_vmm_takes_no_descriptors", || play(a_capability_from_a_vmm())),
        trial("a_vmm_that_floods_the_service_with_descriptors_is_killed", || play(a_flood())),
        trial("a_service_that_ends_launches_nothing_from_snapshots", || play(the_services_end())),
    ];
    // One after the other: they count what this process has open.
    libtest_mimic::run(&Arguments { test_threads: Some(1), ..Arguments::from_args() }, trials).exit_code()
}

fn trial(name: &str, test: fn() -> Story) -> Trial {
    Trial::test(name, move || test().map_err(|error| format!("{error:#}").into()))
}

fn play(story: impl Future<Output = Story>) -> Story {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let timed = async { tokio::time::timeout(PATIENCE, story).await? };
    tokio::task::LocalSet::new().block_on(&runtime, timed)
}

fn service() -> anyhow::Result<Rc<Service>> {
    let config = ServiceConfig {
        vmm: Some(std::env::current_exe()?),
        hypervisor: "scripted".into(),
        // They count what is open.
        warm: 0,
        max_snapshots: MOST,
        ..ServiceConfig::default()
    };
    Ok(Service::new(config)?)
}

/// How many descriptors this process has open, the service's included.
fn open_files() -> anyhow::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

async fn until(what: &str, mut condition: impl FnMut() -> anyhow::Result<bool>) -> Story {
    let begin = Instant::now();
    while !condition()? {
        ensure!(begin.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// A client of one user.
struct Client {
    host: guest_host::Client,
    descriptors: Descriptors,
    connection: JoinHandle<()>,
}

impl Client {
    fn of(service: &Rc<Service>, uid: u32) -> anyhow::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        spawn_local(service.clone().serve(theirs, uid));
        let mut connection = Connection::client(ours, Limits::of_client())?;
        let (host, descriptors) = (connection.bootstrap(Side::Server), connection.descriptors());
        let connection = spawn_local(async move { drop(connection.run().await) });
        Ok(Self { host, descriptors, connection })
    }

    async fn launch(&self, id: &str) -> anyhow::Result<Guest> {
        let (lease, theirs) = UnixStream::pair()?;
        let mut request = self.host.launch_request();
        request.get().set_server_end(self.descriptors.push(theirs.into()));
        request.get().set_id(id);
        let answer = request.send().promise.await?;
        let answer = answer.get()?;
        refusal(answer.has_error(), answer.get_error())??;
        self.guest(answer.get_id()?.to_str()?, Some(lease), answer.get_exit()?).await
    }

    async fn guest(
        &self,
        id: &str,
        lease: Option<UnixStream>,
        exit: guest_exit::Client,
    ) -> anyhow::Result<Guest> {
        let mut request = self.host.find_request();
        request.get().set_id(id);
        let control = request.send().promise.await?.get()?.get_control()?;
        Ok(Guest { lease, control, exit })
    }

    async fn snapshot(&self, token: &[u8]) -> anyhow::Result<Result<snapshot::Client, Failure>> {
        let mut request = self.host.snapshot_request();
        request.get().set_token(token);
        let answer = request.send().promise.await?;
        let answer = answer.get()?;
        match refusal(answer.has_error(), answer.get_error())? {
            Ok(()) => Ok(Ok(answer.get_snapshot()?)),
            Err(failure) => Ok(Err(failure)),
        }
    }

    /// Launches a guest from a snapshot that came over this connection.
    async fn launch_from(
        &self,
        snapshot: &snapshot::Client,
        id: &str,
    ) -> anyhow::Result<Result<Guest, Failure>> {
        let (lease, theirs) = UnixStream::pair()?;
        let mut request = snapshot.launch_request();
        request.get().set_server_end(self.descriptors.push(theirs.into()));
        request.get().set_id(id);
        let answer = request.send().promise.await?;
        let answer = answer.get()?;
        if let Err(failure) = refusal(answer.has_error(), answer.get_error())? {
            return Ok(Err(failure));
        }
        Ok(Ok(self.guest(answer.get_id()?.to_str()?, Some(lease), answer.get_exit()?).await?))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// A launched guest, which the stand-in is.
struct Guest {
    lease: Option<UnixStream>,
    control: guest_control::Client,
    exit: guest_exit::Client,
}

/// A snapshot's capability as a VMM has handed it on, and its token.
type Taken = (snapshot::Client, Vec<u8>);

impl Guest {
    /// Has the VMM hand such parts to the service.
    async fn snapshot(&self, parts: Parts) -> anyhow::Result<Result<Taken, Failure>> {
        let mut request = self.control.update_request();
        request.get().set_path(parts.name());
        request.send().promise.await?;
        let answer = self.control.snapshot_request().send().promise.await?;
        let answer = answer.get()?;
        match refusal(answer.has_error(), answer.get_error())? {
            Ok(()) => Ok(Ok((answer.get_snapshot()?, answer.get_token()?.to_vec()))),
            Err(failure) => Ok(Err(failure)),
        }
    }

    /// What the VMM was attached with.
    async fn began_with(&self) -> anyhow::Result<String> {
        let answer = self.control.inspect_request().send().promise.await?;
        Ok(answer.get()?.get_tree()?.to_string()?)
    }

    async fn exit(&self) -> anyhow::Result<Exit> {
        let answer = self.exit.when_terminated_request().send().promise.await?;
        Ok(Exit::read(answer.get()?.get_exit()?)?)
    }

    /// Gives the lease up, and waits until the VMM has ended.
    async fn end(mut self) -> Story {
        drop(self.lease.take());
        self.exit().await.map(drop)
    }
}

fn refusal(
    refused: bool,
    failure: capnp::Result<guest_schema::common_capnp::failure::Reader<'_>>,
) -> capnp::Result<Result<(), Failure>> {
    Ok(if refused { Err(Failure::read(failure?)?) } else { Ok(()) })
}

fn is_refused<T>(answer: Result<T, Failure>, code: GuestError, words: &str) -> Story {
    match answer {
        Err(failure) if failure.code == code && failure.detail.contains(words) => Ok(()),
        Err(failure) => Err(anyhow!("{failure} is not {code} with {words:?}")),
        Ok(_) => Err(anyhow!("not refused, though {words:?}")),
    }
}

async fn info(snapshot: &snapshot::Client) -> anyhow::Result<SnapshotInfo> {
    let answer = snapshot.info_request().send().promise.await?;
    Ok(SnapshotInfo::read(answer.get()?.get_info()?)?)
}

async fn bad_parts() -> Story {
    let service = service()?;
    let client = Client::of(&service, USER)?;
    let guest = client.launch("one").await?;
    let before = open_files()?;
    for (parts, words) in [
        (Parts::Unsealed, "memory is not sealed"),
        (Parts::Writable, "memory is not sealed against writes, shrinking and growing, but"),
        (Parts::Device, "memory is no memfd"),
        (Parts::File, "memory is no"),
        (Parts::UnknownNumber, "files[1].descriptor: memory: descriptor 1099511627776 was not handed over"),
        (Parts::NumberTwice, "files[2].descriptor: kernel: descriptor"),
        (Parts::NameTwice, "files[3].name: memory is there twice"),
        (Parts::Many, "files: 6 are more than the 5 that there can be"),
        (Parts::UnknownName, "files[3].name: \"disk\\n\" is none of a snapshot's files"),
        (Parts::Missing, "files: kernel is missing"),
        (Parts::Nothing, "files: state is missing"),
        (Parts::LargeInfo, "info: it is of more than 64 KiB"),
    ] {
        is_refused(guest.snapshot(parts).await?, GuestError::BadConfig, words)?;
        ensure!(open_files()? == before, "{parts:?}: {before} open before, {} now", open_files()?);
    }
    guest.snapshot(Parts::Good).await??;
    guest.end().await
}

async fn a_snapshots_life() -> Story {
    let service = service()?;
    let client = Client::of(&service, USER)?;
    client.launch("first").await?.end().await?;
    let before = open_files()?;
    let guest = client.launch("parent").await?;
    let (taken, token) = guest.snapshot(Parts::Good).await??;
    ensure!(token.len() == 16 && token != [0; 16], "{token:?}");
    guest.end().await?;
    let found = client.snapshot(&token).await??;
    drop(taken);
    let known = info(&found).await?;
    ensure!(known == SnapshotInfo { parent: "parent".into(), ..stand_in::info() }, "{known:?}");
    let fork = client.launch_from(&found, "fork").await??;
    ensure!(fork.began_with().await? == "of parent: state, memory, kernel", "{}", fork.began_with().await?);
    drop(found);
    until("the snapshot to be freed", || Ok(open_files()? < before + 6)).await?;
    is_refused(client.snapshot(&token).await?, GuestError::BadConfig, "token: no snapshot has it")?;
    // The fork goes on without it.
    fork.began_with().await?;
    fork.end().await?;
    until("all files to be closed", || Ok(open_files()? <= before)).await
}

async fn files_are_given() -> Story {
    let service = service()?;
    let client = Client::of(&service, USER)?;
    let parent = client.launch("parent").await?;
    let new = "nothing";
    ensure!(parent.began_with().await? == new, "a new guest began with {}", parent.began_with().await?);
    let (_taken, token) = parent.snapshot(Parts::All).await??;
    let snapshot = client.snapshot(&token).await??;
    for number in 0..3 {
        let fork = client.launch_from(&snapshot, &format!("fork-{number}")).await??;
        let began = fork.began_with().await?;
        ensure!(began == "of parent: state, memory, kernel, layer, ramdisk", "{began}");
        fork.end().await?;
    }
    let refused = client.launch_from(&snapshot, "parent").await?.map(drop);
    is_refused(refused, GuestError::BadConfig, "\"parent\" is taken")?;
    parent.end().await
}

async fn tokens() -> Story {
    let service = service()?;
    let client = Client::of(&service, USER)?;
    let guest = client.launch("one").await?;
    let (_taken, token) = guest.snapshot(Parts::Good).await??;
    let (_other, other) = guest.snapshot(Parts::Good).await??;
    ensure!(token != other, "two snapshots have one token");
    client.snapshot(&token).await??;
    Client::of(&service, USER)?.snapshot(&token).await??;
    let unknown = "token: no snapshot has it";
    let stranger = Client::of(&service, USER + 1)?.snapshot(&token).await?;
    is_refused(stranger, GuestError::BadConfig, unknown)?;
    let mut changed = token.clone();
    changed[15] ^= 1;
    for token in [&[][..], &token[..15], &[&token[..], &[0]].concat(), &changed, &[0; 16]] {
        is_refused(client.snapshot(token).await?, GuestError::BadConfig, unknown)?;
    }
    guest.end().await
}

async fn more_than_allowed() -> Story {
    let service = service()?;
    let client = Client::of(&service, USER)?;
    let guest = client.launch("one").await?;
    let mut taken = Vec::new();
    for _ in 0..MOST {
        taken.push(guest.snapshot(Parts::Good).await??);
    }
    let words = format!("limit of {MOST} snapshots");
    is_refused(guest.snapshot(Parts::Good).await?, GuestError::LimitExceeded, &words)?;
    drop(taken.pop());
    let begin = Instant::now();
    while guest.snapshot(Parts::Good).await?.is_err() {
        ensure!(begin.elapsed() < PATIENCE, "no place becomes free");
    }
    guest.end().await
}

async fn a_capability_from_a_vmm() -> Story {
    let service = service()?;
    let client = Client::of(&service, USER)?;
    let guest = client.launch("one").await?;
    let (taken, _) = guest.snapshot(Parts::Good).await??;
    ensure!(info(&taken).await?.vps == stand_in::info().vps, "another snapshot's info");
    let refused = client.launch_from(&taken, "two").await?.map(drop);
    is_refused(refused, GuestError::BadConfig, "serverEnd: none comes with this capability")?;
    let mut request = taken.launch_proxied_request();
    request.get().set_id("two");
    let answer = request.send().promise.await?;
    let fork = client.guest("two", None, answer.get()?.get_exit()?).await?;
    ensure!(fork.began_with().await? == "of one: state, memory, kernel", "{}", fork.began_with().await?);
    // The lease is in the answer.
    drop(answer);
    ensure!(fork.exit().await?.outcome == Outcome::Forced, "the fork outlived its lease");
    guest.end().await
}

async fn a_flood() -> Story {
    let service = service()?;
    let client = Client::of(&service, USER)?;
    client.launch("first").await?.end().await?;
    let before = open_files()?;
    let guest = client.launch("flooding").await?;
    let Err(_) = guest.snapshot(Parts::Flood).await else { bail!("the flood was taken") };
    let exit = guest.exit().await?;
    ensure!(exit.outcome == Outcome::Crashed && exit.detail.contains("signal 9"), "{exit:?}");
    drop(guest);
    until("all files to be closed", || Ok(open_files()? <= before)).await
}

async fn the_services_end() -> Story {
    let service = service()?;
    let client = Client::of(&service, USER)?;
    let guest = client.launch("one").await?;
    let (_taken, token) = guest.snapshot(Parts::Good).await??;
    let snapshot = client.snapshot(&token).await??;
    service.shutdown().await;
    info(&snapshot).await?;
    let refused = client.launch_from(&snapshot, "two").await?.map(drop);
    is_refused(refused, GuestError::FailedServiceConnect, "the service is ending")
}
