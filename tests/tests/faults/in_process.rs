//! The VMM as a library: a whole life over a socket pair, in one process.
//!
//! What the process holds is counted in a process of its own, since other tests run in this one.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread::JoinHandle;

use anyhow::anyhow;
use guest_schema::guest_capnp::{guest_lifecycle, observer};
use guest_schema::{Failure, FileSource, GuestConfig, Phase};
use guest_tests::bare::{Bare, sink};
use guest_tests::console::Console;
use guest_tests::process::{Process, Stdin};
use guest_tests::requirements::{scaled, trial};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Kind, Story, expect, play, says, sealed_file};
use guest_tests::{census, wait};
use guest_vmm::Platform;
use libtest_mimic::Trial;

/// The argument with which this binary counts what lives in its process leave behind.
pub const ROUNDS: &str = "--count-in-process-lives";

const WARM_UP: u32 = 5;
const LIVES: u32 = 50;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("in_process::a_whole_life", &[], || play(a_whole_life())),
        trial("in_process::descriptors_of_both_kinds", &[], || play(descriptors_of_both_kinds())),
        trial("in_process::the_end_of_the_lease_ends_a_running_guest", &[], || {
            play(the_lease_ends_a_running_guest())
        }),
        trial("in_process::fifty_lives_leave_nothing", &[], fifty_lives_leave_nothing),
    ]
}

/// A VMM on a thread of this process.
struct Vmm {
    lease: Bare<guest_lifecycle::Client>,
    thread: JoinHandle<()>,
}

impl Vmm {
    /// One that was handed these files, numbered from 0.
    fn start(files: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let platform: Platform = "scripted".parse()?;
        let thread = guest_vmm::serve(theirs, files, platform)?;
        Ok(Self { lease: Bare::over(ours)?, thread })
    }

    async fn create(&self, kernel: u64) -> anyhow::Result<Result<(), Failure>> {
        let mut request = self.lease.client.create_request();
        config(kernel).write(request.get().init_config());
        let answer = request.send().promise.await?;
        Ok(Failure::read_result(answer.get()?.get_result()?)?)
    }

    async fn stop(&self) -> anyhow::Result<Result<(), Failure>> {
        let answer = self.lease.client.stop_request().send().promise.await?;
        Ok(Failure::read_result(answer.get()?.get_result()?)?)
    }

    /// Ends the lease, and with it the thread.
    async fn end(self) -> Story {
        let Self { lease, thread } = self;
        drop(lease);
        let ended = || async { thread.is_finished() };
        wait::until_async("the VMM's thread to end", PATIENCE, ended).await?;
        thread.join().map_err(|_| anyhow!("the VMM's thread panicked"))
    }
}

fn config(kernel: u64) -> GuestConfig {
    GuestConfig::new(Some(FileSource::Descriptor(kernel)), 16 << 20)
}

fn kernel(act: Act) -> anyhow::Result<OwnedFd> {
    Ok(sealed_file(&Kind::Scripted.image(act))?.into())
}

/// Creates, runs and cues a guest that powers itself off.
async fn live(vmm: &Vmm, number: u64) -> Story {
    let lease = &vmm.lease.client;
    let created = vmm.create(number);
    let guest = async {
        let console = Console::default();
        let guest = lease.bind_request().send().pipeline.get_guest();
        let mut serial = guest.get_serial_request();
        serial.get().set_output(sink(&console));
        let input = serial.send().pipeline.get_input();
        let run = lease.run_request().send().promise;
        console.saw("READY").await?;
        let mut cue = input.write_request();
        cue.get().set_bytes(Kind::Scripted.cue(Act::PowerOff));
        cue.send().await?;
        let ended = run.await?;
        Failure::read_result(ended.get()?.get_result()?)??;
        expect("all output", console.whole().await?, "READY\n".to_owned())
    };
    let (created, guest) = tokio::join!(created, guest);
    created??;
    guest
}

async fn a_whole_life() -> Story {
    let vmm = Vmm::start(vec![kernel(Act::PowerOff)?])?;
    live(&vmm, 0).await?;
    let again = vmm.create(0).await?;
    says(&format!("{again:?}"), "descriptor 0")?;
    vmm.stop().await??;
    vmm.end().await
}

async fn descriptors_of_both_kinds() -> Story {
    let vmm = Vmm::start(vec![kernel(Act::PowerOff)?, kernel(Act::PowerOff)?])?;
    // What comes over the channel is numbered behind what was there.
    let sent = vmm.lease.descriptors.push(kernel(Act::PowerOff)?);
    for number in [2 + sent, 1, 0] {
        live(&vmm, number).await?;
    }
    vmm.end().await
}

async fn the_lease_ends_a_running_guest() -> Story {
    let vmm = Vmm::start(vec![kernel(Act::Spin)?])?;
    vmm.create(0).await??;
    let guest = vmm.lease.client.bind_request().send().pipeline.get_guest();
    let observer = guest.observer_request().send().pipeline.get_observer();
    let _run = vmm.lease.client.run_request().send().promise;
    let running = || async { phase(&observer).await.is_ok_and(|phase| phase == Phase::Running) };
    wait::until_async("the guest to run", PATIENCE, running).await?;
    vmm.end().await
}

async fn phase(observer: &observer::Client) -> capnp::Result<Phase> {
    let answer = observer.state_request().send().promise.await?;
    Ok(answer.get()?.get_state()?.get_phase()?.into())
}

fn fifty_lives_leave_nothing() -> Story {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(ROUNDS);
    let counting = Process::spawn(command, Stdin::Empty)?;
    let status = counting.wait(PATIENCE * 2)?;
    anyhow::ensure!(status.success(), "{}", counting.last_words());
    println!("{}", counting.last_words());
    Ok(())
}

/// Lives many lives in this process, which must have nothing else to do, and counts what they leave behind.
pub fn count() -> Story {
    let holding = || -> std::io::Result<(usize, usize)> {
        let pid = std::process::id();
        Ok((census::threads(pid)?, census::open_files(pid)?))
    };
    play(rounds(WARM_UP))?;
    let before = holding()?;
    play(rounds(scaled(LIVES)))?;
    let look = || {
        let now = holding().map_err(|error| error.to_string())?;
        if now == before { Ok(now) } else { Err(format!("{now:?} after {before:?}")) }
    };
    let now = wait::found("threads and descriptors as before", PATIENCE, look)?;
    println!("threads and descriptors: {before:?}, then {now:?}");
    Ok(())
}

async fn rounds(rounds: u32) -> Story {
    for _ in 0..rounds {
        let vmm = Vmm::start(vec![kernel(Act::PowerOff)?])?;
        live(&vmm, 0).await?;
        vmm.end().await?;
    }
    Ok(())
}
