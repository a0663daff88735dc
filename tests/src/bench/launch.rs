//! A cold launch: everything asked for in one flight, and the guest's own end.

use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::LocalBoxFuture;
use guest_client::{Host, Launched};

use super::figure::{Definition, Samples};
use super::{Group, Rounds, config, first_byte, floor, output};

const LAUNCH: &str = "launch";
const POWER_OFF: &str = "power-off";

pub(super) static GROUP: Group = Group {
    figures: &[
        Definition::time(LAUNCH, "cold launch, all in one flight → first byte", Some(floor::COLD)),
        Definition::time(
            POWER_OFF,
            "input on which the guest powers itself off → run answered",
            Some(floor::CLOSE),
        ),
    ],
    open: |setting| async { Ok(Box::new(Launches(setting.host.clone())) as Box<dyn Rounds>) }.boxed_local(),
};

struct Launches(Host);

/// A guest's whole life: from its launch until its first byte, and from the input on which it powers itself off until run has
/// answered.
pub(super) async fn live(host: &Host) -> anyhow::Result<(Duration, Duration)> {
    let (output, mut bytes) = output();
    let begin = Instant::now();
    let Launched { lifecycle, exit, id } = host.launch("")?;
    let created = lifecycle.create(&config(&lifecycle)?);
    let input = lifecycle.bind().serial(output);
    let run = lifecycle.run();
    first_byte(&mut bytes).await?;
    let launched = begin.elapsed();
    id.await?;
    created.await?;
    let begin = Instant::now();
    input.write(b"poweroff\n").await?;
    run.await?;
    let powered_off = begin.elapsed();
    drop(lifecycle);
    exit.terminated().await?;
    Ok((launched, powered_off))
}

impl Launches {
    async fn measure(&self, samples: &mut Samples) -> anyhow::Result<()> {
        let (launched, powered_off) = live(&self.0).await?;
        samples.time(LAUNCH, launched);
        samples.time(POWER_OFF, powered_off);
        Ok(())
    }
}

impl Rounds for Launches {
    fn round<'a>(&'a mut self, samples: &'a mut Samples) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        self.measure(samples).boxed_local()
    }
}
