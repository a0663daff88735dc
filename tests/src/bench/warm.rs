//! A launch that finds a VMM ready, and what one that is ready costs.
//!
//! guestd keeps two ready, as by default. Each round begins once they are, with a guest prepared, and no other VMM is left.

use anyhow::Context;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use guest_client::Host;

use super::figure::{Definition, Samples};
use super::life::Pss;
use super::{Group, Rounds, floor, launch};
use crate::service::{PATIENCE, Service};
use crate::{census, wait};

const LAUNCH: &str = "warm-launch";
const MEMORY: &str = "warm-memory";

/// What a launch may take, of the in-process floor.
const LAUNCH_BAR: f64 = 0.5;

/// How many VMMs are kept ready.
const WARM: u32 = 2;

pub(super) static GROUP: Group = Group {
    figures: &[
        Definition::beside(
            LAUNCH,
            "launch with a VMM ready, all in one flight → first byte",
            floor::IN_PROCESS,
            LAUNCH_BAR,
        ),
        Definition::memory(MEMORY, "Pss of a VMM that is ready, beside another"),
    ],
    open: |_| {
        async { Ok(Box::new(WarmLaunches(WarmService::new().await?)) as Box<dyn Rounds>) }.boxed_local()
    },
};

/// A guestd that keeps VMMs ready.
pub(super) struct WarmService {
    service: Service,
    pub host: Host,
}

impl WarmService {
    pub async fn new() -> anyhow::Result<Self> {
        let service = Service::start_all("info", "kvm", WARM, &[])?;
        let host = service.connect().await?;
        // From the first guest on it knows what to prepare.
        launch::live(&host).await?;
        Ok(Self { service, host })
    }

    /// Waits until the VMMs are ready and have prepared a guest, and of this guestd nothing else is left but so many guests; gives all their processes.
    pub async fn ready(&self, guests: usize) -> anyhow::Result<Vec<u32>> {
        let look = || async {
            let info = self.host.info().await.map_err(|error| error.to_string())?;
            let vmms = census::children(self.service.pid()).map_err(|error| error.to_string())?;
            let open = |&pid: &u32| census::holds(pid, "/dev/kvm").is_ok_and(|open| open);
            let all = vmms.len() == WARM as usize + guests && vmms.iter().all(open);
            if (info.warm, info.prepared) == (WARM, WARM) && all {
                Ok(vmms)
            } else {
                Err(format!("{info:?}, {vmms:?}"))
            }
        };
        Ok(wait::found_async("VMMs to be ready", PATIENCE, look).await?)
    }
}

struct WarmLaunches(WarmService);

impl WarmLaunches {
    async fn measure(&self, samples: &mut Samples) -> anyhow::Result<()> {
        let vmms = self.0.ready(0).await?;
        samples.add(MEMORY, Pss::of(*vmms.first().context("a ready VMM")?)?.total_kib);
        let (launched, _) = launch::live(&self.0.host).await?;
        samples.time(LAUNCH, launched);
        // The next group is not to share the machine with a VMM that starts.
        self.0.ready(0).await.map(drop)
    }
}

impl Rounds for WarmLaunches {
    fn round<'a>(&'a mut self, samples: &'a mut Samples) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        self.measure(samples).boxed_local()
    }
}
