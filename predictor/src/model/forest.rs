//! A random forest on lags, one for each horizon.
//!
//! Breiman, *Random forests*, Machine Learning 45, 2001: trees on parts of the rows and of the features, averaged. They say the change
//! over the horizon in usual steps, from earlier values relative to the newest one and from the time in each cycle; what they
//! say stays within what they were taught. The trees are those of [`super::boost`]: smartcore's forests cannot be copied or stored
//! together with the state around them.

use super::boost::{Boosted, Growth, Lessons};
use super::fit::{Dear, History};
use super::{Budget, CostClass, Model};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Lags that are features.
const LAGS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 24];
/// Rows at most: longer histories are thinned.
const ROWS: usize = 6_000;
/// Changes further than so many usual steps teach no more than these.
const FURTHEST: f64 = 50.0;

/// A forest for each horizon, and the newest samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forest {
    horizons: Vec<usize>,
    cycles: Vec<usize>,
    models: Vec<Boosted>,
    /// Newest first, gaps bridged, as many as the longest lag and cycle need.
    recent: VecDeque<f64>,
    /// Usual size of one step.
    scale: f64,
    /// Number of the newest step.
    now: u64,
}

impl Forest {
    /// For these horizons and cycles, all in steps.
    #[must_use]
    pub fn new(horizons: &[usize], cycles: &[usize]) -> Self {
        Self {
            horizons: horizons.to_vec(),
            cycles: cycles.to_vec(),
            models: Vec::new(),
            recent: VecDeque::new(),
            scale: 0.0,
            now: 0,
        }
    }

    fn kept(&self) -> usize {
        self.cycles.iter().copied().max().unwrap_or(0).min(2_016).max(LAGS[LAGS.len() - 1]) + 1
    }

    /// Features at a step; `back` gives the value so many steps before it.
    fn row(&self, back: &dyn Fn(usize) -> f64, step: u64, ahead: usize, scale: f64) -> Vec<f32> {
        let now = back(0);
        let relative = |value: f64| ((value - now) / scale).clamp(-FURTHEST, FURTHEST) as f32;
        let mut row: Vec<f32> = LAGS.iter().map(|lag| relative(back(*lag))).collect();
        row.push((now / scale).clamp(-1e6, 1e6) as f32);
        for cycle in &self.cycles {
            let cycle = (*cycle).max(1);
            row.push((step % cycle as u64) as f32 / cycle as f32);
            // The same time of the cycle before.
            let ago = cycle.saturating_sub(ahead % cycle);
            row.push(if ago < self.kept() { relative(back(ago)) } else { 0.0 });
        }
        row
    }

    fn growth() -> Growth {
        Growth {
            rounds: 40,
            depth: 6,
            least_rows: 10,
            penalty: 1.0,
            row_share: 0.6,
            feature_share: 0.5,
            ..Growth::default()
        }
    }
}

impl Model for Forest {
    const NAME: &'static str = "forest";

    fn update(&mut self, value: Option<f64>) {
        if self.models.is_empty() {
            return;
        }
        self.now += 1;
        let Some(value) = value.or(self.recent.front().copied()) else { return };
        if let Some(last) = self.recent.front() {
            self.scale += ((value - last).abs() - self.scale) * 0.01;
        }
        self.recent.push_front(value);
        self.recent.truncate(self.kept());
    }

    fn forecast(&self, horizons: &[usize], out: &mut [f32]) {
        let Some(now) = self.recent.front() else { return };
        if self.scale <= 0.0 {
            return;
        }
        let oldest = self.recent.back().copied().unwrap_or(*now);
        let back = |ago: usize| self.recent.get(ago).copied().unwrap_or(oldest);
        for (steps, out) in horizons.iter().zip(out) {
            let Some(index) = self.horizons.iter().position(|known| known == steps) else { continue };
            let Some(model) = self.models.get(index) else { continue };
            let row = self.row(&back, self.now, *steps, self.scale);
            *out = (now + self.scale * f64::from(model.predict(&row, 0.0))) as f32;
        }
    }
}

impl Dear for Forest {
    const COST: CostClass = CostClass::Dear;

    fn work(&self, history: &History<'_>) -> u64 {
        let Growth { rounds, depth, .. } = Self::growth();
        let width = LAGS.len() + 1 + 2 * self.cycles.len();
        (self.horizons.len() * history.values.len().min(ROWS) * width * rounds * depth / 3) as u64
    }

    fn fit(&mut self, history: &History<'_>, budget: &mut Budget) -> bool {
        let longest = LAGS[LAGS.len() - 1];
        let Some(values) = history.filled().filter(|values| values.len() > 4 * longest) else { return false };
        if !budget.spend(self.work(history)) {
            return false;
        }
        let first = history.first + (history.values.len() - values.len()) as u64;
        let steps: f64 = values.windows(2).map(|pair| (pair[1] - pair[0]).abs()).sum();
        let scale = steps / (values.len() - 1) as f64;
        if scale <= 0.0 {
            return false;
        }
        let every = values.len().div_ceil(ROWS);
        let mut models = Vec::new();
        for ahead in &self.horizons {
            let (mut rows, mut targets) = (Vec::new(), Vec::new());
            for t in (longest..values.len().saturating_sub(*ahead)).step_by(every) {
                let back = |ago: usize| values[t.saturating_sub(ago)];
                rows.extend(self.row(&back, first + t as u64, *ahead, scale));
                targets.push(((values[t + ahead] - values[t]) / scale).clamp(-FURTHEST, FURTHEST) as f32);
            }
            let (offsets, weights) = (vec![0.0; targets.len()], vec![1.0; targets.len()]);
            let width = rows.len() / targets.len().max(1);
            let lessons = Lessons { rows: &rows, width, offsets: &offsets, targets: &targets, weights: &weights };
            let Some(model) = Boosted::forest(&lessons, &Self::growth()) else { return false };
            models.push(model);
        }
        self.models = models;
        self.scale = scale;
        self.now = first + values.len() as u64 - 1;
        self.recent = values.iter().rev().take(self.kept()).copied().collect();
        true
    }

    fn state_bytes(&self) -> usize {
        size_of::<Self>() + 8 * self.recent.len() + self.models.iter().map(Boosted::state_bytes).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fit::test::{error_over_naive, noise};
    use super::*;

    #[test]
    fn a_threshold_process_is_followed_that_no_line_fits() {
        // Charges by one until it reaches about ten, then falls to zero.
        let (mut state, mut value) = (13, 0.0);
        let series: Vec<Option<f64>> = (0..3_000)
            .map(|_| {
                value = if value > 10.0 { 0.0 } else { value + 1.0 + 0.1 * noise(&mut state) };
                Some(50.0 + value)
            })
            .collect();
        let error = error_over_naive(Forest::new(&[1, 3], &[]), &series, 2_500, 3);
        assert!(error < 0.35, "{error}");
    }

    #[test]
    fn what_was_never_seen_does_not_blow_it_up() {
        let mut state = 14;
        let series: Vec<Option<f64>> = (0..1_000).map(|_| Some(50.0 + noise(&mut state))).collect();
        let mut forest = Forest::new(&[1], &[24]);
        assert!(forest.fit(&History::new(&series, 0, &[]), &mut Budget::unlimited()));
        forest.update(Some(1e9));
        forest.update(Some(50.0));
        let mut out = [f32::NAN];
        forest.forecast(&[1], &mut out);
        // The step to 1e9 has raised the usual step, in which changes are told.
        assert!(out[0].is_finite() && out[0].abs() < 1e9, "{out:?}");
    }
}
