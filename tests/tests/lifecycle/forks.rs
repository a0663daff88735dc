//! A hundred forks of the built-in guest, which live at the same time.

use anyhow::ensure;
use futures::future::try_join_all;
use guest_client::{Host, Snapshot};
use guest_schema::{GuestConfig, MemoryConfig, Outcome};
use guest_tests::requirements::scaled;
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Player, Running, Stage, Story, expect};
use guest_tests::{census, wait};

/// How many forks there are.
const FORKS: u32 = 100;
const MEMORY_BYTES: u64 = 64 << 20;
/// What the parent has written of it before the first fork.
const TOUCHED_MIB: u64 = 48;

struct Fork {
    name: String,
    player: Player,
    running: Running,
}

impl Fork {
    async fn new(stage: &Stage, host: &Host, snapshot: &Snapshot, number: u32) -> anyhow::Result<Self> {
        let name = format!("fork-{number}");
        let player = stage.launch_from(snapshot, host, &name).await?;
        let running = player.run_config(&GuestConfig::new(None, 0)).await?;
        Ok(Self { name, player, running })
    }

    /// Has the guest keep its own name, which it says.
    async fn keeps_its_name(&self) -> Story {
        says(&self.running, &format!("keep {}", self.name), &format!("kept {}\n", self.name)).await
    }

    /// Whether it has it still.
    async fn has_its_name(&self) -> Story {
        self.running.input.write(b"keep\n").await?;
        Ok(self.running.console.saw_times(&format!("kept {}\n", self.name), 2).await?)
    }

    async fn ends(self) -> Story {
        self.player.cue(&self.running, Act::PowerOff).await?;
        self.running.run.await?;
        expect(&self.name, self.running.guest.terminated().await?.outcome, Outcome::Clean)
    }
}

/// What the guest answers to a command.
async fn says(running: &Running, command: &str, answer: &str) -> Story {
    running.input.write(format!("{command}\n").as_bytes()).await?;
    Ok(running.console.saw(answer).await?)
}

pub async fn a_hundred_live_at_once(stage: Stage) -> Story {
    let parent = stage.launch("parent").await?;
    let config = GuestConfig { memory: MemoryConfig::of_bytes(MEMORY_BYTES), ..parent.config(Act::Spin)? };
    let running = parent.play_config(&config).await?;
    let touched = TOUCHED_MIB << 20 >> 12;
    says(&running, &format!("touch {TOUCHED_MIB}"), &format!("touched {touched} pages\n")).await?;
    says(&running, "keep parent", "kept parent\n").await?;
    let (before, snapshot) =
        (census::memfds(stage.service.pid())?, parent.lifecycle.control().snapshot().await?);

    let numbers = 1..=scaled(FORKS);
    let forks =
        try_join_all(numbers.clone().map(|number| Fork::new(&stage, &parent.host, &snapshot, number)));
    let forks = forks.await?;
    try_join_all(forks.iter().map(Fork::keeps_its_name)).await?;
    let list = parent.host.list().await?;
    expect("guests", list.len(), forks.len() + 1)?;

    // Nobody has what another was told to keep, nor has the next fork.
    try_join_all(forks.iter().map(Fork::has_its_name)).await?;
    running.input.write(b"keep\n").await?;
    running.console.saw_times("kept parent\n", 2).await?;
    let last = Fork::new(&stage, &parent.host, &snapshot, 0).await?;
    says(&last.running, "keep", "kept parent\n").await?;

    // What they have not written is there once.
    let of_forks = list.iter().filter(|guest| guest.id != parent.id);
    let bytes: Vec<u64> =
        of_forks.map(|fork| census::proportional_bytes(fork.pid)).collect::<Result<_, _>>()?;
    let most = bytes.iter().max().copied().unwrap_or_default();
    println!("{} forks of {} MiB, Pss at most {} KiB each", bytes.len(), MEMORY_BYTES >> 20, most >> 10);
    ensure!(most < MEMORY_BYTES / 8, "{most} bytes of a fork of {MEMORY_BYTES}");

    drop(snapshot);
    last.ends().await?;
    try_join_all(forks.into_iter().map(Fork::ends)).await?;
    parent.lifecycle.stop().await?;
    drop((parent, running));
    let service = stage.service.pid();
    let freed = || async {
        let memfds = census::memfds(service).map_err(|error| error.to_string())?;
        let vmms = census::children(service).map_err(|error| error.to_string())?;
        if memfds == before && vmms.is_empty() { Ok(()) } else { Err(format!("{memfds} memfds, {vmms:?}")) }
    };
    Ok(wait::found_async("the end of all guests and of the snapshot", PATIENCE, freed).await?)
}
