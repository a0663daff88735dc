//! What VMMs take of the host's memory, each page divided among those that have it mapped (Pss): one without a guest, those that are
//! kept ready, and the tenth of ten forks that live at once.
//!
//! The first two are looked at while the others are there, so that what programs share counts alike.

use anyhow::Context;

use super::launches::{ColdService, WRITTEN_MIB};
use crate::bench::figure::{Definition, Samples};
use crate::bench::fork::{Child, Parent};
use crate::bench::launched;
use crate::bench::life::Pss;
use crate::bench::warm::WarmService;

/// How many forks live at once.
const FORKS: usize = 10;

const IDLE: &str = "idle-memory";
const POOL: &str = "pool-memory";
const TENTH: &str = "fork-10-memory";

pub(super) const FIGURES: [Definition; 3] = [
    Definition::memory(IDLE, "Pss of a VMM that was launched and has no guest"),
    Definition {
        bar: Some(1.0),
        reference: Some(IDLE),
        ..Definition::memory(POOL, "Pss of a VMM that is kept ready, with a guest prepared")
    },
    Definition {
        reference: Some(IDLE),
        ..Definition::memory(TENTH, "Pss of the tenth of ten forks, 64 MiB written before")
    },
];

pub(super) async fn round(
    warm: &WarmService,
    cold: &ColdService,
    samples: &mut Samples,
) -> anyhow::Result<()> {
    let ready = warm.ready(0).await?;
    let lifecycle = launched(&cold.host).await?;
    let idle = cold.vmms(1).await?;
    samples.add(IDLE, Pss::of(*idle.first().context("the VMM")?)?.total_kib);
    for vmm in ready {
        samples.add(POOL, Pss::of(vmm)?.total_kib);
    }
    drop(lifecycle);
    cold.vmms(0).await?;
    forks(warm, samples).await
}

async fn forks(warm: &WarmService, samples: &mut Samples) -> anyhow::Result<()> {
    let parent = Parent::that_wrote(&warm.host, WRITTEN_MIB).await?;
    let (snapshot, _, _) = parent.snapshot().await?;
    let mut forks = Vec::new();
    for _ in 0..FORKS {
        forks.push(Child::fork(&snapshot).await?);
    }
    warm.ready(1 + FORKS).await?;
    let tenth = forks.last().context("a fork")?.pid(&warm.host).await?;
    samples.add(TENTH, Pss::of(tenth)?.total_kib);
    for fork in forks {
        fork.end().await?;
    }
    parent.launched.lifecycle.stop().await?;
    drop((parent, snapshot));
    warm.ready(0).await.map(drop)
}
