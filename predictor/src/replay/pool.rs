//! Probabilities that a pool exceeds its capacity within a window, replayed and scored.

use super::{Protocol, fill_forward};
use crate::bank::{BankConfig, BankError};
use crate::experience::{Experience, LESSONS};
use crate::insight::{Insight, Waiting};
use crate::maximum::Maxima;
use crate::model::Budget;
use crate::quantile::sorted_quantile;
use serde::{Deserialize, Serialize};

/// What was said and what came at one origin.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Said {
    /// Probability by the forecaster.
    pub probability: f64,
    /// The same without the trees over all pools.
    pub alone: f64,
    /// Probability by the last value and the past residuals of the window's maximum.
    pub naive: f64,
    /// Probability by mean and standard deviation of the last day (N-sigma).
    pub sigma: f64,
    /// What was used, as a share of the capacity: what a reactive threshold looks at.
    pub used: f64,
    /// Whether the capacity was exceeded.
    pub happened: bool,
    /// Whether it had not been exceeded for a while.
    pub quiet: bool,
}

/// Scores of many [`Said`].
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct ProbabilityScore {
    /// Origins.
    pub count: usize,
    /// Share of origins at which it happened.
    pub base_rate: f64,
    /// Mean square of (probability - outcome).
    pub brier: f64,
    /// Expected calibration error: over ten equal bins, mean distance of what was said and what came.
    pub ece: f64,
    /// 1 - brier / brier of always saying the base rate.
    pub skill: f64,
    /// Probability that an origin at which it happened was given more than one at which it did not.
    pub auc: f64,
}

impl Said {
    /// The certainty of a threshold trigger: it will happen, or it will not.
    #[must_use]
    pub fn reactive(&self, threshold: f64) -> f64 {
        f64::from(u8::from(self.used >= threshold))
    }
}

/// One bar of a reliability diagram: origins at which about the same was said.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Bin {
    /// Mean probability that was said.
    pub said: f64,
    /// Share of origins at which it happened.
    pub came: f64,
    /// Origins.
    pub count: usize,
}

/// What was said and what came in ten equal bins of probability; empty ones are left out.
#[must_use]
pub fn reliability(pairs: &[(f64, bool)]) -> Vec<Bin> {
    let mut bins = [(0.0, 0_usize, 0_usize); 10];
    for (p, happened) in pairs {
        let bin = &mut bins[((p * 10.0) as usize).min(9)];
        *bin = (bin.0 + p, bin.1 + usize::from(*happened), bin.2 + 1);
    }
    let bin = |(said, came, count): (f64, usize, usize)| Bin {
        said: said / count as f64,
        came: came as f64 / count as f64,
        count,
    };
    bins.into_iter().filter(|bin| bin.2 > 0).map(bin).collect()
}

/// Replays the sums of pools, all of them step by step together, since they learn from each other. One list a window, in the
/// order of the protocol's horizons.
///
/// # Errors
/// [`BankError`] if `config` cannot be used.
pub fn replay_pools(
    sums: &[Vec<Option<f64>>],
    protocol: &Protocol,
    config: &BankConfig,
) -> Result<Vec<Vec<Said>>, BankError> {
    let known = sums.iter().filter_map(|sums| Replay::new(sums, protocol, config).transpose());
    let mut pools = known.collect::<Result<Vec<_>, _>>()?;
    let Experience { mut insight, .. } = Experience::new(config, LESSONS);
    let mut said = vec![Vec::new(); protocol.horizons.len()];
    for t in 0..sums.iter().map(Vec::len).max().unwrap_or(0) {
        for pool in &mut pools {
            pool.step(t, protocol, &mut insight, &mut said);
        }
        if protocol.refit_every > 0 && (t + 1).is_multiple_of(protocol.refit_every) {
            insight.refit(&mut Budget::unlimited());
        }
    }
    Ok(said)
}

/// One pool of a replay.
struct Replay<'a> {
    sums: &'a [Option<f64>],
    filled: Vec<Option<f64>>,
    capacity: f64,
    /// Sorted residuals of the naive forecast before the test, by window.
    residuals: Vec<Vec<f64>>,
    maxima: Maxima,
    waiting: Waiting,
}

impl<'a> Replay<'a> {
    /// `None` for a pool of which nothing was measured before the test.
    fn new(sums: &'a [Option<f64>], protocol: &Protocol, config: &BankConfig) -> Result<Option<Self>, BankError> {
        let before = protocol.test_from.min(sums.len());
        let mut known: Vec<f64> = sums[..before].iter().flatten().copied().collect();
        known.sort_by(f64::total_cmp);
        let maxima = Maxima::new(config)?;
        let Some(capacity) = sorted_quantile(&known, protocol.capacity_quantile) else { return Ok(None) };
        let filled = fill_forward(sums);
        let residuals = protocol.horizons.iter().map(|window| window_residuals(&filled, *window, protocol)).collect();
        Ok(Some(Self { sums, filled, capacity, residuals, maxima, waiting: Waiting::default() }))
    }

    fn step(&mut self, t: usize, protocol: &Protocol, insight: &mut Insight, said: &mut [Vec<Said>]) {
        let (sums, capacity) = (self.sums, self.capacity);
        let Some(value) = sums.get(t) else { return };
        self.maxima.update(*value);
        self.maxima.watch(capacity);
        insight.follow(&mut self.waiting, &mut self.maxima, capacity, t as u64);
        let origin = t >= protocol.test_from
            && t < protocol.test_until
            && (t - protocol.test_from).is_multiple_of(protocol.pool_origin_every);
        let Some(last) = self.filled[t].filter(|_| origin) else { return };
        let quiet = sums[(t + 1).saturating_sub(protocol.quiet)..=t].iter().flatten().all(|value| *value <= capacity);
        let sigma = n_sigma(&self.filled[(t + 1).saturating_sub(protocol.day)..=t]);
        for ((said, window), residuals) in said.iter_mut().zip(&protocol.horizons).zip(&self.residuals) {
            let Some(ahead) = sums.get(t + 1..=t + window) else { continue };
            let Some(highest) = ahead.iter().flatten().copied().reduce(f64::max) else { continue };
            let Some(probability) = self.maxima.exceedance(*window, capacity) else { continue };
            let above = residuals.len() - residuals.partition_point(|residual| last + residual <= capacity);
            said.push(Said {
                probability,
                alone: self.maxima.exceedance_alone(*window, capacity).unwrap_or(probability),
                naive: above as f64 / residuals.len().max(1) as f64,
                sigma: sigma(capacity),
                used: if capacity > 0.0 { last / capacity } else { 0.0 },
                happened: highest > capacity,
                quiet,
            });
        }
    }
}

/// Sorted (maximum over the next `window` steps - value) before the test.
fn window_residuals(filled: &[Option<f64>], window: usize, protocol: &Protocol) -> Vec<f64> {
    let until = protocol.test_from.min(filled.len()).saturating_sub(window);
    let mut residuals: Vec<f64> = (protocol.calibrate_from..until)
        .filter_map(|t| {
            let highest = filled[t + 1..=t + window].iter().flatten().copied().reduce(f64::max)?;
            Some(highest - filled[t]?)
        })
        .collect();
    residuals.sort_by(f64::total_cmp);
    residuals
}

/// The probability that a normal variable with the mean and deviation of these values exceeds a capacity.
fn n_sigma(values: &[Option<f64>]) -> impl Fn(f64) -> f64 {
    let count = values.iter().flatten().count().max(1) as f64;
    let mean = values.iter().flatten().sum::<f64>() / count;
    let variance = values.iter().flatten().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    let deviation = variance.sqrt().max(1e-9);
    move |capacity| normal_above((capacity - mean) / deviation)
}

/// Upper tail of the standard normal distribution (Abramowitz and Stegun, 26.2.17; error below 1e-7).
fn normal_above(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let series =
        t * (0.319_381_530 + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let tail = (-0.5 * z * z).exp() / std::f64::consts::TAU.sqrt() * series;
    if z >= 0.0 { tail } else { 1.0 - tail }
}

/// Scores pairs of probability and outcome.
#[must_use]
pub fn score(pairs: &[(f64, bool)]) -> ProbabilityScore {
    if pairs.is_empty() {
        return ProbabilityScore::default();
    }
    let count = pairs.len() as f64;
    let outcome = |happened: bool| f64::from(u8::from(happened));
    let base_rate = pairs.iter().map(|(_, happened)| outcome(*happened)).sum::<f64>() / count;
    let brier = pairs.iter().map(|(p, happened)| (p - outcome(*happened)).powi(2)).sum::<f64>() / count;
    let ece = reliability(pairs).iter().map(|bin| bin.count as f64 * (bin.said - bin.came).abs()).sum::<f64>() / count;
    let reference = base_rate * (1.0 - base_rate);
    let skill = if reference > 0.0 { 1.0 - brier / reference } else { 0.0 };
    ProbabilityScore { count: pairs.len(), base_rate, brier, ece, skill, auc: auc(pairs) }
}

/// Area under the ROC curve by ranks, ties counting half.
fn auc(pairs: &[(f64, bool)]) -> f64 {
    let mut sorted: Vec<&(f64, bool)> = pairs.iter().collect();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut rank_sum, mut happened, mut start) = (0.0, 0.0, 0);
    while start < sorted.len() {
        let ties = sorted[start..].iter().take_while(|pair| pair.0 <= sorted[start].0).count();
        let rank = start as f64 + 0.5 * (ties as f64 + 1.0);
        let positive = sorted[start..start + ties].iter().filter(|pair| pair.1).count() as f64;
        rank_sum += rank * positive;
        happened += positive;
        start += ties;
    }
    let calm = sorted.len() as f64 - happened;
    if happened == 0.0 || calm == 0.0 {
        0.5
    } else {
        (rank_sum - happened * (happened + 1.0) / 2.0) / (happened * calm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_of_a_perfect_a_constant_and_a_wrong_forecaster() {
        let outcomes: Vec<bool> = (0..100).map(|i| i % 5 == 0).collect();
        let scored = |said: &dyn Fn(bool) -> f64| {
            score(&outcomes.iter().map(|happened| (said(*happened), *happened)).collect::<Vec<_>>())
        };
        let perfect = scored(&|happened| f64::from(u8::from(happened)));
        assert_eq!((perfect.brier, perfect.ece, perfect.skill, perfect.auc), (0.0, 0.0, 1.0, 1.0));
        let constant = scored(&|_| 0.2);
        assert!((constant.brier - 0.16).abs() < 1e-12 && constant.ece < 1e-12 && constant.skill.abs() < 1e-12);
        assert_eq!(constant.auc, 0.5);
        let wrong = scored(&|happened| if happened { 0.0 } else { 0.9 });
        assert!(wrong.skill < 0.0 && wrong.auc == 0.0 && wrong.ece > 0.9);
    }

    #[test]
    fn the_normal_tail_is_right() {
        for (z, tail) in [(0.0, 0.5), (1.0, 0.158_655), (1.96, 0.024_998), (-1.0, 0.841_345)] {
            assert!((normal_above(z) - tail).abs() < 1e-5, "{z}");
        }
    }
}
