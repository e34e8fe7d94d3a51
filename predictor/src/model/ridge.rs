//! Ridge regression on lags, one set of weights a horizon, learned online.
//!
//! The target is the change over the horizon and the features are earlier values and slow means, all relative to the newest
//! value and divided by the usual size of a step: so the weights mean the same for a series in cores and one in bytes, and a
//! weight of zero is the naive forecast, towards which the penalty shrinks. The normal equations are sums that decay, kept instead of the
//! samples, and smartcore's Cholesky decomposition solves them now and then. Large errors weigh less (Huber, *Annals of
//! Mathematical Statistics* 35, 1964), since one burst must not rule the weights for days.

use super::Model;
use crate::bank::MOST_HORIZONS;
use crate::season::Season;
use crate::window::gaps;
use serde::{Deserialize, Serialize};
use smartcore::linalg::basic::arrays::{Array, Array2, MutArray};
use smartcore::linalg::basic::matrix::DenseMatrix;
use smartcore::linalg::traits::cholesky::CholeskyDecomposable;

/// Lags that are features, in steps.
const LAGS: [usize; 3] = [1, 2, 5];
/// Means that are features, by the weight of their newest sample.
const MEANS: [f64; 3] = [0.2, 0.04, 0.005];
/// The most cycles, each giving two features: its deviation now and at the horizon.
pub const MOST_SEASONS: usize = 2;
/// Features that are the same for every horizon; the last is the constant.
const COMMON: usize = LAGS.len() + MEANS.len() + MOST_SEASONS + 1;
/// Number of features.
const P: usize = COMMON + MOST_SEASONS;
/// Numbers kept for each step: the common features, the value, the scale.
const KEPT: usize = COMMON + 2;
/// Entries of the upper triangle of the normal matrix.
const TRIANGLE: usize = P * (P + 1) / 2;
/// Newest samples kept for the lags.
const RECENT: usize = LAGS[LAGS.len() - 1] + 1;

/// Sums and weights for one horizon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Equations {
    steps: usize,
    /// Upper triangle of the sum of x x'.
    matrix: Vec<f32>,
    /// Sum of x y.
    right: [f32; P],
    weights: [f32; P],
    /// Samples seen so far.
    seen: u32,
    solved: bool,
}

/// See the module's description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ridge {
    decay: f32,
    penalty: f64,
    refit_every: u32,
    clock: u32,
    equations: Vec<Equations>,
    recent: [f64; RECENT],
    means: [f64; MEANS.len()],
    seasons: Vec<Season>,
    /// Usual size of one step.
    scale: f64,
    seen: u32,
    /// Features, value and scale of the latest steps as a ring.
    #[serde(with = "gaps")]
    pending: Vec<f32>,
}

impl Ridge {
    /// For `horizons` (ascending) and at most [`MOST_SEASONS`] cycles, forgetting a sample's weight by `decay` a step, with the penalty `penalty` (in samples), and
    /// solving anew every `refit_every` steps, more often while there are few.
    #[must_use]
    pub fn new(horizons: &[usize], seasons: Vec<Season>, decay: f64, penalty: f64, refit_every: u32) -> Self {
        let equations = horizons
            .iter()
            .map(|steps| Equations {
                steps: *steps,
                matrix: vec![0.0; TRIANGLE],
                right: [0.0; P],
                weights: [0.0; P],
                seen: 0,
                solved: false,
            })
            .collect();
        let longest = horizons.last().copied().unwrap_or(1);
        Self {
            decay: decay as f32,
            penalty,
            refit_every: refit_every.max(1),
            clock: 0,
            equations,
            recent: [0.0; RECENT],
            means: [0.0; MEANS.len()],
            seasons,
            scale: 0.0,
            seen: 0,
            pending: vec![f32::NAN; longest * KEPT],
        }
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        let seasons: usize = self.seasons.iter().map(|season| size_of::<Season>() + 2 * season.parts()).sum();
        let equations = self.equations.len() * (size_of::<Equations>() + 4 * TRIANGLE);
        seasons + equations + 4 * self.pending.len()
    }

    fn common(&self) -> [f32; COMMON] {
        let mut x = [0.0; COMMON];
        if self.scale <= 0.0 {
            return x;
        }
        let now = self.recent[0];
        let relative = |value: f64| ((value - now) / self.scale).clamp(-30.0, 30.0) as f32;
        for (x, lag) in x.iter_mut().zip(LAGS) {
            *x = relative(self.recent[lag]);
        }
        for (x, mean) in x[LAGS.len()..].iter_mut().zip(self.means) {
            *x = relative(mean);
        }
        for (x, season) in x[LAGS.len() + MEANS.len()..].iter_mut().zip(&self.seasons) {
            *x = deviation(season, 0, self.scale as f32);
        }
        x[COMMON - 1] = 1.0;
        x
    }

    /// All features for a horizon `ahead` of the newest sample, of which the common ones are known.
    fn complete(&self, common: &[f32], ahead: usize, scale: f32) -> [f32; P] {
        let mut x = [0.0; P];
        x[..COMMON].copy_from_slice(&common[..COMMON]);
        for (x, season) in x[COMMON..].iter_mut().zip(&self.seasons) {
            *x = deviation(season, ahead, scale);
        }
        x
    }

    fn remember(&mut self, value: f64) {
        if self.seen == 0 {
            self.recent = [value; RECENT];
            self.means = [value; MEANS.len()];
        } else {
            let step = (value - self.recent[0]).abs();
            self.scale += (step - self.scale) * (1.0 / f64::from(self.seen)).max(0.02);
            self.recent.copy_within(..RECENT - 1, 1);
            self.recent[0] = value;
            for (mean, alpha) in self.means.iter_mut().zip(MEANS) {
                *mean += (value - *mean) * alpha.max(1.0 / f64::from(self.seen + 1));
            }
        }
        self.seen = self.seen.saturating_add(1);
    }
}

impl Model for Ridge {
    const NAME: &'static str = "ridge";

    fn update(&mut self, value: Option<f64>) {
        let outcomes = [value.unwrap_or(f64::NAN) as f32; MOST_HORIZONS];
        self.update_with(value, &outcomes);
    }

    fn forecast(&self, _horizons: &[usize], out: &mut [f32]) {
        if self.seen < 2 || self.scale <= 0.0 {
            return;
        }
        let common = self.common();
        for (equations, out) in self.equations.iter().zip(out).filter(|(equations, _)| equations.solved) {
            let features = self.complete(&common, equations.steps, self.scale as f32);
            *out = self.recent[0] as f32 + self.scale as f32 * dot(&equations.weights, &features);
        }
    }
}

impl Ridge {
    /// Takes the next sample, and for each horizon what came of the forecast made that long ago (NaN: nothing to learn): the
    /// sample itself, or the maximum since then.
    pub fn update_with(&mut self, value: Option<f64>, outcomes: &[f32]) {
        let slots = self.pending.len() / KEPT;
        let clock = self.clock as usize;
        self.clock = self.clock.wrapping_add(1);
        if let Some(value) = value {
            self.learn(clock, outcomes);
            self.remember(value);
        } else {
            // Lags are in time and not in samples.
            self.recent.copy_within(..RECENT - 1, 1);
        }
        for season in &mut self.seasons {
            season.update(value);
        }
        // A missing sample is bridged by the value before it, and its features are not learned from.
        let slot = clock % slots * KEPT;
        let common = if value.is_some() { self.common() } else { [f32::NAN; COMMON] };
        self.pending[slot..slot + COMMON].copy_from_slice(&common);
        self.pending[slot + COMMON] = self.recent[0] as f32;
        self.pending[slot + COMMON + 1] = self.scale as f32;
    }

    fn learn(&mut self, clock: usize, outcomes: &[f32]) {
        let slots = self.pending.len() / KEPT;
        for index in 0..self.equations.len() {
            let Some(outcome) = outcomes.get(index) else { continue };
            let slot = (clock + slots - self.equations[index].steps) % slots * KEPT;
            let then = &self.pending[slot..slot + KEPT];
            let (base, scale) = (then[COMMON], then[COMMON + 1]);
            if then[0].is_nan() || outcome.is_nan() || scale.is_nan() || scale <= 0.0 {
                continue;
            }
            // The seasons still stand at the sample before: one step ahead of it is the phase of the outcome.
            let x = self.complete(then, 1, scale);
            let y = ((outcome - base) / scale).clamp(-100.0, 100.0);
            let equations = &mut self.equations[index];
            equations.learn(&x, y, self.decay);
            // Often while every sample changes much, seldom when they are many.
            let every = (equations.seen / 8).clamp(1, self.refit_every);
            // Not all horizons at the same step.
            if equations.seen > 2 && (equations.seen + index as u32 * 31).is_multiple_of(every) {
                equations.solve(self.penalty);
            }
        }
    }
}

fn deviation(season: &Season, ahead: usize, scale: f32) -> f32 {
    if scale > 0.0 { (season.deviation(ahead) / scale).clamp(-30.0, 30.0) } else { 0.0 }
}

fn dot(a: &[f32; P], b: &[f32; P]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Equations {
    /// Learns that `y` came of features `x`.
    fn learn(&mut self, x: &[f32; P], y: f32, decay: f32) {
        let error = (y - dot(&self.weights, x)).abs();
        let weight = 1.0 / error.max(1.0);
        let mut entry = self.matrix.iter_mut();
        for i in 0..P {
            for j in i..P {
                if let Some(entry) = entry.next() {
                    *entry = *entry * decay + weight * x[i] * x[j];
                }
            }
            self.right[i] = self.right[i] * decay + weight * x[i] * y;
        }
        self.seen = self.seen.saturating_add(1);
    }

    /// Solves (X'X + penalty I) w = X'y; keeps the old weights if that is not possible.
    fn solve(&mut self, penalty: f64) {
        let mut matrix = DenseMatrix::<f64>::zeros(P, P);
        let mut entry = self.matrix.iter();
        for i in 0..P {
            for j in i..P {
                let value = f64::from(entry.next().copied().unwrap_or(0.0));
                matrix.set((i, j), value);
                matrix.set((j, i), value);
            }
        }
        for i in 0..P {
            let diagonal = *matrix.get((i, i));
            matrix.set((i, i), diagonal * 1.001 + penalty);
        }
        let right = DenseMatrix::from_iterator(self.right.iter().map(|value| f64::from(*value)), P, 1, 0);
        let Ok(solution) = matrix.cholesky_solve_mut(right) else { return };
        let mut weights = [0.0_f32; P];
        for (i, weight) in weights.iter_mut().enumerate() {
            *weight = *solution.get((i, 0)) as f32;
        }
        if weights.iter().all(|weight| weight.is_finite()) {
            self.weights = weights;
            self.solved = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learns_that_a_series_alternates() {
        let mut ridge = Ridge::new(&[1, 2], Vec::new(), 0.999, 1.0, 12);
        for t in 0..400 {
            ridge.update(Some(if t % 2 == 0 { 10.0 } else { 20.0 }));
        }
        let mut out = [f32::NAN; 2];
        ridge.forecast(&[1, 2], &mut out);
        // The last value was 20.
        assert!((out[0] - 10.0).abs() < 1.0, "{out:?}");
        assert!((out[1] - 20.0).abs() < 1.0, "{out:?}");
    }

    #[test]
    fn a_constant_series_says_nothing() {
        let mut ridge = Ridge::new(&[1], Vec::new(), 0.999, 1.0, 12);
        for _ in 0..100 {
            ridge.update(Some(5.0));
        }
        let mut out = [f32::NAN];
        ridge.forecast(&[1], &mut out);
        assert!(out[0].is_nan() || (out[0] - 5.0).abs() < 1e-6);
    }
}
