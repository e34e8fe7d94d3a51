//! Ridge regression on lags, one set of weights a horizon, learned online.
//!
//! The target is the change over the horizon and the features are earlier values and slow means, all relative to the newest
//! value and divided by the usual size of a step: so the weights mean the same for a series in cores and one in bytes, and a
//! weight of zero is the naive forecast, towards which the penalty shrinks. The normal equations are sums that decay, kept instead of the
//! samples, and a Cholesky decomposition solves them now and then. Large errors weigh less (Huber, *Annals of
//! Mathematical Statistics* 35, 1964), since one burst must not rule the weights for days.

mod equations;

use super::Model;
use crate::bank::MOST_HORIZONS;
use crate::season::{Season, half, whole};
use equations::{Equations, SHARE, dot};
use serde::{Deserialize, Serialize};

/// Lags that are features, in steps.
const LAGS: [usize; 2] = [1, 3];
/// Means that are features, by the weight of their newest sample.
const MEANS: [f64; 3] = [0.2, 0.04, 0.005];
/// The most cycles, each giving two features: its deviation now and at the horizon.
pub const MOST_SEASONS: usize = 2;
/// Features that are the same for every horizon: lags and means.
const COMMON: usize = LAGS.len() + MEANS.len();
/// Number of features; the last is the constant.
const P: usize = COMMON + 2 * MOST_SEASONS + 1;
/// Newest samples kept for the lags.
const RECENT: usize = LAGS[LAGS.len() - 1] + 1;

/// What is kept of a step until its outcome is known; a scale of 0 means that there is nothing to learn from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Kept {
    value: f32,
    /// Usual size of one step.
    scale: f32,
    /// Lags and means relative to the value, in scales, as upper halves of `f32`.
    common: [u16; COMMON],
    /// Deviations of the cycles, likewise.
    seasons: [u16; MOST_SEASONS],
}

/// See the module's description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ridge {
    penalty: f32,
    refit_every: u32,
    /// At which of these steps it is solved.
    #[serde(default)]
    stagger: u32,
    clock: u32,
    equations: Vec<Equations>,
    recent: [f64; RECENT],
    means: [f64; MEANS.len()],
    seasons: Vec<Season>,
    /// Usual size of one step.
    scale: f64,
    seen: u32,
    /// The latest steps as a ring.
    pending: Vec<Kept>,
}

impl Ridge {
    /// For `horizons` (ascending) and at most [`MOST_SEASONS`] cycles, forgetting a sample's weight by `decay` a step, with the penalty
    /// `penalty` (in samples), and solving anew every `refit_every` steps, more often while there are few.
    #[must_use]
    pub fn new(horizons: &[usize], seasons: Vec<Season>, decay: f64, penalty: f64, refit_every: u32) -> Self {
        let equations = horizons.iter().map(|steps| Equations::new(*steps, decay)).collect();
        let longest = horizons.last().copied().unwrap_or(1);
        Self {
            penalty: penalty as f32,
            refit_every: refit_every.max(1),
            stagger: 0,
            clock: 0,
            equations,
            recent: [0.0; RECENT],
            means: [0.0; MEANS.len()],
            seasons,
            scale: 0.0,
            seen: 0,
            pending: vec![Kept::default(); longest],
        }
    }

    /// Solves `steps` earlier than others that began together.
    pub(crate) fn staggered(mut self, steps: u32) -> Self {
        self.stagger = steps % self.refit_every;
        self
    }

    /// See [`crate::bank::Bank::touch_places`].
    pub(crate) fn touch_places(&self) -> f32 {
        self.clock as f32 + self.recent[0] as f32 + self.means[MEANS.len() - 1] as f32 + self.equations.len() as f32
    }

    /// See [`crate::bank::Bank::touch`].
    pub(crate) fn touch(&self) -> f32 {
        let (slots, slot) = (self.pending.len(), self.clock as usize % self.pending.len());
        let mut read = self.deviations(1).iter().sum::<f32>();
        for (index, equations) in self.equations.iter().enumerate() {
            let ago = equations.steps as usize;
            let ahead: f32 = self.deviations(1 + ago).iter().sum();
            let learns = equations.learns(self.clock, index);
            if learns {
                read += self.pending[if slot >= ago { slot - ago } else { slot + slots - ago }].scale;
            }
            read += equations.touch(learns) + ahead;
        }
        read + self.pending[slot].value
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        let seasons: usize = self.seasons.iter().map(|season| size_of::<Season>() + 2 * season.parts()).sum();
        seasons + size_of_val(self.equations.as_slice()) + size_of_val(self.pending.as_slice())
    }

    pub(crate) fn common(&self) -> [f32; COMMON] {
        let mut x = [0.0; COMMON];
        if self.scale <= 0.0 {
            return x;
        }
        let (now, share) = (self.recent[0], 1.0 / self.scale);
        let relative = |value: f64| ((value - now) * share).clamp(-30.0, 30.0) as f32;
        for (x, lag) in x.iter_mut().zip(LAGS) {
            *x = relative(self.recent[lag]);
        }
        for (x, mean) in x[LAGS.len()..].iter_mut().zip(self.means) {
            *x = relative(mean);
        }
        x
    }

    /// The deviations of the cycles now and `ahead` steps after the newest sample, in usual steps.
    pub(crate) fn seasons(&self, ahead: usize) -> [[f32; MOST_SEASONS]; 2] {
        let share = if self.scale > 0.0 { 1.0 / self.scale as f32 } else { 0.0 };
        [0, ahead].map(|ahead| self.deviations(ahead).map(|deviation| deviation * share))
    }

    /// The deviations of the cycles `ahead` steps after the newest sample.
    fn deviations(&self, ahead: usize) -> [f32; MOST_SEASONS] {
        let mut deviations = [0.0; MOST_SEASONS];
        for (deviation, season) in deviations.iter_mut().zip(&self.seasons) {
            *deviation = season.deviation(ahead);
        }
        deviations
    }

    fn remember(&mut self, value: f64) {
        if self.seen == 0 {
            self.recent = [value; RECENT];
            self.means = [value; MEANS.len()];
        } else {
            let step = (value - self.recent[0]).abs();
            let young = 1.0 / f64::from(self.seen);
            self.scale += (step - self.scale) * young.max(0.02);
            self.recent.copy_within(..RECENT - 1, 1);
            self.recent[0] = value;
            for (mean, alpha) in self.means.iter_mut().zip(MEANS) {
                *mean += (value - *mean) * alpha.max(young / (1.0 + young));
            }
        }
        self.seen = self.seen.saturating_add(1);
    }
}

/// All features of an origin and a horizon.
fn complete(common: &[f32; COMMON], now: &[f32; MOST_SEASONS], then: &[f32; MOST_SEASONS], scale: f32) -> [f32; P] {
    let mut x = [1.0; P];
    x[..COMMON].copy_from_slice(common);
    let share = 1.0 / scale;
    for (x, deviation) in x[COMMON..].iter_mut().zip(now.iter().chain(then)) {
        *x = (deviation * share).clamp(-30.0, 30.0);
    }
    x
}

impl Model for Ridge {
    const NAME: &'static str = "ridge";

    fn update(&mut self, value: Option<f64>) {
        let outcomes = [value.unwrap_or(f64::NAN) as f32; MOST_HORIZONS];
        self.update_with(value, &outcomes);
    }

    fn forecast(&self, _horizons: &[usize], out: &mut [f32]) {
        let scale = self.scale as f32;
        if self.seen < 2 || scale <= 0.0 {
            return;
        }
        let (common, now) = (self.common(), self.deviations(0));
        for (equations, out) in self.equations.iter().zip(out).filter(|(equations, _)| equations.solved) {
            let features = complete(&common, &now, &self.deviations(equations.steps as usize), scale);
            *out = self.recent[0] as f32 + scale * dot(&equations.weights, &features);
        }
    }
}

impl Ridge {
    /// Takes the next sample, and for each horizon what came of the forecast made that long ago (NaN: nothing to learn): the
    /// sample itself, or the maximum since then.
    pub fn update_with(&mut self, value: Option<f64>, outcomes: &[f32]) {
        let slot = self.clock as usize % self.pending.len();
        if let Some(value) = value {
            self.learn(slot, outcomes);
            self.remember(value);
        } else {
            // Lags are in time and not in samples.
            self.recent.copy_within(..RECENT - 1, 1);
        }
        self.clock = self.clock.wrapping_add(1);
        for season in &mut self.seasons {
            season.update(value);
        }
        // A missing sample is bridged by the value before it, and its features are not learned from.
        self.pending[slot] = match value {
            Some(value) => Kept {
                value: value as f32,
                scale: self.scale as f32,
                common: self.common().map(half),
                seasons: self.deviations(0).map(half),
            },
            None => Kept::default(),
        };
    }

    fn learn(&mut self, slot: usize, outcomes: &[f32]) {
        // The seasons still stand at the sample before: one step ahead of it is the phase of the outcome.
        let here = self.deviations(1);
        let slots = self.pending.len();
        for (index, (equations, outcome)) in self.equations.iter_mut().zip(outcomes).enumerate() {
            if !equations.learns(self.clock, index) {
                continue;
            }
            let ago = equations.steps as usize;
            let then = &self.pending[if slot >= ago { slot - ago } else { slot + slots - ago }];
            if then.scale <= 0.0 || outcome.is_nan() {
                continue;
            }
            let x = complete(&then.common.map(whole), &then.seasons.map(whole), &here, then.scale);
            let y = ((outcome - then.value) / then.scale).clamp(-100.0, 100.0);
            equations.learn(&x, y);
            // Often while every sample changes much, seldom when they are many.
            let most =
                if equations.is_sparse() { (f64::from(self.refit_every) * SHARE) as u32 } else { self.refit_every };
            let between = (equations.seen / 8).clamp(1, most.max(1));
            if equations.seen > 2 && (equations.seen + index as u32 * 31 + self.stagger).is_multiple_of(between) {
                equations.solve(f64::from(self.penalty));
            }
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
