//! Ridge regression on lags, one set of weights a horizon, learned online.
//!
//! The target is the change over the horizon and the features are earlier values and slow means, all relative to the newest
//! value and divided by the usual size of a step: so the weights mean the same for a series in cores and one in bytes, and a
//! weight of zero is the naive forecast, towards which the penalty shrinks. The normal equations are sums that decay, kept instead of the
//! samples, and a Cholesky decomposition solves them now and then. Large errors weigh less (Huber, *Annals of
//! Mathematical Statistics* 35, 1964), since one burst must not rule the weights for days.

use super::Model;
use crate::bank::MOST_HORIZONS;
use crate::season::{Season, half, whole};
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
/// Entries of the upper triangle of the normal matrix.
const TRIANGLE: usize = P * (P + 1) / 2;
/// Newest samples kept for the lags.
const RECENT: usize = LAGS[LAGS.len() - 1] + 1;

/// Sums and weights for one horizon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Equations {
    /// Upper triangle of the sum of x x', row by row.
    #[serde(with = "crate::window::array")]
    matrix: [f32; TRIANGLE],
    /// Sum of x y.
    right: [f32; P],
    weights: [f32; P],
    steps: u32,
    /// What is left of an outcome's weight when the next is learned from.
    decay: f32,
    /// Outcomes learned from so far.
    seen: u32,
    solved: bool,
}

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

/// Outcomes of neighbouring origins overlap and tell almost the same: of horizons beyond the first steps, three of seven are
/// learned from. Seven divides no minute, hour or day, so that no phase of a cycle is left out.
const PATTERN: u32 = 7;
const LEARNED: [bool; PATTERN as usize] = [true, false, true, false, true, false, false];
const SHARE: f64 = 3.0 / 7.0;
/// Horizons of fewer steps are learned from always.
const DENSE: u32 = 3;

/// The further ahead, the more alike are neighbouring outcomes and the longer they have to be remembered. `decay` is a step's for
/// the first horizon.
fn remaining(steps: usize, decay: f64) -> f32 {
    let every = if steps as u64 >= u64::from(DENSE) { 1.0 / SHARE } else { 1.0 };
    decay.powf(every / (1.0 + (steps as f64).ln() / 3.0)) as f32
}

impl Ridge {
    /// For `horizons` (ascending) and at most [`MOST_SEASONS`] cycles, forgetting a sample's weight by `decay` a step, with the penalty
    /// `penalty` (in samples), and solving anew every `refit_every` steps, more often while there are few.
    #[must_use]
    pub fn new(horizons: &[usize], seasons: Vec<Season>, decay: f64, penalty: f64, refit_every: u32) -> Self {
        let equations = horizons
            .iter()
            .map(|steps| Equations {
                matrix: [0.0; TRIANGLE],
                right: [0.0; P],
                weights: [0.0; P],
                steps: u32::try_from(*steps).unwrap_or(u32::MAX),
                decay: remaining(*steps, decay),
                seen: 0,
                solved: false,
            })
            .collect();
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

    /// See [`crate::bank::Bank::touch`].
    pub(crate) fn touch(&self) -> f32 {
        let (slots, slot) = (self.pending.len(), self.clock as usize % self.pending.len());
        let mut read = self.deviations(1).iter().sum::<f32>();
        for equations in &self.equations {
            let ago = equations.steps as usize;
            read += self.pending[if slot >= ago { slot - ago } else { slot + slots - ago }].scale;
            read += equations.matrix[0] + equations.weights[0];
        }
        read
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
            let sparse = equations.steps >= DENSE;
            // Not all horizons at the same step.
            if sparse && !LEARNED[(self.clock.wrapping_add(index as u32) % PATTERN) as usize] {
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
            let most = if sparse { (f64::from(self.refit_every) * SHARE) as u32 } else { self.refit_every };
            let between = (equations.seen / 8).clamp(1, most.max(1));
            if equations.seen > 2 && (equations.seen + index as u32 * 31 + self.stagger).is_multiple_of(between) {
                equations.solve(f64::from(self.penalty));
            }
        }
    }
}

fn dot(a: &[f32; P], b: &[f32; P]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Equations {
    /// Learns that `y` came of features `x`.
    fn learn(&mut self, x: &[f32; P], y: f32) {
        let decay = self.decay;
        let error = (y - dot(&self.weights, x)).abs();
        let weight = 1.0 / error.max(1.0);
        let mut rest = self.matrix.as_mut_slice();
        for i in 0..P {
            let Some((row, below)) = rest.split_at_mut_checked(P - i) else { break };
            let weighted = weight * x[i];
            for (entry, x) in row.iter_mut().zip(&x[i..]) {
                *entry = *entry * decay + weighted * x;
            }
            self.right[i] = self.right[i] * decay + weighted * y;
            rest = below;
        }
        self.seen = self.seen.saturating_add(1);
    }

    /// Solves (X'X + penalty I) w = X'y; keeps the old weights if that is not possible.
    fn solve(&mut self, penalty: f64) {
        let mut matrix = [[0.0; P]; P];
        let mut entries = self.matrix.iter();
        for i in 0..P {
            for (row, entry) in matrix[i..].iter_mut().zip(entries.by_ref()) {
                row[i] = f64::from(*entry);
            }
            matrix[i][i] = matrix[i][i] * 1.001 + penalty;
        }
        let Some(solution) = solved(matrix, self.right.map(f64::from)) else { return };
        let weights = solution.map(|weight| weight as f32);
        if weights.iter().all(|weight| weight.is_finite()) {
            self.weights = weights;
            self.solved = true;
        }
    }
}

/// Solves A x = b for a symmetric A, of which the lower triangle is given, by Cholesky's decomposition (Golub and Van Loan, *Matrix
/// Computations*, 4.2): row by row into L, then forwards with L and backwards with its transpose. `None` if A is not positive
/// definite. In arrays of fixed length, since ten thousand machines solve hundreds of these at each step.
fn solved(mut a: [[f64; P]; P], mut b: [f64; P]) -> Option<[f64; P]> {
    for j in 0..P {
        let mut squares = 0.0;
        for k in 0..j {
            let product: f64 = a[k][..k].iter().zip(&a[j][..k]).fold(0.0, |sum, (x, y)| sum + x * y);
            let entry = (a[j][k] - product) / a[k][k];
            a[j][k] = entry;
            squares += entry * entry;
        }
        let rest = a[j][j] - squares;
        if rest < 0.0 || rest.is_nan() {
            return None;
        }
        a[j][j] = rest.sqrt();
    }
    for k in 0..P {
        for i in 0..k {
            b[k] -= b[i] * a[k][i];
        }
        b[k] /= a[k][k];
    }
    for k in (0..P).rev() {
        for i in k + 1..P {
            b[k] -= b[i] * a[i][k];
        }
        b[k] /= a[k][k];
    }
    Some(b)
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
    fn equations_are_solved_and_those_that_have_no_solution_are_not() {
        let mut state = 5_u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1_u32 << 24) - 0.5
        };
        // X'X of twenty random rows is positive definite.
        let rows: [[f64; P]; 20] = std::array::from_fn(|_| std::array::from_fn(|_| noise()));
        let a: [[f64; P]; P] =
            std::array::from_fn(|i| std::array::from_fn(|j| rows.iter().map(|row| row[i] * row[j]).sum()));
        let x: [f64; P] = std::array::from_fn(|i| i as f64 - 3.0);
        let b = a.map(|row| row.iter().zip(x).map(|(a, x)| a * x).sum());
        let found = solved(a, b).expect("positive definite");
        assert!(found.iter().zip(x).all(|(found, x)| (found - x).abs() < 1e-8), "{found:?}");
        let mut indefinite = a;
        indefinite[P - 1][P - 1] = -1.0;
        assert_eq!(solved(indefinite, b), None);
        assert_eq!(solved([[f64::NAN; P]; P], b), None);
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
