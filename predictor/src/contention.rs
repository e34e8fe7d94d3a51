//! The contention score: how probable it is that a pool exceeds its capacity within the horizon.

use crate::calibration::Correction;
use crate::forecast::{Distribution, Forecast};
use crate::sample::{PerResource, Resource};
use serde::{Deserialize, Serialize};

/// Probability that the capacity has been exceeded by a moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Onset {
    /// From now, in seconds.
    pub after_s: f64,
    /// Probability that the limit is exceeded at some time until then; never falls with `after_s`.
    pub probability: f64,
}

/// How high the use will go within one window: the distribution of its maximum without events, what outcomes have taught of
/// its probabilities, and the events that may come on top.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outlook {
    base: Distribution,
    correction: Correction,
    /// Probability and amount of each combination of events.
    cases: Vec<(f64, f64)>,
    /// The distribution with the events.
    mixed: Distribution,
}

impl Outlook {
    /// `effects` are probability and amount of events that may add to `base`; beyond the six largest their mean is added.
    #[must_use]
    pub fn new(base: Distribution, correction: Correction, effects: &[(f64, f64)]) -> Self {
        let (large, small) = effects.split_at(effects.len().min(6));
        let mean: f64 = small.iter().map(|(probability, amount)| probability * amount).sum();
        let cases: Vec<(f64, f64)> = (0..1_usize << large.len())
            .map(|mask| {
                large.iter().enumerate().fold((1.0, mean), |(weight, sum), (bit, (probability, amount))| {
                    if mask >> bit & 1 == 1 {
                        (weight * probability, sum + amount)
                    } else {
                        (weight * (1.0 - probability), sum)
                    }
                })
            })
            .filter(|(weight, _)| *weight > 1e-6)
            .collect();
        let parts: Vec<(f64, Distribution)> = cases.iter().map(|(weight, sum)| (*weight, base.shifted(*sum))).collect();
        let mixed = if effects.is_empty() { None } else { Distribution::mixture(&parts) };
        Self { mixed: mixed.unwrap_or_else(|| base.clone()), base, correction, cases }
    }

    /// The probability that the maximum is above `threshold`.
    #[must_use]
    pub fn exceedance(&self, threshold: f64) -> f64 {
        let case = |(weight, sum): &(f64, f64)| weight * self.correction.apply(self.base.exceedance(threshold - sum));
        self.cases.iter().map(case).sum::<f64>().clamp(0.0, 1.0)
    }

    /// The mean of what the maximum is above `threshold`.
    #[must_use]
    pub fn excess(&self, threshold: f64) -> f64 {
        self.mixed.excess(threshold)
    }

    /// Quantiles of the maximum.
    #[must_use]
    pub fn quantile(&self, level: f64) -> f64 {
        self.mixed.quantile(level)
    }

    /// As a forecast for `steps` ahead.
    #[must_use]
    pub fn forecast(&self, steps: usize) -> Forecast {
        self.mixed.forecast(steps)
    }
}

/// How one resource of a pool stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResourceContention {
    /// What there is, in the resource's unit.
    pub capacity: f64,
    /// Above this the pool counts as contended: capacity times the threshold of the resource.
    pub limit: f64,
    /// What was used at the last sample.
    pub now: f64,
    /// Probability that the limit is exceeded within the horizon.
    pub probability: f64,
    /// The same for shorter windows, ascending in time.
    pub onset: Vec<Onset>,
    /// Forecasts for moments within the horizon, ascending in time.
    pub path: Vec<Forecast>,
    /// The maximum over each window of `onset`.
    pub maxima: Vec<Outlook>,
}

impl ResourceContention {
    /// Quantiles of the maximum over the horizon.
    #[must_use]
    pub fn maximum(&self, steps: usize) -> Option<Forecast> {
        self.maxima.last().map(|outlook| outlook.forecast(steps))
    }

    /// When the probability reaches `level`, in seconds from now, by straight lines; `None` if not within the horizon.
    #[must_use]
    pub fn reaches(&self, level: f64) -> Option<f64> {
        let mut before = Onset { after_s: 0.0, probability: 0.0 };
        for onset in &self.onset {
            if onset.probability >= level {
                let rise = onset.probability - before.probability;
                let share = if rise > 0.0 { ((level - before.probability) / rise).clamp(0.0, 1.0) } else { 0.0 };
                return Some(before.after_s + share * (onset.after_s - before.after_s));
            }
            before = *onset;
        }
        None
    }
}

/// How a pool stands. `score` is what triggers act on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Contention {
    /// Time of the last sample on the caller's clock.
    pub now_s: f64,
    /// How far it looks ahead.
    pub horizon_s: f64,
    /// 1 - product of (1 - weight x probability) over the resources: one resource that is sure to run out is enough, and a
    /// resource of weight 0 does not count.
    pub score: f64,
    /// Probability that any resource exceeds its limit, taking them as independent.
    pub any: f64,
    /// Mean of the probabilities by weight.
    pub weighted_mean: f64,
    /// Per resource; `None` where the capacity or the use is not known.
    pub resources: PerResource<Option<ResourceContention>>,
    /// Why the score is what it is, most important first.
    pub reasons: Vec<String>,
}

/// Joins the resources' probabilities; returns (score, any, weighted mean). Weights are cut to 0..=1.
#[must_use]
pub fn combine(probabilities: &PerResource<Option<f64>>, weights: &PerResource<f64>) -> (f64, f64, f64) {
    let (mut calm, mut none, mut sum, mut total) = (1.0, 1.0, 0.0, 0.0);
    for (resource, probability) in probabilities.iter() {
        let Some(probability) = probability.filter(|p| p.is_finite()).map(|p| p.clamp(0.0, 1.0)) else { continue };
        let weight = if weights[resource].is_finite() { weights[resource].clamp(0.0, 1.0) } else { 0.0 };
        calm *= 1.0 - weight * probability;
        none *= 1.0 - probability;
        sum += weight * probability;
        total += weight;
    }
    (1.0 - calm, 1.0 - none, if total > 0.0 { sum / total } else { 0.0 })
}

/// One line on a resource for an explanation.
#[must_use]
pub fn describe(resource: Resource, state: &ResourceContention, horizon_s: f64) -> String {
    let p95 = state.maxima.last().map_or(state.now, |outlook| outlook.quantile(0.95));
    format!(
        "{resource}: {:.0} % probable to exceed {} (of {}) within {horizon_s:.0} s; now {}, at most {} with 95 %",
        100.0 * state.probability,
        resource.quantity(state.limit),
        resource.quantity(state.capacity),
        resource.quantity(state.now),
        resource.quantity(p95),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_exhausted_resource_is_enough_and_weights_count() {
        let weights = PerResource { cpu: 1.0, memory: 1.0, io: 0.5, network: 0.0 };
        let only = |resource| {
            let mut probabilities = PerResource::from_fn(|_| Some(0.0));
            probabilities[resource] = Some(1.0);
            combine(&probabilities, &weights)
        };
        assert_eq!(only(Resource::Cpu).0, 1.0);
        assert_eq!(only(Resource::Io).0, 0.5);
        assert_eq!(only(Resource::Network), (0.0, 1.0, 0.0));
        let unknown = PerResource { cpu: None, memory: Some(f64::NAN), io: Some(0.4), network: None };
        let (score, any, mean) = combine(&unknown, &weights);
        assert!((score - 0.2).abs() < 1e-12 && (any - 0.4).abs() < 1e-12 && (mean - 0.4).abs() < 1e-12);
    }

    #[test]
    fn onset_is_read_by_straight_lines() {
        let onset =
            [(10.0, 0.1), (20.0, 0.5), (30.0, 0.9)].map(|(after_s, probability)| Onset { after_s, probability });
        let state = ResourceContention {
            capacity: 1.0,
            limit: 0.9,
            now: 0.5,
            probability: 0.9,
            onset: onset.to_vec(),
            path: Vec::new(),
            maxima: Vec::new(),
        };
        assert_eq!(state.reaches(0.05), Some(5.0));
        assert_eq!(state.reaches(0.3), Some(15.0));
        assert_eq!(state.reaches(0.95), None);
    }
}
