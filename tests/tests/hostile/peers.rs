//! Peers that break the protocol, or keep it to the other side's harm: at the service's socket, and on the channel of a lease.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use capnp::traits::HasTypeId;
use guest_schema::Phase;
use guest_schema::guest_capnp::guest_lifecycle;
use guest_schema::host_capnp::guest_host;
use guest_tests::bare::Bare;
use guest_tests::requirements::{scaled, trial};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Channel, Kind, Player, Running, Stage, Story, expect, play};
use guest_tests::{census, wait};
use libtest_mimic::Trial;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::attacks::{
    Dice, Method, bootstrap, call, closed, finish, header, honest_session, mutated, send, send_until_stuck,
};

/// How much memory the attacked process may take meanwhile, in bytes.
const MEMORY: u64 = 96 << 20;

/// How long a bystander may wait for an answer.
const ANSWER: Duration = Duration::from_secs(5);

const MUTATIONS: u32 = 300;

/// Whom a peer attacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// guestd's socket.
    Service,
    /// A lease's channel: each attack gets a VMM of its own.
    Lease,
}

impl Victim {
    fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Lease => "lease",
        }
    }

    /// A method without parameters that is answered at once.
    fn method(self) -> Method {
        match self {
            Self::Service => Method { interface: guest_host::Client::TYPE_ID, number: 4 },
            Self::Lease => Method { interface: guest_lifecycle::Client::TYPE_ID, number: 3 },
        }
    }
}

/// Everything that an attack needs, and what must survive it.
struct Scene {
    victim: Victim,
    stage: Stage,
    host: Bare<guest_host::Client>,
    bystander: Player,
    running: Running,
    worst: Cell<Duration>,
    attacked: Cell<u32>,
}

impl Scene {
    async fn set(victim: Victim) -> anyhow::Result<Self> {
        let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
        let bystander = stage.launch("bystander").await?;
        let running = bystander.play(Act::PowerOff).await?;
        let host = Bare::connect(&stage.service.socket())?;
        // Its connection is there once it has been answered, and counts no more as a new one.
        host.client.info_request().send().promise.await?;
        let attacked = Cell::new(stage.service.pid());
        Ok(Self { victim, stage, host, bystander, running, worst: Cell::default(), attacked })
    }

    /// A new channel to the victim.
    async fn channel(&self) -> anyhow::Result<UnixStream> {
        match self.victim {
            Victim::Service => Ok(UnixStream::connect(self.stage.service.socket()).await?),
            Victim::Lease => {
                let channel = self.host.launch_channel("victim").await?;
                let found = self.bystander.host.list().await?;
                let victim =
                    found.iter().find(|guest| guest.id == "victim").context("the victim is listed")?;
                self.attacked.set(victim.pid);
                channel.set_nonblocking(true)?;
                Ok(UnixStream::from_std(channel)?)
            }
        }
    }

    /// Waits until the VMM whose lease was attacked has gone.
    async fn settled(&self) -> Story {
        let alone = || async { self.bystander.host.list().await.is_ok_and(|guests| guests.len() == 1) };
        Ok(wait::until_async("the victim's end", PATIENCE, alone).await?)
    }

    /// Calls of others are answered, and the attacked process stays small, for as long as this is polled.
    async fn watch(&self) -> Story {
        loop {
            let asked = Instant::now();
            let answers = async {
                self.bystander.host.info().await?;
                self.running.guest.observer().state().await
            };
            let state = tokio::time::timeout(ANSWER, answers).await.context("a bystander waits")??;
            expect("the bystander", state.phase, Phase::Running)?;
            self.worst.set(self.worst.get().max(asked.elapsed()));
            // The victim of a lease may have gone already.
            let bytes = census::resident_bytes(self.attacked.get()).unwrap_or(0);
            ensure!(bytes < MEMORY, "the attacked process has {} MiB", bytes >> 20);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Nothing but the offender was harmed.
    async fn unharmed(self) -> Story {
        self.settled().await?;
        self.bystander.cue(&self.running, Act::PowerOff).await?;
        self.running.run.await?;
        let log = self.stage.service.log();
        ensure!(!log.contains("panicked"), "{log}");
        println!("{}: a bystander waited {:?} at most", self.victim.name(), self.worst.get());
        expect("guestd's status", self.stage.service.terminate()?.code(), Some(0))
    }
}

type Attack = fn(&Scene) -> std::pin::Pin<Box<dyn Future<Output = Story> + '_>>;

macro_rules! attacks {
    ($($name:ident),*) => { [$((stringify!($name), (|scene| Box::pin($name(scene))) as Attack)),*] };
}

pub fn trials() -> Vec<Trial> {
    let attacks = attacks![
        garbage,
        half_a_message,
        a_huge_header,
        huge_headers_of_many,
        ten_thousand_unfinished_calls,
        ten_thousand_bootstraps,
        answers_that_nobody_reads,
        half_closed_and_reading,
        half_closed_and_never_reading,
        mutated_sessions
    ];
    let mut trials = Vec::new();
    for victim in [Victim::Service, Victim::Lease] {
        for (name, attack) in attacks {
            let name = format!("peers::{}::{name}", victim.name());
            trials.push(trial(&name, &[], move || play(survived(victim, attack))));
        }
    }
    trials.push(trial("peers::service::silence", &[], || {
        play(survived(Victim::Service, |s| Box::pin(silence(s))))
    }));
    trials
}

async fn survived(victim: Victim, attack: Attack) -> Story {
    let scene = Scene::set(victim).await?;
    tokio::select! {
        attacked = attack(&scene) => attacked?,
        watched = scene.watch() => watched?,
    }
    scene.unharmed().await
}

async fn garbage(scene: &Scene) -> Story {
    for seed in 0..8 {
        let mut stream = scene.channel().await?;
        send(&mut stream, &Dice(seed).bytes(64 << 10)).await;
        closed(&mut stream).await?;
        scene.settled().await?;
    }
    Ok(())
}

async fn half_a_message(scene: &Scene) -> Story {
    let whole = honest_session(scene.victim.method());
    for end in [1, 4, 9, whole.len() / 2, whole.len() - 3] {
        let mut stream = scene.channel().await?;
        send(&mut stream, &whole[..end]).await;
        stream.shutdown().await?;
        closed(&mut stream).await?;
        scene.settled().await?;
    }
    Ok(())
}

async fn a_huge_header(scene: &Scene) -> Story {
    for words in [8 << 20, 1 << 28, u32::MAX] {
        let mut stream = scene.channel().await?;
        send(&mut stream, &header(words)).await;
        closed(&mut stream).await?;
        scene.settled().await?;
    }
    Ok(())
}

/// As many as a channel allows: fifty connections to the service, one to a lease.
async fn huge_headers_of_many(scene: &Scene) -> Story {
    let count = if scene.victim == Victim::Service { 50 } else { 1 };
    let mut streams = Vec::new();
    for _ in 0..count {
        let mut stream = scene.channel().await?;
        // One below the limit and never completed, and one far above it.
        send(&mut stream, &header(200 << 10)).await;
        send(&mut stream, &[0; 4096]).await;
        streams.push(stream);
    }
    for stream in &mut streams {
        stream.shutdown().await?;
        closed(stream).await?;
    }
    scene.settled().await?;
    for _ in 0..count {
        let mut stream = scene.channel().await?;
        send(&mut stream, &header(8 << 20)).await;
        closed(&mut stream).await?;
        scene.settled().await?;
    }
    Ok(())
}

async fn ten_thousand_unfinished_calls(scene: &Scene) -> Story {
    let method = scene.victim.method();
    let stream = scene.channel().await?;
    flood(stream, bootstrap(0), move |question| call(question, method)).await
}

async fn ten_thousand_bootstraps(scene: &Scene) -> Story {
    flood(scene.channel().await?, Vec::new(), bootstrap).await
}

/// Sends ten thousand messages and reads all answers, until it is cut off.
async fn flood(stream: UnixStream, first: Vec<u8>, piece: impl Fn(u32) -> Vec<u8>) -> Story {
    let (mut reader, mut writer) = stream.into_split();
    let writing = async move {
        writer.write_all(&first).await?;
        for question in 1..=10_000 {
            writer.write_all(&piece(question)).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let mut nowhere = tokio::io::sink();
    let reading = tokio::io::copy(&mut reader, &mut nowhere);
    let (written, read) = tokio::time::timeout(PATIENCE, async { tokio::join!(writing, reading) })
        .await
        .context("the offender was not cut off")?;
    // Either end may notice first, depending on what was under way.
    let _ = (written, read);
    Ok(())
}

async fn answers_that_nobody_reads(scene: &Scene) -> Story {
    let method = scene.victim.method();
    let mut stream = scene.channel().await?;
    send(&mut stream, &bootstrap(0)).await;
    let piece = |question| [call(question, method), finish(question)].concat();
    let sent = send_until_stuck(&mut stream, piece).await?;
    println!("{} KiB of calls were taken without their answers being read", sent >> 10);
    Ok(())
}

async fn half_closed_and_reading(scene: &Scene) -> Story {
    let method = scene.victim.method();
    let mut stream = scene.channel().await?;
    send(&mut stream, &bootstrap(0)).await;
    for question in 1..100 {
        send(&mut stream, &call(question, method)).await;
    }
    stream.shutdown().await?;
    closed(&mut stream).await?;
    Ok(())
}

async fn half_closed_and_never_reading(scene: &Scene) -> Story {
    let method = scene.victim.method();
    let files = census::open_files(scene.stage.service.pid())?;
    let mut stream = scene.channel().await?;
    send(&mut stream, &bootstrap(0)).await;
    for question in 1..4000 {
        send(&mut stream, &call(question, method)).await;
    }
    stream.shutdown().await?;
    // Nothing is read: the other side gives up by itself.
    let given_up = || async { census::open_files(scene.stage.service.pid()).is_ok_and(|now| now <= files) };
    wait::until_async("the connection to be given up", PATIENCE * 2, given_up).await?;
    scene.settled().await?;
    closed(&mut stream).await?;
    Ok(())
}

async fn mutated_sessions(scene: &Scene) -> Story {
    let session = honest_session(scene.victim.method());
    let mut dice = Dice(2026);
    for round in 0..scaled(MUTATIONS) {
        let mut stream = scene.channel().await?;
        let bytes = mutated(&session, &mut dice);
        send(&mut stream, &bytes).await;
        // Whoever was cut off already cannot be closed again.
        let _ = stream.shutdown().await;
        closed(&mut stream).await.with_context(|| format!("round {round}: {bytes:02x?}"))?;
        if scene.victim == Victim::Lease {
            scene.settled().await?;
        }
    }
    Ok(())
}

/// A client that says nothing does not keep its connection.
async fn silence(scene: &Scene) -> Story {
    let mut silent = scene.channel().await?;
    let mut slow = scene.channel().await?;
    send(&mut slow, &header(100)).await;
    closed(&mut silent).await?;
    closed(&mut slow).await?;
    Ok(())
}
