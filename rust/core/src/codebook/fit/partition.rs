//! The best way to cut sorted groups of samples into cells, by dynamic programming (as Ckmeans.1d.dp, Wang and Song
//! 2011, with the divide and conquer that the ordered cuts allow: O(cells * groups * log groups)).

use std::ops::{Range, RangeInclusive};

use super::samples::{Moments, WeightedSamples};

/// Groups to cut, and the values that their first and last cells are held to, if any. A cell may be empty.
pub(super) struct Span {
    pub(super) groups: Range<usize>,
    pub(super) first: Option<f64>,
    pub(super) last: Option<f64>,
}

/// The best cuts of a span for every number of free cells up to a limit. A free cell stands for the mean of its samples.
pub(super) struct Partition<'a> {
    samples: &'a WeightedSamples,
    span: Span,
    /// `errors[free][end]`: the least error of the first `end` groups with `free` free cells after the held first one.
    errors: Vec<Vec<f64>>,
    /// `cuts[free][end]`: where the last of those free cells starts. The row of no free cells is empty.
    cuts: Vec<Vec<u32>>,
}

impl<'a> Partition<'a> {
    pub(super) fn new(samples: &'a WeightedSamples, span: Span, most_free: usize) -> Self {
        let count = span.groups.len();
        let mut partition = Self { samples, span, errors: vec![], cuts: vec![vec![]] };
        let without_free = match partition.span.first {
            Some(value) => (0..=count).map(|end| partition.held_error(0, end, value)).collect(),
            None => (0..=count).map(|end| if end == 0 { 0.0 } else { f64::INFINITY }).collect(),
        };
        partition.errors.push(without_free);
        for free in 1..=most_free {
            let mut row = Row { errors: vec![0.0; count + 1], cuts: vec![0; count + 1] };
            partition.fill(&partition.errors[free - 1], &mut row, 0..=count, 0..=count);
            partition.errors.push(row.errors);
            partition.cuts.push(row.cuts);
        }
        partition
    }

    /// The least error with `free` free cells.
    pub(super) fn error(&self, free: usize) -> f64 {
        self.last_cut(free).1
    }

    /// The values with `free` free cells in ascending order, the held ones included and empty free cells left out.
    pub(super) fn values(&self, free: usize) -> Vec<f64> {
        let mut values: Vec<f64> = self.span.last.into_iter().collect();
        let mut end = self.last_cut(free).0;
        for cuts in self.cuts[1..=free].iter().rev() {
            let start = cuts[end] as usize;
            let cell = self.moments(start, end);
            if cell.mass > 0.0 {
                let offset = self.span.groups.start;
                let (low, high) = self.samples.range_of_groups(offset + start, offset + end);
                values.push(cell.mean_within(low, high));
            }
            end = start;
        }
        values.extend(self.span.first);
        values.reverse();
        values
    }

    /// Where the held last cell starts (the end, if no cell is held) and the error with it.
    fn last_cut(&self, free: usize) -> (usize, f64) {
        let (row, count) = (&self.errors[free], self.span.groups.len());
        match self.span.last {
            Some(value) => (0..=count)
                .map(|start| (start, row[start] + self.held_error(start, count, value)))
                .min_by(|a, b| a.1.total_cmp(&b.1))
                .expect("0 is in the range"),
            None => (count, row[count]),
        }
    }

    /// Fills the row at `ends`, knowing that the best cuts lie in `cuts`: the best cut of a later end is never earlier, so
    /// that of the middle end bounds those of both halves.
    fn fill(&self, before: &[f64], row: &mut Row, ends: RangeInclusive<usize>, cuts: RangeInclusive<usize>) {
        if ends.is_empty() {
            return;
        }
        let (first_end, last_end) = ends.into_inner();
        let (first_cut, last_cut) = cuts.into_inner();
        let end = usize::midpoint(first_end, last_end);
        let (mut best, mut least) = (first_cut, f64::INFINITY);
        for (cut, error_before) in before.iter().enumerate().take(last_cut.min(end) + 1).skip(first_cut) {
            let error = error_before + self.free_error(cut, end);
            if error < least {
                (best, least) = (cut, error);
            }
        }
        (row.errors[end], row.cuts[end]) = (least, best as u32);
        if end > first_end {
            self.fill(before, row, first_end..=end - 1, first_cut..=best);
        }
        self.fill(before, row, end + 1..=last_end, best..=last_cut);
    }

    fn moments(&self, start: usize, end: usize) -> Moments {
        self.samples.moments_of_groups(self.span.groups.start + start, self.span.groups.start + end)
    }

    fn held_error(&self, start: usize, end: usize, value: f64) -> f64 {
        self.moments(start, end).error(value)
    }

    fn free_error(&self, start: usize, end: usize) -> f64 {
        let moments = self.moments(start, end);
        if moments.mass > 0.0 { moments.error(moments.first / moments.mass) } else { 0.0 }
    }
}

/// A row of the table under construction.
struct Row {
    errors: Vec<f64>,
    cuts: Vec<u32>,
}
