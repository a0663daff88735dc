//! Transitions of state units: what one costs beside as many bare round trips over a channel, and how that grows.
//!
//! Every unit has a saved state of 64 bytes and does nothing else, so that what is measured is the set's own work. In every
//! round the bare round trips and each transition take their turn. Everything runs on one thread.
//!
//! The bars are half of a reference that was measured on one machine: elsewhere they are for orientation,
//! and the ratio to the bare round trips of the same run is what can be compared.
//!
//! Limits: neither KVM nor a process of guestd takes part; no figure fails the run.

use std::fmt::{self, Write as _};
use std::time::Instant;

use inspect::{Inspect, Request};
use save_restore::{RestoreError, SaveError, SavedStateBlob, saved_state_root};
use serde::Serialize;
use state_unit::{SaveSupport, SpawnedUnit, StateUnit, StateUnits, UnitError, run_unit};
use tokio::sync::{mpsc, oneshot};

use super::figure::{self, Definition, Samples};

/// As many bare round trips as there are units.
pub const BARE: &str = "bare";
const START: &str = "start";
const STOP: &str = "stop";
const SAVE: &str = "save";
const RESTORE: &str = "restore";

/// What is measured of each graph, in this order.
pub const FIGURES: [Definition; 5] = [
    Definition::time(BARE, "a message with a oneshot to each of as many tasks, and all answers", None),
    Definition::time(START, "start of all units", Some(BARE)),
    Definition::time(STOP, "stop of all units", Some(BARE)),
    Definition::time(SAVE, "the saved state of all units", Some(BARE)),
    Definition::time(RESTORE, "restore and post-restore of all units", Some(BARE)),
];

/// Transitions of a graph of this many units, in µs, as a mature implementation in another VMM needs them.
struct Reference {
    shape: Shape,
    units: usize,
    start: f64,
    stop: f64,
    save: f64,
    restore: f64,
}

/// Measured on 2026-11-20: OpenVMM's crate `state_unit` on its own asynchronous runtime, with the same graphs and the same
/// 64 bytes for each unit, on the machine on which guestd was measured then. Medians; restore with post-restore.
#[rustfmt::skip]
const REFERENCE: [Reference; 5] = [
    Reference { shape: Shape::Flat, units: 10, start: 8.0, stop: 8.0, save: 12.0, restore: 13.0 },
    Reference { shape: Shape::Flat, units: 1_000, start: 959.0, stop: 986.0, save: 1_235.0, restore: 1_811.0 },
    Reference { shape: Shape::Flat, units: 10_000, start: 17_506.0, stop: 15_360.0, save: 17_156.0, restore: 26_069.0 },
    Reference { shape: Shape::Chain, units: 1_000, start: 1_419.0, stop: 1_442.0, save: 1_029.0, restore: 1_927.0 },
    Reference { shape: Shape::Chain, units: 10_000, start: 19_570.0, stop: 20_894.0, save: 17_541.0, restore: 30_033.0 },
];

/// The most that a transition may take, in µs: half of the reference, where there is one.
fn bar(shape: Shape, units: usize, figure: &str) -> Option<f64> {
    let reference = REFERENCE.iter().find(|entry| entry.shape == shape && entry.units == units)?;
    let whole = match figure {
        START => reference.start,
        STOP => reference.stop,
        SAVE => reference.save,
        RESTORE => reference.restore,
        _ => return None,
    };
    Some(whole / 2.0)
}

/// A figure is called linear if its growth per unit is at most this many times that of the bare round trips, which themselves
/// grow as their tasks leave the caches. From 10 units to 10,000, n·log n would come to 4 times, n² to 1,000 times.
const LINEAR: f64 = 2.0;

/// How the units depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Not at all.
    Flat,
    /// Each on the one before.
    Chain,
    /// In layers of 32, each unit on two of the layer before.
    Layers,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Flat => "flat",
            Self::Chain => "chain",
            Self::Layers => "layers",
        })
    }
}

impl Shape {
    /// In the order in which they are measured and shown.
    pub const ALL: [Self; 3] = [Self::Flat, Self::Chain, Self::Layers];

    const WIDTH: usize = 32;

    /// The units that this one depends on. All of them are before it.
    fn dependencies(self, unit: usize) -> Vec<usize> {
        match self {
            Self::Flat => Vec::new(),
            Self::Chain => unit.checked_sub(1).into_iter().collect(),
            Self::Layers => {
                let column = unit % Self::WIDTH;
                let above = (unit - column).checked_sub(Self::WIDTH);
                above.map_or(vec![], |layer| vec![layer + column, layer + (column + 1) % Self::WIDTH])
            }
        }
    }
}

/// What was measured of one figure of one graph.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// How the units depend on each other.
    pub graph: Shape,
    /// How many there are.
    pub units: usize,
    /// One of [`FIGURES`].
    pub name: &'static str,
    /// The unit of `median`, `p99` and `bar`.
    pub unit: &'static str,
    /// The median of all rounds.
    pub median: f64,
    /// The value that one in a hundred exceeds; the largest if there are fewer.
    pub p99: f64,
    /// This median divided by that of the bare round trips.
    pub ratio: Option<f64>,
    /// The most that the median may be.
    pub bar: Option<f64>,
    /// Whether the bar is met.
    pub met: Option<bool>,
    /// The median per unit divided by that in the graph of the same shape with the fewest units.
    pub growth: Option<f64>,
    /// Whether the figure grows linearly, beside the growth of the bare round trips.
    pub linear: Option<bool>,
}

impl Row {
    fn new(graph: Shape, units: usize, measured: &figure::Row) -> Self {
        let &figure::Row { name, unit, median, p99, ratio, .. } = measured;
        let bar = bar(graph, units, name);
        let met = bar.map(|bar| median <= bar);
        Self { graph, units, name, unit, median, p99, ratio, bar, met, growth: None, linear: None }
    }

    #[expect(clippy::cast_precision_loss, reason = "there are far fewer units than 2^52")]
    fn per_unit(&self) -> f64 {
        self.median / self.units as f64
    }
}

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The sizes of the graphs, in units; a size that is 0 measures nothing.
    pub units: Vec<usize>,
    /// How often everything is measured; `None` for 200,000 requests of each kind, in 15 to 2,000 rounds.
    pub rounds: Option<u32>,
}

impl Plan {
    fn rounds(&self, units: usize) -> usize {
        let fixed = self.rounds.and_then(|rounds| usize::try_from(rounds).ok());
        fixed.unwrap_or_else(|| (200_000 / units.max(1)).clamp(15, 2_000))
    }
}

/// Measures every shape in every size.
///
/// # Errors
/// When a transition fails, which is a fault of the set's.
pub fn measure(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for shape in Shape::ALL {
        for &units in &plan.units {
            // A runtime for each graph: nothing is left of the one before.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let samples = runtime.block_on(measure_graph(shape, units, plan.rounds(units)))?;
            rows.extend(samples.rows(&FIGURES).iter().map(|row| Row::new(shape, units, row)));
        }
    }
    compare_sizes(&mut rows);
    Ok(rows)
}

async fn measure_graph(shape: Shape, units: usize, rounds: usize) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    if units == 0 {
        return Ok(samples);
    }
    let (bare, set) = (BareTasks::new(units), build(shape, units)?);
    // The first round finds everything cold, and is not counted.
    measure_round(&bare, &set, &mut Samples::default()).await?;
    for _ in 0..rounds {
        measure_round(&bare, &set, &mut samples).await?;
    }
    Ok(samples)
}

async fn measure_round(bare: &BareTasks, set: &StateUnits, samples: &mut Samples) -> anyhow::Result<()> {
    let begin = Instant::now();
    bare.round_trips().await?;
    samples.time(BARE, begin.elapsed());
    let begin = Instant::now();
    set.start().await?;
    samples.time(START, begin.elapsed());
    let begin = Instant::now();
    set.stop().await?;
    samples.time(STOP, begin.elapsed());
    let begin = Instant::now();
    let saved = set.save().await?;
    samples.time(SAVE, begin.elapsed());
    let begin = Instant::now();
    set.restore(saved).await?;
    samples.time(RESTORE, begin.elapsed());
    Ok(())
}

/// Fills in what rows of different sizes say together.
fn compare_sizes(rows: &mut [Row]) {
    let all = rows.to_vec();
    let smallest = |row: &Row, name| {
        let same = all.iter().filter(|other| other.graph == row.graph && other.name == name);
        same.min_by_key(|other| other.units).filter(|smallest| smallest.units < row.units)
    };
    let growth = |row: &Row, name| {
        let here =
            all.iter().find(|other| (other.graph, other.units, other.name) == (row.graph, row.units, name));
        Some(here?.per_unit() / smallest(row, name)?.per_unit())
    };
    for row in rows {
        row.growth = growth(row, row.name);
        let limit = growth(row, BARE).filter(|_| row.name != BARE).map(|bare| bare * LINEAR);
        row.linear = row.growth.zip(limit).map(|(growth, limit)| growth <= limit);
    }
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<7} {:>6} {:<8} {:>10} {:>10} {:<4} {:>8} {:>8} {:<4} {:>6} {}\n",
        "graph", "units", "figure", "median", "p99", "unit", "to bare", "bar", "met", "growth", "linear"
    );
    let number = |value: Option<f64>| value.map(|value| format!("{value:.2}")).unwrap_or_default();
    let word = |value: Option<bool>| value.map_or("", |yes| if yes { "yes" } else { "NO" });
    for row in rows {
        let Row { graph, units, name, unit, median, p99, .. } = row;
        let (ratio, growth, met, linear) =
            (number(row.ratio), number(row.growth), word(row.met), word(row.linear));
        let bar = row.bar.map(|bar| format!("{bar:.1}")).unwrap_or_default();
        // Writing into a string cannot fail.
        let _ = writeln!(
            text,
            "{graph:<7} {units:>6} {name:<8} {median:>10.1} {p99:>10.1} {unit:<4} {ratio:>8} {bar:>8} {met:<4} {growth:>6} {linear}"
        );
    }
    text
}

/// Tasks that answer, and do nothing else.
struct BareTasks(Vec<mpsc::UnboundedSender<oneshot::Sender<()>>>);

impl BareTasks {
    fn new(count: usize) -> Self {
        let task = |_| {
            let (sender, mut requests) = mpsc::unbounded_channel::<oneshot::Sender<()>>();
            tokio::spawn(async move {
                while let Some(answer) = requests.recv().await {
                    // Whoever asked and went away needs no answer.
                    let _ = answer.send(());
                }
            });
            sender
        };
        Self((0..count).map(task).collect())
    }

    /// A round trip to each, all sent before the first answer is awaited.
    async fn round_trips(&self) -> anyhow::Result<()> {
        let mut answers = Vec::with_capacity(self.0.len());
        for sender in &self.0 {
            let (answer, answered) = oneshot::channel();
            sender.send(answer)?;
            answers.push(answered);
        }
        for answered in answers {
            answered.await?;
        }
        Ok(())
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct IdleState {
    #[prost(bytes = "vec", tag = "1")]
    bytes: Vec<u8>,
}

saved_state_root!(IdleState, package = "guest_tests.bench");

/// A unit that does nothing but keep its state.
struct Idle {
    bytes: [u8; 64],
}

impl Inspect for Idle {
    fn inspect(&self, request: Request<'_>) {
        request.value(&self.bytes[..]);
    }
}

impl StateUnit for Idle {
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
        Ok(Some(SavedStateBlob::new(&IdleState { bytes: self.bytes.to_vec() })))
    }

    async fn restore(&mut self, state: SavedStateBlob) -> Result<(), RestoreError> {
        let IdleState { bytes } = state.parse()?;
        let wrong_length = |bytes: Vec<u8>| RestoreError::invalid("bytes", bytes.len());
        self.bytes = bytes.try_into().map_err(wrong_length)?;
        Ok(())
    }
}

fn build(shape: Shape, count: usize) -> anyhow::Result<StateUnits> {
    let units = StateUnits::new();
    let mut all: Vec<SpawnedUnit<Idle>> = Vec::with_capacity(count);
    for unit in 0..count {
        let mut builder = units.add(format!("unit-{unit}"));
        for dependency in shape.dependencies(unit) {
            builder = builder.depends_on(all[dependency].handle());
        }
        all.push(builder.spawn(|requests| run_unit(Idle { bytes: [7; 64] }, requests))?);
    }
    all.into_iter().for_each(SpawnedUnit::detach);
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(units: usize, name: &'static str, median: f64) -> Row {
        let measured = figure::Row {
            name,
            what: "",
            unit: "µs",
            median,
            p99: median,
            reference: None,
            ratio: None,
            bar: None,
            met: None,
        };
        Row::new(Shape::Flat, units, &measured)
    }

    #[test]
    fn layers_lean_on_the_layer_before() {
        assert_eq!(Shape::Layers.dependencies(31), [0; 0]);
        assert_eq!(Shape::Layers.dependencies(32), [0, 1]);
        assert_eq!(Shape::Layers.dependencies(95), [63, 32]);
        assert_eq!(Shape::Chain.dependencies(0), [0; 0]);
        assert_eq!(Shape::Chain.dependencies(7), [6]);
    }

    #[test]
    fn the_bar_is_half_of_the_reference() {
        assert_eq!(bar(Shape::Flat, 10, RESTORE), Some(6.5));
        assert_eq!(bar(Shape::Chain, 10_000, STOP), Some(10_447.0));
        assert_eq!(bar(Shape::Chain, 10, STOP), None, "there is no reference");
        assert_eq!(bar(Shape::Flat, 10, BARE), None);
        assert_eq!(row(10, SAVE, 6.0).met, Some(true));
        assert_eq!(row(10, SAVE, 6.1).met, Some(false));
    }

    #[test]
    fn growth_is_per_unit_and_linear_beside_the_bare_round_trips() {
        let mut rows = vec![
            row(10, BARE, 10.0),
            row(10, START, 20.0),
            row(10, STOP, 20.0),
            row(1_000, BARE, 1_500.0),
            row(1_000, START, 6_000.0),
            row(1_000, STOP, 6_002.0),
        ];
        compare_sizes(&mut rows);
        let seen: Vec<_> = rows.iter().map(|row| (row.growth, row.linear)).collect();
        let smallest = (None, None);
        let expected = [(Some(1.5), None), (Some(3.0), Some(true)), (Some(3.001), Some(false))];
        assert_eq!(seen[..3], [smallest; 3]);
        assert_eq!(seen[3..], expected);
    }
}
