//! Quantiles that adapt until they are exceeded as often as they should be.
//!
//! Four simple answers are kept for each level, and mixed by how small their pinball loss was (exponentially weighted experts;
//! Vovk 1990; here with the linear update of Cesa-Bianchi, Mansour and Stoltz, *Machine Learning* 66, 2007): the point forecast plus a multiple of the usual
//! error, in slow and in fast memory; the last value plus a multiple of the usual step; and the quantile of the series itself.
//! Each multiple moves after every outcome: up by `gamma * level` if the outcome was above, down by `gamma * (1 - level)` if not.
//! Whatever the series does, the share of outcomes above then tends to 1 - level (Gibbs and Candès, *Adaptive conformal
//! inference under distribution shift*, `NeurIPS` 2021; quantile tracking in Angelopoulos, Candès and Tibshirani, *Conformal PID
//! control for time series prediction*, `NeurIPS` 2023). A last correction of the same kind does that for the mixture.

use crate::forecast::LEVELS;
use serde::{Deserialize, Serialize};

/// Number of levels.
const L: usize = LEVELS.len();
/// Experts with a multiple of their own.
const SCALED: usize = 3;
/// All experts.
const EXPERTS: usize = SCALED + 1;
/// Levels from this one on are corrected by phase: the upper ones, which capacities are compared with.
const PHASED: usize = 2;
/// Quantiles of a Laplace distribution with mean absolute error 1: where the tracking starts.
const START: [f32; L] = [-1.61, 0.0, 1.61, 2.30, 3.91];
/// No expert is ever given up.
const LEAST_WEIGHT: f32 = 0.02;

/// What a forecast was made from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Basis {
    /// Point forecast.
    pub point: f32,
    /// Last value.
    pub last: f32,
    /// Usual error in slow memory, fast memory, and usual step.
    pub scales: [f32; SCALED],
    /// Quantiles of the series itself.
    pub levels: [f32; L],
    /// Phase of the outcome in the short cycle, if there is one.
    pub phase: usize,
}

/// How fast things are learned.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// Step of the multiples, in usual errors.
    pub gamma: f32,
    /// Step of the last correction, in usual errors.
    pub correction: f32,
    /// Step of the correction of one phase, in usual errors.
    pub by_phase: f32,
    /// Step of the mixing weights.
    pub mixing: f32,
    /// Weight of the newest error in the slow and in the fast usual error.
    pub memory: [f32; 2],
}

impl Default for Rates {
    fn default() -> Self {
        Self { gamma: 0.01, correction: 0.005, by_phase: 0.1, mixing: 0.05, memory: [0.003, 0.15] }
    }
}

/// Tracks the quantiles of one forecast at one horizon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Conformal {
    multiples: [[f32; L]; SCALED],
    weights: [[f32; EXPERTS]; L],
    /// Usual pinball loss of the mixture.
    losses: [f32; L],
    correction: [f32; L],
    /// More of it for each phase of a short cycle; empty without one.
    by_phase: Vec<[f32; L - PHASED]>,
    /// Usual absolute error in slow and fast memory.
    pub(crate) errors: [f32; 2],
    pub(crate) seen: u32,
}

impl Conformal {
    pub(crate) fn new(phases: usize) -> Self {
        Self {
            multiples: [START; SCALED],
            weights: [[0.4, 0.2, 0.2, 0.2]; L],
            losses: [0.0; L],
            correction: [0.0; L],
            by_phase: vec![[0.0; L - PHASED]; phases],
            errors: [0.0; 2],
            seen: 0,
        }
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        size_of_val(self.by_phase.as_slice())
    }

    fn experts(&self, basis: &Basis, level: usize) -> [f32; EXPERTS] {
        [
            basis.point + self.multiples[0][level] * basis.scales[0],
            basis.point + self.multiples[1][level] * basis.scales[1],
            basis.last + self.multiples[2][level] * basis.scales[2],
            basis.levels[level],
        ]
    }

    fn mixed(&self, basis: &Basis, level: usize, experts: &[f32; EXPERTS]) -> f32 {
        let mixed: f32 = experts.iter().zip(&self.weights[level]).map(|(expert, weight)| expert * weight).sum();
        let phase = match self.by_phase.get(basis.phase) {
            Some(correction) if level >= PHASED => correction[level - PHASED],
            _ => 0.0,
        };
        mixed + (self.correction[level] + phase) * basis.scales[0]
    }

    /// The quantiles of a forecast with that basis; ascending.
    pub(crate) fn quantiles(&self, basis: &Basis) -> [f32; L] {
        let mut quantiles = [0.0; L];
        let mut before = 0.0_f32;
        for (level, quantile) in quantiles.iter_mut().enumerate() {
            before = before.max(self.mixed(basis, level, &self.experts(basis, level)));
            *quantile = before;
        }
        quantiles
    }

    /// Learns that `outcome` came of a forecast with that basis.
    pub(crate) fn learn(&mut self, outcome: f32, basis: &Basis, rates: &Rates) {
        if !outcome.is_finite() || !basis.point.is_finite() {
            return;
        }
        self.seen = self.seen.saturating_add(1);
        let young = 1.0 / self.seen as f32;
        self.learn_errors((outcome - basis.point).abs(), young, rates);
        // Larger moves at first, so that a short history is not ruled by where the tracking started.
        let gamma = rates.gamma.max(0.5 * young.sqrt());
        let unit = basis.scales[0];
        for level in 0..L {
            let share = LEVELS[level] as f32;
            let experts = self.experts(basis, level);
            let mixed = self.mixed(basis, level, &experts);
            let step = |quantile: f32| if outcome > quantile { share } else { share - 1.0 };
            for (expert, multiples) in experts.iter().zip(&mut self.multiples) {
                multiples[level] += gamma * step(*expert);
            }
            let loss = |quantile: f32| step(quantile) * (outcome - quantile);
            let losses = experts.map(loss);
            self.losses[level] += (loss(mixed) - self.losses[level]) * young.max(0.01);
            if unit > 0.0 {
                self.correction[level] += rates.correction * step(mixed);
                if let Some(correction) = self.by_phase.get_mut(basis.phase).filter(|_| level >= PHASED) {
                    // The phases share what they have in common with the correction above.
                    let correction = &mut correction[level - PHASED];
                    *correction += rates.by_phase * step(mixed) - 1e-3 * *correction;
                }
            }
            self.mix(level, &losses, rates.mixing);
        }
    }

    fn learn_errors(&mut self, error: f32, young: f32, rates: &Rates) {
        // One outcome may count for ten usual errors at most once there is something to compare it with.
        let most = if self.seen > 10 { 10.0 * self.errors[0].max(f32::MIN_POSITIVE) } else { f32::MAX };
        for (usual, rate) in self.errors.iter_mut().zip(rates.memory) {
            *usual += (error.min(most) - *usual) * young.max(rate);
        }
    }

    /// Weight goes from experts that lost more than the mean to those that lost less.
    fn mix(&mut self, level: usize, losses: &[f32; EXPERTS], rate: f32) {
        let usual = self.losses[level];
        if usual <= 0.0 {
            return;
        }
        let weights = &mut self.weights[level];
        let mean: f32 = weights.iter().zip(losses).map(|(weight, loss)| weight * loss).sum();
        let mut total = 0.0;
        for (weight, loss) in weights.iter_mut().zip(losses) {
            let change = (rate * (mean - loss) / usual).clamp(-0.3, 0.3);
            *weight = (*weight * (1.0 + change)).max(LEAST_WEIGHT);
            total += *weight;
        }
        for weight in weights {
            *weight /= total;
        }
    }
}

/// Tracks the quantiles of a series itself, about a day's memory at the default rate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Levels {
    values: [f32; L],
    spread: f32,
    seen: u32,
}

impl Levels {
    pub(crate) fn update(&mut self, value: f32, rate: f32) {
        self.seen = self.seen.saturating_add(1);
        if self.seen == 1 {
            self.values = [value; L];
            return;
        }
        let young = 1.0 / self.seen as f32;
        let middle = self.values[L / 2 - 1];
        self.spread += ((value - middle).abs() - self.spread) * young.max(rate);
        let step = self.spread * rate.max(young.sqrt());
        for (known, level) in self.values.iter_mut().zip(LEVELS) {
            let share = level as f32;
            *known += step * if value > *known { share } else { share - 1.0 };
        }
        for i in 1..L {
            self.values[i] = self.values[i].max(self.values[i - 1]);
        }
    }

    pub(crate) fn values(&self) -> [f32; L] {
        self.values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator of our own (xorshift64*), so that tests need no crate and no seed from outside.
    fn noise(state: &mut u64) -> f32 {
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        ((state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32) / (1_u64 << 24) as f32
    }

    #[test]
    fn covers_what_it_promises_even_for_a_skewed_error() {
        let mut tracker = Conformal::new(0);
        let mut state = 7;
        let mut above = [0_u32; L];
        let (warm, total) = (2_000, 22_000);
        for t in 0..total {
            // Exponential: never below zero, long tail above.
            let error = -(1.0 - noise(&mut state)).ln();
            let scales = [tracker.errors[0], tracker.errors[1], 1.0];
            let basis = Basis { scales, ..Basis::default() };
            let quantiles = tracker.quantiles(&basis);
            if t >= warm {
                for (above, quantile) in above.iter_mut().zip(quantiles) {
                    *above += u32::from(error > quantile);
                }
            }
            tracker.learn(error, &basis, &Rates::default());
        }
        for (above, level) in above.iter().zip(LEVELS) {
            let share = 1.0 - f64::from(*above) / f64::from(total - warm);
            assert!((share - level).abs() < 0.01, "level {level}: covered {share}");
        }
    }

    #[test]
    fn the_levels_of_a_series_are_found() {
        let mut levels = Levels::default();
        let mut state = 9;
        for _ in 0..20_000 {
            levels.update(100.0 * noise(&mut state), 0.01);
        }
        for (value, level) in levels.values().iter().zip(LEVELS) {
            assert!((f64::from(*value) - 100.0 * level).abs() < 6.0, "level {level}: {value}");
        }
    }
}
