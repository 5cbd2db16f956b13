//! Sorted samples whose moments over any interval are quickly known.

use rayon::slice::ParallelSliceMut;

/// Sums over an interval of samples x with weights w: of w, of w x and of w x^2.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moments {
    pub(super) mass: f64,
    pub(super) first: f64,
    pub(super) second: f64,
}

impl Moments {
    fn add(&mut self, (value, weight): (f32, f32)) {
        let (value, weight) = (f64::from(value), f64::from(weight));
        self.mass += weight;
        self.first += weight * value;
        self.second += weight * value * value;
    }

    /// The mean of samples that all lie from `low` to `high`. Held to that, as differences of sums lose the last digits
    /// where an interval weighs next to nothing.
    pub(super) fn mean_within(&self, low: f64, high: f64) -> f64 {
        (self.first / self.mass).clamp(low, high)
    }

    /// The squared distance of the samples to `value`.
    pub(super) fn error(&self, value: f64) -> f64 {
        (self.second - value * (2.0 * self.first - value * self.mass)).max(0.0)
    }
}

impl std::ops::Sub for Moments {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { mass: self.mass - other.mass, first: self.first - other.first, second: self.second - other.second }
    }
}

/// Samples and weights in ascending order, in groups of neighbours. The moments below each group are kept, so that those
/// of an interval cost two look-ups and a walk through two groups.
pub(super) struct WeightedSamples {
    sorted: Vec<(f32, f32)>,
    /// Where each group starts, and the end of the last.
    starts: Vec<usize>,
    /// Moments of everything below each start.
    below: Vec<Moments>,
}

impl WeightedSamples {
    /// Groups end where they hold 1/2048 of the weight or of the range, but never between equal samples and always at
    /// zero. Up to 2048 distinct samples, each is a group.
    pub(super) fn new(mut pairs: Vec<(f32, f32)>) -> Self {
        const SHARES: usize = 2048;
        // Ordered by weight too: pairs that compare equal are the same, so the result never depends on threads.
        pairs.par_sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let sorted = pairs;
        let distinct = 1 + sorted.windows(2).filter(|pair| pair[0].0 < pair[1].0).count();
        let share = if distinct <= SHARES { 0.0 } else { 1.0 / SHARES as f64 };
        let least_mass = share * sorted.iter().map(|&(_, weight)| f64::from(weight)).sum::<f64>();
        let least_width = share * sorted.last().map_or(0.0, |last| f64::from(last.0) - f64::from(sorted[0].0));

        let mut starts = vec![0];
        let mut below = vec![Moments::default()];
        let mut sum = Moments::default();
        for i in 0..sorted.len() {
            sum.add(sorted[i]);
            let Some(&(next, _)) = sorted.get(i + 1) else { break };
            let first = sorted[starts[starts.len() - 1]].0;
            let full = (sum - below[below.len() - 1]).mass >= least_mass
                || f64::from(next) - f64::from(first) >= least_width
                || (first < 0.0 && next >= 0.0);
            if full && next > sorted[i].0 {
                starts.push(i + 1);
                below.push(sum);
            }
        }
        if !sorted.is_empty() {
            starts.push(sorted.len());
            below.push(sum);
        }
        Self { sorted, starts, below }
    }

    pub(super) fn group_count(&self) -> usize {
        self.starts.len() - 1
    }

    /// The number of groups of negative samples.
    pub(super) fn first_group_from_zero(&self) -> usize {
        self.starts[..self.group_count()].partition_point(|&start| self.sorted[start].0 < 0.0)
    }

    pub(super) fn total(&self) -> Moments {
        self.below[self.group_count()]
    }

    /// The least and the greatest sample of the groups from `first` up to but without `end`; both 0 if there are none.
    pub(super) fn range_of_groups(&self, first: usize, end: usize) -> (f64, f64) {
        let samples = &self.sorted[self.starts[first]..self.starts[end]];
        let value = |sample: Option<&(f32, f32)>| sample.map_or(0.0, |&(value, _)| f64::from(value));
        (value(samples.first()), value(samples.last()))
    }

    /// The moments of the groups from `first` up to but without `end`.
    pub(super) fn moments_of_groups(&self, first: usize, end: usize) -> Moments {
        self.below[end] - self.below[first]
    }

    /// The moments of the samples up to and with `limit`.
    pub(super) fn moments_up_to(&self, limit: f64) -> Moments {
        let within = |index: usize| f64::from(self.sorted[index].0) <= limit;
        let reached = self.starts[..self.group_count()].partition_point(|&start| within(start));
        if reached == 0 {
            return Moments::default();
        }
        let mut moments = self.below[reached - 1];
        let last_group = self.starts[reached - 1]..self.starts[reached];
        last_group.take_while(|&index| within(index)).for_each(|index| moments.add(self.sorted[index]));
        moments
    }
}
