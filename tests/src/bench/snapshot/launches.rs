//! Guests that go on from a file or as forks, with a VMM ready and without, up to their first byte.
//!
//! The guest has 128 MiB and has written 64 MiB. The floor of those that find no VMM ready is the spawn of an empty program, and the bare
//! ioctls that let a guest go on from its first byte with a private mapping of a file in the same folder.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use guest_client::{Host, Snapshot};
use tempfile::TempDir;

use crate::bench::figure::{Definition, Samples};
use crate::bench::floor::{self, BareSnapshot, EmptyProgram};
use crate::bench::fork::{Child, Parent};
use crate::bench::warm::WarmService;
use crate::service::{PATIENCE, Service};
use crate::{census, wait};

/// What the guest has written.
pub(super) const WRITTEN_MIB: u32 = 64;
/// Launches of each kind in a round.
const LAUNCHES: usize = 3;

const FLOOR: &str = "floor-restore";
const RESTORE: &str = "restore";
const RESTORE_COLD: &str = "restore-cold";
const FORK_COLD: &str = "fork-cold";

pub(super) const FIGURES: [Definition; 5] = [
    floor::OF_IN_PROCESS,
    Definition::time(
        FLOOR,
        "empty program, and bare ioctls with a private mapping of a file → next byte",
        None,
    ),
    Definition::beside(RESTORE, "launch from a file with a VMM ready → first byte", floor::IN_PROCESS, 0.5),
    Definition::beside(RESTORE_COLD, "the same with none ready", FLOOR, 1.5),
    Definition::beside(FORK_COLD, "launch from a snapshot with no VMM ready → first byte", FLOOR, 1.5),
];

/// A guestd that keeps no VMMs ready.
pub(super) struct ColdService {
    service: Service,
    pub host: Host,
}

impl ColdService {
    pub async fn new() -> anyhow::Result<Self> {
        let service = Service::start_logging("info", "kvm", &[])?;
        let host = service.connect().await?;
        Ok(Self { service, host })
    }

    /// Waits until so many VMMs are left, and gives their processes.
    pub async fn vmms(&self, count: usize) -> anyhow::Result<Vec<u32>> {
        let look = || async {
            match census::children(self.service.pid()) {
                Ok(vmms) if vmms.len() == count => Ok(vmms),
                other => Err(format!("{other:?}")),
            }
        };
        Ok(wait::found_async("the end of other VMMs", PATIENCE, look).await?)
    }
}

/// What guests go on from, for all rounds.
pub(super) struct Launches {
    empty: EmptyProgram,
    bare: BareSnapshot,
    snapshot: Snapshot,
    saved: PathBuf,
    _folder: TempDir,
}

impl Launches {
    /// Its files are in a folder of its own below this one.
    pub async fn new(cold: &ColdService, folder: &Path) -> anyhow::Result<Self> {
        let folder = TempDir::with_prefix_in("guestd-bench-", folder)?;
        let bare = BareSnapshot::take(File::create_new(folder.path().join("bare"))?)?;
        let saved = folder.path().join("saved");
        let parent = Parent::that_wrote(&cold.host, WRITTEN_MIB).await?;
        let (snapshot, _, _) = parent.snapshot().await?;
        snapshot.save(&saved, None, |_, _| ControlFlow::Continue(())).await?;
        parent.launched.lifecycle.stop().await?;
        Ok(Self { empty: EmptyProgram::build()?, bare, snapshot, saved, _folder: folder })
    }

    pub async fn round(
        &self,
        warm: &WarmService,
        cold: &ColdService,
        samples: &mut Samples,
    ) -> anyhow::Result<()> {
        for _ in 0..LAUNCHES {
            warm.ready(0).await?;
            cold.vmms(0).await?;
            samples.time(floor::IN_PROCESS, floor::in_process()?);
            samples.time(FLOOR, self.empty.spawn()? + self.bare.restore()?);
            let restored = Child::restored(&warm.host, &self.saved, "echo on").await?;
            ends(restored, RESTORE, samples).await?;
            warm.ready(0).await?;
            let restored = Child::restored(&cold.host, &self.saved, "echo on").await?;
            ends(restored, RESTORE_COLD, samples).await?;
            cold.vmms(0).await?;
            ends(Child::fork(&self.snapshot).await?, FORK_COLD, samples).await?;
        }
        warm.ready(0).await?;
        cold.vmms(0).await.map(drop)
    }
}

/// Notes how long it took, and ends the guest.
async fn ends(child: Child, figure: &'static str, samples: &mut Samples) -> anyhow::Result<()> {
    samples.time(figure, child.answered);
    child.end().await
}
