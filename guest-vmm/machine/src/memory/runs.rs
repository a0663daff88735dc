//! Sets of pages, as runs: ranges of bytes in ascending order of which no two touch.

use std::ops::Range;

/// A set of pages. Its ranges are ascending and apart; none is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Runs(Vec<Range<u64>>);

impl Runs {
    pub(super) fn iter(&self) -> std::slice::Iter<'_, Range<u64>> {
        self.0.iter()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.iter().map(|run| run.end - run.start).sum()
    }

    /// Adds a range that begins no earlier than the last run.
    pub(super) fn push(&mut self, range: Range<u64>) {
        match self.0.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ if range.is_empty() => {}
            _ => self.0.push(range),
        }
    }

    /// Adds a range, wherever it lies.
    pub(super) fn insert(&mut self, range: Range<u64>) {
        let from = self.0.partition_point(|run| run.end < range.start);
        let to = self.0.partition_point(|run| run.start <= range.end);
        let touched = &self.0[from..to];
        let start = touched.first().map_or(range.start, |run| run.start.min(range.start));
        let end = touched.last().map_or(range.end, |run| run.end.max(range.end));
        self.0.splice(from..to, std::iter::once(start..end));
    }

    pub(super) fn contains(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).first().is_some_and(|run| run.start <= range.start && range.end <= run.end)
    }

    /// What of the set lies in a range.
    pub(super) fn within(&self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.overlapping(range).iter().map(|run| run.start.max(range.start)..run.end.min(range.end))
    }

    fn overlapping(&self, range: &Range<u64>) -> &[Range<u64>] {
        let from = self.0.partition_point(|run| run.end <= range.start);
        let to = self.0.partition_point(|run| run.start < range.end);
        &self.0[from..to.max(from)]
    }

    pub(super) fn union(&self, other: &Self) -> Self {
        let mut all: Vec<_> = self.iter().chain(other.iter()).cloned().collect();
        all.sort_by_key(|run| run.start);
        all.into_iter().collect()
    }

    /// The longest runs, at most so many, and the others.
    pub(super) fn longest(&self, most: usize) -> (Self, Self) {
        let mut by_length: Vec<_> = self.0.clone();
        by_length.sort_by_key(|run| std::cmp::Reverse(run.end - run.start));
        let mut rest = by_length.split_off(most.min(by_length.len()));
        by_length.sort_by_key(|run| run.start);
        rest.sort_by_key(|run| run.start);
        (Self(by_length), Self(rest))
    }
}

/// Of ranges in the order of their starts.
impl FromIterator<Range<u64>> for Runs {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut runs = Self::default();
        ranges.into_iter().for_each(|range| runs.push(range));
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLACES: usize = 40;

    fn range() -> impl Strategy<Value = Range<u64>> {
        (0..36u64, 1..5u64).prop_map(|(start, length)| start..start + length)
    }

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec(range(), 0..12)
    }

    fn set(ranges: &[Range<u64>]) -> [bool; PLACES] {
        std::array::from_fn(|place| ranges.iter().any(|range| range.contains(&(place as u64))))
    }

    fn runs(ranges: &[Range<u64>]) -> Runs {
        let mut runs = Runs::default();
        ranges.iter().for_each(|range| runs.insert(range.clone()));
        runs
    }

    proptest! {
        #[test]
        fn runs_are_a_set_whose_ranges_are_apart(one in ranges(), other in ranges(), within in range()) {
            let (a, b) = (runs(&one), runs(&other));
            prop_assert_eq!(set(&a.0), set(&one));
            prop_assert!(a.0.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(a.union(&b), runs(&[one.clone(), other].concat()));
            let inside: Vec<_> = a.within(&within).collect();
            let expected: [bool; PLACES] =
                std::array::from_fn(|place| set(&one)[place] && within.contains(&(place as u64)));
            prop_assert_eq!(set(&inside), expected);
            let all = within.clone().all(|place| set(&one)[usize::try_from(place).unwrap()]);
            prop_assert_eq!(a.contains(&within), all);
            prop_assert_eq!(a.bytes(), set(&one).iter().filter(|in_it| **in_it).count() as u64);
        }

        #[test]
        fn the_longest_runs_are_kept(one in ranges(), most in 0..5usize) {
            let all = runs(&one);
            let (longest, rest) = all.longest(most);
            prop_assert_eq!(longest.0.len(), most.min(all.0.len()));
            prop_assert_eq!(longest.union(&rest), all);
            let length = |run: &Range<u64>| run.end - run.start;
            let shortest = longest.iter().map(length).min().unwrap_or(u64::MAX);
            prop_assert!(rest.iter().map(length).all(|length| length <= shortest));
        }
    }
}
