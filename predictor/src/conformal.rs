//! Quantiles that adapt until they are exceeded as often as they should be.
//!
//! For each level a multiple of the usual error is kept and moved after every outcome: up by `gamma * level` if the outcome was
//! above the quantile, down by `gamma * (1 - level)` if not. Whatever the series does, the share of outcomes above then tends to
//! 1 - level (Gibbs and Candès, *Adaptive conformal inference under distribution shift*, `NeurIPS` 2021; quantile tracking in
//! Angelopoulos, Candès and Tibshirani, *Conformal PID control for time series prediction*, `NeurIPS` 2023).

use crate::forecast::LEVELS;
use serde::{Deserialize, Serialize};

/// Quantiles of a Laplace distribution with mean absolute error 1: where the tracking starts.
const START: [f32; LEVELS.len()] = [-1.61, 0.0, 1.61, 2.30, 3.91];

/// Tracks the quantiles of the error of one forecast at one horizon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Conformal {
    gamma: f32,
    /// Quantiles of the error in units of `scale`.
    multiples: [f32; LEVELS.len()],
    /// Mean absolute error, recent outcomes weighing more.
    scale: f32,
    seen: u32,
}

impl Conformal {
    /// Moves by `gamma` (in usual errors) at most after each outcome.
    #[must_use]
    pub fn new(gamma: f64) -> Self {
        Self { gamma: gamma as f32, multiples: START, scale: 0.0, seen: 0 }
    }

    /// How many outcomes it has learned from.
    #[must_use]
    pub fn seen(&self) -> u32 {
        self.seen
    }

    /// Usual absolute error.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Learns that the forecast was wrong by `error` (outcome minus point) when the usual error was `scale_then`.
    pub fn learn(&mut self, error: f32, scale_then: f32) {
        if !error.is_finite() {
            return;
        }
        self.seen = self.seen.saturating_add(1);
        let young = 1.0 / self.seen as f32;
        // One outcome may count for ten usual errors at most once there is something to compare it with.
        let size = if self.seen > 10 { error.abs().min(10.0 * self.scale.max(f32::MIN_POSITIVE)) } else { error.abs() };
        self.scale += (size - self.scale) * young.max(0.01);
        if scale_then <= 0.0 {
            return;
        }
        let score = error / scale_then;
        // Larger moves at first, so that a short history is not ruled by where the tracking started.
        let gamma = self.gamma.max(0.5 * young.sqrt());
        for (multiple, level) in self.multiples.iter_mut().zip(LEVELS) {
            let level = level as f32;
            *multiple += if score > *multiple { gamma * level } else { -gamma * (1.0 - level) };
        }
        // Tracked one by one they may cross for a while.
        for i in 1..self.multiples.len() {
            self.multiples[i] = self.multiples[i].max(self.multiples[i - 1]);
        }
    }

    /// The quantiles around `point` when the usual error is `scale`.
    #[must_use]
    pub fn quantiles(&self, point: f32, scale: f32) -> [f32; LEVELS.len()] {
        self.multiples.map(|multiple| point + multiple * scale)
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
        let mut tracker = Conformal::new(0.05);
        let mut state = 7;
        let mut above = [0_u32; LEVELS.len()];
        let (warm, total) = (2_000, 22_000);
        for t in 0..total {
            // Exponential: never below zero, long tail above.
            let error = -(1.0 - noise(&mut state)).ln();
            let scale = tracker.scale();
            let quantiles = tracker.quantiles(0.0, scale);
            if t >= warm {
                for (above, quantile) in above.iter_mut().zip(quantiles) {
                    *above += u32::from(error > quantile);
                }
            }
            tracker.learn(error, scale);
        }
        for (above, level) in above.iter().zip(LEVELS) {
            let share = 1.0 - f64::from(*above) / f64::from(total - warm);
            assert!((share - level).abs() < 0.01, "level {level}: covered {share}");
        }
    }
}
