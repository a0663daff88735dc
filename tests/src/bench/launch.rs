//! A cold launch: everything asked for in one flight, and the guest's own end.

use std::time::Instant;

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

impl Launches {
    async fn measure(&self, samples: &mut Samples) -> anyhow::Result<()> {
        let (output, mut bytes) = output();
        let begin = Instant::now();
        let Launched { lifecycle, exit, id } = self.0.launch("")?;
        let created = lifecycle.create(&config(&lifecycle)?);
        let input = lifecycle.bind().serial(output);
        let run = lifecycle.run();
        first_byte(&mut bytes).await?;
        samples.time(LAUNCH, begin.elapsed());
        id.await?;
        created.await?;
        let begin = Instant::now();
        input.write(b"poweroff\n").await?;
        run.await?;
        samples.time(POWER_OFF, begin.elapsed());
        drop(lifecycle);
        exit.terminated().await?;
        Ok(())
    }
}

impl Rounds for Launches {
    fn round<'a>(&'a mut self, samples: &'a mut Samples) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        self.measure(samples).boxed_local()
    }
}
