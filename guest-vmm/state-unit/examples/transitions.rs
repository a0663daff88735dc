//! Measures transitions: `cargo run --release -p state-unit --example transitions`.
//!
//! For each graph, the median time of one transition in µs on a current-thread runtime, each unit with a saved state of
//! 64 bytes; and beside start the ratio to as many bare round trips over a channel and a oneshot.

use inspect::{Inspect, Request};
use save_restore::{RestoreError, SaveError, SavedStateBlob, saved_state_root};
use state_unit::{SaveSupport, SpawnedUnit, StateUnit, StateUnits, UnitError, run_unit};
use std::error::Error;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

#[derive(Clone, PartialEq, prost::Message)]
struct State {
    #[prost(bytes = "vec", tag = "1")]
    bytes: Vec<u8>,
}

saved_state_root!(State, package = "state_unit.transitions");

struct Unit {
    bytes: [u8; 64],
}

impl Inspect for Unit {
    fn inspect(&self, request: Request<'_>) {
        request.value(&self.bytes[..]);
    }
}

impl StateUnit for Unit {
    async fn start(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        self.bytes = [0; 64];
        Ok(())
    }

    fn can_save(&mut self) -> SaveSupport {
        SaveSupport::Saves
    }

    async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError> {
        Ok(Some(SavedStateBlob::new(&State { bytes: self.bytes.to_vec() })))
    }

    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        let State { bytes } = state.parse()?;
        self.bytes =
            bytes.try_into().map_err(|bytes: Vec<u8>| RestoreError::invalid("bytes", bytes.len()))?;
        Ok(())
    }
}

/// How the units depend on each other.
#[derive(Clone, Copy, Debug)]
enum Shape {
    /// Not at all.
    Flat,
    /// Each on the one before.
    Chain,
    /// In layers of 32, each unit on two of the layer before.
    Layers,
}

fn build(units: &StateUnits, shape: Shape, count: usize) -> Result<(), Box<dyn Error>> {
    let mut all: Vec<SpawnedUnit<Unit>> = Vec::with_capacity(count);
    for index in 0..count {
        let mut builder = units.add(format!("unit-{index}"));
        let needs = match shape {
            Shape::Flat => vec![],
            Shape::Chain => vec![index.checked_sub(1)],
            Shape::Layers => vec![index.checked_sub(32), index.checked_sub(33)],
        };
        for need in needs.into_iter().flatten() {
            builder = builder.depends_on(all[need].handle());
        }
        all.push(builder.spawn(|requests| run_unit(Unit { bytes: [7; 64] }, requests))?);
    }
    all.into_iter().for_each(SpawnedUnit::detach);
    Ok(())
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

/// Start, stop, save and restore, in µs.
async fn measure(shape: Shape, count: usize) -> Result<[f64; 4], Box<dyn Error>> {
    let units = StateUnits::new();
    build(&units, shape, count)?;
    let rounds = (200_000 / count).clamp(15, 2_000);
    let mut times: [Vec<Duration>; 4] = Default::default();
    for _ in 0..rounds {
        let begin = Instant::now();
        units.start().await?;
        times[0].push(begin.elapsed());
        let begin = Instant::now();
        units.stop().await?;
        times[1].push(begin.elapsed());
        let begin = Instant::now();
        let saved = units.save().await?;
        times[2].push(begin.elapsed());
        let begin = Instant::now();
        units.restore(saved).await?;
        times[3].push(begin.elapsed());
    }
    Ok(times.map(median))
}

/// As many bare round trips: a message with a oneshot to each of `count` tasks, all sent before the first answer is
/// awaited.
async fn bare(count: usize) -> Result<f64, Box<dyn Error>> {
    let senders: Vec<mpsc::UnboundedSender<oneshot::Sender<()>>> = (0..count)
        .map(|_| {
            let (sender, mut requests) = mpsc::unbounded_channel::<oneshot::Sender<()>>();
            tokio::spawn(async move {
                while let Some(answer) = requests.recv().await {
                    let _ = answer.send(());
                }
            });
            sender
        })
        .collect();
    let mut times = Vec::new();
    for _ in 0..(200_000 / count).clamp(15, 2_000) {
        let begin = Instant::now();
        let mut answers = Vec::with_capacity(count);
        for sender in &senders {
            let (answer, answered) = oneshot::channel();
            sender.send(answer)?;
            answers.push(answered);
        }
        for answer in answers {
            answer.await?;
        }
        times.push(begin.elapsed());
    }
    Ok(median(times))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    println!(
        "| graph | start | stop | save | restore | start / bare |\n| --- | --- | --- | --- | --- | --- |"
    );
    for shape in [Shape::Flat, Shape::Chain, Shape::Layers] {
        for count in [10, 1_000, 10_000] {
            let [start, stop, save, restore] = measure(shape, count).await?;
            let ratio = start / bare(count).await?;
            println!(
                "| {shape:?}, {count} | {start:.1} | {stop:.1} | {save:.1} | {restore:.1} | {ratio:.2} |"
            );
        }
    }
    Ok(())
}
