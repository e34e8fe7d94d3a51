//! Ridge regression on lags, one set of weights a horizon, learned online.
//!
//! The target is the change over the horizon and the features are earlier values and slow means, all relative to the newest
//! value and divided by the usual size of a step: so the weights mean the same for a series in cores and one in bytes, and a
//! weight of zero is the naive forecast, towards which the penalty shrinks. The normal equations are sums that decay, kept instead of the
//! samples, and a Cholesky decomposition solves them now and then. Large errors weigh less (Huber, *Annals of
//! Mathematical Statistics* 35, 1964), since one burst must not rule the weights for days.

mod equations;

use super::{Model, Target};
use crate::fetch::fetch;
use crate::season::{Season, half, whole};
use equations::{Equations, PATTERN, SHARE, dot};
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

/// Steps whose rows wait at most before they are added to the sums, so that these are not fetched from memory at each step. In as
/// many steps each horizon that leaves some out learns equally often.
const BATCH: usize = PATTERN as usize;

/// What is kept of a step until the outcomes that begin with it and end with it are learned from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Kept {
    value: f32,
    /// Usual size of one step. 0 means that there is nothing to learn from it, and below 0 that it is missing.
    scale: f32,
    /// Lags and means relative to the value, in scales, as upper halves of `f32`.
    common: [u16; COMMON],
    /// Deviations of the cycles, likewise.
    seasons: [u16; MOST_SEASONS],
}

impl Kept {
    const MISSING: Self = Self { value: 0.0, scale: -1.0, common: [0; COMMON], seasons: [0; MOST_SEASONS] };
}

/// See the module's description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ridge {
    penalty: f32,
    refit_every: u32,
    /// At which of these steps it is solved.
    stagger: u32,
    target: Target,
    /// Steps so far, and at which one some sums have to learn.
    clock: u32,
    next: u32,
    /// Usual size of one step.
    scale: f64,
    recent: [f64; RECENT],
    means: [f64; MEANS.len()],
    seen: u32,
    /// What was said of the deviations of the cycles at each of the latest steps before it came, as in [`Kept`].
    here: [[u16; MOST_SEASONS]; BATCH],
    /// By horizon, once they are known.
    weights: Box<[Option<[f32; P]>]>,
    equations: Box<[Equations]>,
    seasons: Box<[Season]>,
    /// The latest steps as a ring.
    pending: Box<[Kept]>,
}

impl Ridge {
    /// For `horizons` (ascending) and at most [`MOST_SEASONS`] cycles, forgetting a sample's weight by `decay` a step, with the penalty
    /// `penalty` (in samples), and solving anew every `refit_every` steps, more often while there are few.
    #[must_use]
    pub fn new(horizons: &[usize], seasons: Vec<Season>, decay: f64, penalty: f64, refit_every: u32) -> Self {
        let longest = horizons.last().copied().unwrap_or(1);
        Self {
            penalty: penalty as f32,
            refit_every: refit_every.max(1),
            stagger: 0,
            target: Target::Value,
            clock: 0,
            next: 1,
            scale: 0.0,
            recent: [0.0; RECENT],
            means: [0.0; MEANS.len()],
            seen: 0,
            here: [[0; MOST_SEASONS]; BATCH],
            weights: vec![None; horizons.len()].into(),
            equations: horizons.iter().map(|steps| Equations::new(*steps, decay)).collect(),
            seasons: seasons.into(),
            pending: vec![Kept::MISSING; longest + BATCH].into(),
        }
    }

    /// Solves `steps` earlier than others that began together.
    pub(crate) fn staggered(mut self, steps: u32) -> Self {
        self.stagger = steps % self.refit_every;
        self
    }

    /// Forecasts that instead of the value.
    pub(crate) fn of(mut self, target: Target) -> Self {
        self.target = target;
        self
    }

    /// See [`crate::bank::Bank::fetch`].
    pub(crate) fn fetch(&self) {
        fetch(&*self.weights);
        fetch(&*self.seasons);
        fetch(&self.pending[self.clock as usize % self.pending.len()]);
        if self.clock.wrapping_add(1) == self.next {
            fetch(&*self.equations);
            fetch(&*self.pending);
        }
    }

    /// See [`crate::bank::Bank::fetch_seasons`].
    pub(crate) fn fetch_seasons(&self, horizons: &[usize]) {
        for season in &self.seasons {
            season.fetch(0);
            horizons.iter().for_each(|ahead| season.fetch(1 + ahead));
        }
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        let seasons: usize = self.seasons.iter().map(|season| size_of::<Season>() + 2 * season.parts()).sum();
        let sums = size_of_val(&*self.weights) + size_of_val(&*self.equations);
        seasons + sums + size_of_val(&*self.pending)
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
        // The seasons still stand at the sample before: one step ahead of it is the phase of this one.
        self.here[self.clock as usize % BATCH] = self.deviations(1).map(half);
        match value {
            Some(value) => self.remember(value),
            // Lags are in time and not in samples.
            None => self.recent.copy_within(..RECENT - 1, 1),
        }
        for season in &mut self.seasons {
            season.update(value);
        }
        // A missing sample is bridged by the value before it, and its features are not learned from.
        let kept = value.map_or(Kept::MISSING, |value| Kept {
            value: value as f32,
            scale: self.scale as f32,
            common: self.common().map(half),
            seasons: self.deviations(0).map(half),
        });
        self.pending[self.clock as usize % self.pending.len()] = kept;
        self.clock = self.clock.wrapping_add(1);
        if self.clock == self.next {
            self.learn();
        }
    }

    fn forecast(&self, horizons: &[usize], out: &mut [f32]) {
        let scale = self.scale as f32;
        if self.seen < 2 || scale <= 0.0 {
            return;
        }
        let (common, now) = (self.common(), self.deviations(0));
        for ((weights, steps), out) in self.weights.iter().zip(horizons).zip(out) {
            if let Some(weights) = weights {
                let features = complete(&common, &now, &self.deviations(*steps), scale);
                *out = self.recent[0] as f32 + scale * dot(weights, &features);
            }
        }
    }
}

impl Ridge {
    /// What is kept of the sample `age` steps before the newest, which is at most as many as the longest horizon.
    fn back(&self, age: usize) -> &Kept {
        let (slots, slot) = (self.pending.len(), self.clock.wrapping_sub(1) as usize % self.pending.len());
        &self.pending[if slot >= age { slot - age } else { slot + slots - age }]
    }

    /// The sample `age` steps before the newest; NaN if it is missing.
    pub(crate) fn past(&self, age: usize) -> f32 {
        let kept = self.back(age);
        if kept.scale < 0.0 { f32::NAN } else { kept.value }
    }

    /// What came `age` steps ago of the forecast made so many steps before it; NaN if that is not known.
    fn outcome(&self, age: usize, steps: usize) -> f32 {
        let value = self.past(age);
        match self.target {
            Target::Maximum if !value.is_nan() => {
                (age + 1..age + steps).fold(value, |most, age| most.max(self.past(age)))
            }
            _ => value,
        }
    }

    /// Features and outcome of the forecast that ended `age` steps ago, if something can be learned from it.
    fn row(&self, age: usize, steps: usize) -> Option<([f32; P], f32)> {
        let (then, outcome) = (self.back(age + steps), self.outcome(age, steps));
        if then.scale <= 0.0 || outcome.is_nan() {
            return None;
        }
        let here = self.here[self.clock.wrapping_sub(age as u32 + 1) as usize % BATCH].map(whole);
        let x = complete(&then.common.map(whole), &then.seasons.map(whole), &here, then.scale);
        Some((x, ((outcome - then.value) / then.scale).clamp(-100.0, 100.0)))
    }

    /// Adds what waits to the sums that are due, and solves those of which it is time. Weights change at no other step than they would if
    /// each row were added at once: nothing waits beyond the first solution that may need it.
    fn learn(&mut self) {
        let mut all = std::mem::take(&mut self.equations);
        self.next = self.clock.wrapping_add(BATCH as u32);
        for (index, equations) in all.iter_mut().enumerate() {
            if equations.due == self.clock {
                self.learn_of(equations, index);
                equations.due = self.due(equations, index);
            }
            if equations.due.wrapping_sub(self.clock) < self.next.wrapping_sub(self.clock) {
                self.next = equations.due;
            }
        }
        self.equations = all;
    }

    fn learn_of(&mut self, equations: &mut Equations, index: usize) {
        let mut weights = self.weights[index];
        for age in (0..self.clock.wrapping_sub(equations.learned)).rev() {
            if !equations.learns(self.clock.wrapping_sub(age + 1), index) {
                continue;
            }
            let Some((x, y)) = self.row(age as usize, equations.steps as usize) else { continue };
            equations.learn(&x, y, &weights.unwrap_or_default());
            if self.solves(equations, equations.seen, index) {
                weights = equations.solution(f64::from(self.penalty)).or(weights);
            }
        }
        self.weights[index] = weights;
        equations.learned = self.clock;
    }

    /// The step at which the sums of that number have to learn next: every [`BATCH`] steps all of a bank, which read the same rows, at other
    /// steps than banks with another stagger; earlier if they may be solved before.
    fn due(&self, equations: &Equations, index: usize) -> u32 {
        let ahead = BATCH as u32 - self.clock.wrapping_add(self.stagger) % BATCH as u32;
        let mut seen = equations.seen;
        for step in 0..ahead {
            if equations.learns(self.clock.wrapping_add(step), index) {
                seen += 1;
                if self.solves(equations, seen, index) {
                    return self.clock.wrapping_add(step + 1);
                }
            }
        }
        self.clock.wrapping_add(ahead)
    }

    /// Whether those of that number are solved once they have learned so often: often while every sample changes much, seldom when
    /// they are many.
    fn solves(&self, equations: &Equations, seen: u32, index: usize) -> bool {
        let most = if equations.is_sparse() { (f64::from(self.refit_every) * SHARE) as u32 } else { self.refit_every };
        let between = (seen / 8).clamp(1, most.max(1));
        seen > 2 && (seen + index as u32 * 31 + self.stagger).is_multiple_of(between)
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

    #[test]
    fn rows_that_wait_change_no_forecast() {
        let horizons = [1, 3, 5];
        for target in [Target::Value, Target::Maximum] {
            let seasons = vec![Season::new(5, 5, 0.1), Season::new(40, 8, 0.1)];
            let mut waits = Ridge::new(&horizons, seasons, 0.999, 1.0, 20).staggered(3).of(target);
            let mut at_once = waits.clone();
            let mut waited = 0;
            for t in 0..2_000_u32 {
                let value = (t % 41 != 7).then(|| f64::from(t * 7_919 % 101) + 30.0 * f64::from(t % 5));
                at_once.next = t + 1;
                at_once.equations.iter_mut().for_each(|equations| equations.due = t + 1);
                waits.update(value);
                at_once.update(value);
                let said = [&waits, &at_once].map(|ridge| {
                    let mut out = [-1.0; 3];
                    ridge.forecast(&horizons, &mut out);
                    out
                });
                assert_eq!(said[0], said[1], "at {t}");
                waited = waited.max(waits.clock - waits.equations[0].learned);
            }
            assert_eq!(waited as usize, BATCH - 1, "they do wait");
        }
    }
}
