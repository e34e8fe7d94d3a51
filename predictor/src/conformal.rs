//! Quantiles that adapt until they are exceeded as often as they should be.
//!
//! Four simple answers are kept for each level, and mixed by how small their pinball loss was (exponentially weighted experts;
//! Vovk 1990; here with the linear update of Cesa-Bianchi, Mansour and Stoltz, *Machine Learning* 66, 2007): the point forecast plus a multiple of the usual
//! error, in slow and in fast memory; the last value plus a multiple of the usual step; and the quantile of the series itself.
//! Each multiple moves after every outcome: up by `gamma * level` if the outcome was above, down by `gamma * (1 - level)` if not.
//! Whatever the series does, the share of outcomes above then tends to 1 - level (Gibbs and Candès, *Adaptive conformal
//! inference under distribution shift*, `NeurIPS` 2021; quantile tracking in Angelopoulos, Candès and Tibshirani, *Conformal PID
//! control for time series prediction*, `NeurIPS` 2023). A last correction of the same kind does that for the mixture.

#![expect(
    clippy::needless_range_loop,
    reason = "several arrays side by side, in loops that become vector instructions"
)]

use crate::forecast::LEVELS;
use serde::{Deserialize, Serialize};

/// More of a correction at one phase of a short cycle, in parts of [`FINE`]. Kept by phase and not in [`Conformal`], since only one phase
/// at a time is learned.
pub(crate) type Phased = [i16; L - PHASED];

/// Number of levels. All that is kept for each level stands in arrays of this length side by side, which compilers make vector
/// instructions of.
const L: usize = LEVELS.len();
/// One number for each level.
pub(crate) type Lanes = [f32; L];
/// Experts with a multiple of their own.
const SCALED: usize = 3;
/// All experts.
const EXPERTS: usize = SCALED + 1;
/// Levels from this one on are corrected by phase: the upper ones, which capacities are compared with.
const PHASED: usize = 1;
/// The most phases of a cycle that are told apart.
pub(crate) const PHASES: usize = 12;
/// Corrections by phase are kept in this many parts of a usual error: in 16 bits they reach 16 usual errors, and the small steps
/// down are whole numbers.
const FINE: f32 = 2_000.0;
/// Quantiles of a Laplace distribution with mean absolute error 1: where the tracking starts.
const START: Lanes = [0.0, 1.61, 2.30, 3.91];
/// No expert is ever given up.
const LEAST_WEIGHT: f32 = 0.02;
/// Weights at the start, one for each expert.
const PRIOR: [f32; EXPERTS] = [0.4, 0.2, 0.2, 0.2];

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
    pub levels: Lanes,
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
    multiples: [Lanes; SCALED],
    weights: [Lanes; EXPERTS],
    /// Usual pinball loss of the mixture.
    losses: Lanes,
    correction: Lanes,
    /// Usual absolute error in slow and fast memory.
    pub(crate) errors: [f32; 2],
    pub(crate) seen: u32,
}

impl Conformal {
    pub(crate) fn new() -> Self {
        Self {
            multiples: [START; SCALED],
            weights: PRIOR.map(|weight| [weight; L]),
            losses: [0.0; L],
            correction: [0.0; L],
            errors: [0.0; 2],
            seen: 0,
        }
    }

    #[inline(always)]
    fn experts(&self, basis: &Basis) -> [Lanes; EXPERTS] {
        let bases = [basis.point, basis.point, basis.last];
        let mut experts = [basis.levels; EXPERTS];
        for expert in 0..SCALED {
            for level in 0..L {
                experts[expert][level] = bases[expert] + self.multiples[expert][level] * basis.scales[expert];
            }
        }
        experts
    }

    #[inline(always)]
    fn mixed(&self, basis: &Basis, experts: &[Lanes; EXPERTS], phased: Option<&Phased>) -> Lanes {
        let mut corrections = self.correction;
        if let Some(phase) = phased {
            for (correction, phase) in corrections[PHASED..].iter_mut().zip(phase) {
                *correction += f32::from(*phase) / FINE;
            }
        }
        let mut mixed = [0.0; L];
        for level in 0..L {
            mixed[level] = corrections[level] * basis.scales[0];
            for expert in 0..EXPERTS {
                mixed[level] += experts[expert][level] * self.weights[expert][level];
            }
        }
        mixed
    }

    /// The quantiles of a forecast with that basis, for an outcome at a phase of that correction, if there is a cycle; ascending.
    pub(crate) fn quantiles(&self, basis: &Basis, phased: Option<&Phased>) -> Lanes {
        let mut quantiles = self.mixed(basis, &self.experts(basis), phased);
        let mut before = 0.0_f32;
        for quantile in &mut quantiles {
            before = before.max(*quantile);
            *quantile = before;
        }
        quantiles
    }

    /// Learns that `outcome` came of a forecast with that basis, at a phase of that correction.
    pub(crate) fn learn(&mut self, outcome: f32, basis: &Basis, rates: &Rates, phased: Option<&mut Phased>) {
        if !outcome.is_finite() || !basis.point.is_finite() {
            return;
        }
        self.seen = self.seen.saturating_add(1);
        let young = 1.0 / self.seen as f32;
        self.learn_errors((outcome - basis.point).abs(), young, rates);
        let experts = self.experts(basis);
        let mixed = self.mixed(basis, &experts, phased.as_deref());
        // Larger moves at first, so that a short history is not ruled by where the tracking started.
        let gamma = rates.gamma.max(0.5 * young.sqrt());
        let mut losses = [[0.0; L]; EXPERTS];
        for expert in 0..EXPERTS {
            for level in 0..L {
                let step = step(outcome, experts[expert][level], level);
                losses[expert][level] = step * (outcome - experts[expert][level]);
                if expert < SCALED {
                    self.multiples[expert][level] += gamma * step;
                }
            }
        }
        let mut steps = [0.0; L];
        for level in 0..L {
            steps[level] = step(outcome, mixed[level], level);
            self.losses[level] += (steps[level] * (outcome - mixed[level]) - self.losses[level]) * young.max(0.01);
        }
        if basis.scales[0] > 0.0 {
            for level in 0..L {
                self.correction[level] += rates.correction * steps[level];
            }
            if let Some(phase) = phased {
                // The phases share what they have in common with the correction above.
                for (correction, step) in phase.iter_mut().zip(&steps[PHASED..]) {
                    let moved = 0.999 * f32::from(*correction) + FINE * rates.by_phase * step;
                    // The conversion keeps within the bounds of 16 bits.
                    *correction = (moved + 0.5_f32.copysign(moved)) as i16;
                }
            }
        }
        self.mix(&losses, rates.mixing);
    }

    fn learn_errors(&mut self, error: f32, young: f32, rates: &Rates) {
        // One outcome may count for ten usual errors at most once there is something to compare it with.
        let most = if self.seen > 10 { 10.0 * self.errors[0].max(f32::MIN_POSITIVE) } else { f32::MAX };
        for (usual, rate) in self.errors.iter_mut().zip(rates.memory) {
            *usual += (error.min(most) - *usual) * young.max(rate);
        }
    }

    /// Weight goes from experts that lost more than the mean to those that lost less.
    #[inline]
    fn mix(&mut self, losses: &[Lanes; EXPERTS], rate: f32) {
        let (mut mean, mut rates, mut total) = ([0.0; L], [0.0; L], [0.0; L]);
        for level in 0..L {
            let usual = self.losses[level];
            rates[level] = if usual > 0.0 { rate / usual } else { 0.0 };
            for expert in 0..EXPERTS {
                mean[level] += self.weights[expert][level] * losses[expert][level];
            }
        }
        for expert in 0..EXPERTS {
            for level in 0..L {
                let change = (rates[level] * (mean[level] - losses[expert][level])).clamp(-0.3, 0.3);
                let weight = (self.weights[expert][level] * (1.0 + change)).max(LEAST_WEIGHT);
                self.weights[expert][level] = weight;
                total[level] += weight;
            }
        }
        for level in 0..L {
            let share = 1.0 / total[level];
            for expert in 0..EXPERTS {
                self.weights[expert][level] *= share;
            }
        }
    }
}

/// Slope of the pinball loss: the share that should not be exceeded if the outcome is above the quantile, less one if not.
#[inline]
fn step(outcome: f32, quantile: f32, level: usize) -> f32 {
    const SHARES: Lanes = [LEVELS[0] as f32, LEVELS[1] as f32, LEVELS[2] as f32, LEVELS[3] as f32];
    if outcome > quantile { SHARES[level] } else { SHARES[level] - 1.0 }
}

/// Tracks the quantiles of a series itself, about a day's memory at the default rate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Levels {
    values: Lanes,
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
        // The first level is the median.
        let middle = self.values[0];
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

    pub(crate) fn values(&self) -> Lanes {
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
        let mut tracker = Conformal::new();
        let mut state = 7;
        let mut above = [0_u32; L];
        let (warm, total) = (2_000, 22_000);
        for t in 0..total {
            // Exponential: never below zero, long tail above.
            let error = -(1.0 - noise(&mut state)).ln();
            let scales = [tracker.errors[0], tracker.errors[1], 1.0];
            let basis = Basis { scales, ..Basis::default() };
            let quantiles = tracker.quantiles(&basis, None);
            if t >= warm {
                for (above, quantile) in above.iter_mut().zip(quantiles) {
                    *above += u32::from(error > quantile);
                }
            }
            tracker.learn(error, &basis, &Rates::default(), None);
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
