//! A figure: what it is called, the samples of it, and what they come to.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::bail;
use serde::Serialize;

/// What a figure is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Definition {
    /// Its name on the command line and in JSON.
    pub name: &'static str,
    /// What it counts, in a few words.
    pub what: &'static str,
    /// The unit of its samples.
    pub unit: &'static str,
    /// The figure that it is divided by.
    pub reference: Option<&'static str>,
    /// The most that its ratio may be, or its median if it has no reference.
    pub bar: Option<f64>,
}

impl Definition {
    /// A time in microseconds, without a bar.
    pub(super) const fn time(
        name: &'static str,
        what: &'static str,
        reference: Option<&'static str>,
    ) -> Self {
        Self { name, what, unit: "µs", reference, bar: None }
    }

    /// A time in microseconds beside its floor, of which it may be so much at the most.
    pub(super) const fn beside(
        name: &'static str,
        what: &'static str,
        floor: &'static str,
        bar: f64,
    ) -> Self {
        Self { bar: Some(bar), ..Self::time(name, what, Some(floor)) }
    }

    /// An amount of memory in KiB, without a bar.
    pub(super) const fn memory(name: &'static str, what: &'static str) -> Self {
        Self { name, what, unit: "KiB", reference: None, bar: None }
    }

    /// A bandwidth in MiB/s, without a bar.
    pub(super) const fn rate(name: &'static str, what: &'static str) -> Self {
        Self { name, what, unit: "MiB/s", reference: None, bar: None }
    }
}

/// What was measured of a figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The figure's name.
    pub name: &'static str,
    /// What it counts.
    #[serde(skip)]
    pub what: &'static str,
    /// The unit of `median` and `p99`.
    pub unit: &'static str,
    /// The median of all rounds.
    pub median: f64,
    /// The value that one in a hundred exceeds; the largest if there are fewer.
    pub p99: f64,
    /// The name of the figure that this one is compared with.
    pub reference: Option<&'static str>,
    /// This median divided by that of the reference.
    pub ratio: Option<f64>,
    /// The most that the ratio may be, or the median if there is no reference.
    pub bar: Option<f64>,
    /// Whether the bar is met.
    pub met: Option<bool>,
}

/// All samples, by figure.
#[derive(Debug, Default)]
pub struct Samples(HashMap<&'static str, Vec<f64>>);

impl Samples {
    /// Adds a value in the figure's unit.
    pub fn add(&mut self, name: &'static str, value: f64) {
        self.0.entry(name).or_default().push(value);
    }

    /// Adds a time.
    pub fn time(&mut self, name: &'static str, time: Duration) {
        self.add(name, time.as_secs_f64() * 1e6);
    }

    /// What the samples of these figures come to. A figure without samples has no row.
    pub fn rows(mut self, figures: &[Definition]) -> Vec<Row> {
        self.0.values_mut().for_each(|samples| samples.sort_by(f64::total_cmp));
        figures.iter().filter_map(|figure| self.row(figure)).collect()
    }

    fn row(&self, figure: &Definition) -> Option<Row> {
        let &Definition { name, what, unit, reference, bar } = figure;
        let median = self.quantile(name, 0.5)?;
        let ratio = reference.and_then(|of| Some(median / self.quantile(of, 0.5)?));
        let met = bar.map(|bar| ratio.unwrap_or(median) <= bar);
        let p99 = self.quantile(name, 0.99)?;
        Some(Row { name, what, unit, median, p99, reference, ratio, bar, met })
    }

    /// The smallest sample that is not below this part of them all. They are sorted.
    fn quantile(&self, name: &str, part: f64) -> Option<f64> {
        let samples = self.0.get(name)?;
        #[expect(clippy::cast_possible_truncation, reason = "a rank, from 0 to a count of samples")]
        #[expect(clippy::cast_sign_loss, reason = "a rank, from 0 to a count of samples")]
        #[expect(clippy::cast_precision_loss, reason = "there are far fewer samples than 2^52")]
        let rank = (samples.len() as f64 * part).ceil() as usize;
        samples.get(rank.saturating_sub(1)).copied()
    }
}

/// The figures whose names begin with one of `wanted`, or all, and those that they refer to, in the order of `all`.
pub(super) fn choose(all: Vec<Definition>, wanted: &[String]) -> anyhow::Result<Vec<Definition>> {
    if let Some(unknown) = wanted.iter().find(|begin| !all.iter().any(|f| f.name.starts_with(&begin[..]))) {
        let names: Vec<_> = all.iter().map(|figure| figure.name).collect();
        bail!("no figure begins with {unknown:?}; there are {}", names.join(", "));
    }
    let named = |figure: &&Definition| wanted.iter().any(|begin| figure.name.starts_with(&begin[..]));
    let references: Vec<_> = all.iter().filter(named).filter_map(|figure| figure.reference).collect();
    let chosen =
        |figure: &Definition| wanted.is_empty() || named(&figure) || references.contains(&figure.name);
    Ok(all.into_iter().filter(chosen).collect())
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<16} {:>10} {:>10} {:<5} {:>7}  {:<14} {:>5} {:<4} {}\n",
        "figure", "median", "p99", "unit", "ratio", "to", "bar", "met", "what"
    );
    for row in rows {
        let ratio = row.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
        let bar = row.bar.map(|bar| bar.to_string()).unwrap_or_default();
        let met = row.met.map_or("", |met| if met { "yes" } else { "NO" });
        let reference = row.reference.unwrap_or_default();
        // Writing into a string cannot fail.
        let _ = writeln!(
            text,
            "{:<16} {:>10.1} {:>10.1} {:<5} {ratio:>7}  {reference:<14} {bar:>5} {met:<4} {}",
            row.name, row.median, row.p99, row.unit, row.what
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Definition> {
        vec![
            Definition::time("floor", "", None),
            Definition::beside("launch", "", "floor", 1.5),
            Definition::memory("memory", ""),
        ]
    }

    fn names(wanted: &[&str]) -> Vec<&'static str> {
        let wanted: Vec<String> = wanted.iter().map(|&name| name.to_owned()).collect();
        choose(all(), &wanted).unwrap().iter().map(|figure| figure.name).collect()
    }

    #[test]
    fn figures_are_chosen_with_what_they_refer_to() {
        assert_eq!(names(&[]), ["floor", "launch", "memory"]);
        assert_eq!(names(&["la"]), ["floor", "launch"]);
        assert_eq!(names(&["memory"]), ["memory"]);
        let error = choose(all(), &["x".to_owned()]).unwrap_err().to_string();
        assert_eq!(error, "no figure begins with \"x\"; there are floor, launch, memory");
    }

    #[test]
    fn a_row_is_the_median_the_rank_of_99_percent_and_the_ratio() {
        let mut samples = Samples::default();
        (1..=200).rev().for_each(|n| samples.add("floor", f64::from(n)));
        [Duration::from_micros(190), Duration::from_micros(160), Duration::from_micros(150)]
            .into_iter()
            .for_each(|time| samples.time("launch", time));
        let rows = samples.rows(&all());
        let seen: Vec<_> =
            rows.iter().map(|row| (row.name, row.median, row.p99, row.ratio, row.met)).collect();
        assert_eq!(seen[0], ("floor", 100.0, 198.0, None, None));
        assert_eq!(seen[1], ("launch", 160.0, 190.0, Some(1.6), Some(false)));
        assert_eq!(seen.len(), 2, "nothing was measured of the third");
    }
}
