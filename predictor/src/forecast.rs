//! What a forecast says: a point, quantiles, and whole distributions.

use serde::{Deserialize, Serialize};

/// The quantile levels of every forecast, ascending: the median, and the upper ones that capacities are compared with.
pub const LEVELS: [f64; 4] = [0.5, 0.9, 0.95, 0.99];

/// A forecast for one moment, or for the maximum over a window that ends there.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// How far ahead, in sampling intervals.
    pub steps: usize,
    /// The single most useful value (smallest expected absolute error).
    pub point: f64,
    /// Values that are not exceeded with the probabilities [`LEVELS`]; ascending.
    pub quantiles: [f64; LEVELS.len()],
}

impl Forecast {
    /// The same certain value for everything.
    #[must_use]
    pub fn certain(steps: usize, value: f64) -> Self {
        Self { steps, point: value, quantiles: [value; LEVELS.len()] }
    }

    /// The quantile at `level`, by straight lines between those of [`LEVELS`], the outermost beyond them.
    #[must_use]
    pub fn quantile(&self, level: f64) -> f64 {
        let above = LEVELS.partition_point(|known| *known < level);
        if above == 0 {
            return self.quantiles[0];
        }
        if above == LEVELS.len() {
            return self.quantiles[LEVELS.len() - 1];
        }
        let share = (level - LEVELS[above - 1]) / (LEVELS[above] - LEVELS[above - 1]);
        self.quantiles[above - 1] + share * (self.quantiles[above] - self.quantiles[above - 1])
    }
}

/// How many points a [`Distribution`] keeps.
const POINTS: usize = 41;

/// The distribution of one uncertain quantity: its quantiles at evenly spaced levels, and an exponential tail above them, so
/// that what was never seen is improbable and not impossible.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// Ascending; the value at index i is not exceeded with probability (i + 0.5) / len.
    values: Vec<f64>,
    /// Mean excess over the last value, given that it is exceeded.
    tail: f64,
}

impl Distribution {
    /// From any number of equally likely values; `None` if there is none that is finite.
    #[must_use]
    pub fn from_values(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        if values.is_empty() {
            return None;
        }
        let tail = mean_excess(values.len(), |place| values[place]);
        if values.len() > POINTS {
            let all = Self { values, tail };
            let values = (0..POINTS).map(|i| all.quantile((i as f64 + 0.5) / POINTS as f64)).collect();
            return Some(Self { values, tail });
        }
        Some(Self { values, tail })
    }

    /// The same as [`Distribution::from_values`] of finite values in ascending order, without a copy of them.
    pub(crate) fn from_sorted(sorted: &[f32]) -> Option<Self> {
        // What is not finite stands at one of the ends.
        let finite = [sorted.first(), sorted.last()].into_iter().flatten().all(|value| value.is_finite());
        if sorted.len() <= POINTS || !finite {
            return Self::from_values(sorted.iter().map(|value| f64::from(*value)).collect());
        }
        let at = |place: usize| f64::from(sorted[place]);
        let tail = mean_excess(sorted.len(), at);
        let values = (0..POINTS).map(|i| quantile(sorted.len(), tail, (i as f64 + 0.5) / POINTS as f64, at)).collect();
        Some(Self { values, tail })
    }

    /// One certain value.
    #[must_use]
    pub fn certain(value: f64) -> Self {
        Self { values: vec![value], tail: 0.0 }
    }

    /// The probability that the quantity is above `threshold`, 0 to 1, never growing with `threshold`.
    #[must_use]
    pub fn exceedance(&self, threshold: f64) -> f64 {
        self.exceedance_with(threshold, self.values.partition_point(|value| *value <= threshold))
    }

    /// The same, where `above` is the place of the first value above `threshold`, or their number.
    fn exceedance_with(&self, threshold: f64, above: usize) -> f64 {
        let count = self.values.len() as f64;
        let (first, last) = (self.values[0], self.values[self.values.len() - 1]);
        if threshold.is_nan() {
            return 0.0;
        }
        if threshold >= last {
            let share = 0.5 / count;
            return match self.tail {
                tail if tail > 0.0 => share * (-(threshold - last) / tail).exp(),
                _ => 0.0,
            };
        }
        if threshold < first {
            // Symmetric to the upper tail.
            let share = 0.5 / count;
            return match self.tail {
                tail if tail > 0.0 => 1.0 - share * (-(first - threshold) / tail).exp(),
                _ => 1.0,
            };
        }
        let (low, high) = (self.values[above - 1], self.values[above]);
        let share = if high > low { (threshold - low) / (high - low) } else { 0.0 };
        (1.0 - (above as f64 - 0.5 + share) / count).clamp(0.0, 1.0)
    }

    /// The same with nothing above `most` but the tail, which is no longer than to there from the highest value below.
    #[must_use]
    pub(crate) fn capped(mut self, most: f64) -> Self {
        for value in &mut self.values {
            *value = value.min(most);
        }
        let last = self.values[self.values.len() - 1];
        self.tail = self.tail.min((most - last).max(0.0));
        self
    }

    /// The mean of what the quantity is above `threshold`, counting nothing where it is below: area under the exceedance.
    #[must_use]
    pub fn excess(&self, threshold: f64) -> f64 {
        let count = self.values.len() as f64;
        let above: f64 = self.values.iter().map(|value| (value - threshold).max(0.0)).sum();
        let last = self.values[self.values.len() - 1];
        above / count
            + self.tail * 0.5 / count
                * if threshold > last && self.tail > 0.0 { (-(threshold - last) / self.tail).exp() } else { 1.0 }
    }

    /// The value that is not exceeded with probability `level`.
    #[must_use]
    pub fn quantile(&self, level: f64) -> f64 {
        quantile(self.values.len(), self.tail, level, |place| self.values[place])
    }

    /// The same quantity plus `by`.
    #[must_use]
    pub fn shifted(&self, by: f64) -> Self {
        Self { values: self.values.iter().map(|value| value + by).collect(), tail: self.tail }
    }

    /// The same quantity times `factor` (not negative) plus `by`.
    #[must_use]
    pub fn scaled(&self, by: f64, factor: f64) -> Self {
        Self { values: self.values.iter().map(|value| by + factor * value).collect(), tail: factor * self.tail }
    }

    /// The distribution when one of several holds, each with its weight (not negative; they need not sum to 1).
    #[must_use]
    pub fn mixture(parts: &[(f64, Self)]) -> Option<Self> {
        let total: f64 = parts.iter().map(|(weight, _)| weight).sum();
        let low = parts.iter().map(|(_, part)| part.values[0]).reduce(f64::min)?;
        let high = parts.iter().map(|(_, part)| part.quantile(1.0)).reduce(f64::max)?;
        if !(total > 0.0 && low.is_finite() && high.is_finite()) {
            return None;
        }
        // Between which places the first value above is looked for, of each part: ever fewer, as what is tried comes nearer.
        let mut between: Vec<[usize; 2]> = Vec::with_capacity(parts.len());
        let mut found = vec![0; parts.len()];
        let values = (0..POINTS)
            .map(|i| {
                let target = 1.0 - (i as f64 + 0.5) / POINTS as f64;
                let (mut a, mut b) = (low, high);
                between.clear();
                between.extend(parts.iter().map(|(_, part)| [0, part.values.len()]));
                for _ in 0..40 {
                    let middle = 0.5 * (a + b);
                    let mut exceedance = 0.0;
                    for (((weight, part), found), [from, to]) in parts.iter().zip(&mut found).zip(&between) {
                        *found = from + part.values[*from..*to].partition_point(|value| *value <= middle);
                        exceedance += weight * part.exceedance_with(middle, *found);
                    }
                    let right = exceedance / total > target;
                    *(if right { &mut a } else { &mut b }) = middle;
                    between.iter_mut().zip(&found).for_each(|(between, found)| between[usize::from(!right)] = *found);
                }
                b
            })
            .collect();
        let tail = parts.iter().map(|(_, part)| part.tail).fold(0.0, f64::max);
        Some(Self { values, tail })
    }

    /// As a [`Forecast`] for `steps` ahead.
    #[must_use]
    pub fn forecast(&self, steps: usize) -> Forecast {
        Forecast { steps, point: self.quantile(0.5), quantiles: LEVELS.map(|level| self.quantile(level)) }
    }
}

/// The quantile at `level` of `count` ascending values, with an exponential tail above them.
fn quantile(count: usize, tail: f64, level: f64, at: impl Fn(usize) -> f64) -> f64 {
    let place = level.clamp(0.0, 1.0) * count as f64 - 0.5;
    if place <= 0.0 {
        return at(0);
    }
    let below = place as usize;
    if below + 1 >= count {
        let left = (1.0 - level).max(1e-6) * count as f64 / 0.5;
        return at(count - 1) + tail * (-left.min(1.0).ln());
    }
    let share = place - below as f64;
    at(below) + share * (at(below + 1) - at(below))
}

/// Mean distance of the top tenth of `count` ascending values from the value below them.
fn mean_excess(count: usize, at: impl Fn(usize) -> f64) -> f64 {
    let top = (count / 10).max(1);
    if count <= top {
        return 0.0;
    }
    let base = at(count - top - 1);
    (count - top..count).map(|place| at(place) - base).sum::<f64>() / top as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_distribution_of_known_values_answers_as_they_do() {
        let distribution = Distribution::from_values((0..1000).map(f64::from).collect()).unwrap();
        for threshold in [100.0, 500.0, 900.0, 950.0] {
            let expected = 1.0 - threshold / 1000.0;
            assert!((distribution.exceedance(threshold) - expected).abs() < 0.01, "at {threshold}");
        }
        assert!((distribution.quantile(0.9) - 900.0).abs() < 5.0);
        assert!((distribution.excess(900.0) - 5.0).abs() < 2.0, "{}", distribution.excess(900.0));
        assert!((distribution.excess(0.0) - 500.0).abs() < 5.0, "{}", distribution.excess(0.0));
        assert!(distribution.exceedance(1200.0) > 0.0 && distribution.exceedance(1200.0) < 0.01);
        assert!(Distribution::from_values(vec![f64::NAN]).is_none());
    }

    #[test]
    fn a_mixture_weighs_its_parts() {
        let parts = [(0.8, Distribution::certain(1.0)), (0.2, Distribution::certain(10.0))];
        let mixture = Distribution::mixture(&parts).unwrap();
        assert!((mixture.exceedance(5.0) - 0.2).abs() < 0.03, "{}", mixture.exceedance(5.0));
        assert!((mixture.quantile(0.5) - 1.0).abs() < 1e-6);
        assert!((mixture.quantile(0.9) - 10.0).abs() < 1e-6);
    }

    /// As [`Distribution::mixture`] before it remembered where it had looked.
    fn looked_for_anew(parts: &[(f64, Distribution)]) -> Vec<f64> {
        let total: f64 = parts.iter().map(|(weight, _)| weight).sum();
        let exceedance = |x: f64| parts.iter().map(|(w, part)| w * part.exceedance(x)).sum::<f64>() / total;
        let low = parts.iter().map(|(_, part)| part.values[0]).reduce(f64::min).unwrap();
        let high = parts.iter().map(|(_, part)| part.quantile(1.0)).reduce(f64::max).unwrap();
        let value = |i: usize| {
            let target = 1.0 - (i as f64 + 0.5) / POINTS as f64;
            let mut between = [low, high];
            for _ in 0..40 {
                let middle = 0.5 * (between[0] + between[1]);
                between[usize::from(exceedance(middle) <= target)] = middle;
            }
            between[1]
        };
        (0..POINTS).map(value).collect()
    }

    proptest! {
        #[test]
        fn a_mixture_does_not_depend_on_where_it_looks_first(
            values in proptest::collection::vec(proptest::collection::vec(-10.0_f64..10.0, 1..60), 1..5),
            weights in proptest::collection::vec(0.01_f64..1.0, 5),
        ) {
            let parts = values.into_iter().zip(weights);
            let parts: Vec<_> = parts.map(|(values, w)| (w, Distribution::from_values(values).unwrap())).collect();
            prop_assert_eq!(Distribution::mixture(&parts).unwrap().values, looked_for_anew(&parts));
        }

        #[test]
        fn exceedance_never_grows_and_quantiles_never_fall(
            values in proptest::collection::vec(-1e12_f64..1e12, 1..200), a in -2e12_f64..2e12, b in -2e12_f64..2e12,
            p in 0.0_f64..1.0, q in 0.0_f64..1.0,
        ) {
            let distribution = Distribution::from_values(values).unwrap();
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(distribution.exceedance(low) >= distribution.exceedance(high));
            prop_assert!((0.0..=1.0).contains(&distribution.exceedance(low)));
            prop_assert!(distribution.quantile(p.min(q)) <= distribution.quantile(p.max(q)));
        }
    }
}
